"""File writes that are complete or absent, locks, JSON, and the error for a write that failed."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rluf.errors import DISK_FULL_ERRNOS, DataError, ModelError, ResourceError, RlufError

logger = logging.getLogger(__name__)


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk, so that a power cut does not undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file path next to `path` that replaces it when the block ends without an error.

    Parent folders are created. Readers see the old file or the complete new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target, because a rename is atomic within one file system only.
    temporary_path = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary_path
        temporary_path.replace(path)
    finally:
        temporary_path.unlink(missing_ok=True)


def replace_folder(new_folder: Path, folder: Path) -> None:
    """Move a complete folder to `folder` and delete the folder that was there."""
    # A rename cannot replace a folder that has files, so the old one is renamed away first.
    old_folder = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    if folder.exists():
        folder.rename(old_folder)
    new_folder.rename(folder)
    shutil.rmtree(old_folder, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path, subject: str = "the policy") -> Iterator[Path]:
    """A temporary folder next to `path` that replaces it, synced to disk, when the block ends without an error.

    Files become as readable as the folder (safetensors makes its files readable by their owner only). Raises
    ResourceError on a full disk, ModelError on another write error; `subject` says in both what is written.
    """
    temporary_folder = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.part")
    try:
        temporary_folder.mkdir(parents=True)
        yield temporary_folder
        # Files are synced before their folder and the folder before its name, so that after a crash the name never
        # points to missing content.
        file_mode = temporary_folder.stat().st_mode & 0o666
        for file in (p for p in temporary_folder.rglob("*") if p.is_file()):
            file.chmod(file_mode)
            fsync_path(file)
        fsync_path(temporary_folder)
        replace_folder(temporary_folder, path)
        fsync_path(path.parent)
    except OSError as error:
        raise build_write_error(subject, path, error) from error
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)


def build_write_error(subject: str, path: Path, error: Exception) -> RlufError:
    """Error for a failed write of `subject` to `path`: ResourceError on a full disk, else ModelError."""
    # safetensors raises its own error type, with the system's error number in the message only.
    is_full = getattr(error, "errno", None) in DISK_FULL_ERRNOS or any(
        f"os error {number}" in str(error) for number in DISK_FULL_ERRNOS
    )
    error_type = ResourceError if is_full else ModelError
    return error_type(f"{subject} could not be written to {path}: {error}; free some disk, earlier checkpoints remain")


@contextmanager
def file_lock(path: Path, wait_message: str = "") -> Iterator[None]:
    """Wait for an exclusive advisory lock on the file `path`, created if missing; it ends with the process.

    `wait_message` is logged if another process has the lock.
    """
    lock_file = try_lock(path)
    if lock_file is None:
        if wait_message:
            logger.info("%s (%s)", wait_message, path)
        lock_file = _open_lock(path)
        fcntl.flock(lock_file, fcntl.LOCK_EX)
    with lock_file:
        yield


def try_lock(path: Path) -> IO[str] | None:
    """The open file `path` with an exclusive lock, or None if another process has the lock. Close it to unlock."""
    file = _open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _open_lock(path: Path) -> IO[str]:
    try:
        # Append mode creates the file without emptying one that another process has written.
        return path.open("a")
    except OSError as error:
        raise ResourceError(
            f"cannot open the lock {path}: {error.strerror}; another user may have made it: set run.cache, or run.root "
            "for a run folder, to a folder of your own"
        ) from error


def to_jsonable(value: Any) -> Any:
    """Convert to plain JSON types: numpy scalars and arrays to numbers and lists, non-finite numbers to None."""
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Sequence):
        return [to_jsonable(item) for item in value]
    # Arrays and numpy scalars, without importing numpy; before float, since numpy.float64 is a float.
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) else str(value)


def write_json(path: Path, content: Any) -> None:
    """Write one JSON file atomically; non-finite numbers become null, since JSON has no NaN."""
    text = json.dumps(to_jsonable(content), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as temporary_path:
        temporary_path.write_text(f"{text}\n", "utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, atomically."""
    with atomic_write(path) as temporary_path, temporary_path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(to_jsonable(row), ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; a missing file counts as an empty one. Raises DataError if it is not a JSON object."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); restore the file or run again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is a JSON {type(content).__name__}, expected an object; restore it or run again")
    return content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON lines file; a missing file has none.

    A killed run may leave an incomplete last line, which is skipped. Raises DataError for any other invalid line.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_text("utf-8").split("\n")
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if line_number == len(lines):
                break
            raise DataError(f"{path} line {line_number} is not JSON ({error}); restore it or run again") from error
    return rows


def _truncate_partial_line(path: Path) -> None:
    if not path.exists():
        return
    # Without this, the first new row would be appended to the incomplete line and both would be lost.
    with path.open("rb+") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)


class JsonlWriter:
    """Appends JSON objects, one per line, and flushes each: a run can be followed, and read after it was killed."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; creates its folder and removes the incomplete last line of a killed run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        _truncate_partial_line(path)
        self._stream = path.open("a", encoding="utf-8")

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Write one row, such as {"step": 3, "love": 0.07, "kl": 0.01}."""
        self._stream.write(json.dumps(to_jsonable(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> JsonlWriter:
        """Use as a context manager that closes the file."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the file."""
        self.close()
