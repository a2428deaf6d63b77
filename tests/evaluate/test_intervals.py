"""Intervals: worked numbers, agreement with scipy, and coverage in simulated studies whose truth is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.intervals import (
    Estimate,
    bootstrap_mean,
    cluster,
    clustered_mean,
    paired_bootstrap,
    relative_lift,
    two_proportion_z,
    welch_z,
)


def coverage(draw: Callable[[int], Estimate | None], truth: float, runs: int) -> float:
    """Share of simulated studies whose interval holds the truth."""
    found = [draw(seed) for seed in range(runs)]
    return sum(one is not None and one.low <= truth <= one.high for one in found) / runs


def users(rng: np.random.Generator, rate: float, count: int = 120) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hearts of `count` users whose own rates scatter around `rate` and who read 5 to 14 responses each."""
    reads = rng.integers(5, 15, count)
    own = rng.beta(rate * 6, (1 - rate) * 6, count)
    user = np.repeat(np.arange(count), reads)
    return (rng.random(user.size) < own[user]).astype(np.int64), user


def test_one_row_a_cluster_is_the_plain_t_interval() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 40)
    ours = clustered_mean(values, np.arange(40))
    low, high = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values))
    assert (ours.mean, ours.low, ours.high) == pytest.approx((values.mean(), low, high), abs=1e-12)


def test_delta_method_equals_the_textbook_ratio_formula() -> None:
    rng = np.random.default_rng(1)
    values, user = users(rng, 0.3)
    data = cluster(values, user)
    covariance = np.cov(data.sums, data.counts)
    ratio, size = data.mean, len(data.sums)
    textbook = covariance[0, 0] - 2 * ratio * covariance[0, 1] + ratio**2 * covariance[1, 1]
    assert data.variance == pytest.approx(textbook / (size * data.counts.mean() ** 2), rel=1e-9)


def test_worked_lift() -> None:
    base, aligned = np.repeat([1, 0], [50, 950]), np.repeat([1, 0], [65, 935])
    found = relative_lift(base, np.arange(1000), aligned, np.arange(1000))
    error = np.sqrt((0.95 / 0.05 + 0.935 / 0.065) / 999)
    reach = stats.t.ppf(0.975, 999) * error
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx(
        (0.3, 1.3 * np.exp(-reach) - 1, 1.3 * np.exp(reach) - 1), rel=1e-9
    )


def test_lift_of_a_silent_arm_is_undefined() -> None:
    assert relative_lift([0, 0, 0], [1, 2, 3], [0, 1, 0], [1, 2, 3]) is None


def test_rates_stay_between_zero_and_one_and_unanimity_is_not_certainty() -> None:
    nobody = clustered_mean(np.zeros(1000), np.repeat(np.arange(500), 2), rate=True)
    assert nobody.low == 0.0
    assert nobody.high == pytest.approx(stats.binomtest(0, 500).proportion_ci(method="exact").high, rel=1e-9)
    assert clustered_mean(np.ones(20), np.arange(20), rate=True).high == 1.0
    assert clustered_mean([1, 1, 1, 0], [1, 2, 3, 4], rate=True).high == 1.0


def test_clustering_widens_when_users_agree_with_themselves() -> None:
    hearts = np.repeat([1, 0, 0, 1, 0, 0, 0, 1], 25)
    alone = clustered_mean(hearts, np.arange(200))
    grouped = clustered_mean(hearts, np.repeat(np.arange(8), 25))
    assert grouped.high - grouped.low > 4 * (alone.high - alone.low)


@pytest.mark.parametrize("method", ["delta", "bootstrap"])
def test_mean_covers_the_truth(method: str) -> None:
    def study(seed: int) -> Estimate:
        values, user = users(np.random.default_rng(seed), 0.15)
        if method == "delta":
            return clustered_mean(values, user, rate=True)
        return bootstrap_mean(values, user, resamples=400, seed=seed)

    assert 0.93 <= coverage(study, 0.15, 600) <= 0.97


def test_lift_covers_the_truth() -> None:
    def study(seed: int) -> Estimate | None:
        rng = np.random.default_rng(seed)
        return relative_lift(*users(rng, 0.12), *users(rng, 0.156))

    assert 0.93 <= coverage(study, 0.3, 600) <= 0.97


def test_paired_bootstrap_covers_the_truth_and_profits_from_pairing() -> None:
    widths = []

    def study(seed: int) -> Estimate:
        rng = np.random.default_rng(seed)
        ease = rng.normal(0.4, 0.1, 64)
        prompt = np.repeat(np.arange(64), 4)
        base = ease[prompt] + rng.normal(0, 0.05, 256)
        aligned = ease[prompt] + 0.03 + rng.normal(0, 0.05, 256)
        found = paired_bootstrap(base, prompt, aligned, prompt, resamples=400, seed=seed)
        widths.append((found.difference.high - found.difference.low) / (found.base.high - found.base.low))
        return found.difference

    assert 0.92 <= coverage(study, 0.03, 400) <= 0.98
    assert np.mean(widths) < 0.5


def test_paired_bootstrap_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    base, aligned = rng.normal(0.5, 0.2, 200), rng.normal(0.55, 0.2, 200)
    ours = paired_bootstrap(base, np.arange(200), aligned, np.arange(200), resamples=20_000, seed=0).difference
    theirs = stats.bootstrap(
        (aligned - base,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)


def test_paired_bootstrap_repeats_with_its_seed_and_refuses_odd_prompts() -> None:
    values, prompts = [0.1, 0.4, 0.2, 0.6], ["a", "a", "b", "c"]
    first = paired_bootstrap(values, prompts, values, prompts, resamples=100, seed=5)
    assert first == paired_bootstrap(values, prompts, values, prompts, resamples=100, seed=5)
    assert first.difference == Estimate(0.0, 0.0, 0.0)
    with pytest.raises(DataError, match="1 prompts were answered by one arm only"):
        paired_bootstrap(values, prompts, values[:3], prompts[:3], resamples=100, seed=5)


def test_bad_input_is_told() -> None:
    with pytest.raises(DataError, match="at least 2 clusters"):
        clustered_mean([1, 0], ["a", "a"])
    with pytest.raises(DataError, match="not finite"):
        clustered_mean([1.0, float("nan")], ["a", "b"])
    with pytest.raises(DataError, match="2 values came with 3"):
        clustered_mean([1, 0], ["a", "b", "c"])


def test_z_statistics() -> None:
    base, aligned = np.repeat([1, 0], [7, 993]), np.repeat([1, 0], [28, 972])
    table = stats.contingency.chi2_contingency([[7, 993], [28, 972]], correction=False)
    assert two_proportion_z(base, aligned) ** 2 == pytest.approx(table.statistic, rel=1e-9)
    assert two_proportion_z([0, 0], [0, 0]) == 0.0
    rng = np.random.default_rng(4)
    first, second = rng.normal(0, 1, 50), rng.normal(1, 2, 70)
    assert welch_z(first, second) == pytest.approx(stats.ttest_ind(second, first, equal_var=False).statistic, rel=1e-9)
    assert welch_z([1.0], [2.0]) == 0.0
