"""Event logs of an experiment: served responses with their arm and reactions, and totals of them per user.

Rows are FeedbackRecords (rluf.prepare.schema) with one more column that names the arm; only the columns that an
experiment needs are read, so a log of millions of responses fits in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.errors import DataError
from rluf.evaluate.effects import UserTotals
from rluf.evaluate.event_columns import (
    PLACEHOLDER_USERS,
    Columns,
    ColumnSource,
    parse_numbers,
    parse_reactions,
    parse_texts,
    parse_times,
    read_columns,
)
from rluf.prepare.readers.feedback_folder import list_row_files, read_late_reactions
from rluf.prepare.schema import LOVE_REACTION
from rluf.utils.stats import Floats, Ints

DEFAULT_ARM_COLUMNS = ("arm", "model_version")
"""Arm column when none is named: the first of these that the log has."""
REACTION_COLUMNS = ("reaction", "reactions")
SEGMENT_COLUMNS = ("topic", "locale")
SECONDS_PER_DAY = 86_400.0
MAX_MISSING_USER_SHARE = 0.05
"""Maximum share of rows without a user id. They are dropped; with more of them the users are not those of the test."""
MAX_USER_SHARE = 0.05
"""A single user with more of the rows is named: it may be a placeholder that stands for many people."""
_MIN_USERS_FOR_SHARE = 100
_FLAG_COLUMNS = ("continued", "returned")
_MAX_REACTION_METRICS = 20
"""Reactions beyond love that become metrics, the commonest first: free text would give one column per row."""


@dataclass(frozen=True, slots=True)
class EventLog:
    """N served responses in time order.

    `user_index`, `conversation_index` and `arm_index` [N] are indices (into `user_ids` and `arm_names`), `timestamps`
    [N] are seconds since 1970; `metric_values` maps a metric name to the value of each response [N], nan if missing.
    `duplicate_count` rows were dropped, and `missing_user_count` rows without a user id. `reaction_counts` are the
    rows with each reaction, `love_spellings` those that were read as love by the spelling of the log. `segments` maps
    a column to an index [N] and its names. `notes` say what else the reader should know of the log.
    """

    user_index: Ints
    conversation_index: Ints
    arm_index: Ints
    arm_names: tuple[str, ...]
    user_ids: tuple[str, ...]
    timestamps: Floats
    metric_values: dict[str, Floats]
    duplicate_count: int
    missing_user_count: int = 0
    reaction_counts: dict[str, int] = field(default_factory=dict)
    love_spellings: dict[str, int] = field(default_factory=dict)
    segments: dict[str, tuple[Ints, tuple[str, ...]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def is_yes_no(self, metric: str) -> bool:
        """Whether all values of a metric are 0 or 1 (or missing)."""
        values = self.metric_values[metric]
        return bool((np.isnan(values) | (values == 0.0) | (values == 1.0)).all())


def read_event_log(
    paths: Sequence[Path],
    *,
    arm_column: str | None = None,
    metric_columns: Sequence[str] = (),
    optional_columns: Sequence[str] = (),
    love_names: Sequence[str] = (),
) -> EventLog:
    """Read event logs; `metric_columns` are additional numeric or yes/no columns to test.

    `optional_columns` are read too if the log has them and they are no reactions. `love_names` are the reactions that
    mean love (default: the usual spellings). DataError when a file is missing, broken or empty, when a value is not
    understood, a row lacks time or arm, or a column is absent.
    """
    columns, available = _read_all(paths, arm_column, [*metric_columns, *optional_columns])
    source_path = paths[0]
    arm_column = arm_column or next((name for name in DEFAULT_ARM_COLUMNS if _has_values(columns, name)), "arm")
    arms = parse_texts(columns[arm_column], ColumnSource(source_path, arm_column))
    notes: list[str] = []
    has_arm = np.array([arm is not None for arm in arms], dtype=bool)
    if arm_column == "arm" and any(path.is_dir() for path in paths) and not has_arm.all():
        notes.append(f"{int((~has_arm).sum())} rows without an arm are left out: chats that named their model")
        arms = ["" if arm is None else arm for arm in arms]
    for column in ("time", arm_column):
        missing_count = sum(value is None for value in (arms if column == arm_column else columns[column]))
        if missing_count:
            raise DataError(
                f"{source_path}: {missing_count} of {len(arms)} rows have no {column}; every row needs user_id, time "
                "and its arm (--arm names the column)"
            )
    user_ids = parse_texts(columns["user_id"], ColumnSource(source_path, "user_id"))
    has_user = _select_rows_with_user(user_ids, source_path)
    times = parse_times(columns["time"], ColumnSource(source_path, "time"))
    is_first = _select_first_rows(columns, user_ids, arms, times, source_path, notes)
    rows = np.flatnonzero(has_user & has_arm & is_first)
    # A stable sort keeps rows of equal time in file order, so results do not depend on the sort algorithm.
    rows = rows[np.argsort(times[rows], kind="stable")]
    user_index, user_names = _encode_values([user_ids[row] for row in rows])
    arm_index, arm_names = _encode_values([arms[row] for row in rows])
    conversation_index = np.arange(len(rows))
    if _has_values(columns, "conversation_id"):
        conversations = parse_texts(columns["conversation_id"], ColumnSource(source_path, "conversation_id"))
        conversation_index = _encode_values([conversations[row] for row in rows])[0]
    same_but_case = len(user_names) - len({name.casefold() for name in user_names})
    if same_but_case:
        notes.append(
            f"{same_but_case} user ids differ from another one in upper and lower case only and count as other users"
        )
    row_counts = np.bincount(user_index, minlength=len(user_names))
    busiest = int(row_counts.argmax())
    if len(user_names) >= _MIN_USERS_FOR_SHARE and row_counts[busiest] > MAX_USER_SHARE * len(rows):
        notes.append(
            f"user {user_names[busiest]!r} has {row_counts[busiest]} of {len(rows)} responses; if the id stands for "
            "several people, remove these rows"
        )
    reaction_column = next((name for name in REACTION_COLUMNS if name in available), None)
    reaction_values, rows_by_spelling = _read_reactions(columns, reaction_column, source_path, love_names)
    present = [name for name in optional_columns if name not in reaction_values and _has_values(columns, name)]
    values = reaction_values | _read_numbers(columns, source_path, [*metric_columns, *present])
    segments = {}
    for name in (name for name in SEGMENT_COLUMNS if _has_values(columns, name)):
        labels = parse_texts(columns[name], ColumnSource(source_path, name))
        segments[name] = _encode_values([labels[row] or "missing" for row in rows])
    return EventLog(
        user_index=user_index, user_ids=user_names, arm_index=arm_index, arm_names=arm_names,
        conversation_index=conversation_index, timestamps=times[rows],
        metric_values={name: column_values[rows] for name, column_values in values.items()},
        duplicate_count=int((has_user & ~is_first).sum()), missing_user_count=int((~has_user).sum()),
        reaction_counts={name: int(column_values[rows].sum()) for name, column_values in reaction_values.items()},
        love_spellings={name: int(np.isin(rows, spelled).sum()) for name, spelled in rows_by_spelling.items()},
        segments=segments, notes=tuple(notes),
    )  # fmt: skip


def _read_all(paths: Sequence[Path], arm_column: str | None, metric_columns: Sequence[str]) -> tuple[Columns, set[str]]:
    """All wanted columns of all files, None where a file lacks one, and the names that occur. DataError if empty."""
    arm_columns = (arm_column,) if arm_column else DEFAULT_ARM_COLUMNS
    names = list(dict.fromkeys([
        "id", "conversation_id", "turn", "user_id", "time", *REACTION_COLUMNS, *_FLAG_COLUMNS, *SEGMENT_COLUMNS,
        *arm_columns, *metric_columns,
    ]))  # fmt: skip
    merged: Columns = {name: [] for name in names}
    all_available: set[str] = set()
    for path in _expand_stores(paths):
        columns, available = read_columns(path, names)
        row_count = max((len(values) for values in columns.values()), default=0)
        for name in names:
            merged[name] += columns.get(name, [None] * row_count)
        all_available |= set(available)
        for required, choices in (("user_id", ("user_id",)), ("time", ("time",)), ("arm", arm_columns)):
            if available and not set(choices) & set(available):
                hint = "--arm names the column of the arm" if required == "arm" else f"rename one of them {required}"
                raise DataError(f"{path}: no column {' or '.join(choices)}; it has {', '.join(available)}; {hint}")
    if not merged["time"]:
        raise DataError(f"{', '.join(map(str, paths))}: no rows; expected a log with one served response per row")
    apply_late_reactions(merged, paths)
    return merged, all_available


def _expand_stores(paths: Sequence[Path]) -> list[Path]:
    """Files of the paths; a folder is that of a feedback store. DataError for a folder without rows."""
    files = []
    for path in paths:
        row_files = list_row_files(path)
        if not row_files:
            raise DataError(f"{path} has no Parquet files; expected the folder of a feedback store, or a log file")
        files += row_files
    return files


def apply_late_reactions(columns: Columns, paths: Sequence[Path]) -> None:
    """Replace the reactions of rows that changed after a feedback store (a folder of `paths`) had written them."""
    for path in paths:
        late_reactions = read_late_reactions(path) if path.is_dir() else {}
        if late_reactions:
            columns["reaction"] = [
                late_reactions.get(row_id, reaction)
                for row_id, reaction in zip(columns["id"], columns["reaction"], strict=True)
            ]


def _has_values(columns: Columns, name: str) -> bool:
    return any(value is not None and value != "" for value in columns.get(name, ()))


def _encode_values(values: Sequence[str | None]) -> tuple[Ints, tuple[str, ...]]:
    """Indices [N] into the distinct texts, in order of first occurrence; None is the empty text."""
    positions: dict[str, int] = {}
    index = [positions.setdefault(value or "", len(positions)) for value in values]
    return np.array(index, dtype=np.int64), tuple(positions)


def is_user_id(text: str | None) -> bool:
    """Whether a parsed id is that of one user: neither missing nor a placeholder such as "anonymous"."""
    return text is not None and text.lower() not in PLACEHOLDER_USERS


def _select_rows_with_user(user_ids: Sequence[str | None], path: Path) -> NDArray[np.bool_]:
    """Mask [N] of the rows with a user id. DataError if more than MAX_MISSING_USER_SHARE lack one."""
    has_user = np.array(list(map(is_user_id, user_ids)), bool)
    missing_count = int((~has_user).sum())
    if missing_count > MAX_MISSING_USER_SHARE * len(has_user):
        raise DataError(
            f"{path}: {missing_count} of {len(has_user)} rows have no user_id; every row needs user_id, time and its "
            f"arm, and more than {MAX_MISSING_USER_SHARE:.0%} without a user cannot be dropped without bias"
        )
    return has_user


def _select_first_rows(
    columns: Columns,
    user_ids: Sequence[str | None],
    arms: Sequence[str | None],
    times: Floats,
    path: Path,
    notes: list[str],
) -> NDArray[np.bool_]:
    """Mask [N] of the rows that repeat no earlier one; appends to `notes` what cannot be decided.

    With ids a repeat has the same id and user. Without ids, or for rows without one, it has the same user, time, arm,
    conversation and turn. The same under another id stays, but is reported.
    """
    row_count = len(user_ids)
    ids = parse_texts(columns["id"], ColumnSource(path, "id"))
    details = list(zip(user_ids, times.tolist(), arms, map(str, columns["conversation_id"]), map(str, columns["turn"]),
                       strict=True))  # fmt: skip
    seen_ids: dict[tuple[str | None, str | None], int] = {}
    seen_details: set[tuple[Any, ...]] = set()
    is_first = np.ones(row_count, dtype=bool)
    repeated_count = changed_count = 0
    for row, (response_id, user_id) in enumerate(zip(ids, user_ids, strict=True)):
        is_repeat = details[row] in seen_details
        if response_id is None:
            is_first[row] = not is_repeat
        elif (response_id, user_id) in seen_ids:
            is_first[row] = False
            first = seen_ids[response_id, user_id]
            changed_count += any(columns[name][row] != columns[name][first] for name in REACTION_COLUMNS)
        elif is_repeat:
            repeated_count += 1
        seen_ids.setdefault((response_id, user_id), row)
        seen_details.add(details[row])
    missing_count = sum(value is None for value in ids)
    if missing_count:
        notes.append(
            f"{missing_count} rows have no id: of these, rows with the same user, time, arm, conversation and turn as "
            "an earlier one count as duplicates"
        )
    if changed_count:
        notes.append(
            f"{changed_count} repeated rows have another reaction than the first row with their id, which counts; "
            "if a reaction came later, leave one row with it"
        )
    if repeated_count:
        notes.append(
            f"{repeated_count} rows repeat user, time, arm, conversation and turn of an earlier row under another id "
            "and count again; if they were sent twice, remove them"
        )
    present = [value for value in ids if value is not None]
    shared = sum(pair[0] is not None for pair in seen_ids) - len(set(present))
    if shared:
        notes.append(f"{shared} ids occur with more than one user, so they are not ids of responses")
    return is_first


def _read_reactions(
    columns: Columns, column: str | None, path: Path, love_names: Sequence[str]
) -> tuple[dict[str, Floats], dict[str, list[int]]]:
    """1 or 0 for each row of the log and each reaction, and the rows of each spelling of love."""
    if column is None:
        if love_names:
            raise DataError(f"{path}: no column {' or '.join(REACTION_COLUMNS)}, so --love has nothing to name")
        return {}, {}
    reactions = parse_reactions(columns[column], ColumnSource(path, column), love_names)
    other_names = sorted(
        reactions.rows_by_name.keys() - {LOVE_REACTION}, key=lambda name: -len(reactions.rows_by_name[name])
    )
    values = {}
    # The love reaction is always a metric: a log without any heart has a love rate of 0, not none.
    for name in (LOVE_REACTION, *other_names[:_MAX_REACTION_METRICS]):
        values[name] = np.zeros(len(columns[column]))
        values[name][reactions.rows_by_name.get(name, [])] = 1.0
    return values, reactions.rows_by_spelling


def _read_numbers(columns: Columns, path: Path, metric_columns: Sequence[str]) -> dict[str, Floats]:
    """Value of each row of the log for each flag and each additional column."""
    values = {}
    for name in dict.fromkeys((*_FLAG_COLUMNS, *metric_columns)):
        if _has_values(columns, name):
            values[name] = parse_numbers(columns[name], ColumnSource(path, name), is_flag=name in _FLAG_COLUMNS)
        elif name in metric_columns:
            raise DataError(f"column {name!r} of the log has no values; name another one with --column")
    return values


def cap_values(events: EventLog, quantile: float) -> EventLog:
    """The log with the numeric (not yes/no) values of each metric capped at their quantile over all rows."""
    capped = {
        name: values if events.is_yes_no(name) else np.minimum(values, np.nanquantile(values, quantile, method="lower"))
        for name, values in events.metric_values.items()
    }
    return replace(events, metric_values=capped)


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
