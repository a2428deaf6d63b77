"""Where rluf reads and writes: run folders, the cache of finished stages, the sample log shipped with the package."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import rluf
from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError

SAMPLE_KINDS = ("feedback", "preferences", "safety", "prompts")


def cache_dir(settings: Settings) -> Path:
    """Folder of converted models and finished stages: run.cache, else $RLUF_CACHE, else ~/.cache/rluf."""
    return Path(settings.run.cache or os.environ.get("RLUF_CACHE") or "~/.cache/rluf").expanduser().resolve()


def runs_root(settings: Settings) -> Path:
    """Folder that holds the run folders: run.root, else $RLUF_RUNS, else ./runs.

    A packaged Ray job (`ray job submit --working-dir .`) works in a copy of the folder that Ray deletes later, so
    there the last resort is ~/rluf/runs.
    """
    named = settings.run.root or os.environ.get("RLUF_RUNS")
    if named:
        return Path(named).expanduser().resolve()
    here = Path.cwd()
    return Path("~/rluf/runs").expanduser() if "runtime_resources" in here.parts else here / "runs"


def check_writable(folder: Path) -> None:
    """Raise ResourceError when `folder` cannot be made or written to, judged by its nearest folder that exists."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ResourceError(
            f"cannot write to {folder}: {place} is no folder that you may write; set run.root and run.cache (or "
            "RLUF_RUNS and RLUF_CACHE) to folders you may write"
        )


def new_run_folder(settings: Settings, *, suffix: str = "") -> Path:
    """Create <root>/<name><suffix>/<UTC time> and point the link `latest` beside it at it.

    Raises ResourceError when the folder cannot be written.
    """
    parent = runs_root(settings) / f"{settings.name}{suffix}"
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / stamp
        count = 1
        while folder.exists():
            count += 1
            folder = parent / f"{stamp}-{count}"
        folder.mkdir()
        link = parent / f".latest-{folder.name}"
        link.symlink_to(folder.name)
        link.replace(parent / "latest")
    except OSError as error:
        raise ResourceError(
            f"cannot write run folder under {parent}: {error.strerror or error}; "
            "set run.root or RLUF_RUNS to a folder you may write"
        ) from error
    return folder


def sample_file(kind: str) -> Path:
    """Path of a file of the sample log that ships with rluf; `kind` is one of SAMPLE_KINDS."""
    if kind not in SAMPLE_KINDS:
        raise DataError(f"sample:{kind} is not shipped with rluf; use one of {', '.join(SAMPLE_KINDS)}")
    return Path(rluf.__file__).parent / "simulate" / "sample" / f"{kind}.jsonl.gz"
