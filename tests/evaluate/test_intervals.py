"""Intervals: worked numbers, agreement with scipy, and coverage in simulated studies with a known truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.intervals import (
    IntervalEstimate,
    clustered_mean,
    paired_bootstrap,
    relative_lift,
    sum_by_cluster,
)


def measure_coverage(run_study: Callable[[int], IntervalEstimate | None], truth: float, study_count: int) -> float:
    """Share of simulated studies whose interval contains the truth."""
    estimates = [run_study(seed) for seed in range(study_count)]
    covered = [estimate is not None and estimate.low <= truth <= estimate.high for estimate in estimates]
    return sum(covered) / study_count


def simulate_hearts(
    rng: np.random.Generator, rate: float, user_count: int = 120
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hearts and user labels; user rates scatter around `rate`, and each user reads 5 to 14 responses."""
    read_counts = rng.integers(5, 15, user_count)
    user_rates = rng.beta(rate * 6, (1 - rate) * 6, user_count)
    user_index = np.repeat(np.arange(user_count), read_counts)
    return (rng.random(user_index.size) < user_rates[user_index]).astype(np.int64), user_index


def test_one_row_per_cluster_gives_the_plain_t_interval() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 40)
    estimate = clustered_mean(values, np.arange(40))
    low, high = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values))
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((values.mean(), low, high), abs=1e-12)


def test_delta_method_equals_the_textbook_ratio_formula() -> None:
    rng = np.random.default_rng(1)
    hearts, user_index = simulate_hearts(rng, 0.3)
    totals = sum_by_cluster(hearts, user_index)
    covariance = np.cov(totals.sums, totals.counts)
    ratio, user_count = totals.mean, len(totals.sums)
    textbook = covariance[0, 0] - 2 * ratio * covariance[0, 1] + ratio**2 * covariance[1, 1]
    assert totals.variance == pytest.approx(textbook / (user_count * totals.counts.mean() ** 2), rel=1e-9)


def test_worked_lift() -> None:
    base, aligned = np.repeat([1, 0], [50, 950]), np.repeat([1, 0], [65, 935])
    lift = relative_lift(base, np.arange(1000), aligned, np.arange(1000))
    log_error = np.sqrt((0.95 / 0.05 + 0.935 / 0.065) / 999)
    margin = stats.t.ppf(0.975, 999) * log_error
    assert lift is not None
    assert (lift.mean, lift.low, lift.high) == pytest.approx(
        (0.3, 1.3 * np.exp(-margin) - 1, 1.3 * np.exp(margin) - 1), rel=1e-9
    )


def test_lift_is_undefined_for_an_arm_without_hearts() -> None:
    assert relative_lift([0, 0, 0], [1, 2, 3], [0, 1, 0], [1, 2, 3]) is None


def test_rates_stay_between_zero_and_one_and_equal_rows_do_not_give_certainty() -> None:
    all_zero = clustered_mean(np.zeros(1000), np.repeat(np.arange(500), 2), is_rate=True)
    assert all_zero.low == 0.0
    assert all_zero.high == pytest.approx(stats.binomtest(0, 500).proportion_ci(method="exact").high, rel=1e-9)
    assert clustered_mean(np.ones(20), np.arange(20), is_rate=True).high == 1.0
    assert clustered_mean([1, 1, 1, 0], [1, 2, 3, 4], is_rate=True).high == 1.0


def test_clustering_widens_the_interval_when_rows_of_a_user_agree() -> None:
    hearts = np.repeat([1, 0, 0, 1, 0, 0, 0, 1], 25)
    independent = clustered_mean(hearts, np.arange(200))
    clustered = clustered_mean(hearts, np.repeat(np.arange(8), 25))
    assert clustered.high - clustered.low > 4 * (independent.high - independent.low)


def test_mean_interval_covers_the_truth() -> None:
    def run_study(seed: int) -> IntervalEstimate:
        return clustered_mean(*simulate_hearts(np.random.default_rng(seed), 0.15), is_rate=True)

    assert 0.93 <= measure_coverage(run_study, 0.15, 600) <= 0.97


def test_lift_interval_covers_the_truth() -> None:
    def run_study(seed: int) -> IntervalEstimate | None:
        rng = np.random.default_rng(seed)
        return relative_lift(*simulate_hearts(rng, 0.12), *simulate_hearts(rng, 0.156))

    assert 0.93 <= measure_coverage(run_study, 0.3, 600) <= 0.97


def test_paired_bootstrap_covers_the_truth_and_gains_precision_from_pairing() -> None:
    relative_widths = []

    def run_study(seed: int) -> IntervalEstimate:
        rng = np.random.default_rng(seed)
        prompt_scores = rng.normal(0.4, 0.1, 64)
        prompt_index = np.repeat(np.arange(64), 4)
        base = prompt_scores[prompt_index] + rng.normal(0, 0.05, 256)
        aligned = prompt_scores[prompt_index] + 0.03 + rng.normal(0, 0.05, 256)
        estimate = paired_bootstrap(base, prompt_index, aligned, prompt_index, resamples=400, seed=seed)
        difference_width = estimate.difference.high - estimate.difference.low
        relative_widths.append(difference_width / (estimate.base.high - estimate.base.low))
        return estimate.difference

    assert 0.92 <= measure_coverage(run_study, 0.03, 400) <= 0.98
    assert np.mean(relative_widths) < 0.5


def test_paired_bootstrap_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    base, aligned = rng.normal(0.5, 0.2, 200), rng.normal(0.55, 0.2, 200)
    difference = paired_bootstrap(base, np.arange(200), aligned, np.arange(200), resamples=20_000, seed=0).difference
    expected = stats.bootstrap(
        (aligned - base,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high), abs=0.002)


def test_paired_bootstrap_is_reproducible_and_refuses_unpaired_prompts() -> None:
    values, prompts = [0.1, 0.4, 0.2, 0.6], ["a", "a", "b", "c"]
    first = paired_bootstrap(values, prompts, values, prompts, resamples=100, seed=5)
    assert first == paired_bootstrap(values, prompts, values, prompts, resamples=100, seed=5)
    assert first.difference == IntervalEstimate(0.0, 0.0, 0.0)
    with pytest.raises(DataError, match="1 prompts were answered by one arm only"):
        paired_bootstrap(values, prompts, values[:3], prompts[:3], resamples=100, seed=5)


def test_invalid_input_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2 clusters"):
        clustered_mean([1, 0], ["a", "a"])
    with pytest.raises(DataError, match="not finite"):
        clustered_mean([1.0, float("nan")], ["a", "b"])
    with pytest.raises(DataError, match="got 2 values, 3 labels"):
        clustered_mean([1, 0], ["a", "b", "c"])
