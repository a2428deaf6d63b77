"""Metrics against scikit-learn and worked numbers."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from rluf.reward import metrics
from rluf.utils.stats import Floats


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1), st.floats(0.1, 10)), min_size=2, max_size=40).filter(
        lambda rows: len({label for _, label, _ in rows}) == 2
    )
)
def test_auroc_equals_scikit_learns_with_ties_and_weights(rows: list[tuple[int, int, float]]) -> None:
    table: Floats = np.asarray(rows, dtype=np.float64)
    scores, labels, weights = table[:, 0], table[:, 1], table[:, 2]
    expected = float(reference.roc_auc_score(labels, scores, sample_weight=weights))
    assert math.isclose(metrics.auroc(scores, labels, weights), expected, abs_tol=1e-9)


def test_auroc_without_positives_is_nan() -> None:
    assert math.isnan(metrics.auroc(np.ones(3), np.zeros(3)))


def test_hanley_mcneil_as_in_the_method_notes() -> None:
    assert round(metrics.compute_hanley_mcneil_std_error(0.85, 50, 4950), 3) == 0.034
    assert round(metrics.compute_hanley_mcneil_std_error(0.85, 100, 4900), 3) == 0.024


def test_log_loss_and_brier_score_equal_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    p, y, w = rng.uniform(0.01, 0.99, 100), rng.integers(0, 2, 100).astype(float), rng.uniform(1, 3, 100)
    assert math.isclose(metrics.log_loss(p, y, w), reference.log_loss(y, p, sample_weight=w), rel_tol=1e-9)
    assert math.isclose(metrics.brier_score(p, y, w), reference.brier_score_loss(y, p, sample_weight=w), rel_tol=1e-9)


def test_the_calibration_error_of_a_perfect_and_of_a_wrong_forecast() -> None:
    y = np.asarray([0.0, 1.0] * 500)
    assert metrics.expected_calibration_error(np.full(1000, 0.5), y, np.ones(1000)) == 0.0
    assert math.isclose(metrics.expected_calibration_error(np.full(1000, 0.9), y, np.ones(1000)), 0.4, rel_tol=1e-9)


def test_reliability_bins_have_equal_mass_at_low_base_rates() -> None:
    rng = np.random.default_rng(2)
    p = rng.beta(1, 60, 200_000)
    y = (rng.random(p.size) < p).astype(float)
    assert metrics.expected_calibration_error(p, y, np.ones(p.size)) < 0.001
    assert math.isclose(metrics.expected_calibration_error(p / 2, y, np.ones(p.size)), p.mean() / 2, rel_tol=0.05)


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    scores = np.repeat(rng.normal(size=40), 25)
    labels = (np.repeat(rng.random(40), 25) < 0.5).astype(float)
    ones = np.ones(1000)
    row_interval = metrics.compute_auroc_interval(scores, labels, ones, [str(i) for i in range(1000)])
    user_interval = metrics.compute_auroc_interval(scores, labels, ones, [str(i // 25) for i in range(1000)])
    assert row_interval["mean"] == user_interval["mean"]
    assert user_interval["high"] - user_interval["low"] > 2 * (row_interval["high"] - row_interval["low"])


def test_pair_accuracy_counts_ties_half() -> None:
    interval = metrics.compute_accuracy_interval(np.asarray([1.0, -1.0, 0.0, 2.0]), np.ones(4), list("abcd"))
    assert interval["mean"] == 0.625
    assert interval["low"] <= 0.625 <= interval["high"]


def test_correlation_of_a_constant_is_zero() -> None:
    steps = np.arange(5, dtype=np.float64)
    assert metrics.pearson_correlation(np.ones(5), steps) == 0.0
    assert math.isclose(metrics.pearson_correlation(steps, 2 * steps + 1), 1.0)
