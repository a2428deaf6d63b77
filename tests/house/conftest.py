"""Parsed sources for the house tests, read once per test session."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class SourceFile:
    """One Python file: path relative to the repository, text, and all nodes of its syntax tree in ast.walk's order."""

    path: str
    text: str
    nodes: tuple[ast.AST, ...]


@cache
def _list_tracked_files(*patterns: str) -> tuple[Path, ...]:
    """Files that git tracks or would track, so that a new file counts before it is committed."""
    completed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode:
        pytest.skip("not a git checkout")
    return tuple(ROOT / name for name in completed.stdout.splitlines() if (ROOT / name).is_file())


@cache
def _parse_file(file: Path) -> SourceFile:
    """One file. Parsing and walking take longer than the checks, and the tests name different sets of folders."""
    text = file.read_text(encoding="utf-8")
    return SourceFile(str(file.relative_to(ROOT)), text, tuple(ast.walk(ast.parse(text))))


@cache
def _parse_folders(*folders: str) -> tuple[SourceFile, ...]:
    """All Python files below these folders."""
    return tuple(_parse_file(file) for file in _list_tracked_files(*(f"{folder}/**.py" for folder in folders)))


@pytest.fixture(scope="session")
def list_tracked_files() -> Callable[..., tuple[Path, ...]]:
    return _list_tracked_files


@pytest.fixture(scope="session")
def parse_folders() -> Callable[..., tuple[SourceFile, ...]]:
    return _parse_folders
