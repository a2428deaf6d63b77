"""The three passes over the data, each a function that a worker runs on one part and that returns small counts only.

check: one stripe of one file -> good rows, parted by a hash of their id; bad rows with reasons.
split: one part of one kind -> duplicates and test prompts taken out; rows by train, dev and test.
write: one split of one kind -> sampled rows with weights, in the file that training reads.

Rows go from pass to pass in Parquet files of a working folder that all workers see, so neither the driver nor the
object store holds them. Files are named after their part and appear by a rename: a pass that runs twice, after a lost
worker, writes the same again.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rluf.feedback.readers import READERS, Drop, Options
from rluf.feedback.sampling import Quota, choose, quota
from rluf.feedback.schema import KINDS, LOVE, FeedbackRecord, Kind, Record, arrow_schema
from rluf.feedback.sources import Line, Source, read_lines
from rluf.feedback.splits import bucket, place, prompt_key, side
from rluf.feedback.validate import Bad, validate

RAW_LIMIT = 2**20
"""Bytes of a bad row that quarantine keeps."""

_FLUSH = 1000
"""Rows held for one part before they are written."""

_EXTRA = [
    pa.field("_source", pa.string()),
    pa.field("_order", pa.int32()),
    pa.field("_line", pa.int64()),
    pa.field("_item", pa.int32()),
    pa.field("_raw", pa.binary()),
    pa.field("_side", pa.string()),
    pa.field("_prompt", pa.string()),
]

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
    """Some rows that went the same way. `event` is in, kept, dropped, quarantined or sampled out."""

    kind: str
    event: str
    rows: int
    source: str = ""
    reason: str = ""
    side: str = ""
    topic: str = ""
    label: int = -1
    example: str = ""
    first: str = ""
    last: str = ""


class _Writer:
    """A Parquet file that takes rows bit by bit and appears under its name only when closed."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._schema = path, schema
        self._part = path.with_name(f".{path.name}.{os.getpid()}")
        self._file = pq.ParquetWriter(self._part, schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def table(self, table: pa.Table) -> None:
        self._file.write_table(table.cast(self._schema))

    def close(self) -> None:
        self._flush()
        self._file.close()
        self._part.replace(self._path)


def _items(line: Line, source: Source, options: Options, now: datetime) -> Iterator[Record | Bad | Drop]:
    """What one raw line holds: usually one record, with a reader perhaps several."""
    record = KINDS[source.kind].record
    if line.problem:
        yield Bad(line.problem)
        return
    if source.reader is None:
        yield validate(line.raw, record, now)
        return
    try:
        rows = READERS[source.reader].read(json.loads(line.raw), options)
    except UnicodeDecodeError:
        yield Bad("not UTF-8")
    except json.JSONDecodeError:
        yield Bad("broken JSON")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
        yield Bad(f"not a row of reader {source.reader}")
    else:
        for row in rows:
            yield row if isinstance(row, Drop) else validate(json.dumps(row).encode(), record, now)


def _side(row: Mapping[str, Any], kind: Kind, dev_share: float, test_share: float) -> str:
    key = row[kind.split_by]
    return str(key) if kind.split_by == "split" else side(key, dev_share=dev_share, test_share=test_share)


@dataclass(frozen=True, slots=True)
class CheckTask:
    """One stripe of one file, and where its rows go."""

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


def check(task: CheckTask) -> list[Tally]:
    """First pass. Good rows go to rows/<kind>/<bucket>/, bad ones to bad/; returns counts by event and reason."""
    kind, now = KINDS[task.kind], datetime.fromisoformat(task.now)
    source, options = Source(task.kind, task.path, task.reader), Options(task.test_share)
    name = f"{task.order:05d}-{task.stripe:05d}.parquet"
    good_schema = pa.schema([*arrow_schema(kind.record), *_EXTRA])
    good: dict[int, _Writer] = {}
    bad: _Writer | None = None
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for line in read_lines(source, task.stripe, task.stripes):
        for number, item in enumerate(_items(line, source, options, now)):
            counts["in", ""] += 1
            if isinstance(item, Drop):
                counts["dropped", item.reason] += 1
            elif isinstance(item, Bad):
                counts["quarantined", item.reason] += 1
                examples.setdefault(("quarantined", item.reason), f"{task.path}:{line.number}")
                bad = bad or _Writer(Path(task.work) / "bad" / f"{task.kind}-{name}", BAD_SCHEMA)
                where = {"kind": task.kind, "source": task.path, "line": line.number}
                bad.add({**where, "reason": item.reason, "raw": line.raw[:RAW_LIMIT]})
            else:
                row = item.model_dump()
                part = bucket(row["id"], task.buckets)
                if part not in good:
                    good[part] = _Writer(Path(task.work) / "rows" / task.kind / str(part) / name, good_schema)
                row |= {"_source": task.path, "_order": task.order, "_line": line.number, "_item": number}
                row |= {"_raw": line.raw[:RAW_LIMIT], "_prompt": prompt_key(row["messages"])}
                row["_side"] = _side(row, kind, task.dev_share, task.test_share)
                good[part].add(row)
    for writer in [*good.values(), *([bad] if bad else [])]:
        writer.close()
    return [
        Tally(task.kind, event, rows, source=task.path, reason=reason, example=examples.get((event, reason), ""))
        for (event, reason), rows in counts.items()
    ]


@dataclass(frozen=True, slots=True)
class SplitTask:
    """One part of one kind: all rows whose id hashes there."""

    work: str
    kind: str
    part: int


def _test_prompts(work: str) -> set[str]:
    """Keys of the contexts kept for evaluation."""
    keys: set[str] = set()
    for file in sorted((Path(work) / "rows" / "prompts").glob("*/*.parquet")):
        table = pq.read_table(file, columns=["_side", "_prompt"])
        keys.update(table.filter(pc.equal(table["_side"], "test"))["_prompt"].to_pylist())
    return keys


def _fates(table: pa.Table, kept_out: set[str]) -> list[str]:
    """What becomes of each row [N], in file order: keep, duplicate, or leak (its context is a test prompt)."""
    seen: set[str] = set()
    fates = []
    columns = (table[name].to_pylist() for name in ("id", "_side", "_prompt"))
    for row_id, where, prompt in zip(*columns, strict=True):
        if row_id in seen:
            fates.append("duplicate")
        else:
            seen.add(row_id)
            fates.append("leak" if where != "test" and prompt in kept_out else "keep")
    return fates


def _labels(table: pa.Table, kind: Kind) -> pa.Array:
    """Label of each row [N]: loved or not, safe or not; 1 where the kind has none."""
    if kind.record is FeedbackRecord:
        return pc.cast(pc.fill_null(pc.equal(table["reaction"], LOVE), False), pa.int64())
    return table["label"] if "label" in table.column_names else pa.array(np.ones(table.num_rows, dtype=np.int64))


def split(task: SplitTask) -> list[Tally]:
    """Second pass. Of rows with one id the first stays and the others go to quarantine; rows of train and dev whose
    context is a test prompt are dropped; the rest goes to sides/<kind>/<side>/. Returns counts.
    """
    kind, work = KINDS[task.kind], Path(task.work)
    files = sorted((work / "rows" / task.kind / str(task.part)).glob("*.parquet"))
    if not files:
        return []
    table = pa.concat_tables([pq.read_table(file) for file in files])
    table = table.sort_by([("_order", "ascending"), ("_line", "ascending"), ("_item", "ascending")])
    fates = pa.array(_fates(table, _test_prompts(task.work)))
    tallies = []
    twins = table.filter(pc.equal(fates, "duplicate"))
    if twins.num_rows:
        columns = {"kind": pa.array([task.kind] * twins.num_rows), "source": twins["_source"], "line": twins["_line"]}
        columns |= {"reason": pa.array(["duplicate id"] * twins.num_rows), "raw": twins["_raw"]}
        writer = _Writer(work / "bad" / f"{task.kind}-twins-{task.part:05d}.parquet", BAD_SCHEMA)
        writer.table(pa.table(columns))
        writer.close()
        where = f"{twins['_source'][0].as_py()}:{twins['_line'][0].as_py()}"
        tallies.append(Tally(task.kind, "quarantined", twins.num_rows, reason="duplicate id", example=where))
    leaks = pc.sum(pc.equal(fates, "leak")).as_py() or 0
    if leaks:
        tallies.append(Tally(task.kind, "dropped", leaks, reason="context is a test prompt"))
    table = table.filter(pc.equal(fates, "keep"))
    table = table.take(np.argsort([place(row_id) for row_id in table["id"].to_pylist()], kind="stable"))
    table = table.append_column("_label", _labels(table, kind))
    for name in kind.splits:
        rows = table.filter(pc.equal(table["_side"], name))
        if not rows.num_rows:
            continue
        plain = rows.select(list(dict.fromkeys([*kind.columns, kind.split_by, "_label"])))
        writer = _Writer(work / "sides" / task.kind / name / f"{task.part:05d}.parquet", plain.schema)
        writer.table(plain)
        writer.close()
        first, last = _times(rows)
        groups = rows.group_by(["topic", "_label"]).aggregate([([], "count_all")]).to_pylist()
        tallies += [
            Tally(
                task.kind,
                "kept",
                g["count_all"],
                side=name,
                topic=g["topic"],
                label=g["_label"],
                first=first,
                last=last,
            )
            for g in groups
        ]
    return tallies


def _times(table: pa.Table) -> tuple[str, str]:
    """First and last time of the rows as ISO 8601, empty for kinds without time."""
    if "time" not in table.column_names:
        return "", ""
    ends = pc.min_max(table["time"]).as_py()
    return ends["min"].isoformat(), ends["max"].isoformat()


@dataclass(frozen=True, slots=True)
class WriteTask:
    """One split of one kind (or the quarantine), and how it is sampled. `max_rows` 0 keeps all rows."""

    work: str
    kind: str
    side: str
    path: str
    positive_share: float | None
    max_rows: int
    seed: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a prepared file holds: rows, distinct users or groups, and the quota that its weights come from."""

    kind: str
    side: str
    rows: int
    units: int
    quota: Quota


def write(task: WriteTask) -> Written:
    """Third pass: stream the rows of one split into its file, leaving out those that sampling drops.

    Rows lie in the order of a hash of their id, so the first n are a sample at random, however many blocks there were.

    Only ids and labels of the split are held at once (some 100 bytes a row).
    """
    if task.kind == "quarantine":
        return _write_quarantine(task)
    kind = KINDS[task.kind]
    files = sorted((Path(task.work) / "sides" / task.kind / task.side).glob("*.parquet"))
    index = pa.concat_tables([pq.read_table(f, columns=["id", "_label", kind.split_by]) for f in files])
    positive = index["_label"].to_numpy() == 1
    good = int(positive.sum())
    plan = quota(
        good, len(positive) - good, positive_share=task.positive_share, max_rows=task.max_rows or len(positive)
    )
    weight = choose(index["id"].to_pylist(), positive, plan, seed=task.seed)
    fields = [arrow_schema(kind.record).field(name) for name in kind.columns]
    if kind.record is FeedbackRecord:
        fields.append(pa.field("label", pa.int64(), nullable=False))
    if kind.name != "prompts":
        fields.append(pa.field("weight", pa.float64(), nullable=False))
    schema = pa.schema(fields, metadata=arrow_schema(kind.record).metadata)
    writer = _Writer(Path(task.path), schema)
    start = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(_FLUSH):
            table = pa.Table.from_batches([batch])
            part = weight[start : start + table.num_rows]
            start += table.num_rows
            columns = {name: table[name] for name in kind.columns}
            columns |= {"label": table["_label"]} if "label" in schema.names else {}
            columns |= {"weight": pa.array(part)} if "weight" in schema.names else {}
            writer.table(pa.table([columns[name] for name in schema.names], schema=schema).filter(pa.array(part > 0)))
    writer.close()
    units = pc.count_distinct(index[kind.split_by].filter(pa.array(weight > 0))).as_py()
    return Written(task.kind, task.side, int((weight > 0).sum()), units, plan)


def _write_quarantine(task: WriteTask) -> Written:
    writer = _Writer(Path(task.path), BAD_SCHEMA)
    rows = 0
    for file in sorted((Path(task.work) / "bad").glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(_FLUSH):
            writer.table(pa.Table.from_batches([batch]))
            rows += batch.num_rows
    writer.close()
    return Written("quarantine", "", rows, 0, Quota(0, 0, 0, 0))


def run_task(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run one task in a Ray Data worker: the row names the pass and holds its task as JSON; so do the rows returned."""
    fields = json.loads(row["task"])
    if row["name"] == "check":
        found: list[Tally] | list[Written] = check(CheckTask(**fields))
    elif row["name"] == "split":
        found = split(SplitTask(**fields))
    else:
        found = [write(WriteTask(**fields))]
    return [{"result": json.dumps(asdict(item))} for item in found]


def group_counts(tallies: Sequence[Tally], event: str) -> dict[str, Counter[str]]:
    """Rows of one event by kind and reason."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for tally in tallies:
        if tally.event == event:
            counts[tally.kind][tally.reason] += tally.rows
    return counts
