"""Reaction events, next turns and returns, in any order."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare.joins import HOUR_US, ReactionEvents, attribute_reactions, detect_continued, detect_returned

EventRow = tuple[int, int, int, int, bool]


def build_events(rows: list[EventRow]) -> ReactionEvents:
    """Events from (event, response, time, reaction code, retracted)."""
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * 5
    dtypes = (np.uint64, np.uint64, np.int64, np.int64, np.bool_)
    return ReactionEvents(*(np.array(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)))


event_rows = st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 20), st.integers(0, 1), st.booleans())


@settings(max_examples=120, deadline=None)
@given(st.lists(event_rows, max_size=15), st.randoms())
def test_attribution_equals_a_plain_loop(rows: list[EventRow], rng: random.Random) -> None:
    response_key = np.array([1, 2, 3], dtype=np.uint64)
    served_us = np.array([5, 5, 9], dtype=np.int64)
    seen_events: set[int] = set()
    latest: dict[tuple[int, int], tuple[int, bool]] = {}
    for event, response, time_us, code, is_retraction in rows:
        if event in seen_events:
            continue
        seen_events.add(event)
        if response in (1, 2, 3) and 0 <= time_us - served_us[response - 1] <= 8:
            key = (response - 1, code)
            latest[key] = max(latest.get(key, (-1, False)), (time_us, is_retraction))
    active = {key for key, (_, is_retraction) in latest.items() if not is_retraction}
    retracted = {key for key, (_, is_retraction) in latest.items() if is_retraction}
    result = attribute_reactions(build_events(rows), response_key, served_us, 8)
    assert set(zip(result.active_rows.tolist(), result.active_codes.tolist(), strict=True)) == active
    assert set(zip(result.retracted_rows.tolist(), result.retracted_codes.tolist(), strict=True)) == retracted
    assert len(result.active_rows) + result.drop_counts.total() == len(rows)
    first_rows = list({row[0]: row for row in reversed(rows)}.values())
    rng.shuffle(first_rows)
    shuffled_result = attribute_reactions(build_events(first_rows), response_key, served_us, 8)
    assert shuffled_result.active_rows.tolist() == result.active_rows.tolist()
    assert shuffled_result.active_codes.tolist() == result.active_codes.tolist()


def test_events_without_any_response_are_counted() -> None:
    no_keys, no_times = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    result = attribute_reactions(build_events([(1, 1, 0, 0, False)]), no_keys, no_times, 8)
    assert result.drop_counts.total() == 1 and not len(result.active_rows)


def test_a_next_turn_shows_that_the_user_continued() -> None:
    conversation_key = np.array([1, 1, 1, 2, 3], dtype=np.uint64)
    turn = np.array([2, 0, 1, 0, 0])
    time_us = np.array([3, 1, 2, 5, 100 * HOUR_US])
    continued, is_known = detect_continued(conversation_key, turn, time_us)
    assert continued.tolist() == [False, True, True, False, False]
    assert is_known.tolist() == [True, True, True, True, False]
    assert not detect_continued(conversation_key[2:], turn[2:], time_us[2:])[1].any()


def test_a_return_needs_a_gap_of_six_hours_and_a_log_that_covers_the_window() -> None:
    day_us = 24 * HOUR_US
    cases: list[tuple[int, int, Any]] = [
        (0, 0, False),
        (0, 5 * HOUR_US, False),
        (1, 0, True),
        (1, 7 * HOUR_US, False),
        (2, 0, False),
        (2, 8 * day_us, None),
        (3, 10 * day_us, None),
    ]
    user_code, time_us, expected = (list(column) for column in zip(*cases, strict=True))
    returned, is_known = detect_returned(np.array(user_code), np.array(time_us), 7)
    assert [bool(value) if known else None for value, known in zip(returned, is_known, strict=True)] == expected
