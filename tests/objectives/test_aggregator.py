"""Aggregation of objectives: signals, normalization, weighted sums, baselines, floors and judge gates."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from statistics import fmean, pstdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.config.reward import AggregationSettings, ControllerGains, ObjectivesSettings
from rluf.errors import SettingsError
from rluf.objectives.aggregator import (
    GroupScores,
    LagrangeMultipliers,
    RewardAggregator,
    RewardNormalizer,
    compute_signal,
    lower_truncated,
    sum_weighted_signals,
)
from rluf.types import Score
from rluf.utils.stats import sigmoid

OBJECTIVES = ("love", "helpfulness", "safety")
IDENTITY_NORMALIZER = RewardNormalizer(dict.fromkeys(OBJECTIVES, 0.0), dict.fromkeys(OBJECTIVES, 1.0))
signal_values = st.floats(-50, 50)


def build_aggregator(method: str, weights: Sequence[float], **aggregation: object) -> RewardAggregator:
    objectives = {name: {"weight": weight} for name, weight in zip(OBJECTIVES, weights, strict=True)}
    aggregator = RewardAggregator(
        ObjectivesSettings.model_validate(objectives),
        AggregationSettings.model_validate({"method": method, **aggregation}),
    )
    aggregator.normalizer = IDENTITY_NORMALIZER
    return aggregator


def build_group(
    love: list[float], helpfulness: list[float], safety: list[float], topic: str = "", verdicts: Sequence[bool] = ()
) -> GroupScores:
    return GroupScores("p", topic, {"love": love, "helpfulness": helpfulness, "safety": safety}, verdicts)


def test_the_signal_is_the_logit_of_a_model_and_the_value_of_a_judge() -> None:
    assert math.isclose(compute_signal(Score("love", 0.05, -9.0)), math.log(0.05 / 0.95))
    assert compute_signal(Score("safety", 1.0, 1.0, is_probability=False)) == 1.0
    assert compute_signal(Score("love", 0.5, 0.0, spread=0.2, logit_spread=0.8), 1.5) == pytest.approx(-1.2)
    assert math.isfinite(compute_signal(Score("love", 0.0, -900.0)))
    assert math.isfinite(compute_signal(Score("love", 1.0, 900.0)))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.0, 3.0])
def test_the_uncertainty_penalty_is_a_fixed_distance_in_logits_at_every_base_rate(penalty: float) -> None:
    for value in (0.001, 0.027, 0.031, 0.5, 0.97, 0.9999):
        score = Score("love", value, 0.0, spread=0.014, logit_spread=0.4)
        assert compute_signal(score) - compute_signal(score, penalty) == pytest.approx(0.4 * penalty)


@given(st.lists(signal_values, min_size=2, max_size=30))
def test_the_normalized_reference_has_mean_0_and_at_most_sd_1(values: list[float]) -> None:
    normalizer = RewardNormalizer.fit({"love": [values]})
    assert abs(fmean((value - normalizer.mean["love"]) / normalizer.sd["love"] for value in values)) < 1e-6
    assert pstdev(normalizer.normalize("love", values)) <= 2.0 + 1e-6


def sample_rows(rng: np.random.Generator, prompts: int, between: float, within: float) -> list[list[float]]:
    return (between * rng.normal(size=(prompts, 1)) + within * rng.normal(size=(prompts, 4)) - 3.0).tolist()


@pytest.mark.parametrize("between", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("within", [0.3, 1.0, 2.5])
def test_the_scale_of_a_logit_is_its_standard_deviation_within_a_prompt(between: float, within: float) -> None:
    rows = sample_rows(np.random.default_rng(0), 400, between, within)
    normalizer = RewardNormalizer.fit({"love": rows}, logit_objectives=["love"])
    assert normalizer.sd["love"] == pytest.approx(within, rel=0.1)
    statistics = normalizer.statistics["love"]
    assert statistics.pooled_sd == pytest.approx(math.hypot(between, within), rel=0.1)
    assert (statistics.prompt_count, statistics.sample_count) == (400, 1600)
    assert statistics.standard_error == pytest.approx(math.sqrt((between**2 + within**2 / 4) / 400), rel=0.1)


def test_few_samples_are_shrunk_to_a_standard_deviation_of_one_logit() -> None:
    scales = [
        RewardNormalizer.fit(
            {"love": sample_rows(np.random.default_rng(seed), 12, 0.5, 0.5)}, logit_objectives=["love"]
        ).sd["love"]
        for seed in range(50)
    ]
    assert min(scales) > 0.5 and max(scales) / min(scales) < 1.6
    nearly_constant = RewardNormalizer.fit({"love": [[2.0 + 1e-7 * i for i in range(48)]]}, logit_objectives=["love"])
    assert abs(nearly_constant.normalize("love", [2.1])[0]) < 1.0


@pytest.mark.parametrize("fails", [0, 1, 2, 24, 47, 48])
def test_a_failed_verdict_costs_the_same_however_many_failed_before(fails: int) -> None:
    normalizer = RewardNormalizer.fit({"judge": [[0.0] * fails + [1.0] * (48 - fails)]})
    low, high = normalizer.normalize("judge", [0.0, 1.0])
    assert high - low == pytest.approx(2.0)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 5.0), (-3.0, 0.0), (2.0, 3.0)])
@pytest.mark.parametrize("fails", [1, 2, 24, 47])
def test_verdicts_may_be_any_two_values(low: float, high: float, fails: int) -> None:
    normalizer = RewardNormalizer.fit({"function": [[low] * fails + [high] * (48 - fails)]})
    failed, passed = normalizer.normalize("function", [low, high])
    assert passed - failed == pytest.approx(2.0)


@pytest.mark.parametrize("rows", [[[7.0] * 4] * 3, [[0.0]], [[1e9, 1e9 + 1e-3]], [[5.0 + 1e-12, 5.0]], [[-2.0] * 2]])
def test_rounding_errors_of_a_constant_reward_function_are_no_differences(rows: list[list[float]]) -> None:
    normalized = RewardNormalizer.fit({"f": rows}).normalize("f", rows[0])
    assert max(normalized) - min(normalized) < 0.01


def test_outliers_are_bounded_at_ten_deviations() -> None:
    assert IDENTITY_NORMALIZER.normalize("love", [-500.0, 3.0, 72_000.0]) == [-10.0, 3.0, 10.0]


def test_scales_are_those_of_prompts_where_weights_apply_and_means_those_that_count_for_the_floor() -> None:
    aggregator = RewardAggregator(ObjectivesSettings(), AggregationSettings())
    rng = np.random.default_rng(0)
    plain = [build_group(*(sample_rows(rng, 1, 0.2, 0.5)[0] for _ in OBJECTIVES)) for _ in range(200)]
    risky = [build_group([9.0] * 4, [9.0] * 4, [-30.0, 30.0, -30.0, -30.0], topic="risky") for _ in range(100)]
    aggregator.fit_reference([*plain, *risky])
    reference = aggregator.describe_reference()
    for name in OBJECTIVES:
        assert reference[name]["effective_weight"] == pytest.approx(reference[name]["weight"], rel=0.1)
    assert reference["love"]["mean"] == pytest.approx(-3.0, abs=0.1)
    assert reference["safety"]["mean"] == pytest.approx((200 * -3.0 + 100 * -15.0) / 300, abs=0.1)
    restored = RewardAggregator(ObjectivesSettings(), AggregationSettings())
    restored.restore(json.loads(json.dumps(aggregator.get_state())))
    assert restored.normalizer == aggregator.normalizer
    old_state = aggregator.get_state() | {"normalizer": {"mean": {"love": 1.0}, "sd": {"love": 2.0}}}
    restored.restore(old_state)
    assert restored.normalizer is not None and restored.describe_reference() == {}


@given(
    st.lists(st.tuples(signal_values, signal_values, signal_values), min_size=2, max_size=20),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.permutations(OBJECTIVES),
)
def test_objectives_are_combined_by_name_in_any_order(
    rows: list[tuple[float, float, float]], shares: tuple[float, float, float], order: list[str]
) -> None:
    signals = {name: [row[index] for row in rows] for index, name in enumerate(OBJECTIVES)}
    weights = dict(zip(OBJECTIVES, shares, strict=True))
    normalizer = RewardNormalizer.fit({name: [values] for name, values in signals.items()})
    reordered_signals = {name: signals[name] for name in order}
    expected = sum_weighted_signals(signals, weights, normalizer)
    assert sum_weighted_signals(reordered_signals, weights, normalizer) == expected


@given(st.lists(signal_values, min_size=2, max_size=20), st.floats(0.1, 5), signal_values)
def test_scale_and_offset_of_an_objective_do_not_matter(values: list[float], scale: float, offset: float) -> None:
    transformed = [scale * value + offset for value in values]
    if pstdev(values) < 1.0 or any(set(signals) <= {0.0, 1.0} for signals in (values, transformed)):
        return
    rewards, transformed_rewards = (
        sum_weighted_signals({"love": signals}, {"love": 1.0}, RewardNormalizer.fit({"love": [signals]}))
        for signals in (values, transformed)
    )
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(rewards, transformed_rewards, strict=True))


def test_a_weighted_sum_by_hand() -> None:
    normalizer = RewardNormalizer({"love": 1.0, "safety": 0.5}, {"love": 2.0, "safety": 0.5})
    signals, weights = {"love": [3.0, 1.0], "safety": [1.0, 0.0]}, {"love": 0.3, "safety": 0.7}
    assert sum_weighted_signals(signals, weights, normalizer) == pytest.approx([0.3 + 0.7, -0.7])


def test_an_objective_with_a_constant_signal_adds_nothing() -> None:
    normalizer = RewardNormalizer.fit({"safety": [[1.0, 1.0]]})
    assert sum_weighted_signals({"safety": [1.0]}, {"safety": 1.0}, normalizer) == [0.0]


def test_errors_name_mismatched_objectives() -> None:
    normalizer = RewardNormalizer.fit({"love": [[0.0, 1.0]]})
    with pytest.raises(SettingsError, match="helpfulness"):
        sum_weighted_signals({"love": [1.0]}, {"love": 0.5, "helpfulness": 0.5}, normalizer)
    with pytest.raises(SettingsError, match="safety"):
        sum_weighted_signals({"love": [1.0], "safety": [1.0]}, {"love": 0.5}, normalizer)
    with pytest.raises(SettingsError, match="different numbers"):
        sum_weighted_signals({"love": [1.0], "safety": []}, {"love": 0.5, "safety": 0.5}, normalizer)
    with pytest.raises(SettingsError, match="reference policy"):
        sum_weighted_signals({"safety": [1.0]}, {"safety": 0.5}, normalizer)
    with pytest.raises(SettingsError, match="no scores"):
        RewardNormalizer.fit({"love": [[]]})
    assert sum_weighted_signals({"love": [1.0]}, {"love": 1.0, "safety": 0.0}, normalizer) == [1.0]


def test_linear_is_the_weighted_sum_of_normalized_signals() -> None:
    step = build_aggregator("linear", (0.5, 0.25, 0.25)).aggregate([build_group([1.0, 2.0], [4.0, 0.0], [0.0, 8.0])])
    assert step.rewards == [[1.5, 3.0]]
    assert step.metrics == {}


def test_the_first_batch_freezes_the_normalizer() -> None:
    aggregator = RewardAggregator(ObjectivesSettings(), AggregationSettings())
    aggregator.aggregate([build_group([0.0, 2.0], [1.0, 3.0], [5.0, 7.0])])
    normalizer = aggregator.normalizer
    aggregator.aggregate([build_group([10.0, 20.0], [10.0, 30.0], [50.0, 70.0])])
    assert aggregator.normalizer is normalizer
    assert normalizer is not None and normalizer.mean["love"] == 1.0


def test_calibrated_rewards_by_hand() -> None:
    aggregator = build_aggregator("calibrated", (0.3, 0.7, 0.0))
    aggregator.record_baseline("p", {"love": [1.0, 3.0], "helpfulness": [0.0], "safety": [0.0]})
    step = aggregator.aggregate([build_group([2.0, 4.0], [0.0, -1.0], [9.0, 9.0])])
    # The baseline is 2 for love and 0 for helpfulness: love gives s(0), s(2); helpfulness s(0), s(-1).
    helpfulness_value = 1 / (1 + math.e)
    expected = [0.5, 0.3 / (1 + math.exp(-2)) + 0.7 * helpfulness_value]
    assert step.rewards[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("unit", [0.01, 100.0])
@pytest.mark.parametrize("method", ["linear", "calibrated"])
@pytest.mark.parametrize("source", ["function", "serve"])
def test_the_unit_of_a_reward_function_does_not_matter(source: str, method: str, unit: float) -> None:
    def compute_rewards(unit: float) -> list[float]:
        path = "rewards:grade" if source == "function" else "http://localhost:8000"
        function = {"weight": 1.0, "source": source, "path": path}
        weightless = {name: {"weight": 0.0} for name in OBJECTIVES}
        aggregator = RewardAggregator(
            ObjectivesSettings.model_validate({**weightless, "grade": function}),
            AggregationSettings.model_validate({"method": method}),
        )

        def build(values: list[float]) -> GroupScores:
            signals = dict.fromkeys(OBJECTIVES, [0.0] * len(values))
            signals["grade"] = [unit * value for value in values]
            return GroupScores("p", "", signals, plain_objectives=["grade"])

        aggregator.fit_reference([build([0.2, 0.5, 0.4, 0.8]), build([0.1, 0.3, 0.5, 0.9])])
        aggregator.record_baseline("p", build([0.5]).signals)
        return aggregator.aggregate([build([0.2, 0.6, 0.9, 0.8])]).rewards[0]

    rewards = compute_rewards(unit)
    assert rewards == pytest.approx(compute_rewards(1.0))
    assert 0.4 < max(rewards) - min(rewards) < 4.0


def test_a_prompt_without_baseline_is_calibrated_against_its_own_group() -> None:
    aggregator = build_aggregator("calibrated", (1.0, 0.0, 0.0))
    step = aggregator.aggregate([build_group([1.0, 3.0], [0.0] * 2, [0.0] * 2)])
    assert step.rewards[0] == pytest.approx([float(sigmoid(-1.0)), float(sigmoid(1.0))])


def test_a_failed_judge_gives_the_lowest_reward_of_the_step() -> None:
    zeros = [0.0] * 2
    groups = [build_group([1.0, 9.0], zeros, zeros, verdicts=[True, False]), build_group([-2.0, 0.0], zeros, zeros)]
    weights = (1.0, 0.0, 0.0)
    step = build_aggregator("linear", weights).aggregate(groups, apply_gate=True)
    assert step.rewards == [[1.0, -2.0], [-2.0, 0.0]]
    assert step.metrics == {"gate_pass_rate": 0.5}
    assert build_aggregator("linear", weights).aggregate(groups).rewards[0] == [1.0, 9.0]
    calibrated_rewards = build_aggregator("calibrated", weights).aggregate(groups, apply_gate=True).rewards[0]
    assert calibrated_rewards == [pytest.approx(float(sigmoid(-4.0))), 0.0]
    gdpo_step = build_aggregator("gdpo", weights).aggregate(groups, apply_gate=True)
    assert gdpo_step.normalized_signals["love"] == [[1.0, -2.0], [-2.0, 0.0]]


def test_a_failed_judge_is_not_better_than_a_truncated_response_with_calibrated_rewards() -> None:
    signals = {"love": [-2.0, -1.0, 2.0], "helpfulness": [0.0] * 3, "safety": [0.0] * 3}
    group = GroupScores("p", "", signals, (True, False, True), (False, True, True))
    step = build_aggregator("calibrated", (1.0, 0.0, 0.0)).aggregate([group], apply_gate=True)
    truncated, failed, passed = step.rewards[0]
    assert failed == truncated < 0.0 < passed


UNSMOOTHED = ControllerGains(integral=0.5, integral_cap=10.0, window_steps=1)


def test_multipliers_by_hand() -> None:
    multipliers = LagrangeMultipliers({"safety": 0.0}, UNSMOOTHED)
    # Shortfall 0.4: I = 0.4, no increase yet: 1.0 * 0.4 + 0.5 * 0.4
    assert multipliers.update({"safety": -0.4})["safety"] == pytest.approx(0.6)
    # Shortfall 1.0: I = 1.4, increase 0.6: 1.0 + 0.7 + 0.3
    assert multipliers.update({"safety": -1.0})["safety"] == pytest.approx(2.0)
    # Above the floor by 0.5: I = 0.9: -0.5 + 0.45
    assert multipliers.update({"safety": 0.5})["safety"] == 0.0
    # Above by 2: the integral stops at 0 and does not count the distance above the floor
    assert multipliers.update({"safety": 2.0})["safety"] == 0.0
    assert multipliers.update({"safety": -0.1})["safety"] == pytest.approx(0.1 + 0.05 + 0.5 * 2.1)
    assert multipliers.update({})["safety"] == multipliers.values["safety"]


def test_noise_within_one_standard_error_moves_no_multiplier() -> None:
    multipliers = LagrangeMultipliers({"safety": 0.0}, UNSMOOTHED)
    # The error of the mean, 0.3, and that of the zero, 0.4, add up to 0.5.
    assert multipliers.update({"safety": -0.45}, {"safety": 0.3}, {"safety": 0.4})["safety"] == 0.0
    assert multipliers.update({"safety": -0.7}, {"safety": 0.3}, {"safety": 0.4})["safety"] == pytest.approx(0.4)


def simulate_multiplier(
    distance: float, steps: int, *, runs: int = 300, gains: ControllerGains | None = None, prompts: int = 12
) -> list[float]:
    """Multipliers after `steps` of a policy `distance` sd above its floor; 60% of the variance is between prompts."""
    rng, last = np.random.default_rng(0), []
    step_error, zero_error = (math.sqrt(0.6 / n + 0.4 / (4 * n)) for n in (prompts, 96))
    for _ in range(runs):
        multipliers, zero = LagrangeMultipliers({"safety": 0.0}, gains or ControllerGains()), rng.normal() * zero_error
        for _ in range(steps):
            mean = distance - zero + rng.normal() * step_error
            values = multipliers.update({"safety": mean}, {"safety": step_error}, {"safety": zero_error})
        last.append(values["safety"])
    return last


@pytest.mark.parametrize("steps", [14, 50, 100, 300])
@pytest.mark.parametrize("distance", [0.0, 0.1, 0.25])
def test_a_policy_at_its_floor_keeps_its_multiplier_near_zero(steps: int, distance: float) -> None:
    assert fmean(simulate_multiplier(distance, steps)) <= 0.2


@pytest.mark.parametrize("prompts", [1, 2])
def test_few_prompts_in_a_step_wind_no_multiplier_up(prompts: int) -> None:
    rng, last = np.random.default_rng(0), []

    def sample_groups(count: int) -> list[GroupScores]:
        rows = rng.normal(size=(count, 1)) * 1.2 + rng.normal(size=(count, 4))
        return [build_group([0.0] * 4, [0.0] * 4, row.tolist()) for row in rows]

    for _ in range(20):
        aggregator = build_aggregator("constrained", (1.0, 0.0, 0.0), floors={"safety": 0.0})
        aggregator.fit_reference(sample_groups(96))
        for _ in range(50):
            multiplier = aggregator.aggregate(sample_groups(prompts)).metrics["multiplier_safety"]
        last.append(multiplier)
    assert fmean(last) <= 0.3


def test_a_policy_below_its_floor_gets_a_multiplier_that_is_capped_and_falls_when_it_recovers() -> None:
    for shortfall in (0.5, 1.0, 3.0):
        assert min(simulate_multiplier(-shortfall, 14, runs=50)) > 0.3
    multipliers = LagrangeMultipliers({"safety": 0.0})
    for _ in range(1000):
        multipliers.update({"safety": -1.0})
    assert multipliers.values["safety"] == pytest.approx(3.0)  # the cap of the integral and the proportional term
    recovery = [multipliers.update({"safety": 0.5})["safety"] for _ in range(50)]
    assert recovery[11] < 2.0 and recovery[35] < 0.5 and recovery[-1] == 0.0


def test_constrained_weights_an_objective_below_its_floor() -> None:
    aggregator = build_aggregator(
        "constrained", (1.0, 0.0, 0.0), floors={"safety": 0.5}, multipliers=UNSMOOTHED.model_dump()
    )
    step = aggregator.aggregate([build_group([2.0, 0.0], [0.0] * 2, [0.0, 0.0])])
    multiplier = 0.5 + 0.5 * 0.5
    assert step.metrics == {"multiplier_safety": pytest.approx(multiplier)}
    expected_weights = {"love": 1 / (1 + multiplier), "helpfulness": 0.0, "safety": multiplier / (1 + multiplier)}
    assert step.objective_weights[0] == expected_weights
    assert step.rewards[0] == pytest.approx([2.0 / (1 + multiplier), 0.0])


def test_a_topic_with_its_own_objective_keeps_its_weights_and_counts_for_that_objective_only() -> None:
    aggregator = build_aggregator(
        "constrained", (1.0, 0.0, 0.0), floors={"safety": 0, "helpfulness": 0}, multipliers=UNSMOOTHED.model_dump()
    )
    step = aggregator.aggregate([build_group([2.0, 0.0], [-9.0] * 2, [-1.0, -3.0], topic="risky")])
    assert step.objective_weights[0] == {"love": 0.0, "helpfulness": 0.0, "safety": 1.0}
    assert step.metrics == {"multiplier_safety": pytest.approx(3.0), "multiplier_helpfulness": 0.0}


def test_a_suspended_objective_has_weight_0() -> None:
    aggregator = build_aggregator("linear", (0.5, 0.25, 0.25))
    aggregator.suspended_objectives = frozenset({"love"})
    step = aggregator.aggregate([build_group([1.0, 2.0], [4.0, 0.0], [0.0, 8.0])])
    assert step.objective_weights[0]["love"] == 0.0
    assert step.rewards == [[1.0, 2.0]]


def test_a_floor_gives_a_suspended_objective_no_weight() -> None:
    aggregator = build_aggregator(
        "constrained", (0.5, 0.25, 0.25), floors={"love": 0.0, "safety": 0.0}, multipliers=UNSMOOTHED.model_dump()
    )
    aggregator.suspended_objectives = frozenset({"love"})
    step = aggregator.aggregate([build_group([-1.0, -3.0], [4.0, 0.0], [-1.0, -1.0])])
    multiplier = step.metrics["multiplier_safety"]
    assert multiplier > 0 and step.metrics["multiplier_love"] > 0
    assert step.objective_weights[0] == pytest.approx(
        {"love": 0.0, "helpfulness": 0.25 / (1 + multiplier), "safety": (0.25 + multiplier) / (1 + multiplier)}
    )


def test_a_multiplier_counts_in_the_spread_of_a_group() -> None:
    # Dynamic sampling would drop the groups that alone can raise an objective to its floor.
    aggregator = build_aggregator("constrained", (1.0, 1.0, 0.0), floors={"safety": 0.5})
    group = build_group([0.0, 0.0], [0.0, 0.0], [-2.0, 2.0])
    assert aggregator.measure_spread(group) == 0.0
    aggregator.aggregate([group])
    assert aggregator.measure_spread(group) > 0.5


def test_a_restored_aggregator_gives_the_same_rewards() -> None:
    aggregation = AggregationSettings(method="constrained", floors={"safety": 0.5})
    aggregator = RewardAggregator(ObjectivesSettings(), aggregation)
    batches = [[build_group([0.1 * i, 2.0], [4.0, 0.3], [-1.0, 0.5 * i])] for i in range(1, 5)]
    aggregator.record_baseline("p", {"love": [1.0, 2.0]})
    for batch in batches[:2]:
        aggregator.aggregate(batch)
    assert aggregator.multipliers.values["safety"] > 0
    restored = RewardAggregator(aggregator.objectives, aggregation)
    restored.restore(json.loads(json.dumps(aggregator.get_state())))
    assert restored.baseline_signals == aggregator.baseline_signals
    for batch in batches[2:]:
        assert restored.aggregate(batch) == aggregator.aggregate(batch)
    assert restored.get_state() == aggregator.get_state()


def test_truncated_responses_get_less_than_every_finished_one_of_their_group() -> None:
    assert lower_truncated([2.0, 0.5, -1.0, 3.0], [True, True, False, False]) == [2.0, 0.5, -1.5, 0.0]
    assert lower_truncated([1.0, 2.0], [False, False]) == [0.5, 1.5]  # no finished one: the order stays
    assert lower_truncated([1.0, 2.0], []) == [1.0, 2.0]


@pytest.mark.parametrize("method", ["linear", "calibrated"])
def test_the_aggregator_lowers_rewards_and_signals_of_truncated_responses(method: str) -> None:
    aggregator = build_aggregator(method, (1.0, 0.0, 0.0))
    scores = {"love": [1.0, 2.0, 3.0], "helpfulness": [0.0] * 3, "safety": [0.0] * 3}
    treated_as_finished = aggregator.aggregate([GroupScores("p", "", scores)])
    lowered = aggregator.aggregate([GroupScores("p", "", scores, (), (True, True, False))])
    rewards, penalized = treated_as_finished.rewards[0], lowered.rewards[0]
    assert penalized[:2] == rewards[:2]
    assert penalized[2] == pytest.approx(rewards[0] - 0.5)
    assert lowered.normalized_signals["love"] == [[1.0, 2.0, 0.5]]
