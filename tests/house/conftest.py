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
    """One Python file: path relative to the repository, text, and syntax tree."""

    path: str
    text: str
    tree: ast.Module


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
def _parse_folders(*folders: str) -> tuple[SourceFile, ...]:
    """All Python files below these folders. Parsing takes longer than the checks, so the result is cached."""
    return tuple(
        SourceFile(str(file.relative_to(ROOT)), text := file.read_text(encoding="utf-8"), ast.parse(text))
        for file in _list_tracked_files(*(f"{folder}/**.py" for folder in folders))
    )


@pytest.fixture(scope="session")
def list_tracked_files() -> Callable[..., tuple[Path, ...]]:
    return _list_tracked_files


@pytest.fixture(scope="session")
def parse_folders() -> Callable[..., tuple[SourceFile, ...]]:
    return _parse_folders
