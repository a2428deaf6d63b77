"""Finished stages, kept by the hash of everything they were made from, so that the next run can reuse them.

A stage is a folder under <cache>/stages/<name>-<hash>. It is built in a temporary folder beside it and renamed when
whole, so a half-built stage is never seen, whatever kills the builder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import rluf

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage: its folder, its hash (12 hex digits), and whether an earlier run had built it."""

    name: str
    folder: Path
    key: str
    reused: bool


def file_digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and bytes of files; folders count with all files below them."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def code_digest(*packages: str) -> str:
    """SHA-256 over the source of the named sub-packages or modules of rluf, so that changed code rebuilds an artifact.

    Raises ValueError for a name that does not exist: it would hash to nothing, and a stale artifact would be reused.
    """
    files: list[Path] = []
    for package in packages:
        source = Path(rluf.__file__).parent / package.replace(".", "/")
        module = source.with_suffix(".py")
        sources = [module] if module.is_file() else list(source.rglob("*.py"))
        if not sources:
            raise ValueError(f"rluf.{package} has no source files; name a module or package of rluf")
        files += sources
    return file_digest(files)


def stage_key(parts: Mapping[str, object]) -> str:
    """12 hex digits that stand for everything a stage was made from. `parts` must be JSON-serialisable."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_stage(
    cache: Path, name: str, parts: Mapping[str, object], build: Callable[[Path], None], *, reuse: bool = True
) -> Stage:
    """Return the finished stage for `parts`, building it with `build(temporary folder)` when it is not there.

    With `reuse` off it is built again and replaces the one kept.
    """
    return run_stages(cache, {name: parts}, lambda folders: build(folders[name]), reuse=reuse)[name]


def run_stages(
    cache: Path,
    wanted: Mapping[str, Mapping[str, object]],
    build: Callable[[Mapping[str, Path]], None],
    *,
    reuse: bool = True,
) -> dict[str, Stage]:
    """Several stages whose missing ones are built by one call of `build(name -> temporary folder)`."""
    stages: dict[str, Stage] = {}
    parts: dict[str, Path] = {}
    for name, made_from in wanted.items():
        key = stage_key({"stage": name, **made_from})
        stages[name] = Stage(name, cache / "stages" / f"{name}-{key}", key, reused=False)
        if stages[name].folder.is_dir() and reuse:
            stages[name] = replace(stages[name], reused=True)
            logger.info("%s: reused from %s, same data, settings and code", name, stages[name].folder)
        else:
            parts[name] = stages[name].folder.with_name(f".{name}-{key}-{uuid.uuid4().hex[:8]}")
    if not parts:
        return stages
    (cache / "stages").mkdir(parents=True, exist_ok=True)
    try:
        build(parts)
        for name, part in parts.items():
            origin = {"stage": name, "key": stages[name].key, "from": dict(wanted[name])}
            (part / "stage.json").write_text(json.dumps(origin, indent=2))
            if stages[name].folder.is_dir():
                shutil.rmtree(stages[name].folder)
            os.replace(part, stages[name].folder)
    finally:
        for part in parts.values():
            shutil.rmtree(part, ignore_errors=True)
    return stages
