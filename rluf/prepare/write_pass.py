"""Third pass of prepare: write the rows of one split, in the order of their row keys, for training to read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rluf.prepare.schema import SPLIT_NAMES, FeedbackRecord, build_arrow_schema, find_data_kind
from rluf.prepare.splits import to_unit_interval
from rluf.prepare.workspace import QUARANTINE_SCHEMA, BatchReader, TableWriter, read_table

_JOINED_COLUMNS = ("reaction", "continued", "returned")
"""Columns of feedback that the second pass may fill in: their values come from its decisions, not from the log."""


@dataclass(frozen=True, slots=True)
class WriteTask:
    """One split of one kind (or the quarantine), and its file."""

    work_folder: str
    kind_name: str
    split: str
    output_path: str
    bucket_count: int


def build_data_schema(kind_name: str) -> pa.Schema:
    """Columns of a prepared file.

    `weight` = `sampling` (one over the share of the row's class that was sampled) x `trust` (weight after the abuse
    rules, 0.01 to 1); `propensity` is the probability that a row like this gets any reaction.
    """
    kind = find_data_kind(kind_name)
    record_schema = build_arrow_schema(kind.record_type)
    fields = [record_schema.field(name) for name in kind.output_columns]
    if kind.record_type is FeedbackRecord:
        fields.append(pa.field("label", pa.int64(), nullable=False))
    if kind.name != "prompts":
        fields.append(pa.field("weight", pa.float64(), nullable=False))
    if kind.record_type is FeedbackRecord:
        fields += [pa.field(name, pa.float64(), nullable=False) for name in ("sampling", "trust", "propensity")]
    return pa.schema(fields, metadata=record_schema.metadata)


def write_split_file(task: WriteTask) -> dict[str, Any]:
    """Run the third pass on one file and return its row count. Memory: the rows of one bucket at a time."""
    if task.kind_name == "quarantine":
        return {"rows": _write_quarantine(task)}
    work_folder = Path(task.work_folder)
    schema = build_data_schema(task.kind_name)
    split_code, row_count = SPLIT_NAMES.index(task.split), 0
    writer = TableWriter(Path(task.output_path), schema)
    decision_reader, row_reader = BatchReader(), BatchReader(_list_row_columns(task.kind_name))
    # A bucket is a range of row keys, so sorting within buckets in their order sorts the whole file.
    for batches in _find_bucket_batches(work_folder / "decisions" / task.kind_name, task.bucket_count):
        tables = []
        for decision_file, batch_index in batches:
            decisions = decision_reader.read(decision_file, batch_index)
            row_mask = pc.and_(pc.equal(decisions["split"], split_code), pc.greater(decisions["sampling"], 0))
            if pc.any(row_mask).as_py():
                row_file = work_folder / "rows" / task.kind_name / decision_file.name
                row_table = row_reader.read(row_file, batch_index)
                tables.append(_join_decisions(row_table.filter(row_mask), decisions.filter(row_mask), schema))
        if tables:
            table = pa.concat_tables(tables)
            # The 53 bits that define the bucket; a stable sort leaves rows of equal keys in the order of the log.
            order = np.argsort(table["_row_key"].to_numpy() >> np.uint64(11), kind="stable")
            writer.write(table.select(schema.names).take(order).cast(schema))
            row_count += table.num_rows
    for file in (decision_reader, row_reader, writer):
        file.close()
    return {"kind": task.kind_name, "split": task.split, "rows": row_count}


def _list_row_columns(kind_name: str) -> list[str]:
    """Columns that come from the rows; the joined ones of feedback come from the decisions."""
    kind = find_data_kind(kind_name)
    joined = _JOINED_COLUMNS if kind.record_type is FeedbackRecord else ()
    return [name for name in kind.output_columns if name not in joined]


def _find_bucket_batches(folder: Path, bucket_count: int) -> list[list[tuple[Path, int]]]:
    """Record batches (file, index) of each bucket that has rows, by bucket, in the order of the log."""
    batches_by_bucket: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for path in sorted(folder.glob("*.arrow")):
        for batch_index, keys in enumerate(read_table(path, ["row_key"])["row_key"].chunks):
            bucket = int(to_unit_interval(keys[:1].to_numpy())[0] * bucket_count)
            batches_by_bucket[bucket].append((path, batch_index))
    return [batches_by_bucket[bucket] for bucket in sorted(batches_by_bucket)]


def _join_decisions(row_table: pa.Table, decision_table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Columns of `schema` and the row key, from the rows and the decisions about them."""
    columns = {name: row_table[name] for name in row_table.column_names}
    decision_names = [name for name in decision_table.column_names if name in schema.names and name != "label"]
    columns |= {name: decision_table[name] for name in decision_names}
    if "label" in schema.names and "label" not in columns:
        columns["label"] = decision_table["label"]
    if "weight" in schema.names:
        sampling = decision_table["sampling"]
        columns["weight"] = pc.multiply(sampling, decision_table["trust"]) if "trust" in columns else sampling
    arrays = [*(columns[name] for name in schema.names), decision_table["row_key"]]
    return pa.table(arrays, names=[*schema.names, "_row_key"])


def _write_quarantine(task: WriteTask) -> int:
    writer = TableWriter(Path(task.output_path), QUARANTINE_SCHEMA)
    row_count = 0
    for path in sorted((Path(task.work_folder) / "quarantine").glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(1000):
            writer.write(pa.Table.from_batches([batch]))
            row_count += batch.num_rows
    writer.close()
    return row_count


def list_output_splits(kind_names: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, split) of every prepared file."""
    return [(kind_name, split) for kind_name in kind_names for split in find_data_kind(kind_name).split_names]
