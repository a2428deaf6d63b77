"""Names of libraries that the sources use exist in the installed versions: mypy does not read the types of torch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = frozenset({
    "torch", "vllm", "deepspeed", "ray", "transformers", "peft", "safetensors", "huggingface_hub", "pyarrow", "numpy",
})  # fmt: skip
MIN_CHAINS = 2000


def import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def get_member(owner: Any, name: str) -> Any:
    """Attribute or submodule of a module, attribute or annotated field of a class; None if there is none."""
    if hasattr(owner, name):
        return getattr(owner, name)
    if isinstance(owner, ModuleType):
        return import_module(f"{owner.__name__}.{name}")
    return name if name in getattr(owner, "__annotations__", {}) else None


def bind_imports(tree: ast.AST) -> dict[str, Any]:
    """The modules, classes and functions of libraries by the name that a source file gives them."""
    bound: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                library = alias.name.partition(".")[0]
                if library in LIBRARIES:
                    module = import_module(alias.name)
                    # `import a.b` binds a, `import a.b as c` binds a.b.
                    bound[alias.asname or library] = module and (module if alias.asname else import_module(library))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            module = import_module(node.module or "")
            for alias in node.names:
                bound[alias.asname or alias.name] = module and get_member(module, alias.name)
    return bound


def list_chains(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Line, first name and further names of each attribute chain, such as torch.distributed.all_gather_object."""
    for node in ast.walk(tree):
        names: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name):
            yield node.lineno, inner.id, names  # type: ignore[attr-defined]


def find_missing_names(path: Path) -> tuple[int, list[str]]:
    """Number of chains of a file that were followed, and those that lead nowhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bound = bind_imports(tree)
    missing = [f"{path.relative_to(ROOT)}: import of {name}" for name, value in bound.items() if value is None]
    followed = 0
    for line, first, names in list_chains(tree):
        owner = bound.get(first)
        followed += owner is not None
        for name in names:
            if not isinstance(owner, ModuleType | type):
                break
            owner = get_member(owner, name)
            if owner is None:
                missing.append(f"{path.relative_to(ROOT)}:{line} {first}.{'.'.join(names)}")
    return followed, missing


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_names_of_libraries_exist() -> None:
    folders = ("rluf", "actors", "cluster", "benchmarks")
    results = [find_missing_names(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert [name for _, missing in results for name in missing] == []
    assert sum(followed for followed, _ in results) >= MIN_CHAINS


def test_a_function_that_a_library_lacks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.house.test_library_names.ROOT", tmp_path)
    source = "import numpy as np\nfrom numpy import linalg, not_there\nnp.linalg.norm(1)\nnp.linalg.norms(1)\n"
    (tmp_path / "module.py").write_text(source)
    assert find_missing_names(tmp_path / "module.py") == (
        4, ["module.py: import of not_there", "module.py:4 np.linalg.norms"],
    )  # fmt: skip
