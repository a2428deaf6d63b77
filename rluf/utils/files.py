"""Writes that are complete or absent: atomic folders, fsync, and the error for a disk that refuses."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rluf.errors import ModelError, ResourceError, RlufError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says on a full disk, or a spent quota; safetensors hands the number on in its message."""


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk, so that a power cut does not undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, synced to disk, when the block ends without error.

    A folder that was there before is replaced. Files become as readable as the folder (safetensors keeps its files to
    their owner). Raises ResourceError on a full disk, ModelError when it refuses otherwise.
    """
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        yield part
        readable = part.stat().st_mode & 0o666
        for file in (p for p in part.rglob("*") if p.is_file()):
            file.chmod(readable)
            fsync_path(file)
        fsync_path(part)
        if path.is_dir():
            stale = path.with_name(f"{part.name}.old")
            path.rename(stale)
            part.rename(path)
            shutil.rmtree(stale, ignore_errors=True)
        else:
            part.rename(path)
        fsync_path(path.parent)
    except OSError as error:
        raise write_error("the policy", path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_error(what: str, path: Path, error: Exception) -> RlufError:
    """The error to raise when `what` could not be written to `path`: ResourceError on a full disk, else ModelError."""
    full = getattr(error, "errno", None) in DISK_FULL or any(f"os error {number}" in str(error) for number in DISK_FULL)
    kind = ResourceError if full else ModelError
    return kind(f"{what} could not be written to {path}: {error}; free some disk, earlier checkpoints are kept")
