"""First pass of prepare: validate one stripe of a file; write redacted rows, an index for later passes, and quarantine.

Rows are written by bucket, a range of row keys. The index has one entry per row, about 150 bytes without messages and
response, so that the second pass can hold the whole log's index in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rluf.prepare import splits
from rluf.prepare.erasure import ERASURE_REASON, match_erased_users
from rluf.prepare.readers.datasets import ReaderOptions, SkippedRow
from rluf.prepare.readers.files import RawLine, find_reader, parse_partition_fields, read_line_batches
from rluf.prepare.readers.products import build_column_reader
from rluf.prepare.redact import redact_array
from rluf.prepare.schema import SPLIT_NAMES, RejectedRow, build_arrow_table, find_data_kind, validate_json_rows
from rluf.prepare.splits import ROW_KEY_SALT, assign_split, normalize_context, sampling_salt, to_unit_interval
from rluf.prepare.workspace import RowCount, TableWriter, build_quarantine_table
from rluf.utils.hashing import hash64, hash_user_id

_ROWS_PER_BATCH = 4096
"""Raw rows that are validated together."""

_INDEX_COLUMNS = (
    "topic", "time", "turn", "model_version", "locale", "interface", "device", "author", "continued", "returned",
    "reaction", "retracted", "user_id", "label", "group", "finish_reason", "chosen_finish_reason",
)  # fmt: skip
"""Columns that the index copies, where the kind has them."""

_TEXT_COLUMNS = ("response", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class ValidateTask:
    """One stripe of one file, and where its rows go. `salt_hex` is the user salt in hexadecimal, empty for none."""

    work_folder: str
    kind_name: str
    source_path: str
    reader_name: str | None
    source_index: int
    stripe_index: int
    stripe_count: int
    bucket_count: int
    current_time: str
    dev_share: float
    test_share: float
    seed: int
    redact_kinds: Sequence[str]
    column_paths: Mapping[str, str]
    erasure_marks: Sequence[str]
    salt_hex: str = field(default="", repr=False)

    @property
    def file_stem(self) -> str:
        """Name of this task's files; they sort in the order of the log."""
        return f"{self.source_index:05d}-{self.stripe_index:05d}"


class _ValidationWriter:
    """Writes the results of one task as they arrive, and counts them."""

    def __init__(self, task: ValidateTask) -> None:
        self.task, self.kind = task, find_data_kind(task.kind_name)
        self.row_counts: Counter[tuple[str, str]] = Counter()
        self.example_locations: dict[tuple[str, str], str] = {}
        self.redaction_counts: Counter[str] = Counter()
        self._table_files: dict[tuple[str, int], TableWriter] = {}
        self._quarantine_file: TableWriter | None = None
        salt = bytes.fromhex(task.salt_hex) or None
        self._hash_user = cache(lambda user_id: user_id and hash_user_id(user_id, salt))
        self._assign_split = cache(lambda key: assign_split(key, dev_share=task.dev_share, test_share=task.test_share))

    def write_rejected(self, rejected_rows: Sequence[tuple[int, str, bytes]]) -> None:
        """Write rows to quarantine: (line number, reason, raw bytes)."""
        for line_number, reason, _ in rejected_rows:
            self.row_counts["quarantined", reason] += 1
            self.example_locations.setdefault(("quarantined", reason), f"{self.task.source_path}:{line_number}")
        table = build_quarantine_table(self.task.kind_name, self.task.source_path, rejected_rows)
        path = Path(self.task.work_folder) / "quarantine" / f"{self.task.kind_name}-{self.task.file_stem}.parquet"
        self._quarantine_file = self._quarantine_file or TableWriter(path, table.schema)
        self._quarantine_file.write(table)

    def write_accepted(self, rows: Sequence[Any], positions: Sequence[tuple[int, int]]) -> None:
        """Write valid rows and their index entries; `positions` are their (line number, item of the line)."""
        table = self._protect_personal_data(build_arrow_table(rows, self.kind.record_type))
        index = self._build_index(rows, table, positions)
        if self.task.erasure_marks and "user_id" in table.column_names:
            is_erased = match_erased_users(table["user_id"].to_pylist(), self.task.erasure_marks)
            self.row_counts["dropped", ERASURE_REASON] += sum(is_erased)
            keep_mask = pc.invert(pa.array(is_erased, pa.bool_()))
            table, index = table.filter(keep_mask), index.filter(keep_mask)
        row_buckets = (to_unit_interval(index["row_key"].to_numpy()) * self.task.bucket_count).astype(np.int64)
        for bucket in np.unique(row_buckets):
            bucket_mask = pa.array(row_buckets == bucket)
            for folder, content in (("index", index), ("rows", table)):
                # Reactions are joined to feedback through the index; they have no rows in the data set.
                if folder == "rows" and not self.kind.split_names:
                    continue
                key = folder, int(bucket)
                if key not in self._table_files:
                    bucket_folder = Path(self.task.work_folder) / folder / self.task.kind_name / f"{bucket:05d}"
                    path = bucket_folder / f"{self.task.file_stem}.arrow"
                    self._table_files[key] = TableWriter(path, content.schema)
                self._table_files[key].write(content.filter(bucket_mask))

    def _protect_personal_data(self, table: pa.Table) -> pa.Table:
        """The table with texts redacted and users, devices and authors hashed."""
        for name in table.column_names:
            column = table[name].combine_chunks()
            if name in ("user_id", "device", "author"):
                if self.task.salt_hex:
                    column = pa.array([self._hash_user(user_id) for user_id in column.to_pylist()], pa.string())
            elif name in _TEXT_COLUMNS:
                column, redactions = redact_array(column, self.task.redact_kinds)
                self.redaction_counts += redactions
            elif name == "messages":
                structs = column.values
                contents, redactions = redact_array(structs.field("content"), self.task.redact_kinds)
                self.redaction_counts += redactions
                if redactions:
                    fields = list(column.type.value_type)
                    structs = pa.StructArray.from_arrays([structs.field("role"), contents], fields=fields)
                    column = pa.ListArray.from_arrays(column.offsets, structs, type=column.type)
            else:
                continue
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
        return table

    def _build_index(self, rows: Sequence[Any], table: pa.Table, positions: Sequence[tuple[int, int]]) -> pa.Table:
        kind, row_count = self.kind, len(rows)
        id_field = "response_id" if kind.name == "reactions" else "id"
        salt = sampling_salt(self.task.seed)
        columns: dict[str, Any] = {
            "row_key": pa.array([hash64(getattr(row, id_field), ROW_KEY_SALT) for row in rows], pa.uint64()),
            "source_index": pa.array(np.full(row_count, self.task.source_index, dtype=np.int32)),
            "line_number": pa.array([line_number for line_number, _ in positions], pa.int64()),
            "item_index": pa.array([item_index for _, item_index in positions], pa.int32()),
        }
        # The salts below are part of the data format: another one would change splits, samples or the order of rows.
        if kind.name == "reactions":
            columns["event_key"] = pa.array([hash64(row.id, ROW_KEY_SALT) for row in rows], pa.uint64())
        if kind.split_names and kind.name != "prompts":
            columns["sampling_hash"] = pa.array([hash64(row.id, salt) for row in rows], pa.uint64())
        if kind.name == "feedback":
            conversation_keys = [hash64(row.conversation_id, "rluf-talk") for row in rows]
            response_keys = [hash64(row.response, "rluf-answer") for row in rows]
            columns["conversation_key"] = pa.array(conversation_keys, pa.uint64())
            columns["response_key"] = pa.array(response_keys, pa.uint64())
        if "messages" in kind.record_type.model_fields:
            columns |= self._prompt_columns(rows)
            columns["split"] = self._split_codes(table)
        columns |= {name: table[name].combine_chunks() for name in _INDEX_COLUMNS if name in table.column_names}
        return pa.table(columns)

    def _prompt_columns(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Prompt keys [N] and near-duplicate band hashes [N, BAND_COUNT] of the contexts before redaction."""
        texts = [normalize_context((message.role, message.content) for message in row.messages) for row in rows]
        prompt_keys = np.fromiter((hash64(text, "rluf-prompt") for text in texts), dtype=np.uint64, count=len(texts))
        # MinHash costs far more than hash64, so each distinct context is hashed once.
        _, first_rows, unique_index = np.unique(prompt_keys, return_index=True, return_inverse=True)
        band_hashes = splits.compute_band_hashes([texts[row] for row in first_rows])[unique_index]
        flat_hashes = pa.array(np.ascontiguousarray(band_hashes).reshape(-1))
        band_column = pa.FixedSizeListArray.from_arrays(flat_hashes, splits.BAND_COUNT)
        return {"prompt_key": pa.array(prompt_keys), "band_hashes": band_column}

    def _split_codes(self, table: pa.Table) -> pa.Array:
        keys = table[self.kind.split_key].to_pylist()
        split_names = keys if self.kind.split_key == "split" else map(self._assign_split, keys)
        return pa.array([SPLIT_NAMES.index(name) for name in split_names], pa.int8())

    def close(self) -> None:
        """Finish all files."""
        for writer in [*self._table_files.values(), *([self._quarantine_file] if self._quarantine_file else [])]:
            writer.close()


def _build_adapter(
    task: ValidateTask,
) -> Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any] | SkippedRow]] | None:
    """Function from a raw object to rows of rluf's schema; None if the file holds such rows already."""
    options = ReaderOptions(task.test_share)
    field_names = find_data_kind(task.kind_name).record_type.model_fields
    partitions = parse_partition_fields(task.source_path)
    folder_fields = {name: value for name, value in partitions.items() if name in field_names}
    if task.reader_name is not None:
        read_item = find_reader(task.reader_name, task.kind_name).read_item
        return lambda row: read_item({**folder_fields, **row}, options)
    if task.kind_name == "feedback" and task.column_paths:
        read_columns = build_column_reader(task.column_paths)
        return lambda row: [read_columns({**folder_fields, **row})]
    return (lambda row: [{**folder_fields, **row}]) if folder_fields else None


def _parse_lines(
    lines: Sequence[RawLine], task: ValidateTask, writer: _ValidationWriter
) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Yield (line number, item of the line, row as JSON, raw bytes); count and write broken and skipped rows."""
    adapt, reader_name = _build_adapter(task), task.reader_name or "columns"
    rejected_rows: list[tuple[int, str, bytes]] = []
    for line in lines:
        if line.problem or adapt is None:
            writer.row_counts["in", ""] += 1
            if line.problem:
                rejected_rows.append((line.line_number, line.problem, line.raw))
            else:
                yield line.line_number, 0, line.raw, line.raw
            continue
        try:
            items = adapt(json.loads(line.raw))
        except UnicodeDecodeError:
            items, reason = [], "not UTF-8"
        except json.JSONDecodeError:
            items, reason = [], "broken JSON"
        # Readers index into foreign objects without checks; any of these means that the object has another shape.
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError, OSError):
            items, reason = [], f"not a row of reader {reader_name}"
        else:
            reason = ""
        if reason:
            writer.row_counts["in", ""] += 1
            rejected_rows.append((line.line_number, reason, line.raw))
        for item_index, item in enumerate(items):
            writer.row_counts["in", ""] += 1
            if isinstance(item, SkippedRow):
                writer.row_counts["dropped", item.reason] += 1
            else:
                yield line.line_number, item_index, json.dumps(item).encode(), line.raw
    if rejected_rows:
        writer.write_rejected(rejected_rows)


def validate_rows(task: ValidateTask) -> dict[str, Any]:
    """Run the first pass on one stripe. Returns row counts, and redactions by kind of personal data."""
    kind, now = find_data_kind(task.kind_name), datetime.fromisoformat(task.current_time)
    writer = _ValidationWriter(task)
    for lines in _rebatch_lines(read_line_batches(task.source_path, task.stripe_index, task.stripe_count)):
        items = list(_parse_lines(lines, task, writer))
        rows = validate_json_rows([row_json for _, _, row_json, _ in items], kind.record_type, now)
        rejected_rows = [
            (line_number, row.reason, raw)
            for (line_number, _, _, raw), row in zip(items, rows, strict=True)
            if isinstance(row, RejectedRow)
        ]
        if rejected_rows:
            writer.write_rejected(rejected_rows)
        accepted = [index for index, row in enumerate(rows) if not isinstance(row, RejectedRow)]
        if accepted:
            writer.write_accepted([rows[index] for index in accepted], [items[index][:2] for index in accepted])
    writer.close()
    row_counts = [
        RowCount(task.kind_name, key[0], rows, task.source_path, key[1], writer.example_locations.get(key, ""))
        for key, rows in writer.row_counts.items()
        if rows
    ]
    return {"row_counts": row_counts, "redacted": dict(writer.redaction_counts)}


def _rebatch_lines(line_batches: Iterator[list[RawLine]]) -> Iterator[list[RawLine]]:
    """Join the small batches of the readers into batches of _ROWS_PER_BATCH."""
    pending: list[RawLine] = []
    for lines in line_batches:
        pending += lines
        while len(pending) >= _ROWS_PER_BATCH:
            yield pending[:_ROWS_PER_BATCH]
            pending = pending[_ROWS_PER_BATCH:]
    if pending:
        yield pending
