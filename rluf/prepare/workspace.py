"""Where a data set grows: a folder beside its place, kept when the job is killed, so that the next one goes on from it.

The folder's name follows from the inputs, settings and code. Each finished task leaves its counts in it; a job that
finds them does not run the task again. Nobody sees the data set before it is whole and renamed into its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rluf.errors import DataError, ResourceError, RlufError

CARD = "data_card.json"
"""Name of the card; a folder that holds it is a data set of ours."""

_STALE = 2 * 86400
"""Seconds after which an abandoned working folder is removed."""


class Workspace:
    """The working folder: `data` becomes the data set, `done` holds the counts of finished tasks."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root, root / "data"

    def done(self, name: str) -> Path:
        """File of a finished task's counts."""
        return self.root / "done" / f"{name}.json"

    def remember(self, name: str, value: object) -> Any:
        """The value kept under `name` by an earlier, killed job with the same inputs; else this one, kept from now."""
        path = self.done(name)
        if not path.is_file():
            finish(path, value)
        return json.loads(path.read_text(encoding="utf-8"))


def finish(path: Path, value: object) -> None:
    """Write JSON so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(path)


def digest_of(parts: Mapping[str, object]) -> str:
    """12 hex digits that stand for everything that a data set is made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def check_place(out: Path) -> None:
    """Raise DataError when something that is no data set of ours stands where it would go."""
    if out.exists() and not (out / CARD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is no data set of rluf; name another folder, or remove it")


@contextmanager
def workspace(out: Path, digest: str) -> Iterator[Workspace]:
    """A workspace beside `out`, whose data take the place of `out` when the block ends well.

    An error of the user's removes it; a kill, a signal or a fault leaves it to the next job of equal `digest`. Raises
    DataError when `out` is something else, ResourceError when the place cannot be written.
    """
    out = out.resolve()
    check_place(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out.parent)
        root, lock = _claimed(out.parent / f".prepare-{digest}")
    except OSError as error:
        raise ResourceError(f"cannot write the data set {out}: {error.strerror or error}; check its disk") from error
    try:
        work = Workspace(root)
        work.data.mkdir(exist_ok=True)
        yield work
        swap(work.data, out)
        shutil.rmtree(root, ignore_errors=True)
    except RlufError:
        shutil.rmtree(root, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(root, ignore_errors=True)
        raise ResourceError(f"cannot write the data set {out}: {error.strerror or error}; check its disk") from error
    finally:
        os.close(lock)


def swap(fresh: Path, out: Path) -> None:
    """Put a whole folder where `out` is; the old one goes."""
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.old")
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old, ignore_errors=True)


def _lock(root: Path) -> int | None:
    """A lock on a folder that ends with this process; None when another holds it."""
    root.mkdir(exist_ok=True)
    handle = os.open(root / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _claimed(root: Path) -> tuple[Path, int]:
    handle = _lock(root)
    if handle is not None:
        return root, handle
    return _claimed(root.with_name(f"{root.name}-{uuid.uuid4().hex[:8]}"))


def _sweep(parent: Path) -> None:
    """Remove working folders that nobody holds and nobody came back to."""
    for root in parent.glob(".prepare-*"):
        if time.time() - root.stat().st_mtime > _STALE and (handle := _lock(root)) is not None:
            shutil.rmtree(root, ignore_errors=True)
            os.close(handle)
