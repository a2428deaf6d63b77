"""Paths that rluf reads and writes: run folders, the artifact cache, the sample log shipped with the package."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import rluf
from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError
from rluf.utils.files import try_lock

logger = logging.getLogger(__name__)

CACHE_FOLDERS = ("artifacts", "locks", "models", "base-responses", "batch-layouts")
SAMPLE_LOG_KINDS = ("feedback", "preferences", "safety", "prompts")


def resolve_cache_folder(settings: Settings) -> Path:
    """Folder of converted models and cached artifacts: run.cache, else $RLUF_CACHE, else ~/.cache/rluf."""
    return Path(settings.run.cache or os.environ.get("RLUF_CACHE") or "~/.cache/rluf").expanduser().resolve()


def resolve_runs_root(settings: Settings) -> Path:
    """Folder of the run folders: run.root, else $RLUF_RUNS, else ./runs (~/rluf/runs in a packaged Ray job)."""
    configured_root = settings.run.root or os.environ.get("RLUF_RUNS")
    if configured_root:
        return Path(configured_root).expanduser().resolve()
    working_dir = Path.cwd()
    # `ray job submit --working-dir .` runs in a copy of the folder, which Ray deletes later.
    is_packaged_job = "runtime_resources" in working_dir.parts
    return Path("~/rluf/runs").expanduser() if is_packaged_job else working_dir / "runs"


def check_writable(folder: Path) -> None:
    """Raise ResourceError if `folder` cannot be created or written to, judged by its nearest existing parent."""
    existing_folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing_folder.is_dir() and os.access(existing_folder, os.W_OK)):
        raise ResourceError(
            f"cannot write to {folder}: {existing_folder} is not a writable folder; set run.root and run.cache (or "
            "RLUF_RUNS and RLUF_CACHE) to folders you may write to"
        )


def check_cache_writable(cache_folder: Path) -> None:
    """Raise ResourceError if the cache or a folder in it cannot be written: another user may have made some of them."""
    for folder in (cache_folder, *(cache_folder / name for name in CACHE_FOLDERS)):
        check_writable(folder)


def create_run_folder(settings: Settings, *, name_suffix: str = "") -> Path:
    """Create <root>/<name><suffix>/<UTC time> and point the link `latest` in its parent at it.

    Raises ResourceError if the folder cannot be written.
    """
    parent = resolve_runs_root(settings) / f"{settings.name}{name_suffix}"
    timestamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _make_new_folder(parent, timestamp)
        latest = parent / "latest"
        if latest.is_dir() and not latest.is_symlink():
            # Copies of run folders that follow links make it a folder, which may be the only copy of a run.
            logger.warning("%s is a folder, not a link; the newest run is %s", latest, folder)
            return folder
        # A link cannot be overwritten in place; renaming a new one over it leaves no moment without `latest`.
        link = parent / f".latest-{folder.name}"
        link.symlink_to(folder.name)
        link.replace(latest)
    except OSError as error:
        raise ResourceError(
            f"cannot write a run folder in {parent}: {error.strerror or error}; set run.root or RLUF_RUNS to a folder "
            "you may write to"
        ) from error
    return folder


def suggest_run_folder(folder: Path) -> str:
    """Hint for a folder without the files of a run: the newest run below it; empty where there is none."""
    latest = folder / "latest"
    return f"; did you mean {latest}?" if latest.is_dir() else ""


def _make_new_folder(parent: Path, name: str) -> Path:
    """A new folder with this name, or with the first free number behind it."""
    folder, count = parent / name, 1
    while True:
        # mkdir decides, not a check before it: another process may make the folder in between.
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        count += 1
        folder = parent / f"{name}-{count}"


@contextlib.contextmanager
def lock_run_folder(run_folder: Path) -> Iterator[None]:
    """Hold the run folder's lock inside the block. Raises ResourceError if another process is writing the run."""
    lock_file = try_lock(run_folder / "lock")
    if lock_file is None:
        raise ResourceError(
            f"another process is training in {run_folder}; wait until it ends, or start a new run without run.resume"
        )
    with lock_file:
        yield


def find_sample_log(kind: str) -> Path:
    """Path of a file of the sample log that ships with rluf; `kind` is one of SAMPLE_LOG_KINDS."""
    if kind not in SAMPLE_LOG_KINDS:
        raise DataError(f"sample:{kind} is not shipped with rluf; use one of {', '.join(SAMPLE_LOG_KINDS)}")
    return Path(rluf.__file__).parent / "simulate" / "sample" / f"{kind}.jsonl.gz"
