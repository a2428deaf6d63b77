"""Third pass: the rows of one side, in the order of their places, in the file that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rluf.prepare.schema import KINDS, FeedbackRecord, arrow_schema
from rluf.prepare.tables import BAD_SCHEMA, TableFile, read_table
from rluf.prepare.validate_pass import SIDES

_JOINED = ("reaction", "continued", "returned")


@dataclass(frozen=True, slots=True)
class WriteTask:
    """One side of one kind (or the quarantine), and its file."""

    work: str
    kind: str
    side: str
    path: str


def data_schema(kind_name: str) -> pa.Schema:
    """Columns of a prepared file.

    `weight` = `sampling` (one over the share of the row's class that was kept) x `trust` (what the abuse rules left of
    it, 0.01 to 1); `propensity` is the chance that a row like this gets any reaction.
    """
    kind = KINDS[kind_name]
    fields = [arrow_schema(kind.record).field(name) for name in kind.columns]
    if kind.record is FeedbackRecord:
        fields.append(pa.field("label", pa.int64(), nullable=False))
    if kind.name != "prompts":
        fields.append(pa.field("weight", pa.float64(), nullable=False))
    if kind.record is FeedbackRecord:
        fields += [pa.field(name, pa.float64(), nullable=False) for name in ("sampling", "trust", "propensity")]
    return pa.schema(fields, metadata=arrow_schema(kind.record).metadata)


def write(task: WriteTask) -> dict[str, Any]:
    """Run the third pass on one file; returns its rows. Bucket by bucket, so a bucket's rows are held at once."""
    if task.kind == "quarantine":
        return {"rows": _quarantine(task)}
    kind, work = KINDS[task.kind], Path(task.work)
    schema = data_schema(task.kind)
    code, rows = SIDES.index(task.side), 0
    file = TableFile(Path(task.path), schema)
    for bucket in sorted((work / "fates" / task.kind).iterdir()):
        tables = []
        for part in sorted(bucket.glob("*.arrow")):
            fate = read_table(part)
            mine = pc.and_(pc.equal(fate["side"], code), pc.greater(fate["sampling"], 0))
            if pc.any(mine).as_py():
                names = [name for name in kind.columns if name not in fate.column_names or name not in _JOINED]
                plain = read_table(work / "rows" / task.kind / bucket.name / part.name, names)
                tables.append(_joined(plain.filter(mine), fate.filter(mine), schema))
        if tables:
            table = pa.concat_tables(tables)
            order = np.argsort(table["_place"].to_numpy() >> np.uint64(11), kind="stable")
            file.write(table.select(schema.names).take(order).cast(schema))
            rows += table.num_rows
    file.close()
    return {"kind": task.kind, "side": task.side, "rows": rows}


def _joined(plain: pa.Table, fate: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = {name: plain[name] for name in plain.column_names}
    columns |= {name: fate[name] for name in fate.column_names if name in schema.names and name != "label"}
    if "label" in schema.names and "label" not in columns:
        columns["label"] = fate["label"]
    if "weight" in schema.names:
        columns["weight"] = pc.multiply(fate["sampling"], fate["trust"]) if "trust" in columns else fate["sampling"]
    return pa.table([*(columns[name] for name in schema.names), fate["key"]], names=[*schema.names, "_place"])


def _quarantine(task: WriteTask) -> int:
    file = TableFile(Path(task.path), BAD_SCHEMA)
    rows = 0
    for bad in sorted((Path(task.work) / "bad").glob("*.parquet")):
        source = pq.ParquetFile(bad)
        for batch in source.iter_batches(1000):
            file.write(pa.Table.from_batches([batch]))
            rows += batch.num_rows
    file.close()
    return rows


def files_of(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, side) of every prepared file."""
    return [(name, side) for name in kinds for side in KINDS[name].splits]
