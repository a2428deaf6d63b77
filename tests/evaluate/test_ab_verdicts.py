"""Verdicts with margins, segments with shrinkage, and quantile metrics."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rluf.errors import DataError, SettingsError
from rluf.evaluate.ab_analysis import analyze_experiment
from rluf.evaluate.ab_design import (
    ExperimentDesign,
    Guardrail,
    QuantileMetric,
    parse_guardrail,
    parse_quantile_metric,
)
from rluf.evaluate.effects import TestQuantiles as Quantiles
from rluf.evaluate.effects import UserTotals, estimate_ratio_effect
from rluf.evaluate.events import SECONDS_PER_DAY, EventLog
from rluf.evaluate.quantile_effects import estimate_quantile_effect
from rluf.evaluate.segments import shrink_groups
from rluf.evaluate.verdicts import count_users_still_needed, judge_guardrail

QUANTILES = Quantiles(np.asarray(-1.96), np.asarray(1.96))


@pytest.mark.parametrize(
    ("control", "treated", "margin", "verdict"),
    [
        (0.70, 0.70, -0.05, "pass"), (0.70, 0.62, -0.05, "fail"), (0.70, 0.67, -0.05, "undecided"),
        (0.10, 0.10, 0.30, "pass"), (0.10, 0.16, 0.30, "fail"), (0.10, 0.12, 0.30, "undecided"),
    ],
)  # fmt: skip
def test_a_guardrail_needs_proof_either_way(control: float, treated: float, margin: float, verdict: str) -> None:
    arms = [
        UserTotals.from_arrays(np.repeat([1, 0], [round(2000 * r), 2000 - round(2000 * r)])) for r in (control, treated)
    ]
    effect = estimate_ratio_effect(arms[0], arms[1])
    result = judge_guardrail(
        Guardrail("helpful", margin, is_relative=True), effect, QUANTILES, user_count=4000, alpha=0.05, power=0.8
    )
    assert result["verdict"] == verdict
    assert (result["more_users"] > 0) == (verdict == "undecided")
    if margin < 0:
        assert (result["low"] > margin) == (verdict == "pass")
        assert (result["high"] < margin) == (verdict == "fail")


def test_the_guardrails_p_is_the_one_sided_welch_test_against_the_margin() -> None:
    rng = np.random.default_rng(0)
    control, treated = rng.normal(10, 2, 300), rng.normal(9.9, 2, 300)
    effect = estimate_ratio_effect(UserTotals.from_arrays(control), UserTotals.from_arrays(treated))
    result = judge_guardrail(
        Guardrail("x", -0.5, is_relative=False), effect, QUANTILES, user_count=600, alpha=0.05, power=0.8
    )
    expected = stats.ttest_ind(treated + 0.5, control, equal_var=False, alternative="greater").pvalue
    assert result["p"] == pytest.approx(expected, rel=0.02)


def test_users_still_needed_follow_the_squared_error() -> None:
    rng = np.random.default_rng(1)
    effect = estimate_ratio_effect(
        UserTotals.from_arrays(rng.normal(size=500)), UserTotals.from_arrays(rng.normal(size=500))
    )
    z_sum = 1.959964 + 0.841621
    needed = 1000 * (z_sum * float(effect.error) / 0.1) ** 2
    assert count_users_still_needed(effect, 0.1, 1000, 0.05, 0.8) == pytest.approx(needed - 1000, abs=1)
    assert count_users_still_needed(effect, 10.0, 1000, 0.05, 0.8) == 0


@pytest.mark.parametrize("text", ["helpful", "helpful:", "helpful:0%", ":-2%", "helpful:-100%", "helpful:x", "a:nan"])
def test_invalid_guardrails_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="expected NAME:MARGIN"):
        parse_guardrail(text)


def test_guardrails_and_quantiles_are_parsed() -> None:
    assert parse_guardrail("helpful:-2%") == Guardrail("helpful", -0.02, is_relative=True)
    assert parse_guardrail("a:b:+50") == Guardrail("a:b", 50.0, is_relative=False)
    assert parse_quantile_metric("latency:0.95").name == "latency_p95"
    with pytest.raises(SettingsError, match="--quantile latency:95"):
        parse_quantile_metric("latency:95")


def simulate_segments(seed: int = 2, users: int = 3000) -> EventLog:
    """Love rises by 10 points for everybody but users of topic "hurt", where it falls; a pre-period of a week."""
    rng = np.random.default_rng(seed)
    user_index = np.repeat(np.arange(users), rng.poisson(10, users))
    arm, topic = (np.arange(users) % 2)[user_index], rng.integers(0, 4, len(user_index))
    timestamps = rng.random(len(user_index)) * 10 * SECONDS_PER_DAY
    effect = np.where(topic == 3, -0.15, 0.1) * arm * (timestamps >= 5 * SECONDS_PER_DAY)
    order = np.argsort(timestamps, kind="stable")
    arm = np.where(timestamps >= 5 * SECONDS_PER_DAY, arm, 0)
    return EventLog(
        user_index=user_index[order], conversation_index=np.arange(len(order)), arm_index=arm[order],
        arm_names=("control", "treatment"), user_ids=tuple(map(str, range(users))), timestamps=timestamps[order],
        metric_values={"love": (rng.random(len(order)) < 0.3 + effect)[order].astype(float)}, duplicate_count=0,
        reaction_counts={"love": 1}, segments={"topic": (topic[order], ("a", "b", "c", "hurt"))},
    )  # fmt: skip


def test_segments_show_the_group_that_is_harmed() -> None:
    design = ExperimentDesign("control", "treatment", start_time=5 * SECONDS_PER_DAY, has_segments=True, look_count=1)
    report = analyze_experiment(simulate_segments(), design)
    assert report["metrics"]["love"]["primary"]["verdict"] == "pass"
    assert set(report["segments"]) == {"topic", "activity", "reacts"}
    topic = report["segments"]["topic"]["love"]
    assert topic["worst"]["group"] == "hurt"
    assert topic["worst"]["limit"] < -0.1
    assert topic["p"] < 0.001
    hurt = next(group for group in topic["groups"] if group["group"] == "hurt")
    assert hurt["high"] < 0.0
    assert {group["group"] for group in report["segments"]["reacts"]["love"]["groups"]} <= {"never reacted", "reacted"}


def test_shrinkage_pools_noise_and_keeps_spread() -> None:
    rng = np.random.default_rng(3)
    covered, errors = [], []
    for spread in (0.0, 0.05):
        for _ in range(200):
            true_effects = 0.1 + spread * rng.normal(size=12)
            error = rng.uniform(0.02, 0.06, 12)
            observed = true_effects + error * rng.normal(size=12)
            groups = [{"group": str(n), "error": error[n], "difference": observed[n]} for n in range(12)]
            result = shrink_groups(groups, alpha=0.05)
            assert result is not None
            values = np.array([[group[key] for key in ("shrunken", "low", "high")] for group in result["groups"]])
            covered.append((values[:, 1] <= true_effects) & (true_effects <= values[:, 2]))
            errors.append([np.abs(values[:, 0] - true_effects).mean(), np.abs(observed - true_effects).mean()])
    shrunken_error, raw_error = np.mean(errors, axis=0)
    assert shrunken_error < 0.75 * raw_error
    assert np.mean(covered) > 0.9
    assert shrink_groups([{"group": "a", "error": 1.0, "difference": 0.0}], alpha=0.05) is None


def test_quantiles_of_clustered_values_have_the_stated_error_rate() -> None:
    rng = np.random.default_rng(4)
    rejected, covered = [], []
    for _ in range(200):
        arms = []
        for _arm in range(2):
            users = np.repeat(np.arange(150), 6)
            arms.append((np.exp(rng.normal(size=150)[users] * 0.5 + rng.normal(size=900)), users))
        effect = estimate_quantile_effect((arms[0][0], arms[1][0]), (arms[0][1], arms[1][1]), 0.9, confidence=0.95)
        rejected.append(float(effect.p) < 0.05)
        covered.append(float(effect.low) <= 0.0 <= float(effect.high))
    assert np.mean(rejected) <= 0.1
    assert np.mean(covered) >= 0.9


def test_a_quantile_is_analyzed_and_needs_values_beyond_it() -> None:
    events = simulate_segments(5, users=400)
    rng = np.random.default_rng(6)
    tokens = rng.lognormal(3, 1, len(events.user_index)) * np.where(events.arm_index == 1, 1.5, 1.0)
    events.metric_values["tokens"] = tokens
    design = ExperimentDesign(
        "control", "treatment", start_time=5 * SECONDS_PER_DAY, look_count=1,
        quantile_metrics=(QuantileMetric("tokens", 0.9),), guardrails=(parse_guardrail("tokens_p90:+20%"),),
    )  # fmt: skip
    result = analyze_experiment(events, design)["metrics"]["tokens_p90"]
    assert result["effect"]["lift_low"] < 0.5 < result["effect"]["lift_high"]
    assert result["guardrail"]["verdict"] == "fail"
    with pytest.raises(DataError, match="needs 10 values beyond it"):
        estimate_quantile_effect(
            (tokens[:50], tokens[50:]), (events.user_index[:50], events.user_index[50:]), 0.99, confidence=0.95
        )
