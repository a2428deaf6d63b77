"""Effects against scipy and statsmodels to 1e-9, worked numbers, and properties for any input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint, proportions_ztest

from rluf.errors import DataError
from rluf.evaluate.effects import (
    UserTotals,
    adjust_by_holm,
    adjust_totals_by_cuped,
    build_pre_period_covariate,
    estimate_crossed_effect,
    estimate_mean_effect,
    estimate_proportion_effect,
    estimate_ratio_effect,
    sample_ratio_test,
)
from rluf.utils.stats import wilson_interval

TOLERANCE = 1e-9
hits_and_totals = st.tuples(st.integers(1, 400), st.integers(401, 2000))


def test_mean_effect_agrees_with_scipys_welch_test() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (3, 40)), rng.normal(0.2, 3, (3, 70))
    effect = estimate_mean_effect(first, second)
    expected = stats.ttest_ind(second, first, equal_var=False, axis=-1)
    limits = expected.confidence_interval(0.95)
    assert effect.p == pytest.approx(expected.pvalue, rel=TOLERANCE)
    assert effect.df == pytest.approx(expected.df, rel=TOLERANCE)
    assert (effect.low, effect.high) == (
        pytest.approx(limits.low, rel=TOLERANCE),
        pytest.approx(limits.high, rel=TOLERANCE),
    )


@given(hits_and_totals, hits_and_totals)
def test_proportion_effect_agrees_with_statsmodels(first: tuple[int, int], second: tuple[int, int]) -> None:
    (k0, n0), (k1, n1) = first, second
    effect = estimate_proportion_effect((k0, k1), (n0, n1))
    assert float(effect.p) == pytest.approx(proportions_ztest([k1, k0], [n1, n0])[1], rel=TOLERANCE, abs=1e-300)
    low, high = confint_proportions_2indep(k1, n1, k0, n0, compare="diff", method="newcomb")
    assert (float(effect.low), float(effect.high)) == (
        pytest.approx(low, abs=TOLERANCE),
        pytest.approx(high, abs=TOLERANCE),
    )
    low, high = confint_proportions_2indep(k1, n1, k0, n0, compare="ratio", method="log")
    assert (effect.lift_low + 1, effect.lift_high + 1) == (
        pytest.approx(low, rel=TOLERANCE),
        pytest.approx(high, rel=TOLERANCE),
    )
    low, high = proportion_confint(k0, n0, method="wilson")
    assert wilson_interval(k0, n0) == (
        pytest.approx(low, abs=TOLERANCE),
        pytest.approx(high, abs=TOLERANCE),
    )


def test_ratio_effect_agrees_with_the_delta_method_of_the_run_summary() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 30, 300)
    sums = rng.binomial(counts, rng.beta(1, 9, 300))
    totals = UserTotals.from_arrays(sums, counts)
    covariance, ratio = np.cov(sums, counts), sums.sum() / counts.sum()
    textbook = covariance[0, 0] - 2 * ratio * covariance[0, 1] + ratio**2 * covariance[1, 1]
    effect = estimate_ratio_effect(totals, totals)
    assert float(totals.ratio) == pytest.approx(ratio, rel=TOLERANCE)
    assert float(effect.error) == pytest.approx(np.sqrt(2 * textbook / (300 * counts.mean() ** 2)), rel=TOLERANCE)
    assert float(effect.difference) == 0.0


def test_crossed_effect_is_paired_with_shared_users_and_two_sample_without() -> None:
    rng = np.random.default_rng(6)
    first = rng.normal(1.0, 1.0, 80)
    second = first + rng.normal(0.1, 0.5, 80)
    effect = estimate_crossed_effect(UserTotals.from_arrays(first), UserTotals.from_arrays(second))
    expected = stats.ttest_rel(second, first)
    assert (float(effect.p), float(effect.low)) == pytest.approx(
        (expected.pvalue, expected.confidence_interval(0.95).low), rel=TOLERANCE
    )
    zeros = np.zeros(80)
    disjoint = estimate_crossed_effect(
        UserTotals(np.append(first, zeros), np.append(zeros + 1, zeros)),
        UserTotals(np.append(zeros, second), np.append(zeros, zeros + 1)),
    )
    assert float(disjoint.error) == pytest.approx(float(estimate_mean_effect(first, second).error), rel=0.01)


def test_a_batch_row_equals_the_single_experiment() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 9, (4, 50)).astype(float)
    sums = rng.binomial(counts.astype(int), 0.3).astype(float)
    batch = estimate_ratio_effect(UserTotals(sums, counts), UserTotals(sums[::-1], counts[::-1]))
    single = estimate_ratio_effect(UserTotals(sums[1], counts[1]), UserTotals(sums[2], counts[2]))
    assert float(batch.p[1]) == pytest.approx(float(single.p), rel=TOLERANCE)
    assert float(batch.lift_low[1]) == pytest.approx(float(single.lift_low), rel=TOLERANCE)


def test_cuped_equals_a_regression_on_the_covariate() -> None:
    """With equal spread in both arms, CUPED gives the difference of ANCOVA, and variance falls by correlation^2."""
    rng = np.random.default_rng(3)
    before = rng.normal(size=(2, 4000))
    after = 0.8 * before + 0.6 * rng.normal(size=(2, 4000)) + np.array([[0.0], [0.1]])
    cuped = adjust_totals_by_cuped(
        (UserTotals.from_arrays(after[0]), UserTotals.from_arrays(after[1])), (before[0], before[1])
    )
    effect = estimate_mean_effect(*(totals.sums for totals in cuped.totals))
    is_treated = np.repeat([0.0, 1.0], 4000)
    design = np.column_stack([np.ones(8000), is_treated, before.ravel()])
    slopes = np.linalg.lstsq(design, after.ravel(), rcond=None)[0]
    assert float(effect.difference) == pytest.approx(slopes[1], rel=TOLERANCE)
    assert float(cuped.theta) == pytest.approx(slopes[2], rel=TOLERANCE)
    unadjusted = estimate_mean_effect(after[0], after[1])
    assert float(effect.error / unadjusted.error) ** 2 == pytest.approx(1 - float(cuped.correlation) ** 2, rel=1e-3)


def test_cuped_without_a_pre_period_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=100), rng.normal(size=120)
    covariate = build_pre_period_covariate(
        (UserTotals(np.zeros(100), np.zeros(100)), UserTotals(np.zeros(120), np.zeros(120)))
    )
    cuped = adjust_totals_by_cuped((UserTotals.from_arrays(values[0]), UserTotals.from_arrays(values[1])), covariate)
    for totals, arm_values in zip(cuped.totals, values, strict=True):
        assert totals.sums == pytest.approx(arm_values)
    assert float(cuped.correlation) == 0.0


def test_a_user_without_a_pre_period_has_no_influence() -> None:
    control, treatment = build_pre_period_covariate(
        (UserTotals.from_arrays([1, 0, 0], [2, 0, 2]), UserTotals.from_arrays([2, 1], [2, 2]))
    )
    assert control[1] == 0.0
    assert float(np.concatenate([control, treatment]).sum()) == pytest.approx(0.0)


def test_sample_ratio_test_is_the_chi_square_test() -> None:
    chi2, p_values = sample_ratio_test([[821, 902], [500, 500]], (0.5, 0.5))
    assert chi2[0] == pytest.approx(40.5**2 / 861.5 * 2, rel=TOLERANCE)
    assert p_values[0] == pytest.approx(stats.chi2.sf(chi2[0], 1), rel=TOLERANCE)
    assert p_values[1] == 1.0
    assert float(sample_ratio_test([100, 300], (1, 3))[1]) == 1.0
    with pytest.raises(DataError, match="one share above 0"):
        sample_ratio_test([1, 2], (1.0,))


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_holm_never_lowers_p_values_and_preserves_their_order(p_values: list[float]) -> None:
    adjusted = adjust_by_holm(p_values)
    assert (adjusted >= p_values).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0.0).all()
    assert adjusted.min() == pytest.approx(min(1.0, min(p_values) * len(p_values)))


def test_holm_agrees_with_statsmodels_for_each_family() -> None:
    families = np.random.default_rng(5).random((4, 6)) ** 3
    expected = [multipletests(family, method="holm")[1] for family in families]
    assert adjust_by_holm(families) == pytest.approx(np.stack(expected), rel=TOLERANCE)
    assert adjust_by_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_by_holm([]).tolist() == []


def test_arms_without_variance() -> None:
    constant = np.zeros(5)
    assert float(estimate_mean_effect(constant, constant).p) == 1.0
    assert float(estimate_mean_effect(constant, constant + 1).p) == 0.0
    assert np.isnan(float(estimate_proportion_effect((0, 3), (10, 10)).lift))
    assert float(estimate_proportion_effect((0, 0), (10, 10)).p) == 1.0


def test_too_small_arms_are_refused() -> None:
    with pytest.raises(DataError, match="2 or more users"):
        estimate_mean_effect(np.zeros(1), np.zeros(5))
    with pytest.raises(DataError, match="at least one user"):
        estimate_proportion_effect((0, 1), (0, 5))
