"""Second pass: one task a kind looks at the index of all its rows and says what becomes of each.

Duplicates, joins, sides, abuse weights, propensities and the sampling are decided here, on some 150 bytes a row; the
fate of each row lies beside it, for the third pass to act on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rluf.prepare import abuse, joins
from rluf.prepare import near_duplicates as near
from rluf.prepare import split_assignment as sides
from rluf.prepare.card_statistics import love_facts, topic_facts
from rluf.prepare.propensity import octaves, propensity
from rluf.prepare.readers.files import read_batches
from rluf.prepare.sampling import Quota, choose, quota
from rluf.prepare.schema import KINDS, LOVE
from rluf.prepare.splits import units
from rluf.prepare.tables import Tally, bad_table, read_table, write_table
from rluf.prepare.validate_pass import SIDES

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WeighTask:
    """One kind, and the settings that its rows' fates hang on. `joined` says whether reactions lie in files apart."""

    work: str
    kind: str
    joined: bool
    strict: bool
    dev_share: float
    test_share: float
    positive_share: float
    max_rows: int
    attribution_hours: float
    return_days: float
    abuse: Sequence[str]
    user_cap: int
    seed: int


class _Fates:
    """Which rows are still in, and why the others are not."""

    def __init__(self, rows: int) -> None:
        self.keep = np.ones(rows, dtype=np.bool_)
        self.dropped: Counter[str] = Counter()

    def drop(self, mask: Bools, reason: str) -> None:
        """Drop rows [N] that are still in."""
        gone = mask & self.keep
        self.keep &= ~mask
        self.dropped[reason] += int(gone.sum())


def _index(work: str, kind: str) -> tuple[pa.Table, list[Path], list[int]]:
    """The index of all rows of a kind, its files in order, and the rows of each."""
    files = sorted((Path(work) / "index" / kind).glob("*/*.arrow"))
    tables = [read_table(file) for file in files]
    if not tables:
        return pa.table({}), [], []
    return pa.concat_tables(tables).combine_chunks(), files, [table.num_rows for table in tables]


def _codes(column: pa.ChunkedArray) -> tuple[Ints, list[Any]]:
    """Codes [N] of a column's values and the values; null is -1."""
    coded = column.combine_chunks().dictionary_encode()
    indices = pc.fill_null(coded.indices.cast(pa.int64()), -1)
    return indices.to_numpy(zero_copy_only=False), coded.dictionary.to_pylist()


def _array(table: pa.Table, name: str) -> NDArray[Any]:
    column = table[name]
    return column.cast(pa.int64()).to_numpy() if pa.types.is_timestamp(column.type) else column.to_numpy()


def _bands(table: pa.Table) -> near.Keys:
    column = table["bands"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), near.BANDS)


def _twins(table: pa.Table) -> Bools:
    """Rows [N] whose id a row before them in the log has."""
    order = np.lexsort((_array(table, "item"), _array(table, "line"), _array(table, "order")))
    _, first = np.unique(_array(table, "key")[order], return_index=True)
    twin = np.ones(table.num_rows, dtype=np.bool_)
    twin[order[first]] = False
    return twin


def _quarantine_twins(task: WeighTask, table: pa.Table, twin: Bools, sources: Mapping[int, str]) -> list[Tally]:
    """Write duplicates to quarantine, their raw bytes read from the log once more."""
    if not twin.any():
        return []
    lines: dict[int, list[int]] = defaultdict(list)
    for order, line in zip(_array(table, "order")[twin].tolist(), _array(table, "line")[twin].tolist(), strict=True):
        lines[order].append(line)
    tallies = []
    for order, numbers in sorted(lines.items()):
        wanted, rows = Counter(numbers), []
        for batch in read_batches(sources[order]):
            for line in batch:
                rows += [(line.number, "duplicate id", line.raw)] * wanted.get(line.number, 0)
        path = Path(task.work) / "bad" / f"{task.kind}-{order:05d}-twins.parquet"
        write_table(path, bad_table(task.kind, sources[order], rows))
        example = f"{sources[order]}:{min(numbers)}"
        tallies.append(Tally(task.kind, "quarantined", len(numbers), reason="duplicate id", example=example))
    return tallies


def _kept_out(work: str) -> tuple[near.Keys, near.Keys]:
    """Prompt keys [P] and bands [P, BANDS] of the prompts kept for evaluation."""
    table, files, _ = _index(work, "prompts")
    if not files:
        return np.empty(0, dtype=np.uint64), np.empty((0, near.BANDS), dtype=np.uint64)
    table = table.filter(pc.equal(table["side"], sides.TEST))
    return _array(table, "prompt"), _bands(table)


def _part_sides(task: WeighTask, table: pa.Table, side: Ints, fates: _Fates) -> dict[str, Any]:
    """Drop what would stand on two sides; returns facts for the card."""
    prompt = _array(table, "prompt")
    held, held_bands = _kept_out(task.work)
    fates.drop((side != sides.TEST) & np.isin(prompt, held), "context is a test prompt")
    facts: dict[str, Any] = {}
    if task.kind == "feedback":
        talk, time = _array(table, "conversation"), _array(table, "time")
        fates.drop(sides.talk_apart(talk, side, time), "conversation is on another side")
        if task.strict and fates.keep.any():
            here = np.flatnonzero(fates.keep)
            late, early, moment = sides.time_apart(talk[here], side[here], time[here], task.test_share)
            for mask, reason in ((late, "after the time split"), (early, "test row before the time split")):
                gone = np.zeros(len(side), dtype=np.bool_)
                gone[here[mask]] = True
                fates.drop(gone, reason)
            facts["time_split"] = moment
    if task.strict:
        here = np.flatnonzero(fates.keep)
        group = near.groups(np.concatenate([prompt[here], held]), np.concatenate([_bands(table)[here], held_bands]))
        mine, taken = group[: len(here)], np.unique(group[len(here) :])
        away = sides.prompts_apart(mine, prompt[here], side[here], taken, task.dev_share, task.test_share)
        gone = np.zeros(len(side), dtype=np.bool_)
        gone[here[away]] = True
        fates.drop(gone, "near-duplicate prompt is on another side")
    return facts


def _join(task: WeighTask, table: pa.Table, fates: _Fates) -> tuple[pa.Table, list[Tally]]:
    """The table with reactions joined and `continued`, `returned` told where the log did not."""
    tallies: list[Tally] = []
    time = _array(table, "time")
    user, _ = _codes(table["user_id"])
    for name, (found, tells) in (
        ("continued", joins.written_on(_array(table, "conversation"), _array(table, "turn").astype(np.int64), time)),
        ("returned", joins.came_back(user, time, task.return_days)),
    ):
        told = pc.if_else(pa.array(tells), pa.array(found), pa.nulls(len(found), pa.bool_()))
        column = pc.coalesce(table[name].combine_chunks(), told)
        table = table.set_column(table.column_names.index(name), name, column)
    if task.joined:
        events, files, _ = _index(task.work, "reactions")
        if files:
            table, fate, held = _react(task, table, events, fates)
            tallies += [Tally("reactions", "dropped", rows, reason=reason) for reason, rows in fate.items() if rows]
            tallies.append(Tally("reactions", "joined", held))
    return table, tallies


def _react(task: WeighTask, table: pa.Table, events: pa.Table, fates: _Fates) -> tuple[pa.Table, Counter[str], int]:
    code, names = _codes(events["reaction"])
    order = np.lexsort((_array(events, "item"), _array(events, "line"), _array(events, "order")))
    found = joins.Events(
        event=_array(events, "event")[order],
        response=_array(events, "key")[order],
        time=_array(events, "time")[order],
        name=code[order],
        retracted=_array(events, "retracted")[order],
    )
    rows = np.flatnonzero(fates.keep)
    window = int(task.attribution_hours * joins.HOUR)
    got = joins.attribute(found, _array(table, "key")[rows], _array(table, "time")[rows], window)
    reaction = np.array(table["reaction"].to_pylist(), dtype=object)
    label = np.array(names, dtype=object)
    back = rows[got.back_row]
    reaction[back[reaction[back] == label[got.back_name]]] = None
    place, name = rows[got.row], label[got.name]
    reaction[place] = name
    reaction[place[name == LOVE]] = LOVE  # of several reactions that hold, love counts
    column = pa.array(reaction.tolist(), pa.string())
    return table.set_column(table.column_names.index("reaction"), "reaction", column), got.fate, len(got.row)


def _log(task: WeighTask, table: pa.Table, loved: Bools) -> abuse.Log:
    user, _ = _codes(table["user_id"])
    device, _ = _codes(table["device"])
    author = table["author"].combine_chunks()
    own = pc.fill_null(pc.equal(author, table["user_id"].combine_chunks()), False)
    _, answer = np.unique(_array(table, "answer"), return_inverse=True)
    wanted = "copies" in task.abuse
    group = near.groups(_array(table, "prompt"), _bands(table)) if wanted else np.zeros(len(user), dtype=np.int64)
    return abuse.Log(
        user=user, group=group, answer=answer.astype(np.int64), device=device, time=_array(table, "time"), loved=loved,
        own=own.to_numpy(zero_copy_only=False), cap=task.user_cap,
    )  # fmt: skip


def _feedback(task: WeighTask, table: pa.Table, side: Ints, fates: _Fates, facts: dict[str, Any]) -> dict[str, Any]:
    """Columns of the fates that only feedback has: trust, propensity, and what was joined."""
    rows = np.flatnonzero(fates.keep)
    here = table.take(pa.array(rows))
    loved = pc.fill_null(pc.equal(here["reaction"], LOVE), False).to_numpy()
    weight, each = abuse.trust(_log(task, here, loved), task.abuse)
    user, _ = _codes(here["user_id"])
    features = {
        "turn": octaves(_array(here, "turn").astype(np.int64) + 1),
        "locale": _codes(here["locale"])[0],
        "interface": _codes(here["interface"])[0],
        "activity": octaves(np.bincount(user)[user]) if len(user) else user,
    }
    chance, _ = propensity(features, pc.is_valid(here["reaction"]).to_numpy())
    columns = {}
    for name, values in (("trust", weight), ("propensity", chance)):
        column = np.ones(table.num_rows)
        column[rows] = values
        columns[name] = column
    facts |= love_facts(here, loved, user, side[rows], weight, each)
    return columns | {name: table[name].combine_chunks() for name in ("reaction", "continued", "returned")}


def weigh(task: WeighTask, sources: Mapping[int, str]) -> dict[str, Any]:
    """Run the second pass on one kind; `sources` are the files by order. Returns tallies, quotas and facts."""
    kind = KINDS[task.kind]
    table, files, lengths = _index(task.work, task.kind)
    if not files:
        return {"tallies": [], "sides": [], "facts": {}}
    fates = _Fates(table.num_rows)
    facts: dict[str, Any] = {}
    twin = _twins(table)
    fates.keep &= ~twin
    tallies = _quarantine_twins(task, table, twin, sources)
    columns: dict[str, Any] = {}
    side = _array(table, "side").astype(np.int64)
    if task.kind == "feedback":
        table, joined = _join(task, table, fates)
        tallies += joined
    facts |= _part_sides(task, table, side, fates)
    if task.kind == "feedback":
        columns = _feedback(task, table, side, fates, facts)
        label = pc.fill_null(pc.equal(table["reaction"], LOVE), False).to_numpy().astype(np.int64)
    else:
        label = _array(table, "label") if "label" in table.column_names else np.ones(table.num_rows, dtype=np.int64)
    facts["topics"] = topic_facts(table, fates.keep)
    sampling, parts = _sampled(task, table, side, label, fates)
    where = np.where(fates.keep, side, -1).astype(np.int8)
    columns = {"key": table["key"].combine_chunks(), "side": where, "label": label, "sampling": sampling, **columns}
    fate = pa.table(columns)
    start = 0
    for file, rows in zip(files, lengths, strict=True):
        write_table(Path(str(file).replace("/index/", "/fates/", 1)), fate.slice(start, rows))
        start += rows
    tallies += [Tally(task.kind, "dropped", rows, reason=why) for why, rows in fates.dropped.items() if rows]
    return {"tallies": tallies, "sides": parts, "facts": {kind.name: facts}}


def _sampled(
    task: WeighTask, table: pa.Table, side: Ints, label: Ints, fates: _Fates
) -> tuple[Floats, list[dict[str, Any]]]:
    """Sampling factor of each row [N] (0 when dropped), and each side's quota, users or groups, and labels."""
    kind = KINDS[task.kind]
    factor = np.zeros(table.num_rows)
    parts = []
    for code, name in enumerate(SIDES):
        if name not in kind.splits:
            continue
        rows = np.flatnonzero(fates.keep & (side == code))
        positive = label[rows] == 1
        good = int(positive.sum())
        plan = Quota(good, len(rows) - good, good, len(rows) - good)
        factor[rows] = 1.0
        if name == "train" and kind.name != "prompts" and len(rows):
            share = task.positive_share if kind.name == "feedback" else None
            plan = quota(good, len(rows) - good, positive_share=share, max_rows=task.max_rows)
            factor[rows] = choose(units(_array(table, "sample")[rows]), positive, plan)
            gone = np.zeros(len(side), dtype=np.bool_)
            gone[rows[factor[rows] == 0]] = True
            fates.drop(gone, "sampled out of train")
        column = {"feedback": "user_id", "prompts": "key"}.get(kind.name, "unit")
        stay = table[column].filter(pa.array(fates.keep & (side == code)))
        parts.append(
            {
                "kind": kind.name, "side": name, "units": pc.count_distinct(stay).as_py(), "before": len(rows),
                "labels": sorted({*label[rows].tolist()}), "quota": plan,
            }
        )  # fmt: skip
    return factor, parts
