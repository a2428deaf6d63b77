"""First pass of prepare: validate one stripe of a file; write redacted rows, an index for later passes, and quarantine.

Rows are written by bucket, a range of row keys. The second pass decides on the index alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rluf.config.data import DataSource
from rluf.prepare import splits
from rluf.prepare.card import OTHER_ID_NOTE, ROUNDED_ID_NOTE, USER_ID_NOTE
from rluf.prepare.erasure import ERASURE_REASON, USER_COLUMNS, is_row_of_erased_user, match_erased_users
from rluf.prepare.labels import LabelRules
from rluf.prepare.readers.chats import RowShapeError
from rluf.prepare.readers.columns import (
    NOTES_KEY,
    ROUNDED_ID_PATTERN,
    RowConverter,
    build_converter,
    find_page,
    get_row_kind,
)
from rluf.prepare.readers.conditions import find_failed_condition
from rluf.prepare.readers.datasets import ReaderOptions, SkippedRow
from rluf.prepare.readers.files import RawLine, detect_format, read_line_batches
from rluf.prepare.readers.sources import find_reader, parse_partition_fields
from rluf.prepare.redact import PERSONAL_ID_PATTERN, redact_array, redact_text
from rluf.prepare.schema import (
    BYTES_PER_TOKEN,
    MAX_TEXT_CHARS,
    SPLIT_NAMES,
    PromptRecord,
    RejectedRow,
    build_arrow_table,
    find_data_kind,
    validate_json_rows,
)
from rluf.prepare.splits import ROW_KEY_SALT, assign_split, derive_sampling_salt, normalize_context, to_unit_interval
from rluf.prepare.workspace import BucketWriter, RowCount, RowsReadFile, TableWriter, build_quarantine_table
from rluf.utils.hashing import hash64, hash_user_id

_ROWS_PER_BATCH = 4096
"""Raw rows that are validated together."""

_MAX_PENDING_BYTES = 64 * 2**20
"""Bytes of rows that are validated together."""

_OTHER_ID_COLUMNS = frozenset({"id", "conversation_id", "group"})
ID_NOTES = {
    USER_ID_NOTE: (USER_COLUMNS, PERSONAL_ID_PATTERN),
    OTHER_ID_NOTE: (_OTHER_ID_COLUMNS, PERSONAL_ID_PATTERN),
    ROUNDED_ID_NOTE: (USER_COLUMNS | _OTHER_ID_COLUMNS, f"^{ROUNDED_ID_PATTERN}$"),
}
"""Notes on rows whose ids are personal data or cut, the columns that they are about, and patterns of such ids. A salt
hashes those of users."""

LENGTH_STEP_TOKENS = 16
"""Width of the steps in which estimated lengths are counted."""

SCRIPT_CHARS = 400
"""Characters of a text by which its script is found."""

SCRIPTS = {
    name: rf"\p{{{name}}}"
    for name in (
        "Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Telugu", "Thai", "Hangul",
        "Georgian", "Armenian", "Ethiopic", "Khmer",
    )
} | {"Kana": r"\p{Hiragana}\p{Katakana}", "Han": r"\p{Han}"}  # fmt: skip
"""Scripts by which the card counts the languages of rows, as classes of RE2."""

MAX_REASON_CHARS = 120
"""Characters of a reason that repeats a key of the row."""

_INDEX_COLUMNS = (
    "topic", "time", "turn", "model_version", "locale", "interface", "continued", "returned", "reaction",
    "retracted", "label", "group", "finish_reason", "chosen_finish_reason",
)  # fmt: skip
"""Columns that the index copies, where the kind has them."""

_TEXT_COLUMNS = ("response", "chosen", "rejected")

PROMPT_ROW_KEYS = frozenset({"id", "messages", "prompt", "topic", "split", "extra_fields", "chosen", "rejected"})
"""Keys of a prompt's row that rluf reads itself, or that hold other texts of a preference data set."""

_CONTENT_FIELDS = {
    "feedback": ("response",), "preferences": ("chosen", "rejected"), "safety": ("response", "label"),
    "prompts": ("messages",), "reactions": ("reaction", "retracted"),
}  # fmt: skip
"""Fields by which two rows of one id are versions of the same row, rather than two rows that share an id."""


@dataclass(frozen=True, slots=True)
class ValidateTask:
    """One stripe of some files of one entry, and where their rows go.

    `sources` are (index, location) of the files, `entry` the fields of their DataSource, `labels` all rules for
    reactions in them. `salt_hex` is the user salt in hexadecimal, empty for none.
    """

    work_folder: str
    kind_name: str
    sources: Sequence[tuple[int, str]]
    entry: Mapping[str, Any]
    stripe_index: int
    stripe_count: int
    bucket_count: int
    current_time: str
    dev_share: float
    test_share: float
    seed: int
    redact_kinds: Sequence[str]
    labels: Mapping[str, str]
    contradictions: str
    erasure_marks: Sequence[str]
    salt_hex: str = field(default="", repr=False)

    @property
    def file_stem(self) -> str:
        """Name of this task's files; they sort in the order of the log."""
        return f"{self.sources[0][0]:05d}-{self.stripe_index:05d}"

    @property
    def source(self) -> DataSource:
        """The entry of the files."""
        return DataSource(**self.entry)


class _ValidationWriter:
    """Writes the results of one task as they arrive, and counts them; `source_index` and `source_path` are the file."""

    def __init__(self, task: ValidateTask) -> None:
        self.task, self.kind = task, find_data_kind(task.kind_name)
        self.source_index, self.source_path = task.sources[0]
        self.row_counts: Counter[tuple[str, str, str]] = Counter()
        self.example_locations: dict[tuple[str, str, str], str] = {}
        self.redaction_counts: Counter[str] = Counter()
        self.reaction_counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.length_counts: Counter[int] = Counter()
        self.script_counts: Counter[str] = Counter()
        self.rules = LabelRules(task.labels)
        work_folder, file_name = Path(task.work_folder), f"{task.file_stem}.arrow"
        folders = ("index", "rows") if self.kind.split_names else ("index",)
        # Reactions are joined to feedback through the index; they have no rows in the data set.
        paths = [work_folder / folder / task.kind_name / file_name for folder in folders]
        self._bucket_writer = BucketWriter(paths, task.bucket_count)
        self._quarantine_file: TableWriter | None = None
        self._pending_rows: list[tuple[int, tuple[int, int], Any]] = []
        self._pending_bytes = 0
        salt = bytes.fromhex(task.salt_hex) or None
        # Bounded: a log may have millions of users.
        self._hash_user = lru_cache(2**16)(lambda user_id: user_id and hash_user_id(user_id, salt))
        self._hash_key = lru_cache(2**16)(lambda user_id: hash64(user_id, "rluf-user"))
        self._assign_split = lru_cache(2**16)(
            lambda key: assign_split(key, dev_share=task.dev_share, test_share=task.test_share)
        )

    def count_rows(self, outcome: str, reason: str, rows: int = 1) -> None:
        """Count rows of the present file."""
        self.row_counts[self.source_path, outcome, reason] += rows

    def write_rejected(self, rejected_rows: Sequence[tuple[int, str, bytes]]) -> None:
        """Write rows to quarantine: (line number, reason, raw bytes); those that name an erased user are dropped."""
        if self.task.erasure_marks:
            marks = frozenset(self.task.erasure_marks)
            other_rows = [row for row in rejected_rows if not is_row_of_erased_user(row[2], marks, self._hash_user)]
            self.count_rows("dropped", ERASURE_REASON, len(rejected_rows) - len(other_rows))
            if not other_rows:
                return
            rejected_rows = other_rows
        for line_number, reason, _ in rejected_rows:
            self.count_rows("quarantined", reason)
            key = self.source_path, "quarantined", reason
            self.example_locations.setdefault(key, f"{self.source_path}:{line_number}")
        table = build_quarantine_table(self.task.kind_name, self.source_path, rejected_rows)
        path = Path(self.task.work_folder) / "quarantine" / f"{self.task.kind_name}-{self.task.file_stem}.parquet"
        self._quarantine_file = self._quarantine_file or TableWriter(path, table.schema)
        self._quarantine_file.write(table)

    def write_accepted(self, rows: Sequence[Any], positions: Sequence[tuple[int, int]], byte_count: int) -> None:
        """Write valid rows, those of small files together; `positions` are their (line number, item of the line)."""
        # Each write compiles the patterns of personal data and scripts, which costs more than a few rows do.
        self._pending_rows += [(self.source_index, *pair) for pair in zip(positions, rows, strict=True)]
        self._pending_bytes += byte_count
        # Erased rows are counted for the present file.
        is_full = len(self._pending_rows) >= _ROWS_PER_BATCH // 2 or self._pending_bytes > _MAX_PENDING_BYTES
        if is_full or self.task.erasure_marks:
            self._write_pending()

    def _write_pending(self) -> None:
        """Write the pending rows and their index entries."""
        if not self._pending_rows:
            return
        source_indices, positions, rows = zip(*self._pending_rows, strict=True)
        self._pending_rows, self._pending_bytes = [], 0
        table = self._protect_personal_data(build_arrow_table(rows, self.kind.record_type))
        for note, (names, pattern) in ID_NOTES.items():
            matches = [pc.match_substring_regex(table[name], pattern) for name in names & {*table.column_names}]
            self.notes[note] += max((pc.sum(match).as_py() or 0 for match in matches), default=0)
        self._count_lengths(table)
        if "messages" in table.column_names:
            self.script_counts += count_scripts(self._get_last_texts(table))
        index = self._build_index(rows, table, source_indices, positions)
        if self.task.erasure_marks:
            keep_mask = pa.array([not erased for erased in self._find_erased_rows(table)], pa.bool_())
            self.count_rows("dropped", ERASURE_REASON, table.num_rows - (pc.sum(keep_mask).as_py() or 0))
            table, index = table.filter(keep_mask), index.filter(keep_mask)
        row_buckets = (to_unit_interval(index["row_key"].to_numpy()) * self.task.bucket_count).astype(np.int64)
        self._bucket_writer.write(row_buckets, [index, table])

    def _find_erased_rows(self, table: pa.Table) -> list[bool]:
        """Whether each row [N] is of an erased user, or names one in further fields of a prompt."""
        marks = frozenset(self.task.erasure_marks)
        if "user_id" in table.column_names:
            return match_erased_users(table["user_id"].to_pylist(), self.task.erasure_marks)
        if "extra_fields" not in table.column_names:
            return [False] * table.num_rows
        texts = table["extra_fields"].to_pylist()
        return [bool(text) and is_row_of_erased_user(text.encode(), marks, self._hash_user) for text in texts]

    def _count_lengths(self, table: pa.Table) -> None:
        """Count rows by estimated tokens of the context and the (longer) response, in steps of LENGTH_STEP_TOKENS."""
        texts = [table[name] for name in _TEXT_COLUMNS if name in table.column_names]
        if not texts:
            return
        response_bytes = pc.max_element_wise(*(pc.binary_length(text) for text in texts)).to_numpy()
        messages = table["messages"].combine_chunks()
        message_bytes = np.append(0, np.cumsum(pc.binary_length(messages.flatten().field("content")).to_numpy()))
        offsets = messages.offsets.to_numpy() - messages.offsets[0].as_py()
        tokens = (response_bytes + message_bytes[offsets[1:]] - message_bytes[offsets[:-1]]) / BYTES_PER_TOKEN
        steps = (tokens // LENGTH_STEP_TOKENS).astype(np.int64)
        self.length_counts.update(
            dict(zip(*(values.tolist() for values in np.unique(steps, return_counts=True)), strict=True))
        )

    def _get_last_texts(self, table: pa.Table) -> pa.Array:
        """The response (pairs: the chosen one) of each row [N], of prompts the last message."""
        text_column = next((name for name in _TEXT_COLUMNS if name in table.column_names), None)
        if text_column is not None:
            return table[text_column].combine_chunks()
        messages = table["messages"].combine_chunks()
        last_indices = messages.offsets.to_numpy()[1:] - 1 - messages.offsets[0].as_py()
        return messages.flatten().field("content").take(pa.array(last_indices))

    def _label_reactions(self, column: pa.ChunkedArray) -> pa.Array:
        """Label code of each reaction [N], null where there is none; also counts reactions by name."""
        encoded = column.combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        is_event = self.kind.name == "reactions"
        codes = [
            None if self.rules.is_no_reaction(name, is_event=is_event) else self.rules.find_code(name) for name in names
        ]
        for entry in pc.value_counts(encoded.indices.drop_null()).to_pylist():
            self.reaction_counts[names[entry["values"]]] += entry["counts"]
        return pa.array(codes, pa.int8()).take(encoded.indices)

    def redact_value(self, value: Any) -> Any:
        """A JSON value with its texts redacted; keys and numbers stay."""
        if isinstance(value, str):
            text, redactions = redact_text(value, self.task.redact_kinds)
            self.redaction_counts += redactions
            return text
        if isinstance(value, dict):
            return {key: self.redact_value(item) for key, item in value.items()}
        return [self.redact_value(item) for item in value] if isinstance(value, list) else value

    def _protect_personal_data(self, table: pa.Table) -> pa.Table:
        """The table with texts redacted and users, devices and authors hashed."""
        for name in table.column_names:
            column = table[name].combine_chunks()
            if name in USER_COLUMNS:
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

    def _build_index(
        self, rows: Sequence[Any], table: pa.Table, source_indices: Sequence[int], positions: Sequence[tuple[int, int]]
    ) -> pa.Table:
        kind = self.kind
        id_field = "response_id" if kind.name == "reactions" else "id"
        salt = derive_sampling_salt(self.task.seed)
        columns: dict[str, Any] = {
            "row_key": pa.array([hash64(getattr(row, id_field), ROW_KEY_SALT) for row in rows], pa.uint64()),
            "source_index": pa.array(source_indices, pa.int32()),
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
            openings = [row.messages[0].content for row in rows]
            columns["conversation_key"] = pa.array(conversation_keys, pa.uint64())
            columns["opening_key"] = pa.array([hash64(text, "rluf-opening") for text in openings], pa.uint64())
        content_fields = _CONTENT_FIELDS[get_row_kind(kind.name)]
        contents = [[str(getattr(row, name)) for name in content_fields] for row in rows]
        is_labeled = get_row_kind(kind.name) in ("preferences", "safety")
        if is_labeled:
            # Pairs and labels are equal, or contrary, whatever their white space and case, as prompts are.
            contents = [[" ".join(text.casefold().split()) for text in texts] for texts in contents]
        columns["response_key"] = _hash_contents(contents)
        text_fields = [name for name in content_fields if name in _TEXT_COLUMNS]
        if text_fields:
            # The last message only: the rows of a conversation have all earlier ones in common.
            texts = [[row.messages[-1].content, *(getattr(row, name) for name in text_fields)] for row in rows]
            columns["row_band_hashes"] = _build_list_column(splits.compute_row_band_hashes(texts))
        if is_labeled:
            # The content that contradicts a row: the reverse pair, or the same response with the other label.
            is_pair = get_row_kind(kind.name) == "preferences"
            contraries = [texts[::-1] if is_pair else [texts[0], str(1 - int(texts[1]))] for texts in contents]
            columns["contrary_key"] = _hash_contents(contraries)
        if "reaction" in table.column_names:
            columns["reaction_label"] = self._label_reactions(table["reaction"])
        if "messages" in kind.record_type.model_fields:
            columns |= self._build_prompt_columns(rows)
            columns["split"] = self._split_codes(table)
        columns |= {name: table[name].combine_chunks() for name in _INDEX_COLUMNS if name in table.column_names}
        # Hashes of 8 bytes: the second pass has the index of all rows in memory, and only asks whether users are equal.
        for name in USER_COLUMNS & set(table.column_names):
            keys = [None if user_id is None else self._hash_key(user_id) for user_id in table[name].to_pylist()]
            columns[name] = pa.array(keys, pa.uint64())
        return pa.table(columns)

    def _build_prompt_columns(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Prompt keys [N] and near-duplicate band hashes [N, BAND_COUNT] of the contexts before redaction."""
        texts = [normalize_context((message.role, message.content) for message in row.messages) for row in rows]
        prompt_keys = np.fromiter((hash64(text, "rluf-prompt") for text in texts), dtype=np.uint64, count=len(texts))
        # MinHash costs far more than hash64, so each distinct context is hashed once.
        _, first_rows, unique_index = np.unique(prompt_keys, return_index=True, return_inverse=True)
        band_hashes = splits.compute_band_hashes([texts[row] for row in first_rows])[unique_index]
        return {"prompt_key": pa.array(prompt_keys), "band_hashes": _build_list_column(band_hashes)}

    def _split_codes(self, table: pa.Table) -> pa.Array:
        keys = table[self.kind.split_key].to_pylist()
        split_names = keys if self.kind.split_key == "split" else map(self._assign_split, keys)
        return pa.array([SPLIT_NAMES.index(name) for name in split_names], pa.int8())

    def close(self) -> None:
        """Write what is left and finish all files."""
        self._write_pending()
        self._bucket_writer.close()
        if self._quarantine_file is not None:
            self._quarantine_file.close()


def _hash_contents(contents: Sequence[Sequence[str]]) -> pa.Array:
    """Key of the contents of each row [N]."""
    return pa.array([hash64("\x1f".join(texts), "rluf-answer") for texts in contents], pa.uint64())


def _build_list_column(values: splits.HashKeys) -> pa.Array:
    """Column of lists of equal length from an array [N, length]."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def count_scripts(texts: pa.Array) -> Counter[str]:
    """Number of texts by the script of most letters in their first characters; Japanese counts as Kana."""
    starts = pc.utf8_slice_codeunits(texts, 0, SCRIPT_CHARS)
    is_ascii = pc.string_is_ascii(starts)
    counts = Counter({"Latin": pc.sum(pc.match_substring_regex(starts.filter(is_ascii), "[A-Za-z]")).as_py() or 0})
    counts["none"] = (pc.sum(is_ascii).as_py() or 0) - counts["Latin"]
    other_texts = starts.filter(pc.invert(is_ascii))
    if len(other_texts):
        letters = np.stack([pc.count_substring_regex(other_texts, rf"[{p}]").to_numpy() for p in SCRIPTS.values()])
        # Japanese has more Han letters than Kana in many sentences, Chinese has no Kana.
        kana, han = (list(SCRIPTS).index(name) for name in ("Kana", "Han"))
        letters[kana] += np.where(letters[kana] > 0, letters[han], 0)
        names, has_letters = list(SCRIPTS), letters.max(0) > 0
        counts.update(names[code] for code in letters.argmax(0)[has_letters].tolist())
        counts["none"] += int((~has_letters).sum())
    return +counts


RowAdapter = Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any] | SkippedRow]]


def _build_adapter(task: ValidateTask, source_path: str, converter: RowConverter) -> RowAdapter | None:
    """Function from a raw object to rows of rluf's schema; None if the file holds such rows already."""
    entry, options = task.source, ReaderOptions(task.test_share)
    field_names = converter.record_type.model_fields
    partitions = parse_partition_fields(source_path)
    read_item = find_reader(entry.reader, task.kind_name).read_item if entry.reader is not None else None
    is_text = (entry.format or detect_format(source_path)) in ("csv", "tsv")
    if entry.reader is None and not (converter.columns or entry.where or entry.roles or is_text):
        folder_fields = {name: value for name, value in partitions.items() if name in field_names}
        return (lambda row: [{**folder_fields, **row}]) if folder_fields else None

    def read_row(raw_row: Mapping[str, Any]) -> list[Mapping[str, Any] | SkippedRow]:
        row = {**partitions, **raw_row} if partitions else raw_row
        if page := find_page(raw_row, converter.columns if read_item is None else None):
            return [item for entry in page for item in read_row(entry)]
        items = [converter.read_row(row)] if read_item is None else read_item(row, options)
        named_items = [_name_one_reaction(item, converter) for item in items]
        return [_apply_conditions(item, row, entry.where, converter.path_counts) for item in named_items]

    return read_row


def _name_one_reaction(item: Mapping[str, Any] | SkippedRow, converter: RowConverter) -> Mapping[str, Any] | SkippedRow:
    """A reader's row with one reaction by name, where the reader left a number, a truth value or a list."""
    if isinstance(item, SkippedRow) or not isinstance(item.get("reaction"), bool | int | float | list):
        return item
    return {**item, "reaction": converter.choose_reaction(item["reaction"])}


def _apply_conditions(
    item: Mapping[str, Any] | SkippedRow,
    raw_row: Mapping[str, Any],
    where: Mapping[str, Any],
    path_counts: Counter[str],
) -> Mapping[str, Any] | SkippedRow:
    if isinstance(item, SkippedRow) or not where:
        return item
    path = find_failed_condition(where, raw_row, item, path_counts)
    return item if path is None else SkippedRow(f"excluded by where: {path}")


_RawItem = tuple[int, int, bytes, bytes]
"""Line number, item of the line, row as JSON, raw bytes."""


def _read_line(line: RawLine, adapt: RowAdapter, reader_name: str) -> Sequence[Mapping[str, Any] | SkippedRow] | str:
    """Rows of a line; the reason if it has another shape."""
    try:
        # NaN is how Python and Parquet write that a value is missing.
        raw_row = json.loads(line.raw, parse_constant=lambda _: None)
        if not isinstance(raw_row, dict):
            return "not an object"
        return adapt(raw_row)
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError:
        return "broken JSON"
    except RowShapeError as error:
        is_complete = str(error).startswith("missing field")
        return str(error) if is_complete else f"not a row of reader {reader_name}: {error}"
    except KeyError as error:
        return f"not a row of reader {reader_name}: no key {error.args[0]!r}"[:MAX_REASON_CHARS]
    # Readers index into foreign objects without checks; any of these means that the object has another shape.
    except (TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError, OSError):
        return f"not a row of reader {reader_name}"


def _parse_lines(
    lines: Sequence[RawLine], adapt: RowAdapter | None, reader_name: str, writer: _ValidationWriter
) -> Iterator[_RawItem]:
    """Yield the rows of lines; count and write broken and skipped ones."""
    rejected_rows: list[tuple[int, str, bytes]] = []
    for line in lines:
        if line.problem or adapt is None:
            writer.count_rows("in", "")
            if line.problem:
                rejected_rows.append((line.line_number, line.problem, line.raw))
            else:
                yield line.line_number, 0, line.raw, line.raw
            continue
        items = _read_line(line, adapt, reader_name)
        if isinstance(items, str):
            writer.count_rows("in", "")
            rejected_rows.append((line.line_number, items, line.raw))
            continue
        for item_index, item in enumerate(items):
            writer.count_rows("in", "")
            if isinstance(item, SkippedRow):
                writer.count_rows("dropped", item.reason)
            else:
                writer.notes.update(item.get(NOTES_KEY, {}))
                row = {name: value for name, value in item.items() if name != NOTES_KEY}
                yield line.line_number, item_index, json.dumps(row).encode(), line.raw
    if rejected_rows:
        writer.write_rejected(rejected_rows)


def _validate_items(
    items: Sequence[_RawItem], converter: RowConverter, is_own_shape: bool, now: datetime, writer: _ValidationWriter
) -> None:
    """Validate rows and write them as accepted or rejected."""
    rows = validate_json_rows([row_json for _, _, row_json, _ in items], converter.record_type, now)
    rejected_rows = []
    for index, (line_number, _, row_json, raw) in enumerate(items):
        if isinstance(rows[index], RejectedRow) and is_own_shape:
            repaired_json, notes = None, Counter[str]()
            try:
                repaired_json, notes = converter.repair(row_json)
            except RowShapeError as error:
                rows[index] = RejectedRow(str(error))
            if repaired_json is not None:
                rows[index] = validate_json_rows([repaired_json], converter.record_type, now)[0]
                writer.notes.update(notes if not isinstance(rows[index], RejectedRow) else {})
        if isinstance(rows[index], RejectedRow):
            rejected_rows.append((line_number, rows[index].reason, raw))
    if rejected_rows:
        writer.write_rejected(rejected_rows)
    accepted = [index for index, row in enumerate(rows) if not isinstance(row, RejectedRow)]
    if converter.record_type is PromptRecord:
        for index in accepted:
            rows[index] = _add_extra_fields(rows[index], items[index][3], writer)
    if accepted:
        byte_count = sum(len(items[index][2]) for index in accepted)
        writer.write_accepted([rows[index] for index in accepted], [items[index][:2] for index in accepted], byte_count)


def _add_extra_fields(row: Any, raw: bytes, writer: _ValidationWriter) -> Any:
    """The prompt with the further fields of its raw row, redacted, for reward functions."""
    try:
        raw_row = json.loads(raw)
    except ValueError:
        return row
    if not isinstance(raw_row, dict):
        return row
    fields = {name: value for name, value in raw_row.items() if name not in PROMPT_ROW_KEYS}
    text = json.dumps(writer.redact_value(fields), ensure_ascii=False)
    if not fields:
        return row
    if len(text) > MAX_TEXT_CHARS:
        writer.notes["further fields of a prompt left out, as they are too long"] += 1
        return row
    if isinstance(row, PromptRecord):
        return row.model_copy(update={"extra_fields": text})
    row.extra_fields = text
    return row


def validate_rows(task: ValidateTask) -> dict[str, Any]:
    """Run the first pass on one stripe of some files; returns what the card counts: rows, redactions, reactions."""
    now, entry = datetime.fromisoformat(task.current_time), task.source
    writer, rows_read = _ValidationWriter(task), RowsReadFile(task.work_folder, f"{task.kind_name}-{task.file_stem}")
    columns = find_reader(entry.reader, task.kind_name).columns if entry.reader is not None else {}
    converter = build_converter(task.kind_name, entry, columns, writer.rules, task.contradictions, task.test_share)
    for writer.source_index, writer.source_path in task.sources:
        adapt = _build_adapter(task, writer.source_path, converter)
        lines_of_file = read_line_batches(
            writer.source_path, task.stripe_index, task.stripe_count, format_name=entry.format
        )
        for lines in _rebatch_lines(lines_of_file):
            pending, pending_bytes = [], 0
            for item in _parse_lines(lines, adapt, entry.reader or "columns", writer):
                pending.append(item)
                pending_bytes += len(item[2])
                # A reader may turn one chat into a row for each of its turns, each with all messages before it.
                if pending_bytes > _MAX_PENDING_BYTES:
                    _validate_items(pending, converter, adapt is None, now, writer)
                    pending, pending_bytes = [], 0
            _validate_items(pending, converter, adapt is None, now, writer)
            rows_read.add(len(lines))
    writer.close()
    row_counts = [
        RowCount(task.kind_name, key[1], rows, key[0], key[2], writer.example_locations.get(key, ""))
        for key, rows in writer.row_counts.items()
        if rows
    ]
    return {
        "row_counts": row_counts, "redacted": dict(writer.redaction_counts), "reactions": dict(writer.reaction_counts),
        "lengths": dict(writer.length_counts), "scripts": dict(writer.script_counts), "notes": dict(+writer.notes),
        "paths": dict(converter.path_counts),
    }  # fmt: skip


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
