"""Effects against scipy and statsmodels to 1e-9, worked numbers, and what must hold for any numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint, proportions_ztest

from rluf.errors import DataError
from rluf.evaluate.effects import (
    Totals,
    before_values,
    crossed_effect,
    cuped_effect,
    holm,
    mean_effect,
    proportion_effect,
    ratio_effect,
    sample_ratio,
    wilson,
)
from rluf.evaluate.intervals import cluster

TIGHT = 1e-9
shares = st.tuples(st.integers(1, 400), st.integers(401, 2000))


def test_means_are_scipys_welch_test() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (3, 40)), rng.normal(0.2, 3, (3, 70))
    ours = mean_effect(first, second)
    theirs = stats.ttest_ind(second, first, equal_var=False, axis=-1)
    limits = theirs.confidence_interval(0.95)
    assert ours.p == pytest.approx(theirs.pvalue, rel=TIGHT)
    assert ours.df == pytest.approx(theirs.df, rel=TIGHT)
    assert (ours.low, ours.high) == (pytest.approx(limits.low, rel=TIGHT), pytest.approx(limits.high, rel=TIGHT))


@settings(deadline=None)
@given(shares, shares)
def test_proportions_are_those_of_statsmodels(first: tuple[int, int], second: tuple[int, int]) -> None:
    (k0, n0), (k1, n1) = first, second
    ours = proportion_effect((k0, k1), (n0, n1))
    assert float(ours.p) == pytest.approx(proportions_ztest([k1, k0], [n1, n0])[1], rel=TIGHT, abs=1e-300)
    low, high = confint_proportions_2indep(k1, n1, k0, n0, compare="diff", method="newcomb")
    assert (float(ours.low), float(ours.high)) == (pytest.approx(low, abs=TIGHT), pytest.approx(high, abs=TIGHT))
    low, high = confint_proportions_2indep(k1, n1, k0, n0, compare="ratio", method="log")
    assert (ours.lift_low + 1, ours.lift_high + 1) == (pytest.approx(low, rel=TIGHT), pytest.approx(high, rel=TIGHT))
    low, high = proportion_confint(k0, n0, method="wilson")
    assert wilson(k0, n0) == (pytest.approx(low, abs=TIGHT), pytest.approx(high, abs=TIGHT))


def test_ratio_is_the_delta_method_of_the_run_summary() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 30, 300)
    sums = rng.binomial(counts, rng.beta(1, 9, 300))
    one = Totals.of(sums, counts)
    rows = cluster(
        np.concatenate([np.repeat([1, 0], [k, n - k]) for k, n in zip(sums, counts, strict=True)]),
        np.repeat(np.arange(300), counts),
    )
    effect = ratio_effect(one, one)
    assert float(one.ratio) == pytest.approx(rows.mean, rel=TIGHT)
    assert float(effect.error) == pytest.approx(np.sqrt(2 * rows.variance), rel=TIGHT)
    assert float(effect.difference) == 0.0


def test_crossed_is_the_paired_test_and_the_two_sample_one_at_its_ends() -> None:
    rng = np.random.default_rng(6)
    first = rng.normal(1.0, 1.0, 80)
    second = first + rng.normal(0.1, 0.5, 80)
    ours = crossed_effect(Totals.of(first), Totals.of(second))
    theirs = stats.ttest_rel(second, first)
    assert (float(ours.p), float(ours.low)) == pytest.approx(
        (theirs.pvalue, theirs.confidence_interval(0.95).low), rel=TIGHT
    )
    none = np.zeros(80)
    apart = crossed_effect(
        Totals(np.append(first, none), np.append(none + 1, none)),
        Totals(np.append(none, second), np.append(none, none + 1)),
    )
    assert float(apart.error) == pytest.approx(float(mean_effect(first, second).error), rel=0.01)


def test_one_row_of_a_batch_is_that_experiment_alone() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 9, (4, 50)).astype(float)
    sums = rng.binomial(counts.astype(int), 0.3).astype(float)
    batch = ratio_effect(Totals(sums, counts), Totals(sums[::-1], counts[::-1]))
    alone = ratio_effect(Totals(sums[1], counts[1]), Totals(sums[2], counts[2]))
    assert float(batch.p[1]) == pytest.approx(float(alone.p), rel=TIGHT)
    assert float(batch.lift_low[1]) == pytest.approx(float(alone.lift_low), rel=TIGHT)


def test_cuped_equals_a_regression_on_the_covariate() -> None:
    """With both arms' spread alike, CUPED's difference is that of ANCOVA, and variance falls by the correlation^2."""
    rng = np.random.default_rng(3)
    before = rng.normal(size=(2, 4000))
    after = 0.8 * before + 0.6 * rng.normal(size=(2, 4000)) + np.array([[0.0], [0.1]])
    found = cuped_effect((after[0], after[1]), (before[0], before[1]))
    treated = np.repeat([0.0, 1.0], 4000)
    design = np.column_stack([np.ones(8000), treated, before.ravel()])
    slopes = np.linalg.lstsq(design, after.ravel(), rcond=None)[0]
    assert float(found.effect.difference) == pytest.approx(slopes[1], rel=TIGHT)
    assert float(found.theta) == pytest.approx(slopes[2], rel=TIGHT)
    raw = mean_effect(after[0], after[1])
    assert float(found.effect.error / raw.error) ** 2 == pytest.approx(1 - float(found.correlation) ** 2, rel=1e-3)


def test_cuped_leaves_alone_what_the_past_does_not_tell() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=100), rng.normal(size=120)
    nothing = before_values((Totals(np.zeros(100), np.zeros(100)), Totals(np.zeros(120), np.zeros(120))))
    found = cuped_effect(values, nothing)
    assert found.effect.as_dict() == pytest.approx(mean_effect(*values).as_dict(), nan_ok=True)
    assert float(found.correlation) == 0.0


def test_a_newcomer_stands_at_the_common_ratio() -> None:
    control, treatment = before_values((Totals.of([1, 0, 0], [2, 0, 2]), Totals.of([2, 1], [2, 2])))
    assert control[1] == 0.0
    assert float(np.concatenate([control, treatment]).sum()) == pytest.approx(0.0)


def test_sample_ratio_is_the_chi_square_test() -> None:
    chi2, p = sample_ratio([[821, 902], [500, 500]], (0.5, 0.5))
    assert chi2[0] == pytest.approx(40.5**2 / 861.5 * 2, rel=TIGHT)
    assert p[0] == pytest.approx(stats.chi2.sf(chi2[0], 1), rel=TIGHT)
    assert p[1] == 1.0
    assert float(sample_ratio([100, 300], (1, 3))[1]) == 1.0
    with pytest.raises(DataError, match="one share above 0"):
        sample_ratio([1, 2], (1.0,))


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p_values: list[float]) -> None:
    found = holm(p_values)
    assert (found >= p_values).all()
    assert (np.diff(found[np.argsort(p_values, kind="stable")]) >= 0.0).all()
    assert found.min() == pytest.approx(min(1.0, min(p_values) * len(p_values)))


def test_holm_is_that_of_statsmodels_for_each_family() -> None:
    families = np.random.default_rng(5).random((4, 6)) ** 3
    theirs = [multipletests(family, method="holm")[1] for family in families]
    assert holm(families) == pytest.approx(np.stack(theirs), rel=TIGHT)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]).tolist() == []


def test_arms_that_do_not_vary() -> None:
    flat = np.zeros(5)
    assert float(mean_effect(flat, flat).p) == 1.0
    assert float(mean_effect(flat, flat + 1).p) == 0.0
    assert np.isnan(float(proportion_effect((0, 3), (10, 10)).lift))
    assert float(proportion_effect((0, 0), (10, 10)).p) == 1.0


def test_too_small_arms_are_told() -> None:
    with pytest.raises(DataError, match="2 or more users"):
        mean_effect(np.zeros(1), np.zeros(5))
    with pytest.raises(DataError, match="at least one user"):
        proportion_effect((0, 1), (0, 5))
