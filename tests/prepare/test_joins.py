"""Reaction events, next turns and returns, in any order."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare.abuse import ABUSE_RULES, AbuseLog
from rluf.prepare.joins import HOUR_US, ReactionEvents, attribute_reactions, detect_continued, detect_returned

EventRow = tuple[int, int, int, int, bool]


def build_events(rows: list[EventRow]) -> ReactionEvents:
    """Events from (event, response, time, reaction code, retracted)."""
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * 5
    dtypes = (np.uint64, np.uint64, np.int64, np.int64, np.bool_)
    return ReactionEvents(*(np.array(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)))


event_rows = st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 20), st.integers(0, 1), st.booleans())


@settings(max_examples=120)
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
        if response in (1, 2, 3) and time_us - served_us[response - 1] <= 8:
            key = (response - 1, code)
            latest[key] = max(latest.get(key, (-1, False)), (time_us, is_retraction))
    active = {key for key, (_, is_retraction) in latest.items() if not is_retraction}
    retracted = {key for key, (_, is_retraction) in latest.items() if is_retraction}
    result = attribute_reactions(build_events(rows), response_key, served_us, 8)
    events = build_events(rows)
    active_codes = events.reaction_code[result.active_events].tolist()
    retracted_codes = events.reaction_code[result.retracted_events].tolist()
    assert set(zip(result.active_rows.tolist(), active_codes, strict=True)) == active
    assert set(zip(result.retracted_rows.tolist(), retracted_codes, strict=True)) == retracted
    assert len(result.active_rows) + result.drop_counts.total() == len(rows)
    first_rows = list({row[0]: row for row in reversed(rows)}.values())
    rng.shuffle(first_rows)
    shuffled_result = attribute_reactions(build_events(first_rows), response_key, served_us, 8)
    shuffled_codes = build_events(first_rows).reaction_code[shuffled_result.active_events].tolist()
    assert set(zip(shuffled_result.active_rows.tolist(), shuffled_codes, strict=True)) == active
    for events_in_order in (result.active_events, shuffled_result.active_events):
        assert events_in_order.tolist() == sorted(events_in_order.tolist())


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


def draw_visits(user_count: int, span_us: int, seed: int) -> tuple[Any, Any]:
    """User codes and times of three visits per user, in random order, from 1999 to far in the future."""
    rng = np.random.default_rng(seed)
    user_code = rng.permutation(np.repeat(np.arange(user_count), 3))
    # Whole half minutes and half days make equal times, and pauses of exactly a limit, frequent.
    step_us = rng.choice([30_000_000, 12 * HOUR_US], 3 * user_count)
    time_us = 915_148_800_000_000 + rng.integers(0, span_us, 3 * user_count) // step_us * step_us
    return user_code, time_us


@pytest.mark.parametrize(
    ("user_count", "span_days"), [(1, 3), (300, 1), (5_000, 40), (20_000, 365), (20_000, 36_500), (4_000, 2_900_000)]
)
def test_returns_and_bursts_equal_a_plain_loop(user_count: int, span_days: int) -> None:
    user_code, time_us = draw_visits(user_count, span_days * 24 * HOUR_US, seed=user_count)
    returned, _ = detect_returned(user_code, time_us, 7)
    times_of_user: dict[int, list[int]] = {}
    for user, time in zip(user_code.tolist(), time_us.tolist(), strict=True):
        times_of_user.setdefault(user, []).append(time)
    rows = list(zip(user_code.tolist(), time_us.tolist(), strict=True))
    expected = [
        any(time + 6 * HOUR_US <= later <= time + 168 * HOUR_US for later in times_of_user[user]) for user, time in rows
    ]
    assert returned.tolist() == expected
    repeats = 12  # twelve responses within seconds of each visit, so that bursts exist
    burst_times = (time_us[:, None] + 1_000_000 * np.arange(repeats)).reshape(-1)
    log = build_burst_log(np.repeat(user_code, repeats), burst_times)
    weight = ABUSE_RULES["burst"](log)
    for row in np.random.default_rng(1).integers(0, len(burst_times), 300).tolist():
        times = times_of_user[int(log.user_code[row])]
        moments = {time + 1_000_000 * i for time in times for i in range(repeats)}
        in_window = sum(abs(moment - int(burst_times[row])) <= 30_000_000 for moment in moments)
        assert in_window >= repeats and weight[row] == (8 / in_window) ** 2


def test_a_million_users_over_a_year_equal_a_search_per_user() -> None:
    user_code, time_us = draw_visits(1_000_000, 365 * 24 * HOUR_US, seed=3)
    returned, is_known = detect_returned(user_code, time_us, 7)
    # Three visits per user: a [users, 3] table of times compares every pair.
    table = time_us[np.argsort(user_code, kind="stable")].reshape(-1, 3)
    pause = table[:, None, :] - table[:, :, None]
    expected = ((pause >= 6 * HOUR_US) & (pause <= 168 * HOUR_US)).any(axis=2).reshape(-1)
    assert np.array_equal(returned[np.argsort(user_code, kind="stable")], expected)
    assert is_known[returned].all()
    weight = ABUSE_RULES["burst"](build_burst_log(user_code, time_us))
    assert weight.min() == 1.0


def build_burst_log(user_code: Any, time_us: Any) -> AbuseLog:
    zeros = np.zeros(len(user_code), dtype=np.int64)
    no_flags = np.zeros(len(user_code), dtype=np.bool_)
    return AbuseLog(user_code, zeros, zeros, zeros - 1, time_us, no_flags, no_flags)
