"""Reaction events, next turns and coming back, in any order."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare.joins import HOUR, Events, attribute, came_back, written_on

NAMES = ("love", "thumbs_down")


def events(rows: list[tuple[int, int, int, int, bool]]) -> Events:
    event, response, time, name, gone = (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 5
    return Events(
        np.array(event, dtype=np.uint64), np.array(response, dtype=np.uint64), np.array(time, dtype=np.int64),
        np.array(name, dtype=np.int64), np.array(gone, dtype=np.bool_),
    )  # fmt: skip


row = st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 20), st.integers(0, 1), st.booleans())


@settings(max_examples=120, deadline=None)
@given(st.lists(row, max_size=15), st.randoms())
def test_attribution_is_what_a_plain_loop_says(rows: list[tuple[int, int, int, int, bool]], rng: random.Random) -> None:
    response = np.array([1, 2, 3], dtype=np.uint64)
    time = np.array([5, 5, 9], dtype=np.int64)
    seen: set[int] = set()
    state: dict[tuple[int, int], tuple[int, bool]] = {}
    for event, target, at, name, gone in rows:
        if event in seen:
            continue
        seen.add(event)
        if target in (1, 2, 3) and 0 <= at - time[target - 1] <= 8:
            key = (target - 1, name)
            state[key] = max(state.get(key, (-1, False)), (at, gone))
    hold = {key for key, (_, gone) in state.items() if not gone}
    back = {key for key, (_, gone) in state.items() if gone}
    got = attribute(events(rows), response, time, 8)
    assert set(zip(got.row.tolist(), got.name.tolist(), strict=True)) == hold
    assert set(zip(got.back_row.tolist(), got.back_name.tolist(), strict=True)) == back
    assert len(got.row) + got.fate.total() == len(rows)
    first = {event: found for event, *found in reversed(rows)}
    shuffled = [(event, *found) for event, found in first.items()]
    rng.shuffle(shuffled)
    again = attribute(events(shuffled), response, time, 8)
    assert (again.row.tolist(), again.name.tolist()) == (got.row.tolist(), got.name.tolist())


def test_events_without_any_response_are_counted() -> None:
    got = attribute(events([(1, 1, 0, 0, False)]), np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64), 8)
    assert got.fate.total() == 1 and not len(got.row)


def test_next_turns_tell_who_wrote_on() -> None:
    talk = np.array([1, 1, 1, 2, 3], dtype=np.uint64)
    turn = np.array([2, 0, 1, 0, 0])
    time = np.array([3, 1, 2, 5, 100 * HOUR])
    found, tells = written_on(talk, turn, time)
    assert found.tolist() == [False, True, True, False, False]
    assert tells.tolist() == [True, True, True, True, False]
    assert not written_on(talk[2:], turn[2:], time[2:])[1].any()


def test_coming_back_needs_six_hours_and_a_log_that_lasts() -> None:
    day = 24 * HOUR
    cases: list[tuple[int, int, Any]] = [
        (0, 0, False), (0, 5 * HOUR, False), (1, 0, True), (1, 7 * HOUR, False), (2, 0, False), (2, 8 * day, None),
        (3, 10 * day, None),
    ]  # fmt: skip
    user, time, expected = (list(column) for column in zip(*cases, strict=True))
    back, tells = came_back(np.array(user), np.array(time), 7)
    found = [bool(b) if t else None for b, t in zip(back, tells, strict=True)]
    assert found == expected
