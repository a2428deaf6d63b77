"""A simulated A/B test: users stay in their arm, the pre-period is the control's, and a seed gives one log."""

from __future__ import annotations

import json
from datetime import timedelta

import numpy as np

from rluf.prepare.schema import FeedbackRecord
from rluf.simulate.experiment import experiment_rows, read_served
from rluf.simulate.log import FIRST_DAY, Row
from rluf.utils.paths import sample_file

USERS = [f"user-{n}" for n in range(60)]
ARM = np.arange(60) % 2


def made(seed: int = 1) -> list[Row]:
    control, warm = (rows[:20] for rows in read_served(sample_file("feedback"), ("base-cool", "base-warm")))
    return experiment_rows(
        {"control": control, "treatment": warm}, ARM, names=USERS, days=3, pre_days=2, reads_per_day=2.0, seed=seed
    )


def test_rows_are_feedback_records_in_the_order_of_time() -> None:
    rows = made()
    records = [FeedbackRecord.model_validate_json(json.dumps(row)) for row in rows]
    assert [one.time for one in records] == sorted(one.time for one in records)
    assert len({one.id for one in records}) == len(rows)
    assert 300 < len(rows) < 900


def test_users_stay_in_their_arm_and_start_on_the_control() -> None:
    begin = (FIRST_DAY + timedelta(days=2)).isoformat()
    for row in made():
        treated = ARM[USERS.index(row["user_id"])] == 1 and row["time"] >= begin
        assert row["arm"] == ("treatment" if treated else "control")
        assert row["model_version"] == ("base-warm" if treated else "base-cool")


def test_a_seed_gives_one_log() -> None:
    assert made(3) == made(3)
    assert made(3) != made(4)
