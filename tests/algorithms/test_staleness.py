"""The capacity rule, by number and by simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.algorithms.staleness import capacity


@pytest.mark.parametrize(
    ("concurrency", "running", "accepted", "version", "batch", "staleness", "expected"),
    [
        (16, 0, 0, 0, 12, 0, 12),  # one batch, no more
        (16, 5, 7, 0, 12, 0, 0),  # the batch is out
        (16, 0, 12, 1, 12, 0, 12),  # the next version frees the next batch
        (16, 0, 0, 0, 12, 1, 16),  # one step ahead, bound by concurrency
        (16, 10, 12, 0, 12, 1, 2),  # (1 + 0 + 1) * 12 - 22
        (4, 6, 0, 0, 12, 0, 0),  # never negative
    ],
)
def test_worked_numbers(
    concurrency: int, running: int, accepted: int, version: int, batch: int, staleness: int, expected: int
) -> None:
    found = capacity(
        concurrency=concurrency,
        running=running,
        accepted=accepted,
        version=version,
        batch=batch,
        staleness=staleness,
    )
    assert found == expected


@given(
    concurrency=st.integers(1, 40),
    batch=st.integers(1, 20),
    staleness=st.integers(0, 4),
    finishing=st.lists(st.integers(1, 40), min_size=1, max_size=40),
)
def test_no_group_is_older_than_staleness_when_learnt_from(
    concurrency: int, batch: int, staleness: int, finishing: list[int]
) -> None:
    """Groups start whenever the rule allows and finish in order, in waves of any size."""
    started: list[int] = []
    version = ready = 0
    for wave in finishing:
        running = len(started) - ready
        room = capacity(
            concurrency=concurrency, running=running, accepted=ready, version=version, batch=batch, staleness=staleness
        )
        started += [version] * room
        assert len(started) - ready <= concurrency
        ready = min(len(started), ready + wave)
        while ready >= (version + 1) * batch:
            learnt = started[version * batch : (version + 1) * batch]
            assert all(version - born <= staleness for born in learnt)
            version += 1
