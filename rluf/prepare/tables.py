"""Files of a prepare run: tables that appear complete or not at all, and row counts of each task."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MAX_RAW_BYTES = 2**20
"""Bytes of a rejected row that quarantine stores."""

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("source", pa.string()),
        pa.field("line", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("raw", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class RowCount:
    """Number of rows of one source with the same outcome (in, dropped, quarantined or joined) and reason."""

    kind_name: str
    outcome: str
    rows: int
    source_path: str = ""
    reason: str = ""
    example_location: str = ""


class TableWriter:
    """Writes tables one after another to a Parquet or Arrow file (by its name), which appears only when closed."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._schema = path, schema
        # The process id lets a task that Ray runs twice write both copies without a conflict.
        self._temporary_path = path.with_name(f".{path.name}.{os.getpid()}")
        if path.suffix == ".parquet":
            self._writer = pq.ParquetWriter(self._temporary_path, schema, compression="zstd")
        else:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writer = pa.ipc.new_file(str(self._temporary_path), schema, options=options)

    def write(self, table: pa.Table) -> None:
        """Append rows; columns are cast to the file's schema."""
        self._writer.write_table(table if table.schema.equals(self._schema) else table.cast(self._schema))

    def close(self) -> None:
        """Finish the file and rename it into place."""
        self._writer.close()
        self._temporary_path.replace(self._path)


def write_table(path: Path, table: pa.Table) -> None:
    """Write one table as one file."""
    writer = TableWriter(path, table.schema)
    writer.write(table)
    writer.close()


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read an .arrow file, or some of its columns."""
    with pa.OSFile(str(path)) as file:
        options = None
        if columns is not None:
            column_names = pa.ipc.open_file(file).schema.names
            file.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=[column_names.index(name) for name in columns])
        return pa.ipc.open_file(file, options=options).read_all()


def build_quarantine_table(kind_name: str, source_path: str, rows: Sequence[tuple[int, str, bytes]]) -> pa.Table:
    """Table of quarantined rows: (line number, reason, raw bytes)."""
    return pa.table(
        {
            "kind": [kind_name] * len(rows),
            "source": [source_path] * len(rows),
            "line": [line_number for line_number, _, _ in rows],
            "reason": [reason for _, reason, _ in rows],
            "raw": [raw[:MAX_RAW_BYTES] for _, _, raw in rows],
        },
        schema=QUARANTINE_SCHEMA,
    )


def group_row_counts(row_counts: Sequence[RowCount], outcome: str) -> dict[str, Counter[str]]:
    """Rows of one outcome, by kind and reason."""
    rows_by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for row_count in row_counts:
        if row_count.outcome == outcome:
            rows_by_kind[row_count.kind_name][row_count.reason] += row_count.rows
    return rows_by_kind
