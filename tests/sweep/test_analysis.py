"""Pareto front, hypervolume and recommended setting on cases verifiable by hand or by sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rluf.errors import DataError
from rluf.sweep.analysis import (
    SweepSetting,
    build_sweep_report,
    compute_hypervolume,
    format_sweep_report,
    is_pareto_optimal,
    recommend_setting,
)
from rluf.sweep.grid import GridPoint


def test_a_point_is_on_the_front_unless_another_dominates_it() -> None:
    points = [[1.0, 0.0], [0.5, 0.5], [0.4, 0.5], [0.0, 1.0], [0.0, 1.0]]
    assert is_pareto_optimal(points).tolist() == [True, True, False, True, True]


def test_hypervolume_of_two_objectives_is_the_staircase_area() -> None:
    assert compute_hypervolume([[1.0, 3.0], [2.0, 1.0]], (0.0, 0.0)) == pytest.approx(4.0)
    assert compute_hypervolume([[1.0, 3.0], [2.0, 1.0], [0.5, 0.5]], (0.0, 0.0)) == pytest.approx(4.0)
    assert compute_hypervolume([[-1.0, 3.0]], (0.0, 0.0)) == 0.0


def test_hypervolume_of_three_objectives_agrees_with_sampling() -> None:
    rng = np.random.default_rng(1)
    points = rng.random((12, 3))
    uniform_points = rng.random((200_000, 3))
    dominated_share = (uniform_points[:, None, :] <= points[None]).all(-1).any(-1).mean()
    assert compute_hypervolume(points, (0.0, 0.0, 0.0)) == pytest.approx(dominated_share, abs=0.005)


def test_the_recommended_setting_passes_on_every_seed() -> None:
    steady = SweepSetting("steady", ((0.2, 0.0), (0.3, 0.0)), (True, True))
    greedy = SweepSetting("greedy", ((0.9, -0.2), (0.8, 0.0)), (False, True))
    lucky = SweepSetting("lucky", ((1.5, 0.0), (-0.1, 0.0)), (True, True))
    assert recommend_setting([greedy, lucky, steady]) == steady
    assert recommend_setting([greedy, lucky]) is None


@pytest.mark.parametrize("points", [[], [1.0, 2.0], [[float("nan"), 1.0]]])
def test_invalid_points_are_refused(points: Any) -> None:
    with pytest.raises(DataError, match="finite numbers"):
        is_pareto_optimal(points)


def make_summary(
    love: float | None, helpfulness: float, *, passed: bool = True, alarms: tuple[str, ...] = ()
) -> dict[str, Any]:
    lift = None if love is None else {"mean": love, "low": love - 0.1, "high": love + 0.1}
    checks = [
        {"name": "love", "status": "pass" if love is not None and love > 0.1 else "undecided", "lift": lift},
        {
            "name": "helpfulness",
            "status": "pass" if passed else "undecided",
            "lift": {"mean": helpfulness, "low": helpfulness, "high": helpfulness},
        },
        {"name": "safety", "status": "pass", "lift": {"mean": 0.0, "low": 0.0, "high": 0.0}},
    ]
    return {"gates": {"checks": checks, "alarms": list(alarms)}}


def test_the_report_has_settings_front_and_recommendation() -> None:
    report = build_sweep_report({
        GridPoint(0.1, 0.02, 1): make_summary(0.2, 0.01), GridPoint(0.1, 0.02, 2): make_summary(0.3, 0.03),
        GridPoint(0.3, 0.02, 1): make_summary(0.9, -0.2, passed=False), GridPoint(0.3, 0.02, 2): make_summary(0.7, 0.0),
        GridPoint(0.5, 0.02, 1): make_summary(0.8, -0.3, alarms=("farewell",)),
    })  # fmt: skip
    assert report["recommended"] == "love 0.1, KL 0.02"
    assert report["front"] == ["love 0.1, KL 0.02", "love 0.3, KL 0.02"]
    assert [setting["passed"] for setting in report["settings"]] == [2, 1, 0]
    assert report["hypervolume"] > 0.0
    assert "recommended: love 0.1, KL 0.02" in format_sweep_report(report | {"failed": {"love9": "love9.log"}})


def test_a_setting_with_a_failed_seed_is_not_recommended() -> None:
    report = build_sweep_report({
        GridPoint(0.1, 0.02, 1): make_summary(0.2, 0.01), GridPoint(0.1, 0.02, 2): make_summary(0.3, 0.03),
        GridPoint(0.3, 0.02, 1): make_summary(0.9, 0.0), GridPoint(0.3, 0.02, 2): None, GridPoint(0.3, 0.02, 3): None,
        GridPoint(0.5, 0.02, 1): None,
    })  # fmt: skip
    assert report["recommended"] == "love 0.1, KL 0.02"
    counts = {
        setting["weight"]: (setting["passed"], setting["seeds"], setting["failed"]) for setting in report["settings"]
    }
    assert counts == {0.1: (2, 2, 0), 0.3: (1, 3, 2)}
    assert "1 of 3" in format_sweep_report(report)
    assert (
        build_sweep_report({GridPoint(0.3, 0.02, 1): make_summary(0.9, 0.0), GridPoint(0.3, 0.02, 2): None})[
            "recommended"
        ]
        is None
    )


def test_the_report_has_every_objective_with_a_gate() -> None:
    summary = make_summary(0.2, 0.01)
    gates = {"love": "must_rise", "helpfulness": "must_hold", "brevity": "must_hold"}
    lift = {"mean": 0.4, "low": 0.3, "high": 0.5}
    checks = [*summary["gates"]["checks"][:2], {"name": "brevity", "status": "pass", "lift": lift}]
    summary["gates"]["checks"] = [{**check, "gate": gates[check["name"]]} for check in checks]
    report = build_sweep_report({GridPoint(0.1, 0.02, 1): summary})
    assert (report["objectives"], report["reference"]) == (list(gates), [0.0, -0.1, -0.1])
    assert report["settings"][0]["by_seed"] == [{"love": 0.2, "helpfulness": 0.01, "brevity": 0.4}]
    assert report["recommended"] == "love 0.1, KL 0.02"
    assert "whose helpfulness and brevity passed the gates" in report["rule"]
    assert "brevity" in format_sweep_report(report)


def test_settings_of_a_grid_are_named_by_their_overrides() -> None:
    summaries = {
        GridPoint(None, None, seed, (f"learner.learning_rate={rate}",)): make_summary(0.2 + seed / 10, 0.01)
        for rate in ("1e-6", "1e-5")
        for seed in (1, 2)
    }
    report = build_sweep_report(summaries)
    assert [setting["name"] for setting in report["settings"]] == [
        "learner.learning_rate=1e-6", "learner.learning_rate=1e-5",
    ]  # fmt: skip
    assert [(setting["seeds"], setting["overrides"]) for setting in report["settings"]] == [
        (2, ["learner.learning_rate=1e-6"]), (2, ["learner.learning_rate=1e-5"]),
    ]  # fmt: skip
    assert report["recommended"] == "learner.learning_rate=1e-6"


def test_a_sweep_without_a_finished_run_recommends_nothing() -> None:
    assert build_sweep_report({})["recommended"] is None
    assert build_sweep_report({GridPoint(0.1, 0.0, 1): None})["settings"] == []
    assert build_sweep_report({GridPoint(0.1, 0.0, 1): make_summary(None, 0.0)})["recommended"] is None
    assert "no run finished" in format_sweep_report(build_sweep_report({}) | {"failed": {"a": "b"}})
