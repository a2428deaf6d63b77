"""The interval of a comparison: agreement with scipy, false alarms and coverage in crossed studies, further data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.two_way import ArmValues, PolicyComparison, compare_arms, plan_more_data


def simulate_study(
    seed: int, effect: float = 0.0, *, prompt_count: int = 60, user_count: int = 200, reads: int = 10
) -> PolicyComparison:
    """Base against a policy with `effect` more hearts; prompts, responses (3 each) and users are all sampled."""
    rng = np.random.default_rng(seed)
    prompt_rates = rng.beta(2.0, 8.0, prompt_count)
    arms = []
    for arm in range(2):
        response_logits = np.log(prompt_rates / (1 - prompt_rates))[:, None] + rng.normal(0, 1.0, (prompt_count, 3))
        user_logits = rng.normal(0, 0.7, user_count)
        user = np.repeat(np.arange(user_count), reads)
        item = rng.integers(0, 3 * prompt_count, user.size)
        rates = 1 / (1 + np.exp(-(response_logits.ravel()[item] + user_logits[user])))
        hearts = rng.random(user.size) < rates * (1 + effect * arm)
        arms.append(ArmValues(hearts, item // 3, user))
    return compare_arms(*arms)


def test_scores_of_one_response_per_prompt_give_the_paired_t_interval() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 1.0, 40)
    aligned = base + rng.normal(0.3, 0.5, 40)
    comparison = compare_arms(ArmValues(base, np.arange(40)), ArmValues(aligned, np.arange(40)))
    expected = stats.ttest_rel(aligned, base).confidence_interval(0.95)
    assert (comparison.difference.low, comparison.difference.high) == pytest.approx(expected, rel=1e-9)
    low, high = stats.t.interval(0.95, 39, loc=base.mean(), scale=stats.sem(base))
    assert (comparison.base.low, comparison.base.high) == pytest.approx((low, high), rel=1e-9)


def test_the_lift_is_the_delta_method_on_the_log_ratio() -> None:
    base, aligned = np.repeat([1, 0], [50, 950]), np.repeat([1, 0], [65, 935])
    comparison = compare_arms(ArmValues(base, np.arange(1000)), ArmValues(aligned, np.arange(1000, 2000)))
    margin = stats.t.ppf(0.975, 1999) * np.sqrt((0.95 / 0.05 + 0.935 / 0.065) / 1000 * 2000 / 1999)
    assert comparison.lift is not None
    assert (comparison.lift.mean, comparison.lift.low, comparison.lift.high) == pytest.approx(
        (0.3, 1.3 * np.exp(-margin) - 1, 1.3 * np.exp(margin) - 1), rel=1e-6
    )


def test_a_policy_against_another_draw_of_itself_differs_in_one_of_twenty_comparisons() -> None:
    lifts = [simulate_study(seed).lift for seed in range(400)]
    false_alarms = sum(lift is not None and not lift.low <= 0 <= lift.high for lift in lifts)
    # 5%; three standard errors of 400 studies.
    assert 0.02 <= false_alarms / 400 <= 0.083


def test_the_interval_covers_a_true_effect() -> None:
    lifts = [simulate_study(seed, 0.2).lift for seed in range(1000, 1400)]
    assert 0.915 <= sum(lift is not None and lift.low <= 0.2 <= lift.high for lift in lifts) / 400 <= 0.98


def test_more_simulated_users_do_not_make_the_prompts_certain() -> None:
    few, many = (simulate_study(3, user_count=count).log_ratio_variance for count in (500, 20_000))
    assert few is not None and many is not None
    assert many.user < few.user / 10
    assert many.total > 0.5 * few.total


def test_rates_stay_between_zero_and_one_and_equal_rows_do_not_give_certainty() -> None:
    prompts = np.arange(500)
    comparison = compare_arms(ArmValues(np.zeros(500), prompts), ArmValues(np.ones(500), prompts))
    exact_limit = stats.binomtest(0, 500).proportion_ci(method="exact").high
    assert (comparison.base.low, comparison.base.high) == pytest.approx((0.0, exact_limit))
    assert comparison.aligned.high == 1.0
    assert comparison.lift is None
    all_safe = compare_arms(ArmValues(np.ones(20), np.arange(20)), ArmValues(np.ones(20), np.arange(20)))
    assert all_safe.lift is not None
    assert all_safe.lift.low == pytest.approx(-stats.binomtest(0, 20).proportion_ci(method="exact").high)


def test_further_data_would_decide_at_the_estimated_effect() -> None:
    comparison = simulate_study(2, 0.05, user_count=2000)
    more = plan_more_data(comparison, 0.0)
    assert comparison.lift is not None and comparison.log_ratio_variance is not None
    assert not comparison.lift.low > 0 and more.prompts is not None
    parts = comparison.log_ratio_variance
    scaled = (parts.prompt - parts.cell) * 60 / (60 + more.prompts) + parts.user
    # Estimate over standard error: the 97.5% quantile plus that of the power.
    assert np.log1p(comparison.lift.mean) / np.sqrt(scaled) == pytest.approx(parts.t_quantile + 0.84, rel=0.03)
    all_safe = compare_arms(ArmValues(np.ones(20), np.arange(20)), ArmValues(np.ones(20), np.arange(20)))
    enough = 20 + (plan_more_data(all_safe, -0.05).prompts or 0)
    lift = compare_arms(*[ArmValues(np.ones(enough), np.arange(enough))] * 2).lift
    assert enough > 20 and lift is not None and lift.low > -0.05
    assert plan_more_data(compare_arms(ArmValues([0, 0], [1, 2]), ArmValues([0, 1], [1, 2])), 0.0).prompts is None


def test_invalid_input_is_refused() -> None:
    two = ArmValues([1.0, 0.0], ["a", "b"])
    with pytest.raises(DataError, match="at least 2 clusters \\(prompts\\), got 1"):
        compare_arms(ArmValues([1, 0], ["a", "a"]), ArmValues([1, 0], ["a", "a"]))
    with pytest.raises(DataError, match="1 of 2 values are not finite"):
        compare_arms(two, ArmValues([1.0, float("nan")], ["a", "b"]))
    with pytest.raises(DataError, match="got 2 values and 3 prompts"):
        compare_arms(two, ArmValues([1, 0], ["a", "b", "c"]))
    with pytest.raises(DataError, match="at least 2 clusters \\(users\\) per arm, got 1"):
        compare_arms(ArmValues([1, 0], ["a", "b"], [0, 0]), ArmValues([1, 0], ["a", "b"], [0, 1]))
