"""Working folder and tables of a prepare job: they survive a kill, so the next job with the same inputs resumes.

The folder's name is derived from inputs, settings and code. Each finished task leaves its result in it; a job that
finds one does not run the task again. The data set is not visible before it is complete and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rluf.errors import DataError, ResourceError, RlufError
from rluf.utils.files import replace_folder, try_lock, write_json

CARD_FILE_NAME = "data_card.json"
"""Name of the card; a folder with this file is a prepared data set."""

ROWS_READ_INTERVAL_S = 5.0
"""Seconds between two updates of a RowsReadFile."""

_STALE_SECONDS = 2 * 86400
"""Age in seconds after which an abandoned working folder is removed."""


class PrepareWorkspace:
    """The working folder: `data_folder` becomes the data set; the folder `done` has the results of finished tasks."""

    def __init__(self, root: Path) -> None:
        self.root, self.data_folder = root, root / "data"

    def get_result_path(self, name: str) -> Path:
        """File of a finished task's result."""
        return self.root / "done" / f"{name}.json"

    def load_or_store(self, name: str, value: object) -> Any:
        """The value that an earlier, killed job with the same inputs stored under `name`; else store this one."""
        path = self.get_result_path(name)
        if not path.is_file():
            write_json(path, value)
        return json.loads(path.read_text(encoding="utf-8"))

    def count_rows_read(self) -> int:
        """Rows that the tasks of the first pass have read so far (see RowsReadFile)."""
        counts = (path.read_text(encoding="ascii") for path in (self.root / "rows_read").glob("*.txt"))
        return sum(int(count) for count in counts)


class RowsReadFile:
    """Number of rows that a task has read so far, in a file of the working folder, written once in a few seconds."""

    def __init__(self, work_folder: str, task_name: str) -> None:
        self._path = Path(work_folder) / "rows_read" / f"{task_name}.txt"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._row_count, self._written_at = 0, 0.0

    def add(self, row_count: int) -> None:
        """Add `row_count` rows."""
        self._row_count += row_count
        if time.monotonic() - self._written_at >= ROWS_READ_INTERVAL_S:
            partial_path = self._path.with_suffix(".partial")
            partial_path.write_text(str(self._row_count), encoding="ascii")
            partial_path.replace(self._path)
            self._written_at = time.monotonic()


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
        remove_stale_folders(output_folder.parent)
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
    return ResourceError(f"cannot write the data set {output_folder}: {error.strerror or error}; check its disk")


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


def remove_stale_folders(parent: Path) -> None:
    """Remove working folders below `parent` that jobs killed some days ago have left."""
    for root in parent.glob(".prepare-*"):
        if time.time() - root.stat().st_mtime > _STALE_SECONDS and (lock := _lock_folder(root)) is not None:
            shutil.rmtree(root, ignore_errors=True)
            lock.close()


MAX_RAW_BYTES = 2**20
"""Bytes of a rejected row that quarantine stores."""

QUARANTINE_SCHEMA = pa.schema([
    pa.field("kind", pa.string()), pa.field("source", pa.string()), pa.field("line", pa.int64()),
    pa.field("reason", pa.string()), pa.field("raw", pa.binary()),
])  # fmt: skip


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


_MAX_BUFFER_BYTES = 64 * 2**20
"""Bytes of rows that a BucketWriter holds until it writes them by bucket."""


class BucketWriter:
    """Writes tables of equal rows to one file each, in which every record batch has the rows of one bucket.

    One file for all buckets, and a bound on the rows in memory: a task has the same few files open, and writes as
    many, for any number of buckets.
    """

    def __init__(self, paths: Sequence[Path], bucket_count: int) -> None:
        self._paths, self._bucket_count = paths, bucket_count
        self._writers: list[TableWriter] = []
        self._pending: list[tuple[NDArray[np.int64], list[pa.Table]]] = []
        self._pending_bytes = 0

    def write(self, row_buckets: NDArray[np.int64], tables: Sequence[pa.Table]) -> None:
        """Append rows with their buckets [N]; `tables` may have more tables than there are files."""
        tables = list(tables[: len(self._paths)])
        self._writers = self._writers or [
            TableWriter(path, table.schema) for path, table in zip(self._paths, tables, strict=True)
        ]
        self._pending.append((row_buckets, tables))
        self._pending_bytes += sum(table.nbytes for table in tables)
        if self._bucket_count == 1 or self._pending_bytes > _MAX_BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        row_buckets = np.concatenate([buckets for buckets, _ in self._pending])
        order = np.argsort(row_buckets, kind="stable")
        bounds = np.flatnonzero(np.diff(row_buckets[order], prepend=-1)).tolist()
        for index, writer in enumerate(self._writers):
            table = pa.concat_tables([tables[index] for _, tables in self._pending]).take(pa.array(order))
            for start, end in zip(bounds, [*bounds[1:], len(order)], strict=True):
                writer.write(table.slice(start, end - start).combine_chunks())
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Write what is left and finish the files; no file appears without rows."""
        self._flush()
        for writer in self._writers:
            writer.close()


def write_table(path: Path, table: pa.Table) -> None:
    """Write one table as one file."""
    writer = TableWriter(path, table.schema)
    writer.write(table)
    writer.close()


@contextmanager
def _open_table(path: Path, columns: Sequence[str] | None) -> Iterator[pa.ipc.RecordBatchFileReader]:
    with pa.OSFile(str(path)) as file:
        options = None
        if columns is not None:
            column_names = pa.ipc.open_file(file).schema.names
            file.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=[column_names.index(name) for name in columns])
        yield pa.ipc.open_file(file, options=options)


def read_schema(path: Path) -> pa.Schema:
    """Schema of an .arrow file."""
    with _open_table(path, None) as reader:
        return reader.schema


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read an .arrow file, or some of its columns."""
    with _open_table(path, columns) as reader:
        return reader.read_all()


@contextmanager
def use_system_memory() -> Iterator[None]:
    """Arrow allocates from the system within `with`: its own pool retains the memory of large columns after use."""
    memory_pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(memory_pool)


class IndexTable:
    """Index of all rows of a kind, without band hashes. All of it would take 150 bytes per row of memory.

    So a column is read from its files each time it is used, unless `set_column` has replaced it.
    """

    def __init__(self, work_folder: str, kind_name: str) -> None:
        self.files = _list_index_files(work_folder, kind_name)
        self.batch_rows = [
            [len(keys) for keys in read_table(file, ["row_key"])["row_key"].chunks] for file in self.files
        ]
        """Rows of each record batch of each file."""
        self.num_rows = sum(map(sum, self.batch_rows))
        self._schema = read_schema(self.files[0]) if self.files else pa.schema([])
        self._new_columns: dict[str, pa.Array] = {}
        self._rows: pa.Array | None = None

    @property
    def column_names(self) -> list[str]:
        """Names of the columns that can be read."""
        return [name for name in self._schema.names if name not in ("band_hashes", "row_band_hashes")]

    def __getitem__(self, column_name: str) -> pa.Array:
        if column_name in self._new_columns:
            column = self._new_columns[column_name]
        else:
            chunks = [chunk for file in self.files for chunk in read_table(file, [column_name])[column_name].chunks]
            column = pa.chunked_array(chunks, self._schema.field(column_name).type).combine_chunks()
        return column if self._rows is None else column.take(self._rows)

    def set_column(self, column_name: str, column: pa.Array) -> None:
        """Replace a column [N]."""
        self._new_columns[column_name] = column

    def take(self, rows: NDArray[np.int64]) -> IndexTable:
        """View of some rows [R]. It shares the columns that are set."""
        view = copy(self)
        view._rows, view.num_rows = pa.array(rows), len(rows)
        return view


def _list_index_files(work_folder: str, kind_name: str) -> list[Path]:
    return sorted((Path(work_folder) / "index" / kind_name).glob("*.arrow"))


def load_band_hashes(
    work_folder: str,
    kind_name: str,
    rows: NDArray[np.int64],
    bands: Sequence[int],
    column_name: str = "band_hashes",
) -> NDArray[np.uint64]:
    """Hashes [R, B] of some bands of some rows, in ascending order, of the index; reads a record batch at a time."""
    band_hashes = np.empty((len(rows), len(bands)), dtype=np.uint64)
    first_row = 0
    for file in _list_index_files(work_folder, kind_name):
        with _open_table(file, [column_name]) as reader:
            for batch_index in range(reader.num_record_batches):
                column = reader.get_batch(batch_index)[column_name]
                start, end = np.searchsorted(rows, [first_row, first_row + len(column)])
                batch_hashes = column.flatten().to_numpy().reshape(len(column), -1)
                band_hashes[start:end] = batch_hashes[rows[start:end] - first_row][:, bands]
                first_row += len(column)
    return band_hashes


def load_texts(work_folder: str, kind_name: str, rows: NDArray[np.int64], column_name: str) -> list[str]:
    """Texts [R] of some rows of the index, in its order; one record batch is in memory at a time."""
    texts: list[str] = [""] * len(rows)
    order = np.argsort(rows, kind="stable")
    sorted_rows, first_row = rows[order], 0
    # The files of rows have the record batches of the index.
    for file in sorted((Path(work_folder) / "rows" / kind_name).glob("*.arrow")):
        with _open_table(file, [column_name]) as reader:
            for batch_index in range(reader.num_record_batches):
                column = reader.get_batch(batch_index)[column_name]
                start, end = np.searchsorted(sorted_rows, [first_row, first_row + len(column)])
                values = column.take(pa.array(sorted_rows[start:end] - first_row)).to_pylist()
                for position, text in zip(order[start:end].tolist(), values, strict=True):
                    texts[position] = text
                first_row += len(column)
    return texts


def encode_column(column: pa.Array | pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """Codes [N] of a column's values, and the values; null is -1."""
    encoded = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).dictionary_encode()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1)
    return codes.to_numpy(zero_copy_only=False), encoded.dictionary


def read_column(table: IndexTable, column_name: str, null_value: int | None = None) -> NDArray[Any]:
    """A column as an array [N], with `null_value` in place of nulls; times in microseconds."""
    column = table[column_name]
    if null_value is not None:
        column = pc.fill_null(column, pa.scalar(null_value, column.type))
    elif pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


MAX_OPEN_FILES = 100
"""Files that a BatchReader has open at a time; many systems allow 1,024 in a process."""


class BatchReader:
    """Reads single record batches of many .arrow files, which stay open up to MAX_OPEN_FILES; close it after use."""

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self._columns = columns
        self._open_files = ExitStack()
        self._readers: dict[Path, pa.ipc.RecordBatchFileReader] = {}

    def read(self, path: Path, batch_index: int) -> pa.Table:
        """One record batch of a file."""
        if path not in self._readers:
            if len(self._readers) == MAX_OPEN_FILES:
                self.close()
            self._readers[path] = self._open_files.enter_context(_open_table(path, self._columns))
        return pa.Table.from_batches([self._readers[path].get_batch(batch_index)])

    def close(self) -> None:
        """Close all files."""
        self._open_files.close()
        self._readers.clear()


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
