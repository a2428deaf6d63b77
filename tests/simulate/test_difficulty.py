"""Difficulty: the ceiling is the AUROC of a perfect score of the text, and calibration reaches a requested one."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab.difficulty import bayes_auroc, calibrate_world, relabel_rows

from rluf.errors import DataError
from rluf.reward.metrics import auroc
from rluf.simulate.world import WORLD
from rluf.utils.paths import find_sample_log


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    with gzip.open(find_sample_log("feedback"), "rt", encoding="utf-8") as stream:
        return [json.loads(line) for _, line in zip(range(400), stream, strict=False)]


def test_the_ceiling_is_the_auroc_of_the_true_probabilities_on_sampled_labels() -> None:
    probabilities = np.random.default_rng(1).beta(0.5, 4.0, 200_000)
    labels = (np.random.default_rng(2).random(200_000) < probabilities).astype(np.float64)
    assert abs(bayes_auroc(probabilities) - auroc(probabilities, labels)) < 0.005
    assert bayes_auroc(np.full(50, 0.1)) == pytest.approx(0.5)


@pytest.mark.parametrize("auroc_ceiling", [0.7, 0.85])
def test_calibration_reaches_the_ceiling_and_the_rate(rows: list[dict[str, Any]], auroc_ceiling: float) -> None:
    calibrated = calibrate_world(rows, love_rate=0.03, auroc_ceiling=auroc_ceiling, user_count=60)
    assert calibrated.auroc_ceiling == pytest.approx(auroc_ceiling, abs=2e-4)
    assert calibrated.love_probabilities.mean() == pytest.approx(0.03, abs=1e-4)


def test_hearts_of_new_users_are_ranked_as_well_as_the_ceiling(rows: list[dict[str, Any]]) -> None:
    calibrated = calibrate_world(rows, love_rate=0.1, auroc_ceiling=0.8, user_count=60)
    aurocs = [
        auroc(
            calibrated.love_probabilities,
            np.array([row["reaction"] == "love" for row in relabel_rows(rows, calibrated, user_count=200, seed=seed)]),
        )
        for seed in range(30)
    ]
    assert np.mean(aurocs) == pytest.approx(0.8, abs=4 * np.std(aurocs) / np.sqrt(30))
    repeated = [relabel_rows(rows, calibrated, user_count=200, seed=3) for _ in range(2)]
    assert repeated[0] == repeated[1]


def test_without_a_ceiling_the_world_is_unchanged_and_an_unreachable_one_is_refused(rows: list[dict[str, Any]]) -> None:
    assert calibrate_world(rows, love_rate=0.05, user_count=60).world == WORLD
    with pytest.raises(DataError, match=r"ceiling of 0\.999"):
        calibrate_world(rows, love_rate=0.05, auroc_ceiling=0.999, user_count=60)
