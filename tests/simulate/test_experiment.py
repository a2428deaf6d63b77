"""Simulated A/B test: users stay in their arm, the pre-period is control only, and a seed reproduces the log."""

from __future__ import annotations

import json
from datetime import timedelta

import numpy as np

from rluf.prepare.schema import FeedbackRecord
from rluf.simulate.experiment import read_served_responses, simulate_experiment_rows
from rluf.simulate.ground_truth import ReaderInput
from rluf.simulate.log import FIRST_DAY, Row
from rluf.utils.paths import find_sample_log
from tests.simulate.readings import FITTING, make_reader

USER_IDS = [f"user-{n}" for n in range(60)]
ARM_OF_USER = np.arange(60) % 2


def simulate_rows(seed: int = 1) -> list[Row]:
    control_rows, warm_rows = (
        rows[:20] for rows in read_served_responses(find_sample_log("feedback"), ("base-cool", "base-warm"))
    )
    inputs = [ReaderInput.from_row(row) for row in (*control_rows, *warm_rows)]
    return simulate_experiment_rows(
        {"control": control_rows, "treatment": warm_rows},
        ARM_OF_USER,
        user_ids=USER_IDS,
        days=3,
        pre_days=2,
        reads_per_day=2.0,
        seed=seed,
        reader=make_reader(inputs, [FITTING] * len(inputs)),
    )


def test_rows_are_feedback_records_in_time_order() -> None:
    rows = simulate_rows()
    records = [FeedbackRecord.model_validate_json(json.dumps(row)) for row in rows]
    assert [record.time for record in records] == sorted(record.time for record in records)
    assert len({record.id for record in records}) == len(rows)
    assert 300 < len(rows) < 900


def test_users_stay_in_their_arm_and_start_on_the_control() -> None:
    experiment_start = (FIRST_DAY + timedelta(days=2)).isoformat()
    for row in simulate_rows():
        is_treated = ARM_OF_USER[USER_IDS.index(row["user_id"])] == 1 and row["time"] >= experiment_start
        assert row["arm"] == ("treatment" if is_treated else "control")
        assert row["model_version"] == ("base-warm" if is_treated else "base-cool")


def test_a_seed_reproduces_the_log() -> None:
    assert simulate_rows(3) == simulate_rows(3)
    assert simulate_rows(3) != simulate_rows(4)
