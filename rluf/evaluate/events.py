"""Event logs of an experiment: read served responses with their arm and reactions, and total them per user.

Rows are FeedbackRecords (rluf.prepare.schema) with one more column that names the arm; only the columns that an
experiment needs are read, so a log of millions of responses fits in memory. JSON lines (.gz too) and Parquet.
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
from rluf.evaluate.effects import UserTotals
from rluf.prepare.schema import LOVE_REACTION
from rluf.utils.stats import Floats, Ints

DEFAULT_ARM_COLUMNS = ("arm", "model_version")
"""Arm column when none is named: the first of these that the log has."""
_TEXT_COLUMNS = ("id", "conversation_id", "user_id", "time", "reaction", *DEFAULT_ARM_COLUMNS)
_FLAG_COLUMNS = ("continued", "returned")
SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class EventLog:
    """N served responses in time order.

    `user_index`, `conversation_index` and `arm_index` [N] are indices (into `user_ids` and `arm_names`), `timestamps`
    [N] are seconds since 1970; `metric_values` maps a metric name to the value of each response [N], nan if missing.
    `duplicate_count` rows were dropped.
    """

    user_index: Ints
    conversation_index: Ints
    arm_index: Ints
    arm_names: tuple[str, ...]
    user_ids: tuple[str, ...]
    timestamps: Floats
    metric_values: dict[str, Floats]
    duplicate_count: int


def read_event_log(
    paths: Sequence[Path], *, arm_column: str | None = None, metric_columns: Sequence[str] = ()
) -> EventLog:
    """Read event logs; `metric_columns` are additional numeric or yes/no columns to test.

    DataError when a file is missing, broken or empty, when a row lacks user, time or arm, or a column is absent.
    """
    tables = [_read_table(path, arm_column, metric_columns) for path in paths]
    table = pa.concat_tables(tables, promote_options="permissive")
    if table.num_rows == 0:
        raise DataError(f"{', '.join(map(str, paths))}: no rows; expected a log with one served response per row")
    arm_column = arm_column or next((name for name in DEFAULT_ARM_COLUMNS if _has_values(table, name)), "arm")
    for column in ("user_id", "time", arm_column):
        missing = table.num_rows if column not in table.column_names else table.column(column).null_count
        if missing:
            raise DataError(
                f"{paths[0]}: {missing} of {table.num_rows} rows have no {column}; every row needs user_id, time and "
                "its arm (--arm names the column)"
            )
    row_count = table.num_rows
    if _has_values(table, "id"):
        table = _drop_duplicates(table)
    # A stable sort keeps rows of equal time in file order, so results do not depend on the sort algorithm.
    order = np.argsort(_parse_timestamps(table.column("time"), paths[0]), kind="stable")
    table = table.take(pa.array(order))
    user_index, user_ids = _encode_column(table.column("user_id"))
    arm_index, arm_names = _encode_column(table.column(arm_column))
    if _has_values(table, "conversation_id"):
        conversation_index = _encode_column(table.column("conversation_id"))[0]
    else:
        conversation_index = np.arange(len(user_index))
    return EventLog(
        user_index=user_index, user_ids=user_ids, arm_index=arm_index, arm_names=arm_names,
        conversation_index=conversation_index, timestamps=_parse_timestamps(table.column("time"), paths[0]),
        metric_values=_read_metric_values(table, metric_columns), duplicate_count=row_count - table.num_rows,
    )  # fmt: skip


def _read_table(path: Path, arm_column: str | None, metric_columns: Sequence[str]) -> pa.Table:
    columns = list(
        dict.fromkeys([*_TEXT_COLUMNS, *_FLAG_COLUMNS, *metric_columns, *([arm_column] if arm_column else [])])
    )
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected JSON lines (.jsonl, .jsonl.gz) or .parquet")
    try:
        if path.suffix == ".parquet":
            available = set(pq.read_schema(path).names)
            return pq.read_table(path, columns=[name for name in columns if name in available])
        # With an explicit schema only these columns are parsed, and a block of nulls does not infer another type.
        column_types = {name: pa.string() for name in (*_TEXT_COLUMNS, *([arm_column] if arm_column else []))}
        column_types |= {name: pa.bool_() for name in _FLAG_COLUMNS}
        options = pyarrow.json.ParseOptions(
            explicit_schema=pa.schema(list(column_types.items())),
            unexpected_field_behavior="infer" if metric_columns else "ignore",
        )
        with pa.input_stream(str(path)) as stream:
            table = pyarrow.json.read_json(stream, pyarrow.json.ReadOptions(block_size=2**24), parse_options=options)
        return table.select([name for name in columns if name in table.column_names])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: {error}; expected JSON lines or Parquet with one served response per row") from error


def _has_values(table: pa.Table, column: str) -> bool:
    return column in table.column_names and table.column(column).null_count < table.num_rows


def _drop_duplicates(table: pa.Table) -> pa.Table:
    """The first row of each id; rows without an id are all retained."""
    index, _ = _encode_column(table.column("id"))
    is_first = np.zeros(len(index), dtype=bool)
    is_first[np.unique(index, return_index=True)[1]] = True
    return table.filter(pa.array(is_first | np.asarray(pc.is_null(table.column("id")))))


def _encode_column(column: pa.ChunkedArray) -> tuple[Ints, tuple[str, ...]]:
    """Indices [N] into the distinct texts of a column, in order of first occurrence; null is the empty text."""
    encoded = pc.fill_null(pc.cast(column, pa.string()), "").combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), tuple(encoded.dictionary.to_pylist())


def _parse_timestamps(column: pa.ChunkedArray, path: Path) -> Floats:
    """Seconds since 1970 [N]."""
    try:
        times = column if pa.types.is_timestamp(column.type) else pc.cast(column, pa.timestamp("us", tz="UTC"))
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: {error}; expected times with a time zone, such as 2026-01-31T12:00:00+00:00"
        ) from error
    seconds: Floats = pc.cast(pc.cast(times, pa.timestamp("us")), pa.int64()).to_numpy().astype(np.float64) / 1e6
    return seconds


def _read_metric_values(table: pa.Table, metric_columns: Sequence[str]) -> dict[str, Floats]:
    """Value of each response [N] for each metric of the log."""
    metric_values: dict[str, Floats] = {}
    if "reaction" in table.column_names:
        index, reactions = _encode_column(table.column("reaction"))
        # The love reaction is always a metric: a log without any heart has a love rate of 0, not none.
        for reaction in sorted({LOVE_REACTION, *reactions} - {""}):
            has_reaction = index == reactions.index(reaction) if reaction in reactions else np.zeros(len(index))
            metric_values[reaction] = has_reaction.astype(np.float64)
    for column in dict.fromkeys((*_FLAG_COLUMNS, *metric_columns)):
        if not _has_values(table, column):
            if column in metric_columns:
                raise DataError(f"column {column!r} of the log has no values; name another one with --column")
            continue
        try:
            numbers = pc.cast(table.column(column), pa.float64())
        except pa.ArrowException as error:
            raise DataError(
                f"column {column!r}: expected numbers or yes/no, got {table.column(column).type} ({error})"
            ) from error
        metric_values[column] = pc.fill_null(numbers, float("nan")).to_numpy()
    return metric_values


def hash_to_unit_interval(user_id: str, salt: str) -> float:
    """Number in [0, 1), uniform over users and fixed for a user and salt: keyed BLAKE2b, 53 bits.

    Another salt gives an independent assignment, so experiments do not inherit each other's arms.
    """
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    digest = hashlib.blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    # 53 bits are the precision of a double: more would round to 1.0 now and then.
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def assign_users(user_ids: Sequence[str], salt: str, shares: Sequence[float]) -> Ints:
    """Arm index [U] of each user: the position of its hash among the cumulative `shares`."""
    edges = np.cumsum(np.asarray(shares, dtype=np.float64))
    points = np.array([hash_to_unit_interval(user_id, salt) for user_id in user_ids])
    arm_index = np.searchsorted(edges / edges[-1], points, side="right")
    return np.minimum(arm_index, len(shares) - 1).astype(np.int64)


def sum_by_user(events: EventLog, rows: NDArray[np.bool_], users: Ints) -> dict[str, UserTotals]:
    """Totals of `users` [U] (user indices) over the selected `rows` [N]; users without rows have zeros.

    One entry for each metric per response, plus `responses` (per user: counts of 1) and `turns` (responses per
    conversation).
    """
    position_of_user = np.full(len(events.user_ids), -1, dtype=np.int64)
    position_of_user[users] = np.arange(len(users))
    selected = rows & (position_of_user[events.user_index] >= 0)
    position, user_count = position_of_user[events.user_index[selected]], len(users)

    def sum_per_user(weights: Any) -> Floats:
        return np.bincount(position, weights=weights, minlength=user_count).astype(np.float64)

    totals = {}
    for metric, values in events.metric_values.items():
        selected_values = values[selected]
        has_value = ~np.isnan(selected_values)
        totals[metric] = UserTotals(
            sum_per_user(np.where(has_value, selected_values, 0.0)), sum_per_user(has_value.astype(np.float64))
        )
    response_counts = sum_per_user(np.ones(len(position)))
    totals["responses"] = UserTotals.from_arrays(response_counts)
    # Encode (user, conversation) as one integer: np.unique of a 2-d array sorts rows and is much slower.
    conversation_count = int(events.conversation_index.max()) + 1
    pairs = np.unique(position * conversation_count + events.conversation_index[selected])
    user_of_pair = pairs // conversation_count
    totals["turns"] = UserTotals(response_counts, np.bincount(user_of_pair, minlength=user_count).astype(np.float64))
    return totals
