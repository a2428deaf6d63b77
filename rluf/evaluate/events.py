"""Event logs of an experiment: who read what in which arm, and what they did, added up by user.

Rows are FeedbackRecords (rluf.prepare.schema) with one more column that names the arm; only the columns that an
experiment needs are read, so a log of millions of responses fits. JSON lines (.gz too) and Parquet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rluf.errors import DataError
from rluf.evaluate.effects import Totals
from rluf.prepare.schema import LOVE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ARM_COLUMNS = ("arm", "model_version")
"""Where the arm stands when no column is named: the first of these that the log has."""
_TEXT = ("id", "conversation_id", "user_id", "time", "reaction", *ARM_COLUMNS)
_FLAGS = ("continued", "returned")
SECONDS_A_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Events:
    """N served responses in the order of time.

    `user`, `conversation` and `arm` [N] are indices (arms into `arms`), `time` [N] in seconds since 1970; `values` maps
    a metric's name to what the response counts [N], nan where the log does not tell. `duplicates` rows were left out.
    """

    user: Ints
    conversation: Ints
    arm: Ints
    arms: tuple[str, ...]
    users: tuple[str, ...]
    time: Floats
    values: dict[str, Floats]
    duplicates: int


def read_events(paths: Sequence[Path], *, arm: str | None = None, columns: Sequence[str] = ()) -> Events:
    """Read event logs. `arm` names the arm's column; `columns` are further numeric or yes/no columns to test.

    DataError when a file is missing, broken or empty, when a row lacks user, time or arm, or a column is absent.
    """
    table = pa.concat_tables([_read(path, arm, columns) for path in paths], promote_options="permissive")
    if table.num_rows == 0:
        raise DataError(f"{', '.join(map(str, paths))}: no rows; give a log with one served response a row")
    arm = arm or next((name for name in ARM_COLUMNS if _has(table, name)), "arm")
    for name in ("user_id", "time", arm):
        missing = table.num_rows if name not in table.column_names else table.column(name).null_count
        if missing:
            raise DataError(
                f"{paths[0]}: {missing} of {table.num_rows} rows have no {name}; every row needs user_id, time and its "
                "arm (--arm names the column)"
            )
    rows = table.num_rows
    if _has(table, "id"):
        table = _without_duplicates(table)
    order = np.argsort(_seconds(table.column("time"), paths[0]), kind="stable")
    table = table.take(pa.array(order))
    user, users = _codes(table.column("user_id"))
    arms, names = _codes(table.column(arm))
    conversation = (
        _codes(table.column("conversation_id"))[0] if _has(table, "conversation_id") else np.arange(len(user))
    )
    return Events(
        user=user, users=users, arm=arms, arms=names, conversation=conversation,
        time=_seconds(table.column("time"), paths[0]), values=_values(table, columns), duplicates=rows - table.num_rows,
    )  # fmt: skip


def _read(path: Path, arm: str | None, columns: Sequence[str]) -> pa.Table:
    names = [*_TEXT, *_FLAGS, *columns, *([arm] if arm else [])]
    if not path.is_file():
        raise DataError(f"{path} is no file; give JSON lines (.jsonl, .jsonl.gz) or .parquet")
    try:
        if path.suffix == ".parquet":
            there = set(pq.read_schema(path).names)
            return pq.read_table(path, columns=[name for name in dict.fromkeys(names) if name in there])
        kinds = {name: pa.string() for name in (*_TEXT, *([arm] if arm else []))} | {
            flag: pa.bool_() for flag in _FLAGS
        }
        schema = pa.schema(list(kinds.items()))
        known = "infer" if columns else "ignore"
        options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=known)
        with pa.input_stream(str(path)) as stream:
            table = pyarrow.json.read_json(stream, pyarrow.json.ReadOptions(block_size=2**24), parse_options=options)
        return table.select([name for name in dict.fromkeys(names) if name in table.column_names])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: {error}; the log must be JSON lines or Parquet with one response a row") from error


def _has(table: pa.Table, name: str) -> bool:
    return name in table.column_names and table.column(name).null_count < table.num_rows


def _without_duplicates(table: pa.Table) -> pa.Table:
    """The first row of each id; rows without an id all stay."""
    index, _ = _codes(table.column("id"))
    first = np.zeros(len(index), dtype=bool)
    first[np.unique(index, return_index=True)[1]] = True
    return table.filter(pa.array(first | np.asarray(pc.is_null(table.column("id")))))


def _codes(column: pa.ChunkedArray) -> tuple[Ints, tuple[str, ...]]:
    """Indices [N] into the distinct texts of a column, in the order that they come; null is the empty text."""
    coded = pc.fill_null(pc.cast(column, pa.string()), "").combine_chunks().dictionary_encode()
    return coded.indices.to_numpy(zero_copy_only=False).astype(np.int64), tuple(coded.dictionary.to_pylist())


def _seconds(column: pa.ChunkedArray, path: Path) -> Floats:
    try:
        stamps = column if pa.types.is_timestamp(column.type) else pc.cast(column, pa.timestamp("us", tz="UTC"))
    except pa.ArrowException as error:
        raise DataError(f"{path}: {error}; write times with their zone, such as 2026-01-31T12:00:00+00:00") from error
    seconds: Floats = pc.cast(pc.cast(stamps, pa.timestamp("us")), pa.int64()).to_numpy().astype(np.float64) / 1e6
    return seconds


def _values(table: pa.Table, columns: Sequence[str]) -> dict[str, Floats]:
    """What a response counts for each metric that the log can tell."""
    values: dict[str, Floats] = {}
    if "reaction" in table.column_names:
        index, names = _codes(table.column("reaction"))
        for name in sorted({LOVE, *names} - {""}):
            values[name] = (index == names.index(name) if name in names else np.zeros(len(index))).astype(np.float64)
    for name in dict.fromkeys((*_FLAGS, *columns)):
        if not _has(table, name):
            if name in columns:
                raise DataError(f"the log has no values in column {name!r}; name another with --column")
            continue
        try:
            numbers = pc.cast(table.column(name), pa.float64())
        except pa.ArrowException as error:
            raise DataError(
                f"column {name!r} holds {table.column(name).type}, not numbers or yes/no ({error})"
            ) from error
        values[name] = pc.fill_null(numbers, float("nan")).to_numpy()
    return values


def unit_interval(user: str, salt: str) -> float:
    """A number in [0, 1), uniform over users and fixed for a user and salt: keyed BLAKE2b, 53 bits.

    Another salt gives an independent assignment, so that experiments do not inherit each other's arms.
    """
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    digest = hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def assigned(users: Sequence[str], salt: str, shares: Sequence[float]) -> Ints:
    """Arm index [U] of each user: where its number falls among the cumulated `shares`."""
    edges = np.cumsum(np.asarray(shares, dtype=np.float64))
    points = np.array([unit_interval(user, salt) for user in users])
    arms: Ints = np.minimum(np.searchsorted(edges / edges[-1], points, side="right"), len(shares) - 1).astype(np.int64)
    return arms


def by_user(events: Events, rows: NDArray[np.bool_], people: Ints) -> dict[str, Totals]:
    """Totals of `people` [U] (user indices) over the chosen `rows` [N]; users without rows have zeros.

    One for each metric per response, and `responses` (per user: counts of 1) and `turns` (responses by conversation).
    """
    place = np.full(len(events.users), -1, dtype=np.int64)
    place[people] = np.arange(len(people))
    keep = rows & (place[events.user] >= 0)
    index, size = place[events.user[keep]], len(people)

    def add(weights: Any) -> Floats:
        return np.bincount(index, weights=weights, minlength=size).astype(np.float64)

    totals = {}
    for name, values in events.values.items():
        mine = values[keep]
        told = ~np.isnan(mine)
        totals[name] = Totals(add(np.where(told, mine, 0.0)), add(told.astype(np.float64)))
    reads = add(np.ones(len(index)))
    totals["responses"] = Totals.of(reads)
    talks = int(events.conversation.max()) + 1
    pairs = np.unique(index * talks + events.conversation[keep]) // talks
    totals["turns"] = Totals(reads, np.bincount(pairs, minlength=size).astype(np.float64))
    return totals
