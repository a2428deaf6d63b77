"""The admission rule, by worked numbers and by simulation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.train.work_buffer import compute_admission_capacity


@pytest.mark.parametrize(
    ("concurrency", "running", "accepted", "version", "batch", "staleness", "expected"),
    [
        (16, 0, 0, 0, 12, 0, 12),  # one batch, no more
        (16, 5, 7, 0, 12, 0, 0),  # the batch has started
        (16, 0, 12, 1, 12, 0, 12),  # the next version frees the next batch
        (16, 0, 0, 0, 12, 1, 16),  # one step ahead, bound by concurrency
        (16, 10, 12, 0, 12, 1, 2),  # (1 + 0 + 1) * 12 - 22
        (4, 6, 0, 0, 12, 0, 0),  # never negative
    ],
)
def test_worked_numbers(
    concurrency: int, running: int, accepted: int, version: int, batch: int, staleness: int, expected: int
) -> None:
    capacity = compute_admission_capacity(
        concurrency=concurrency,
        running_groups=running,
        accepted_groups=accepted,
        weight_version=version,
        groups_per_step=batch,
        max_staleness=staleness,
    )
    assert capacity == expected


@given(
    concurrency=st.integers(1, 40),
    batch=st.integers(1, 20),
    staleness=st.integers(0, 4),
    wave_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
)
def test_no_group_exceeds_max_staleness_when_trained_on(
    concurrency: int, batch: int, staleness: int, wave_sizes: list[int]
) -> None:
    """Groups start whenever the rule allows and finish in order, in waves of any size."""
    start_versions: list[int] = []
    version = finished_count = 0
    for wave_size in wave_sizes:
        capacity = compute_admission_capacity(
            concurrency=concurrency,
            running_groups=len(start_versions) - finished_count,
            accepted_groups=finished_count,
            weight_version=version,
            groups_per_step=batch,
            max_staleness=staleness,
        )
        start_versions += [version] * capacity
        assert len(start_versions) - finished_count <= concurrency
        finished_count = min(len(start_versions), finished_count + wave_size)
        while finished_count >= (version + 1) * batch:
            trained = start_versions[version * batch : (version + 1) * batch]
            assert all(version - start_version <= staleness for start_version in trained)
            version += 1
