"""Writers of one feedback store: each of several clusters that serve into it has a folder of its own.

Two clusters run at once while a RayService is upgraded, and cannot share a database. `RLUF_FEEDBACK_WRITER` names the
writer of a cluster; its rows, late reactions and database are below `writer=NAME/`. Readers of the store join the
folders. A reaction that reaches another cluster than its response did becomes an event there. Rows that a cluster left
open are written by the clusters that still run.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from pyarrow import fs

from rluf.errors import RlufError, SettingsError
from rluf.prepare.readers.feedback_folder import WRITER_PREFIX
from rluf.serve.store import WRITER_VARIABLE, FeedbackStore
from rluf.serve.store_database import DATABASE_FILE

logger = logging.getLogger("rluf.serve")

LOG_FOLDER_NAME, ALIVE_FILE = ".log", "alive"
WRITER_STALE_S = 600.0
"""Seconds without a sign of life after which a writer counts as stopped. Its lock alone would not do: some shared
volumes do not carry locks from one node to another."""
_WRITER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")


def read_writer_name() -> str:
    """Name of this cluster's writer from the environment; empty for the only writer of a store."""
    name = os.environ.get(WRITER_VARIABLE, "")
    if name and not _WRITER_NAME.fullmatch(name):
        raise SettingsError(
            f"{WRITER_VARIABLE}={name!r}: expected letters, digits, dots and hyphens, at most 63, such as the name of "
            "the cluster"
        )
    return name


def resolve_writer_folders(root: str, log_folder: Path, writer_name: str) -> tuple[str, Path]:
    """Root and database folder of a writer, from those of the store's only writer."""
    if not writer_name:
        return root, log_folder
    folder = f"{WRITER_PREFIX}{writer_name}"
    is_remote = "://" in root
    return f"{root.rstrip('/')}/{folder}", (
        log_folder / folder if is_remote else log_folder.parent / folder / log_folder.name
    )


def list_writer_names(root: str) -> list[str]:
    """Names of the writers of a store; the empty one for the rows outside of all writers' folders comes first."""
    if "://" in root:
        filesystem, path = fs.FileSystem.from_uri(root.rstrip("/"))
    else:
        filesystem, path = fs.LocalFileSystem(), str(Path(root).expanduser().resolve())
    names = [info.base_name for info in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))]
    return ["", *sorted(name.removeprefix(WRITER_PREFIX) for name in names if name.startswith(WRITER_PREFIX))]


def mark_alive(log_folder: Path) -> None:
    """Record that the writer of a database runs."""
    (log_folder / ALIVE_FILE).touch()


def flush_stopped_writers(
    root: str, log_folder: Path, writer_name: str, *, reaction_window_s: float, stale_s: float = WRITER_STALE_S
) -> int:
    """Write what the stopped writers of a local store left open and is settled now; returns the number of rows.

    `log_folder` is that of the store's only writer, `writer_name` this process's, which must have marked itself alive:
    times are compared as the volume has them.
    """
    count = 0
    now = (resolve_writer_folders(root, log_folder, writer_name)[1] / ALIVE_FILE).stat().st_mtime
    for name in list_writer_names(root):
        writer_root, writer_log = resolve_writer_folders(root, log_folder, name)
        alive_file = writer_log / ALIVE_FILE
        is_alive = alive_file.is_file() and now - alive_file.stat().st_mtime < stale_s
        if name == writer_name or is_alive or not (writer_log / DATABASE_FILE).is_file():
            continue
        store = FeedbackStore(writer_root, writer_log, reaction_window_s=reaction_window_s, lock_timeout_s=0)
        try:
            store.start()
            count += store.flush_settled()
            store.merge_days()
        except (RlufError, OSError) as error:
            logger.warning("feedback store %s: rows of a stopped writer not written: %s", writer_root, error)
        finally:
            store.close()
    return count
