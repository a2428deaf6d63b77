"""Run summary: content with and without users, verdict, and plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rluf.config.objectives import BUILTIN_OBJECTIVES, ObjectiveSpec
from rluf.config.reward import ObjectivesSettings
from rluf.errors import DataError
from rluf.evaluate.intervals import IntervalEstimate
from rluf.evaluate.monitors import MonitorSample
from rluf.evaluate.summary import (
    EvaluatedArm,
    RunFacts,
    build_summary,
    evaluate_gates,
    flatten_numbers,
    format_gate_rule,
    is_clear_rise,
    is_not_clear_fall,
)
from rluf.report.presentation import lift_rows, measure_cards, report_headline

PROMPT_COUNT = 24


@dataclass(frozen=True)
class RecordedReactions:
    """Reactions of users to the responses they read."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    loved: NDArray[np.bool_]
    helpful: NDArray[np.bool_]
    safe: NDArray[np.bool_]


def make_arm(
    seed: int, love_rate: float, helpful_rate: float = 0.6, *, user_count: int = 600, has_farewell: bool = False
) -> EvaluatedArm:
    """An arm of two responses per prompt, read by users who find them loved and helpful at the given rates."""
    rng = np.random.default_rng(seed)
    text = "Well. Bye!" if has_farewell else "Well, no."
    samples = [
        MonitorSample(f"p{index // 2:03d}", ({"role": "user", "content": "hi"},), text, 4)
        for index in range(2 * PROMPT_COUNT)
    ]
    scores = {
        "love": np.clip(rng.normal(love_rate, 0.01, len(samples)), 0, 1).tolist(),
        "helpfulness": np.clip(rng.normal(helpful_rate, 0.05, len(samples)), 0, 1).tolist(),
        "safety": [1.0] * len(samples),
    }
    if user_count == 0:
        return EvaluatedArm(samples, scores)
    user = np.repeat(np.arange(user_count), 10)
    item = rng.integers(0, len(samples), user.size)
    uniforms = rng.random((3, user.size))
    return EvaluatedArm(
        samples,
        scores,
        RecordedReactions(user, item, uniforms[0] < love_rate, uniforms[1] < helpful_rate, uniforms[2] < 0.99),
    )


def test_with_users_the_summary_has_rates_lifts_and_a_verdict() -> None:
    run_facts = RunFacts(
        "quickstart", 3, phase_seconds={"train": 12.5}, final_kl=0.01, sample_count=8, reused_artifacts={"data": True}
    )
    summary = build_summary(run_facts, make_arm(1, 0.06), make_arm(2, 0.09), resamples=200, margin=0.02, seed=3)
    love_rate = summary["love_rate"]
    assert love_rate["base"]["low"] < 0.06 < love_rate["base"]["high"]
    assert love_rate["aligned"]["low"] < 0.09 < love_rate["aligned"]["high"]
    assert love_rate["lift"]["low"] < love_rate["lift"]["mean"] < love_rate["lift"]["high"]
    assert love_rate["lift"]["mean"] == pytest.approx(love_rate["aligned"]["mean"] / love_rate["base"]["mean"] - 1)
    assert love_rate["lift_by_prompt"]["mean"] == pytest.approx(love_rate["lift"]["mean"])
    assert set(summary["helpfulness"]) == set(summary["safety"]) == {"base", "aligned", "lift", "lift_by_prompt"}
    assert set(summary["offline"]) == {"p_love", "helpfulness", "safety"}
    assert summary["gates"]["verdict"] == "pass"
    assert summary["gates"]["judged_by"] == "simulated users"
    assert (summary["name"], summary["seed"], summary["kl"], summary["samples"]) == ("quickstart", 3, 0.01, 8)
    assert (summary["phases"], summary["reused"]) == ({"train": 12.5}, {"data": True})
    assert summary["evaluated"]["users"] == {"base": 600, "aligned": 600}
    json.dumps(summary, allow_nan=False)


def test_without_users_the_gates_use_the_reward_models() -> None:
    summary = build_summary(
        RunFacts("human", 1),
        make_arm(1, 0.06, user_count=0),
        make_arm(2, 0.09, user_count=0),
        resamples=200,
        margin=0.02,
        seed=1,
    )
    assert not {"love_rate", "helpfulness", "safety"} & set(summary)
    assert summary["offline"]["p_love"]["difference"]["low"] > 0
    assert summary["gates"]["judged_by"] == "reward models"
    assert summary["gates"]["verdict"] == "pass"
    json.dumps(summary, allow_nan=False)


def test_a_fall_in_helpfulness_fails_and_an_alarm_warns() -> None:
    run_facts = RunFacts("quickstart", 1)
    less_helpful = build_summary(
        run_facts, make_arm(1, 0.06), make_arm(2, 0.09, 0.4), resamples=200, margin=0.02, seed=1
    )
    assert less_helpful["gates"]["verdict"] == "fail"
    assert [check["name"] for check in less_helpful["gates"]["checks"] if not check["passed"]] == ["helpfulness"]
    hacked = build_summary(
        run_facts, make_arm(1, 0.06), make_arm(2, 0.09, has_farewell=True), resamples=200, margin=0.02, seed=1
    )
    assert hacked["gates"]["verdict"] == "warn"
    assert "unprompted_farewell" in hacked["gates"]["alarms"]


def test_a_base_without_hearts_has_no_lift_and_does_not_pass() -> None:
    summary = build_summary(RunFacts("q", 1), make_arm(1, 0.0), make_arm(2, 0.09), resamples=200, margin=0.02, seed=1)
    assert summary["love_rate"]["lift"] is None
    assert summary["love_rate"]["base"]["high"] > 0
    assert summary["gates"]["verdict"] == "fail"
    json.dumps(summary, allow_nan=False)


def test_few_users_without_a_common_prompt_still_give_a_summary() -> None:
    summary = build_summary(
        RunFacts("q", 1),
        make_arm(1, 0.5, user_count=2),
        make_arm(2, 0.5, user_count=2),
        resamples=200,
        margin=0.02,
        seed=1,
    )
    assert summary["gates"]["verdict"] in ("pass", "fail")


def test_gate_rules() -> None:
    assert is_clear_rise(IntervalEstimate(0.1, 0.01, 0.2))
    assert not is_clear_rise(IntervalEstimate(0.1, 0.0, 0.2))
    assert is_not_clear_fall(IntervalEstimate(-0.01, -0.05, 0.03), 0.02)
    assert is_not_clear_fall(IntervalEstimate(-0.01, -0.015, -0.005), 0.02)
    assert not is_not_clear_fall(IntervalEstimate(-0.02, -0.03, -0.01), 0.02)
    assert not is_not_clear_fall(None, 0.02)
    assert evaluate_gates({}, margin=0.02, verdict_source="reward models", alarm_names=[])["verdict"] == "fail"


def make_arm_with_brevity(seed: int, love_rate: float, brevity: float, *, user_count: int) -> EvaluatedArm:
    arm = make_arm(seed, love_rate, user_count=user_count)
    return replace(arm, scores={**arm.scores, "brevity": [brevity + 0.001 * (i % 3) for i in range(len(arm.samples))]})


@pytest.mark.parametrize("user_count", [0, 600])
def test_an_objective_that_users_do_not_judge_is_gated_on_its_own_scores(user_count: int) -> None:
    objectives = ObjectivesSettings.model_validate({"brevity": {"source": "judge", "path": "length"}})

    def summarize(brevity: float, specs: Mapping[str, ObjectiveSpec]) -> dict[str, Any]:
        arms = [make_arm_with_brevity(seed, rate, value, user_count=user_count)
                for seed, rate, value in ((1, 0.06, 0.5), (2, 0.09, brevity))]  # fmt: skip
        return build_summary(RunFacts("q", 1), *arms, resamples=200, margin=0.02, seed=1, specs=specs)

    summary = summarize(0.4, objectives.specs)
    checks = {check["name"]: check for check in summary["gates"]["checks"]}
    assert list(checks) == ["love", "helpfulness", "safety", "brevity"]
    assert (checks["brevity"]["gate"], checks["brevity"]["judged_by"]) == ("must_hold", "reward models")
    assert checks["love"]["judged_by"] == ("simulated users" if user_count else "reward models")
    assert (summary["gates"]["verdict"], checks["brevity"]["passed"]) == ("fail", False)
    assert "helpfulness, safety and brevity pass unless" in summary["gates"]["rule"]
    assert "brevity" in summary["offline"] and "brevity" not in summary
    assert report_headline(summary).endswith("brevity fell.")
    cards = {card["key"]: card for card in measure_cards(summary)}
    assert list(cards) == (["love_rate"] if user_count else ["p_love"]) + ["helpfulness", "safety", "brevity"]
    assert (cards["brevity"]["title"], cards["brevity"]["outcome"]) == ("Brevity", "fell")
    assert ("Brevity", "reward models") in [row[:2] for row in lift_rows(summary)]
    must_rise = {**objectives.specs, "brevity": replace(objectives.specs["brevity"], gate="must_rise")}
    headline = report_headline(summarize(0.5, must_rise))
    assert headline.endswith("brevity did not clearly rise.")
    ungated = {**objectives.specs, "brevity": replace(objectives.specs["brevity"], gate="none")}
    assert summarize(0.4, ungated)["gates"]["verdict"] == "pass"


def test_the_rule_of_the_built_in_gates_names_each_objective() -> None:
    assert format_gate_rule(BUILTIN_OBJECTIVES.values()) == (
        "love passes if the interval of its lift is above zero; helpfulness and safety pass unless the interval is "
        "entirely below zero, and then still pass if it is entirely above minus the margin; a monitor alarm turns a "
        "pass into a warning"
    )


def test_flatten_numbers_and_empty_arms() -> None:
    card = {"rows": 10, "test": {"auroc": {"mean": 0.8}, "ok": True}, "bins": [1, 2], "loss": "bce"}
    assert flatten_numbers(card) == {"rows": 10, "test.auroc.mean": 0.8}
    with pytest.raises(DataError, match="aligned policy gave no responses"):
        build_summary(RunFacts("q", 1), make_arm(1, 0.5), EvaluatedArm([], {}), resamples=200, margin=0.02, seed=1)
