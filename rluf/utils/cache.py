"""Artifact cache: folders keyed by a hash of everything they were built from, so that the next run reuses them.

An artifact is a folder <cache>/artifacts/<name>-<hash>. It is built in a temporary folder next to it and renamed when
complete, so a killed build leaves nothing that looks finished. A lock file in <cache>/locks lets one process build it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import rluf
from rluf.errors import ResourceError
from rluf.utils.files import file_lock

logger = logging.getLogger(__name__)

ORIGIN_FILE = "artifact.json"
"""What an artifact was built from; written last."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact: its folder, its key (12 hex digits), and whether it was reused from an earlier run."""

    name: str
    folder: Path
    key: str
    reused: bool


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and bytes of files; a folder counts with all files below it."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            digest.update(file.name.encode())  # not the whole path: a moved folder has the same content
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hash_source_code(*module_names: str) -> str:
    """SHA-256 over the source of the named sub-packages or modules of rluf, so that changed code rebuilds an artifact.

    Raises ValueError for a name that does not exist: it would hash to nothing, and a stale artifact would be reused.
    """
    files: list[Path] = []
    for module_name in module_names:
        source = Path(rluf.__file__).parent / module_name.replace(".", "/")
        module_file = source.with_suffix(".py")
        module_files = [module_file] if module_file.is_file() else list(source.rglob("*.py"))
        if not module_files:
            raise ValueError(f"rluf.{module_name} has no source files; name a module or package of rluf")
        files += module_files
    return hash_files(files)


def compute_artifact_key(cache_inputs: Mapping[str, object]) -> str:
    """12 hex digits that identify everything an artifact is built from. `cache_inputs` must be JSON-serializable."""
    # Sorted, since the order of a mapping must not change the key; NaN is refused, because JSON readers differ on it.
    text = json.dumps(cache_inputs, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_or_reuse(
    cache_folder: Path,
    name: str,
    cache_inputs: Mapping[str, object],
    build: Callable[[Path], None],
) -> Artifact:
    """The artifact for `cache_inputs`; when missing, `build` is called with a temporary folder to fill."""
    return build_or_reuse_all(cache_folder, {name: cache_inputs}, lambda folders: build(folders[name]))[name]


def build_or_reuse_all(
    cache_folder: Path,
    cache_inputs_by_name: Mapping[str, Mapping[str, object]],
    build: Callable[[Mapping[str, Path]], None],
) -> dict[str, Artifact]:
    """Several artifacts; all missing ones are built by one call of `build(name -> temporary folder)`.

    Processes that need the same artifact at once build it once: the others wait and reuse it. A finished artifact is
    never replaced, since another job may be reading it. Raises ResourceError for anything else in its place.
    """
    root, locks_folder = cache_folder / "artifacts", cache_folder / "locks"
    locks_folder.mkdir(parents=True, exist_ok=True)
    artifacts: dict[str, Artifact] = {}
    temporary_folders: dict[str, Path] = {}
    with ExitStack() as locks:
        # In one order for all processes, so that none waits for a lock of another that waits for one of its own.
        for name, cache_inputs in sorted(cache_inputs_by_name.items()):
            key = compute_artifact_key({"artifact": name, **cache_inputs})
            folder = root / f"{name}-{key}"
            if not folder.is_dir():
                lock = file_lock(locks_folder / f"{folder.name}.lock", f"{name}: waiting for the job that builds it")
                locks.enter_context(lock)
            # Checked under the lock: another process may have built it while this one waited.
            is_reused = (folder / ORIGIN_FILE).is_file()
            if not is_reused and os.path.lexists(folder):
                raise ResourceError(f"{folder} is not a complete artifact (it has no {ORIGIN_FILE}); delete it")
            artifacts[name] = Artifact(name, folder, key, is_reused)
            if is_reused:
                logger.info("%s: reused from %s, same data, settings and code", name, folder)
            else:
                temporary_folders[name] = root / f".{name}-{key}-{uuid.uuid4().hex[:8]}"
        if temporary_folders:
            root.mkdir(parents=True, exist_ok=True)
            try:
                build(temporary_folders)
                for name, temporary_folder in temporary_folders.items():
                    origin = {"artifact": name, "key": artifacts[name].key, "inputs": dict(cache_inputs_by_name[name])}
                    (temporary_folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2))
                    temporary_folder.rename(artifacts[name].folder)
            finally:
                for temporary_folder in temporary_folders.values():
                    shutil.rmtree(temporary_folder, ignore_errors=True)
    return {name: artifacts[name] for name in cache_inputs_by_name}
