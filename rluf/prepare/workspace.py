"""Working folder of a prepare job: survives a kill, so that the next job with the same inputs resumes from it.

The folder's name is derived from inputs, settings and code. Each finished task leaves its result in it; a job that
finds one does not run the task again. The data set is not visible before it is complete and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rluf.errors import DataError, ResourceError, RlufError
from rluf.utils.files import atomic_write, replace_folder, try_lock

CARD_FILE_NAME = "data_card.json"
"""Name of the card; a folder with this file is a prepared data set."""

_STALE_SECONDS = 2 * 86400
"""Age in seconds after which an abandoned working folder is removed."""


class PrepareWorkspace:
    """The working folder: `data_folder` becomes the data set; the folder `done` has the results of finished tasks."""

    def __init__(self, root: Path) -> None:
        self.root, self.data_folder = root, root / "data"

    def result_path(self, name: str) -> Path:
        """File of a finished task's result."""
        return self.root / "done" / f"{name}.json"

    def load_or_store(self, name: str, value: object) -> Any:
        """The value that an earlier, killed job with the same inputs stored under `name`; else store this one."""
        path = self.result_path(name)
        if not path.is_file():
            write_json_atomically(path, value)
        return json.loads(path.read_text(encoding="utf-8"))


def write_json_atomically(path: Path, value: object) -> None:
    """Write JSON so that the file is complete or absent."""
    with atomic_write(path) as temporary_path:
        temporary_path.write_text(json.dumps(value), encoding="utf-8")


def hash_inputs(inputs: Mapping[str, object]) -> str:
    """12 hex digits that identify everything that a data set is built from."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def check_output_folder(output_folder: Path) -> None:
    """Raise DataError if the folder has files but is not a prepared data set: it must not be overwritten."""
    if (
        output_folder.exists()
        and not (output_folder / CARD_FILE_NAME).is_file()
        and (not output_folder.is_dir() or any(output_folder.iterdir()))
    ):
        raise DataError(f"{output_folder} exists and is not a data set of rluf; name another folder, or remove it")


@contextmanager
def open_workspace(output_folder: Path, digest: str) -> Iterator[PrepareWorkspace]:
    """A workspace next to `output_folder`, whose data replace that folder if the block ends without error.

    An rluf or disk error removes the workspace; a kill, a signal or another exception leaves it to the next job with
    the same `digest`. Raises DataError if `output_folder` is something else, ResourceError if it cannot be written.
    """
    output_folder = output_folder.resolve()
    check_output_folder(output_folder)
    try:
        output_folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_folders(output_folder.parent)
        # Next to the output, not in /tmp: the final rename needs the same file system.
        root, lock = _claim_folder(output_folder.parent / f".prepare-{digest}")
    except OSError as error:
        raise _write_failure(output_folder, error) from error
    try:
        workspace = PrepareWorkspace(root)
        workspace.data_folder.mkdir(exist_ok=True)
        yield workspace
        replace_folder(workspace.data_folder, output_folder)
        shutil.rmtree(root, ignore_errors=True)
    except RlufError:
        shutil.rmtree(root, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(root, ignore_errors=True)
        raise _write_failure(output_folder, error) from error
    finally:
        lock.close()


def _write_failure(output_folder: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot write the data set {output_folder}: {error.strerror or error}; check its disk and permissions"
    )


def _lock_folder(root: Path) -> IO[str] | None:
    """The lock of a working folder; None if another process has it. The lock ends with the process."""
    root.mkdir(exist_ok=True)
    return try_lock(root / "lock")


def _claim_folder(root: Path) -> tuple[Path, IO[str]]:
    """Lock `root`, or a new folder with a random suffix if another job with the same inputs is running."""
    lock = _lock_folder(root)
    if lock is not None:
        return root, lock
    return _claim_folder(root.with_name(f"{root.name}-{uuid.uuid4().hex[:8]}"))


def _remove_stale_folders(parent: Path) -> None:
    """Remove stale, unlocked working folders."""
    for root in parent.glob(".prepare-*"):
        if time.time() - root.stat().st_mtime > _STALE_SECONDS and (lock := _lock_folder(root)) is not None:
            shutil.rmtree(root, ignore_errors=True)
            lock.close()
