"""Fronts, hypervolume and the recommended setting, on cases that can be checked by hand or by sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rluf.errors import DataError
from rluf.sweep.analysis import report, sweep_text
from rluf.sweep.pareto import Choice, hypervolume, on_front, recommended


def test_a_point_is_on_the_front_unless_another_is_nowhere_worse_and_somewhere_better() -> None:
    points = [[1.0, 0.0], [0.5, 0.5], [0.4, 0.5], [0.0, 1.0], [0.0, 1.0]]
    assert on_front(points).tolist() == [True, True, False, True, True]


def test_hypervolume_of_two_goods_is_the_staircase() -> None:
    assert hypervolume([[1.0, 3.0], [2.0, 1.0]], (0.0, 0.0)) == pytest.approx(4.0)
    assert hypervolume([[1.0, 3.0], [2.0, 1.0], [0.5, 0.5]], (0.0, 0.0)) == pytest.approx(4.0)
    assert hypervolume([[-1.0, 3.0]], (0.0, 0.0)) == 0.0


def test_hypervolume_of_three_goods_is_what_sampling_finds() -> None:
    rng = np.random.default_rng(1)
    points = rng.random((12, 3))
    draws = rng.random((200_000, 3))
    covered = (draws[:, None, :] <= points[None]).all(-1).any(-1).mean()
    assert hypervolume(points, (0.0, 0.0, 0.0)) == pytest.approx(covered, abs=0.005)


def test_the_recommended_setting_held_on_every_seed_and_one_lucky_seed_is_not_enough() -> None:
    steady = Choice("steady", ((0.2, 0.0), (0.3, 0.0)), (True, True))
    greedy = Choice("greedy", ((0.9, -0.2), (0.8, 0.0)), (False, True))
    lucky = Choice("lucky", ((1.5, 0.0), (-0.1, 0.0)), (True, True))
    assert recommended([greedy, lucky, steady]) == steady
    assert recommended([greedy, lucky]) is None


@pytest.mark.parametrize("points", [[], [1.0, 2.0], [[float("nan"), 1.0]]])
def test_what_is_no_table_of_numbers_is_refused(points: Any) -> None:
    with pytest.raises(DataError, match="finite numbers"):
        on_front(points)


def summary(love: float | None, helpful: float, *, passed: bool = True, alarms: tuple[str, ...] = ()) -> dict[str, Any]:
    lift = None if love is None else {"mean": love, "low": love - 0.1, "high": love + 0.1}
    checks = [
        {"name": "love", "passed": love is not None and love > 0.1, "lift": lift},
        {"name": "helpfulness", "passed": passed, "lift": {"mean": helpful, "low": helpful, "high": helpful}},
        {"name": "safety", "passed": True, "lift": {"mean": 0.0, "low": 0.0, "high": 0.0}},
    ]
    verdict = "pass" if all(check["passed"] for check in checks) else "fail"
    return {"gates": {"verdict": verdict, "checks": checks, "alarms": list(alarms)}}


def test_a_sweep_is_told_by_setting_with_its_front_and_the_point_to_take() -> None:
    found = report({
        (0.1, 0.02, 1): summary(0.2, 0.01), (0.1, 0.02, 2): summary(0.3, 0.03),
        (0.3, 0.02, 1): summary(0.9, -0.2, passed=False), (0.3, 0.02, 2): summary(0.7, 0.0),
        (0.5, 0.02, 1): summary(0.8, -0.3, alarms=("farewell",)),
    })  # fmt: skip
    assert found["recommended"] == "love 0.1, KL 0.02"
    assert found["front"] == ["love 0.1, KL 0.02", "love 0.3, KL 0.02"]
    assert [one["held"] for one in found["settings"]] == [2, 1, 0]
    assert found["hypervolume"] > 0.0
    assert "recommended: love 0.1, KL 0.02" in sweep_text(found | {"failed": {"love9": "its.log"}})


def test_a_setting_that_lost_a_seed_is_not_recommended_whatever_the_others_found() -> None:
    found = report({
        (0.1, 0.02, 1): summary(0.2, 0.01), (0.1, 0.02, 2): summary(0.3, 0.03),
        (0.3, 0.02, 1): summary(0.9, 0.0), (0.3, 0.02, 2): None, (0.3, 0.02, 3): None,
        (0.5, 0.02, 1): None,
    })  # fmt: skip
    assert found["recommended"] == "love 0.1, KL 0.02"
    told = {one["weight"]: (one["held"], one["seeds"], one["lost"]) for one in found["settings"]}
    assert told == {0.1: (2, 2, 0), 0.3: (1, 3, 2)}
    assert "1 of 3" in sweep_text(found)
    assert report({(0.3, 0.02, 1): summary(0.9, 0.0), (0.3, 0.02, 2): None})["recommended"] is None


def test_a_sweep_without_a_finished_run_recommends_nothing() -> None:
    assert report({})["recommended"] is None
    assert report({(0.1, 0.0, 1): None})["settings"] == []
    assert report({(0.1, 0.0, 1): summary(None, 0.0)})["recommended"] is None
    assert "no run ended" in sweep_text(report({}) | {"failed": {"a": "b"}})
