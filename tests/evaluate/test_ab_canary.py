"""A/B analysis of canaries: unequal arms, rare hearts, a few very active users, outliers, and A/A by shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rluf.evaluate.ab_analysis import analyze_experiment
from rluf.evaluate.ab_checks import measure_planning_inputs, run_aa_check
from rluf.evaluate.ab_design import ExperimentDesign
from rluf.evaluate.effects import (
    UserTotals,
    estimate_ratio_effect,
    measure_information,
    rerandomize_quantiles,
    rerandomize_statistics,
)
from rluf.evaluate.events import SECONDS_PER_DAY, EventLog, cap_values
from rluf.evaluate.power import PowerQuery, compute_design_effect, plan_experiment

DESIGN = ExperimentDesign("control", "treatment", metric_names=("love",), look_count=7)


def simulate_canary(
    seed: int, *, users: int = 2000, share: float = 0.05, rate: float = 0.005, lift: float = 1.0, arms: int = 2
) -> EventLog:
    """Events of two weeks: gamma activity, beta love rates, `share` of the users in each treatment."""
    rng = np.random.default_rng(seed)
    arm_names = ("control", "treatment", "second", "third")[:arms]
    arm = rng.choice(arms, users, p=[1 - share * (arms - 1), *[share] * (arms - 1)])
    rates = np.minimum(rng.beta(0.3, 0.3 / rate - 0.3, users) * np.where(arm == 1, lift, 1.0), 1.0)
    user_index = rng.permutation(np.repeat(np.arange(users), rng.poisson(rng.gamma(0.8, 10, users))))
    return EventLog(
        user_index=user_index, conversation_index=np.arange(len(user_index)), arm_index=arm[user_index],
        arm_names=arm_names, user_ids=tuple(map(str, range(users))), duplicate_count=0,
        timestamps=np.sort(rng.random(len(user_index))) * 14 * SECONDS_PER_DAY,
        metric_values={"love": (rng.random(len(user_index)) < rates[user_index]).astype(float)},
    )  # fmt: skip


def test_a_small_arm_without_hearts_is_no_evidence_of_a_loss() -> None:
    """The variance within an arm of 40 users without a heart is 0: alone it would exclude every other rate."""
    control = UserTotals.from_arrays(np.repeat([1, 0], [20, 780]), np.full(800, 4))
    treatment = UserTotals.from_arrays(np.zeros(40), np.full(40, 4))
    effect = estimate_ratio_effect(control, treatment)
    assert float(effect.low) < 0.0 < float(effect.high)
    assert float(effect.p) > 0.2
    assert float(effect.treatment_variance) > 0.0


@pytest.mark.slow
def test_canaries_without_an_effect_raise_few_alarms() -> None:
    """60 canaries with 5% of users and hearts at 0.5% or 2%: a third raised an alarm before."""
    fixed, sequential = [], []
    for seed in range(60):
        rate = (0.005, 0.02)[seed % 2]
        report = analyze_experiment(simulate_canary(seed, rate=rate), replace(DESIGN, shares=(0.95, 0.05)))
        love, looks = report["metrics"]["love"], report["looks"].get("love", [])
        fixed.append(love["p"] < 0.05)
        assert fixed[-1] == (love["effect"]["low"] > 0 or love["effect"]["high"] < 0)
        sequential.append(any(look["low"] > 0 or look["high"] < 0 for look in looks))
    assert sum(fixed) <= 8  # 5% of 60 are 3; P(more than 8) is 0.3%
    assert sum(sequential) <= 3


def test_the_first_look_waits_for_hearts_not_for_users() -> None:
    rare = analyze_experiment(simulate_canary(1), replace(DESIGN, shares=(0.95, 0.05)))
    assert rare["looks"] == {}
    assert rare["metrics"]["love"]["expected_events"] < 20
    common = analyze_experiment(simulate_canary(1, rate=0.1), replace(DESIGN, shares=(0.95, 0.05)))
    assert len(common["looks"]["love"]) >= 5


def test_a_true_collapse_and_a_true_rise_are_seen_in_a_canary() -> None:
    for lift in (0.05, 3.0):
        events = simulate_canary(2, users=4000, share=0.1, rate=0.02, lift=lift)
        love = analyze_experiment(events, replace(DESIGN, shares=(0.9, 0.1)))["metrics"]["love"]
        assert love["primary"]["verdict"] == ("pass" if lift > 1 else "fail")


def test_rerandomized_quantiles_are_those_of_the_null_distribution() -> None:
    """The rank of a split among others is uniform: the test rejects in 5% of splits, one very active user or not."""
    rng = np.random.default_rng(3)
    counts = np.append(rng.poisson(8, 399), 3000).astype(float)
    totals = UserTotals(rng.binomial(counts.astype(int), 0.02).astype(float), counts)
    pair = UserTotals(totals.sums[:40], counts[:40]), UserTotals(totals.sums[40:], counts[40:])
    assert measure_information(*pair) < 20
    quantiles = rerandomize_quantiles([pair], seed=1)[0]
    splits = rerandomize_statistics([totals], 360, count=2000, seed=2)[0]
    assert ((splits < quantiles.low) | (splits > quantiles.high)).mean() == pytest.approx(0.05, abs=0.015)
    assert float(quantiles.low) < 0.0 < float(quantiles.high)


def test_information_counts_the_users_that_carry_the_variance() -> None:
    hearts = UserTotals.from_arrays(np.repeat([1, 0], [50, 9950]))
    assert measure_information(hearts, hearts) == pytest.approx(50, rel=0.02)
    whale = UserTotals.from_arrays(np.repeat([1000.0, 1.0, 0.0], [1, 49, 9950]))
    assert measure_information(hearts, whale) < 1.0
    assert measure_information(UserTotals.from_arrays(np.zeros(9)), UserTotals.from_arrays(np.zeros(9))) == 0.0


def test_an_aa_check_splits_by_shares() -> None:
    events = simulate_canary(4, users=3000, rate=0.02)
    report = run_aa_check(events, replace(DESIGN, shares=(0.97, 0.03)), split_count=1000, seed=1)
    control_users = len(np.unique(events.user_index[events.arm_index == 0]))
    assert report["users"] == [control_users - round(0.03 * control_users), round(0.03 * control_users)]
    assert report["suspect"] == []
    equal = run_aa_check(events, DESIGN, split_count=100, seed=1)
    assert abs(equal["users"][0] - equal["users"][1]) <= 1


def test_one_outlier_gives_no_lift_instead_of_a_wrong_lift() -> None:
    rng = np.random.default_rng(5)
    control = rng.lognormal(0, 1, 900)
    control[0] = 1e6
    effect = estimate_ratio_effect(UserTotals.from_arrays(control), UserTotals.from_arrays(rng.lognormal(0, 1, 950)))
    assert float(effect.p) > 0.1
    assert np.isnan(float(effect.lift_low))
    assert np.isnan(float(effect.lift_high))


def test_fiellers_limits_are_where_the_scaled_control_is_as_far_as_the_quantile() -> None:
    rng = np.random.default_rng(6)
    effect = estimate_ratio_effect(
        UserTotals.from_arrays(rng.gamma(2, 1, 300)), UserTotals.from_arrays(rng.gamma(2, 1.1, 200))
    )
    for limit, quantile in ((effect.lift_low, effect.quantile_high), (effect.lift_high, effect.quantile_low)):
        ratio = 1.0 + float(limit)
        error = np.sqrt(effect.treatment_variance + ratio**2 * effect.control_variance)
        assert float((effect.treatment - ratio * effect.control) / error) == pytest.approx(float(quantile))
    assert (float(effect.low) > 0) == (float(effect.lift_low) > 0)


def test_a_cap_bounds_numeric_values_only() -> None:
    values = {"tokens": np.append(np.arange(1999.0), 1e6), "love": np.ones(2000)}
    capped = cap_values(replace(simulate_canary(7, users=300), metric_values=values), 0.999)
    assert capped.metric_values["tokens"].max() <= 1998.0
    assert capped.metric_values["love"].min() == 1.0


def test_three_arms_share_one_correction_and_one_sample_ratio() -> None:
    events = simulate_canary(8, users=3000, share=0.3, rate=0.05, lift=2.0, arms=3)
    design = replace(DESIGN, other_treatments=("second",), shares=(0.4, 0.3, 0.3))
    report = analyze_experiment(events, design)
    first, second = (report["comparisons"][arm]["metrics"]["love"] for arm in ("treatment", "second"))
    assert first["p_holm"] == pytest.approx(min(1.0, 2 * first["p"]))
    assert second["p_holm"] == pytest.approx(max(second["p"], first["p_holm"]))
    assert first["primary"]["verdict"] == "pass"
    assert second["primary"]["verdict"] == "undecided"
    assert len(report["users"]) == 3
    assert report["srm"]["ok"]
    assert "metrics" not in report
    broken = analyze_experiment(events, replace(design, shares=(0.3, 0.3, 0.4)))
    assert not broken["srm"]["ok"]


def test_holm_counts_the_primary_metrics_only() -> None:
    events = simulate_canary(9, share=0.5, rate=0.05, lift=1.4)
    report = analyze_experiment(events, replace(DESIGN, metric_names=()))
    metrics: dict[str, Any] = report["metrics"]
    assert report["primary"] == ["love"]
    assert metrics["love"]["p_holm"] == metrics["love"]["p"]
    assert metrics["responses"]["role"] == "secondary"
    both = analyze_experiment(events, replace(DESIGN, metric_names=(), primary_names=("love", "users_who_loved")))
    primaries = [both["metrics"][name] for name in ("love", "users_who_loved")]
    smallest = min(primaries, key=lambda result: result["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 2 * smallest["p"]))


def test_uneven_activity_costs_users() -> None:
    """E[m^2] / E[m] = m (1 + CV^2) takes the place of m in the design effect."""
    assert compute_design_effect(8.0, 0.05, 1.0) == pytest.approx(1 + (16 - 1) * 0.05)
    counts = np.random.default_rng(10).poisson(np.random.default_rng(11).gamma(0.8, 10, 200_000)).astype(float)
    cv = counts.std() / counts.mean()
    expected = 1 + (np.square(counts).mean() / counts.mean() - 1) * 0.05
    assert compute_design_effect(counts.mean(), 0.05, cv) == pytest.approx(expected)
    query = PowerQuery(0.05, 0.15, responses=8.0, icc=0.05)
    even, uneven = (plan_experiment(replace(query, activity_cv=cv))["designs"]["one_look"] for cv in (0.0, 1.0))
    assert uneven["control_users"] == pytest.approx(even["control_users"] * 1.75 / 1.35, rel=1e-3)


def test_activity_and_icc_are_measured_on_the_control() -> None:
    events = simulate_canary(12, users=20_000, share=0.5, rate=0.1)
    inputs = measure_planning_inputs(events, DESIGN)
    counts = np.unique(events.user_index[events.arm_index == 0], return_counts=True)[1]
    assert inputs["activity_cv"] == pytest.approx(counts.std() / counts.mean())
    assert inputs["icc"] == pytest.approx(1 / (0.3 / 0.1 + 1), rel=0.15)  # beta(0.3, 2.7)


@pytest.mark.parametrize("activity", ["equal", "gamma"])
def test_the_planned_power_is_delivered(activity: str) -> None:
    rng = np.random.default_rng(13)
    counts = np.full(100_000, 8) if activity == "equal" else rng.poisson(rng.gamma(0.8, 10, 100_000))
    counts = counts[counts > 0]
    query = PowerQuery(
        0.05, 0.15, responses=float(counts.mean()), icc=0.05, activity_cv=float(counts.std() / counts.mean())
    )
    arm_users = plan_experiment(query)["designs"]["one_look"]["control_users"]
    rejected = []
    for lift in [1.15] * 300:
        arms = []
        for arm_lift in (1.0, lift):
            arm_counts = rng.choice(counts, arm_users)
            rates = np.minimum(rng.beta(0.95, 18.05, arm_users) * arm_lift, 1.0)
            arms.append(UserTotals.from_arrays(rng.binomial(arm_counts, rates), arm_counts))
        rejected.append(float(estimate_ratio_effect(*arms).p) < 0.05)
    assert np.mean(rejected) == pytest.approx(0.8, abs=0.075)  # 3.2 standard errors of 300 runs
