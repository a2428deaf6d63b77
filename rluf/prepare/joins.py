"""What the user did next: logged reactions, next turns, returns, and the propensity to react. Arrays in, arrays out.

Propensity is the probability of any reaction, from where the response was displayed and how active the user is. The
response's text is not a feature: what this column lets a loss correct is exposure and self-selection, not taste
(Schnabel et al. 2016, "Recommendations as Treatments"). A loss may weight a row by the inverse, clipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rluf.prepare.labels import LOVED, NOT_LOVED
from rluf.prepare.splits import HashKeys
from rluf.utils.stats import Bools, Floats, Ints, fit_logistic, sigmoid

HOUR_US = 3_600_000_000
"""An hour in microseconds, the unit of all times here."""

CLOCK_SKEW_US = 60_000_000
"""How far a reaction may be logged before its response: two machines, two clocks."""

UNKNOWN_TIME_US = 946_684_800_000_000
"""The beginning of 2000: time of an event of a table without times, which counts as that of its response."""

_MAX_DURATION_US = 2**61
"""Longest duration in microseconds, 73,000 years: added to any time it stays within int64."""

_RETURN_GAP_US = 6 * HOUR_US
"""Gap after which a user has returned; activity before it belongs to the same visit."""


def to_microseconds(hours: float) -> int:
    """Hours in microseconds, at most _MAX_DURATION_US."""
    return int(min(hours * HOUR_US, _MAX_DURATION_US))


@dataclass(frozen=True, slots=True)
class ReactionEvents:
    """E reaction events in the order of the log: keys of event and response, time, code of the reaction, retracted."""

    event_key: HashKeys
    response_key: HashKeys
    time_us: Ints
    reaction_code: Ints
    retracted: Bools


@dataclass(frozen=True, slots=True)
class AttributedReactions:
    """Active and retracted reactions, as rows and events of equal length, and dropped events by reason.

    `drop_counts` has every event except those of active reactions.
    """

    active_rows: Ints
    active_events: Ints
    retracted_rows: Ints
    retracted_events: Ints
    drop_counts: Counter[str]


def attribute_reactions(
    events: ReactionEvents, response_key: HashKeys, served_us: Ints, window_us: int
) -> AttributedReactions:
    """Assign reaction events to rows, whose response keys and times are [N].

    Of events with the same id the first counts. An event more than CLOCK_SKEW_US before its response, or more than
    `window_us` after it, is dropped. Of the events of one response and reaction, the latest decides whether the
    reaction is active (a retraction ends it; at equal times the retraction counts as later).
    """
    drop_counts: Counter[str] = Counter()
    _, event_index = np.unique(events.event_key, return_index=True)
    drop_counts["duplicate event"] = len(events.event_key) - len(event_index)
    if not len(response_key):
        drop_counts["no such response"] = len(event_index)
        empty = np.empty(0, dtype=np.int64)
        return AttributedReactions(empty, empty, empty, empty, drop_counts)
    order = np.argsort(response_key, kind="stable")
    position = np.searchsorted(response_key[order], events.response_key[event_index])
    row = order[np.minimum(position, len(order) - 1)]
    has_row = response_key[row] == events.response_key[event_index]
    drop_counts["no such response"] = int((~has_row).sum())
    event_index, row = event_index[has_row], row[has_row]
    event_us = events.time_us[event_index]
    delay_us = np.where(event_us == UNKNOWN_TIME_US, 0, event_us - served_us[row])
    in_window = (delay_us >= -CLOCK_SKEW_US) & (delay_us <= window_us)
    drop_counts["outside the attribution window"] = int((~in_window).sum())
    event_index, row = event_index[in_window], row[in_window]
    code, is_retraction = events.reaction_code[event_index], events.retracted[event_index]
    # Sorted by row, reaction, time and retraction, the last event of each (row, reaction) decides.
    order = np.lexsort((is_retraction, events.time_us[event_index], code, row))
    row, code, is_retraction, event_index = row[order], code[order], is_retraction[order], event_index[order]
    is_last = np.ones(len(row), dtype=np.bool_)
    is_last[:-1] = (row[1:] != row[:-1]) | (code[1:] != code[:-1])
    drop_counts["superseded by a later event"] = int((~is_last).sum())
    drop_counts["retracted"] = int((is_last & is_retraction).sum())
    is_active, is_retracted = is_last & ~is_retraction, is_last & is_retraction
    # In the order of the log, which decides between two reactions at the same time.
    active_order = np.argsort(event_index[is_active])
    return AttributedReactions(
        row[is_active][active_order], event_index[is_active][active_order], row[is_retracted],
        event_index[is_retracted], drop_counts,
    )  # fmt: skip


def choose_active_reactions(
    rows: Ints, time_us: Ints, label_code: Ints, row_count: int, contradictions: str
) -> tuple[Ints, Bools]:
    """Index [row_count] of the active reaction that counts on each row, -1 for none; and whether [row_count] a row has
    both loved and not loved ones.

    The latest counts, those with the label of `contradictions` first; ignored ones count only where they are alone.
    """
    is_counted = (label_code == LOVED) | (label_code == NOT_LOVED)
    preferred_code = {"loved": LOVED, "not_loved": NOT_LOVED}.get(contradictions)
    is_preferred = is_counted & (label_code == preferred_code) if preferred_code is not None else is_counted
    order = np.lexsort((time_us, is_preferred, is_counted))
    chosen = np.full(row_count, -1, dtype=np.int64)
    chosen[rows[order]] = order  # of several assignments to a row the last one stays
    has_label = [np.zeros(row_count, dtype=np.bool_) for _ in range(2)]
    for has_code, code in zip(has_label, (LOVED, NOT_LOVED), strict=True):
        has_code[rows[label_code == code]] = True
    return chosen, has_label[0] & has_label[1]


def detect_continued(conversation_key: HashKeys, turn: Ints, time_us: Ints) -> tuple[Bools, Bools]:
    """Whether a later row of the conversation follows [N], and whether the log can show it [N].

    A log in which every conversation has one row shows nothing. Nor do its last six hours, where the next message may
    come after the end of the log.
    """
    order = np.lexsort((time_us, turn, conversation_key))
    has_next = np.zeros(len(turn), dtype=np.bool_)
    is_same = conversation_key[order][1:] == conversation_key[order][:-1]
    has_next[order[:-1]] = is_same & (turn[order][1:] > turn[order][:-1])
    log_has_conversations = np.full(len(turn), bool(is_same.any()))
    before_end = time_us <= (time_us.max() if len(time_us) else 0) - _RETURN_GAP_US
    return has_next, log_has_conversations & (before_end | has_next)


def find_within_users(user_code: Ints, time_us: Ints, query_us: Ints, boundary: Literal["left", "right"]) -> Ints:
    """Position [N] of each row's query time among the times of its user; rows are sorted by user and time.

    As numpy.searchsorted within each user's rows. Positions count from the first row of all users.
    """
    positions = np.empty(len(user_code), dtype=np.int64)
    is_first = np.ones(len(user_code), dtype=np.bool_)
    is_first[1:] = user_code[1:] != user_code[:-1]
    first_rows, user_index = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    first_us = time_us[first_rows]
    # Each user gets a segment of a number line: the user's own span of time and a microsecond on either side, where
    # queries before and after it go. All users on one line would overflow int64 from 290,000 user-years on, so users
    # are searched in blocks whose segments add up to about 2**61. Blocks of a million rows also need less memory.
    segment_us = time_us[np.append(first_rows[1:], len(time_us)) - 1] - first_us + 2
    block = np.floor(np.cumsum(segment_us.astype(np.float64)) / 2.0**61) + first_rows // 2**20
    block_starts = np.flatnonzero(np.diff(block, prepend=-1.0))
    for first_user, end_user in zip(block_starts, np.append(block_starts[1:], len(first_rows)), strict=True):
        start, end = first_rows[first_user], first_rows[end_user] if end_user < len(first_rows) else len(user_code)
        user = user_index[start:end]
        segment_start = np.cumsum(segment_us[first_user:end_user]) - segment_us[first_user:end_user]
        origin = segment_start[user - first_user] - first_us[user]
        query = np.clip(query_us[start:end], first_us[user] - 1, first_us[user] + segment_us[user] - 1)
        positions[start:end] = start + np.searchsorted(time_us[start:end] + origin, query + origin, side=boundary)
    return positions


def detect_returned(user_code: Ints, time_us: Ints, window_days: float) -> tuple[Bools, Bools]:
    """Whether the user is active six hours to `window_days` later [N], and whether the log can show it [N]."""
    if not len(user_code):
        return np.zeros(0, dtype=np.bool_), np.zeros(0, dtype=np.bool_)
    window_us = to_microseconds(window_days * 24)
    order = np.lexsort((time_us, user_code))
    sorted_users, sorted_times = user_code[order], time_us[order]
    first_return = find_within_users(sorted_users, sorted_times, sorted_times + _RETURN_GAP_US, "left")
    window_end = find_within_users(sorted_users, sorted_times, sorted_times + window_us, "right")
    returned = np.zeros(len(user_code), dtype=np.bool_)
    returned[order] = first_return < window_end
    return returned, returned | (time_us + window_us <= time_us.max())


_MAX_LEVELS = 20
"""Most frequent levels of a feature that have a coefficient of their own; the others share one."""

_MIN_PROPENSITY = 1e-3


def bin_by_octave(counts: Ints) -> Ints:
    """Counts [N] by powers of two: 0 for 0 and 1, 1 for 2 and 3, and so on."""
    return np.floor(np.log2(np.maximum(counts, 1))).astype(np.int64)


def estimate_propensity(features: Mapping[str, Ints], reacted: NDArray[np.bool_]) -> tuple[Floats, dict[str, Floats]]:
    """Probability of any reaction [N] by logistic regression on level codes [N]; and each feature's log-odds by level.

    Rows with the same combination of levels are fitted as one, weighted by their number, so the fit costs the same for
    a thousand rows as for ten million.
    """
    if not len(reacted) or reacted.all() or not reacted.any():
        return np.full(len(reacted), float(reacted.mean()) if len(reacted) else 0.0), {}
    level_arrays = []
    for codes in features.values():
        code_counts = np.bincount(codes)
        rank = np.empty(len(code_counts), dtype=np.int64)
        rank[np.argsort(-code_counts, kind="stable")] = np.arange(len(code_counts))
        level_arrays.append(np.minimum(rank, _MAX_LEVELS)[codes])
    # One number for each combination of levels, in base _MAX_LEVELS + 1.
    cell_code = np.zeros(len(reacted), dtype=np.int64)
    for levels in level_arrays:
        cell_code = cell_code * (_MAX_LEVELS + 1) + levels
    _, first_rows, cell_index = np.unique(cell_code, return_index=True, return_inverse=True)
    design_matrix = np.concatenate([np.eye(_MAX_LEVELS + 1)[levels[first_rows]] for levels in level_arrays], axis=1)
    cell_rows = np.bincount(cell_index).astype(np.float64)
    cell_rates = np.bincount(cell_index, weights=reacted) / cell_rows
    coefficients = fit_logistic(design_matrix, cell_rates, cell_rows, 1.0)
    propensity = sigmoid(design_matrix @ coefficients[:-1] + coefficients[-1])[cell_index]
    feature_coefficients = np.split(coefficients[:-1], len(level_arrays))
    return np.maximum(propensity, _MIN_PROPENSITY), dict(zip(features, feature_coefficients, strict=True))
