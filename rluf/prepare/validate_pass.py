"""First pass: one stripe of one file becomes checked, redacted rows, an index of what later passes go by, and bad rows.

Rows lie in files by bucket, a range of places; the index beside each has a row for each of its rows, some 150 bytes
with neither messages nor response.
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

from rluf.prepare import near_duplicates as near
from rluf.prepare.erasure import REASON, forgotten
from rluf.prepare.fast_validation import check_rows, to_arrow
from rluf.prepare.readers.datasets import READERS, Drop, Options
from rluf.prepare.readers.files import Line, partition_fields, read_batches
from rluf.prepare.readers.products import MAPS, column_map
from rluf.prepare.redact import hash_user, redact_array
from rluf.prepare.sampling import sample_salt
from rluf.prepare.schema import KINDS, Kind
from rluf.prepare.splits import ROW_KEY, context_text, hash64, side, units
from rluf.prepare.tables import TableFile, Tally, bad_table
from rluf.prepare.validation import Bad

SIDES = ("train", "dev", "test")

_ROWS = 4096
"""Raw rows that are checked together."""

_PLAIN = ("topic", "time", "turn", "model_version", "locale", "interface", "device", "author", "continued", "returned",
          "reaction", "retracted", "user_id", "label")  # fmt: skip
"""Columns that go into the index as they are, where the kind has them."""

_TEXTS = ("response", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class CheckTask:
    """One stripe of one file, and where its rows go. `salt` is hexadecimal, empty for none."""

    work: str
    kind: str
    path: str
    reader: str | None
    order: int
    stripe: int
    stripes: int
    buckets: int
    now: str
    dev_share: float
    test_share: float
    seed: int
    redact: Sequence[str]
    columns: Mapping[str, str]
    forgotten: Sequence[str]
    salt: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """Name of this part's files; they sort as rows lie in the log."""
        return f"{self.order:05d}-{self.stripe:05d}"


class _Rows:
    """What `check` has found so far, written as it grows."""

    def __init__(self, task: CheckTask) -> None:
        self.task, self.kind = task, KINDS[task.kind]
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], str] = {}
        self.redacted: Counter[str] = Counter()
        self._files: dict[tuple[str, int], TableFile] = {}
        self._bad: TableFile | None = None
        salt = bytes.fromhex(task.salt) or None
        self._user = cache(lambda user: user and hash_user(user, salt))
        self._side = cache(lambda key: side(key, dev_share=task.dev_share, test_share=task.test_share))

    def bad(self, rows: Sequence[tuple[int, str, bytes]]) -> None:
        for line, reason, _ in rows:
            self.counts["quarantined", reason] += 1
            self.examples.setdefault(("quarantined", reason), f"{self.task.path}:{line}")
        table = bad_table(self.task.kind, self.task.path, rows)
        path = Path(self.task.work) / "bad" / f"{self.task.kind}-{self.task.name}.parquet"
        self._bad = self._bad or TableFile(path, table.schema)
        self._bad.write(table)

    def good(self, rows: Sequence[Any], where: Sequence[tuple[int, int]]) -> None:
        """Add rows that passed; `where` are their (line, item)."""
        table = self._private(to_arrow(rows, self.kind.record))
        index = self._index(rows, table, where)
        if self.task.forgotten and "user_id" in table.column_names:
            stay = pc.invert(pa.array(forgotten(table["user_id"].to_pylist(), self.task.forgotten)))
            gone = table.num_rows - pc.sum(stay).as_py()
            self.counts["dropped", REASON] += gone
            table, index = table.filter(stay), index.filter(stay)
        part = (units(index["key"].to_numpy()) * self.task.buckets).astype(np.int64)
        for bucket in np.unique(part):
            mask = pa.array(part == bucket)
            for name, found in (("index", index), ("rows", table)):
                if name == "rows" and not self.kind.splits:
                    continue
                key = name, int(bucket)
                if key not in self._files:
                    path = Path(self.task.work) / name / self.task.kind / f"{bucket:05d}" / f"{self.task.name}.arrow"
                    self._files[key] = TableFile(path, found.schema)
                self._files[key].write(found.filter(mask))

    def _private(self, table: pa.Table) -> pa.Table:
        """The table with texts redacted and users, devices and authors hashed."""
        for name in table.column_names:
            column = table[name].combine_chunks()
            if name in ("user_id", "device", "author"):
                if self.task.salt:
                    column = pa.array([self._user(user) for user in column.to_pylist()], pa.string())
            elif name in _TEXTS:
                column, found = redact_array(column, self.task.redact)
                self.redacted += found
            elif name == "messages":
                inner = column.values
                contents, found = redact_array(inner.field("content"), self.task.redact)
                self.redacted += found
                if found:
                    fields = list(column.type.value_type)
                    inner = pa.StructArray.from_arrays([inner.field("role"), contents], fields=fields)
                    column = pa.ListArray.from_arrays(column.offsets, inner, type=column.type)
            else:
                continue
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
        return table

    def _index(self, rows: Sequence[Any], table: pa.Table, where: Sequence[tuple[int, int]]) -> pa.Table:
        kind, count = self.kind, len(rows)
        own = "response_id" if kind.name == "reactions" else "id"
        salt = sample_salt(self.task.seed)
        columns: dict[str, Any] = {
            "key": pa.array([hash64(getattr(row, own), ROW_KEY) for row in rows], pa.uint64()),
            "order": pa.array(np.full(count, self.task.order, dtype=np.int32)),
            "line": pa.array([line for line, _ in where], pa.int64()),
            "item": pa.array([item for _, item in where], pa.int32()),
        }
        if kind.name == "reactions":
            columns["event"] = pa.array([hash64(row.id, ROW_KEY) for row in rows], pa.uint64())
        if kind.splits and kind.name != "prompts":
            columns["sample"] = pa.array([hash64(row.id, salt) for row in rows], pa.uint64())
        if kind.name == "feedback":
            columns["conversation"] = pa.array([hash64(row.conversation_id, "rluf-talk") for row in rows], pa.uint64())
            columns["answer"] = pa.array([hash64(row.response, "rluf-answer") for row in rows], pa.uint64())
        if "messages" in kind.record.model_fields:
            columns |= self._prompts(rows)
            columns["side"] = self._sides(table)
        if "group" in table.column_names:
            columns["unit"] = table["group"].combine_chunks()
        columns |= {name: table[name].combine_chunks() for name in _PLAIN if name in table.column_names}
        return pa.table(columns)

    def _prompts(self, rows: Sequence[Any]) -> dict[str, Any]:
        texts = [context_text((message.role, message.content) for message in row.messages) for row in rows]
        keys = np.fromiter((hash64(text, "rluf-prompt") for text in texts), dtype=np.uint64, count=len(texts))
        _, first, mine = np.unique(keys, return_index=True, return_inverse=True)
        found = near.bands([texts[index] for index in first])[mine]
        flat = pa.array(np.ascontiguousarray(found).reshape(-1))
        return {"prompt": pa.array(keys), "bands": pa.FixedSizeListArray.from_arrays(flat, near.BANDS)}

    def _sides(self, table: pa.Table) -> pa.Array:
        keys = table[self.kind.split_by].to_pylist()
        names = keys if self.kind.split_by == "split" else map(self._side, keys)
        return pa.array([SIDES.index(name) for name in names], pa.int8())

    def close(self) -> None:
        for file in [*self._files.values(), *([self._bad] if self._bad else [])]:
            file.close()


def _adapter(task: CheckTask) -> Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any] | Drop]] | None:
    """What turns a raw object into our rows; None when it is a row of ours as it stands."""
    options, folders = Options(task.test_share), partition_fields(task.path)
    folders = {name: value for name, value in folders.items() if name in KINDS[task.kind].record.model_fields}
    if task.reader is not None:
        read = (READERS | MAPS)[task.reader].read
        return lambda row: read({**folders, **row}, options)
    if task.kind == "feedback" and task.columns:
        mapped = column_map(task.columns)
        return lambda row: [mapped({**folders, **row})]
    return (lambda row: [{**folders, **row}]) if folders else None


def _items(lines: Sequence[Line], task: CheckTask, found: _Rows) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Rows as JSON of ours with (line, item, JSON, raw bytes); what is broken or left out is counted."""
    adapt, name = _adapter(task), task.reader or "columns"
    bad: list[tuple[int, str, bytes]] = []
    for line in lines:
        if line.problem or adapt is None:
            found.counts["in", ""] += 1
            if line.problem:
                bad.append((line.number, line.problem, line.raw))
            else:
                yield line.number, 0, line.raw, line.raw
            continue
        try:
            rows = adapt(json.loads(line.raw))
        except UnicodeDecodeError:
            rows, reason = [], "not UTF-8"
        except json.JSONDecodeError:
            rows, reason = [], "broken JSON"
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError, OSError):
            rows, reason = [], f"not a row of reader {name}"
        else:
            reason = ""
        if reason:
            found.counts["in", ""] += 1
            bad.append((line.number, reason, line.raw))
        for number, row in enumerate(rows):
            found.counts["in", ""] += 1
            if isinstance(row, Drop):
                found.counts["dropped", row.reason] += 1
            else:
                yield line.number, number, json.dumps(row).encode(), line.raw
    if bad:
        found.bad(bad)


def check(task: CheckTask) -> dict[str, Any]:
    """Run the first pass on one part. Returns tallies and how much was redacted, by kind."""
    kind, now = KINDS[task.kind], datetime.fromisoformat(task.now)
    found = _Rows(task)
    for lines in _gathered(read_batches(task.path, task.stripe, task.stripes)):
        items = list(_items(lines, task, found))
        checked = check_rows([row for _, _, row, _ in items], kind.record, now)
        bad = [
            (line, row.reason, raw)
            for (line, _, _, raw), row in zip(items, checked, strict=True)
            if isinstance(row, Bad)
        ]
        if bad:
            found.bad(bad)
        good = [n for n, row in enumerate(checked) if not isinstance(row, Bad)]
        if good:
            found.good([checked[n] for n in good], [items[n][:2] for n in good])
    found.close()
    tallies = [
        Tally(task.kind, event, rows, source=task.path, reason=reason, example=found.examples.get((event, reason), ""))
        for (event, reason), rows in found.counts.items()
        if rows
    ]
    return {"tallies": tallies, "redacted": dict(found.redacted)}


def _gathered(batches: Iterator[list[Line]]) -> Iterator[list[Line]]:
    """Larger batches of lines."""
    waiting: list[Line] = []
    for lines in batches:
        waiting += lines
        while len(waiting) >= _ROWS:
            yield waiting[:_ROWS]
            waiting = waiting[_ROWS:]
    if waiting:
        yield waiting


__all__ = ["SIDES", "CheckTask", "Kind", "check"]
