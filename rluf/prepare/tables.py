"""The working folder of a run of prepare: files that appear whole or not at all, and the small counts of each part."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

RAW_LIMIT = 2**20
"""Bytes of a bad row that quarantine keeps."""

BAD_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("source", pa.string()),
        pa.field("line", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("raw", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class Tally:
    """Some rows that went the same way. `event` is in, dropped or quarantined."""

    kind: str
    event: str
    rows: int
    source: str = ""
    reason: str = ""
    example: str = ""


class TableFile:
    """A Parquet or Arrow file (by its name) that takes tables bit by bit and has its name only when closed."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._schema = path, schema
        self._part = path.with_name(f".{path.name}.{os.getpid()}")
        if path.suffix == ".parquet":
            self._file = pq.ParquetWriter(self._part, schema, compression="zstd")
        else:
            self._file = pa.ipc.new_file(str(self._part), schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))

    def write(self, table: pa.Table) -> None:
        """Append rows; columns are cast to the file's schema."""
        self._file.write_table(table if table.schema.equals(self._schema) else table.cast(self._schema))

    def close(self) -> None:
        """Finish the file and let it appear."""
        self._file.close()
        self._part.replace(self._path)


def write_table(path: Path, table: pa.Table) -> None:
    """A whole table as one file."""
    file = TableFile(path, table.schema)
    file.write(table)
    file.close()


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A table of an .arrow file."""
    with pa.OSFile(str(path)) as source:
        options = None
        if columns is not None:
            names = pa.ipc.open_file(source).schema.names
            source.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns])
        return pa.ipc.open_file(source, options=options).read_all()


def bad_table(kind: str, source: str, rows: Sequence[tuple[int, str, bytes]]) -> pa.Table:
    """Quarantined rows: (line, reason, raw bytes)."""
    return pa.table(
        {
            "kind": [kind] * len(rows),
            "source": [source] * len(rows),
            "line": [line for line, _, _ in rows],
            "reason": [reason for _, reason, _ in rows],
            "raw": [raw[:RAW_LIMIT] for _, _, raw in rows],
        },
        schema=BAD_SCHEMA,
    )


def group_counts(tallies: Sequence[Tally], event: str) -> dict[str, Counter[str]]:
    """Rows of one event by kind and reason."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for tally in tallies:
        if tally.event == event:
            counts[tally.kind][tally.reason] += tally.rows
    return counts
