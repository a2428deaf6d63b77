"""Build backend of the wheel: setuptools on a staged tree in which everything lies under the package rluf.

In the repository actors/, cluster/ and configs/ are top-level folders. Installed like that, packages named `actors` and
`cluster` would collide with those of other projects, and the configurations would be missing. A wheel or source archive
therefore has rluf.actors, rluf.cluster and rluf/configs, with the imports adapted. An editable install uses the
repository as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import build_meta

build_editable = build_meta.build_editable
get_requires_for_build_editable = build_meta.get_requires_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
get_requires_for_build_wheel = build_meta.get_requires_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable

ROOT = Path(__file__).parents[1]
MOVED_FOLDERS = ("actors", "cluster", "configs")
IMPORT_PATTERN = re.compile(r"^(\s*from )(actors|cluster)(?=[. ])", re.MULTILINE)


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None) -> str:
    """Build the wheel from the staged tree; returns its file name."""
    target = os.path.abspath(wheel_directory)
    with _staged_tree():
        return build_meta.build_wheel(target, config_settings)


def build_sdist(sdist_directory: str, config_settings: object = None) -> str:
    """Build the source archive from the staged tree, which plain setuptools can build again."""
    target = os.path.abspath(sdist_directory)
    with _staged_tree():
        return build_meta.build_sdist(target, config_settings)


@contextmanager
def _staged_tree() -> Iterator[None]:
    """Work in a temporary copy with the layout of the installed package."""
    ignored = shutil.ignore_patterns("__pycache__")
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        shutil.copytree(ROOT / "rluf", stage / "rluf", ignore=ignored)
        for name in MOVED_FOLDERS:
            shutil.copytree(ROOT / name, stage / "rluf" / name, ignore=ignored)
        for name in ("README.md", "LICENSE"):
            shutil.copy(ROOT / name, stage / name)
        for path in stage.rglob("*.py"):
            path.write_text(IMPORT_PATTERN.sub(r"\1rluf.\2", path.read_text(encoding="utf-8")), encoding="utf-8")
        settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        own_backend = 'build-backend = "wheel_backend"\nbackend-path = [".ci"]\n'
        if own_backend not in settings:
            raise RuntimeError(f"pyproject.toml: expected the lines {own_backend!r}")
        plain = settings.replace(own_backend, 'build-backend = "setuptools.build_meta"\n')
        (stage / "pyproject.toml").write_text(plain, encoding="utf-8")
        previous_folder = os.getcwd()
        os.chdir(stage)
        try:
            yield
        finally:
            os.chdir(previous_folder)
