"""Folder of a feedback store (rluf.serve.store): rows, and reactions that arrived after their rows were written.

The rows are in Parquet files anywhere below the folder except in folders whose names start with "_" or ".", as readers
of partitioned data sets have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rluf.errors import DataError

REACTIONS_FOLDER, PREFERENCES_FOLDER = "_reactions", "_preferences"
"""Folders of late reactions and of choices between two responses."""
WRITER_PREFIX = "writer="
"""Prefix of the folder of one of several writers of a store, which has the store's layout."""


def is_in_hidden_folder(relative_path: str) -> bool:
    """Whether a folder of a path under the store's root is hidden."""
    return any(name.startswith(("_", ".")) for name in relative_path.split("/")[:-1])


def list_row_files(path: Path) -> list[Path]:
    """Parquet files with the rows of a store, in order of time; a file stands for itself."""
    if not path.is_dir():
        return [path]
    files = [file for file in path.rglob("*.parquet") if not is_in_hidden_folder(file.relative_to(path).as_posix())]
    return sorted(file for file in files if not file.name.startswith("."))


def read_late_reactions(path: Path) -> dict[str, str | None]:
    """Present reaction by response id, of the responses of a store's folder whose reaction changed late.

    Those of several writers are joined by time. Raises DataError for a file that is not one of reactions.
    """
    folders = (path, *sorted(path.glob(f"{WRITER_PREFIX}*")))
    files = [file for folder in folders for file in sorted((folder / REACTIONS_FOLDER).rglob("*.parquet"))]
    events: list[dict[str, Any]] = []
    for file in (file for file in files if not file.name.startswith(".")):
        try:
            table = pq.read_table(file, columns=["response_id", "time", "reaction", "retracted"], partitioning=None)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{file} is not a file of late reactions: {error}") from error
        events += table.to_pylist()
    events.sort(key=lambda event: event["time"])  # stable: events of one moment stay in the order of arrival
    return apply_reaction_events(events)


def apply_reaction_events(events: Iterable[Mapping[str, Any]]) -> dict[str, str | None]:
    """The last reaction of each response of `events` (response_id, reaction, retracted), which are in order of time."""
    reactions: dict[str, str | None] = {}
    for event in events:
        if not event["retracted"]:
            reactions[event["response_id"]] = event["reaction"]
        elif reactions.get(event["response_id"], event["reaction"]) == event["reaction"]:
            reactions[event["response_id"]] = None
    return reactions
