"""Shared statistics agree with scipy and statsmodels and do not overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit
from scipy.special import logit as scipy_logit
from statsmodels.stats.proportion import proportion_confint
from threadpoolctl import threadpool_info, threadpool_limits

from rluf.utils import stats
from rluf.utils.stats import fit_logistic, logit, sigmoid, wilson_interval


def test_sigmoid_is_exact_and_does_not_overflow() -> None:
    logits = np.linspace(-30.0, 30.0, 61)
    assert sigmoid(logits) == pytest.approx(expit(logits), abs=1e-15)
    assert sigmoid(np.array([-800.0, 0.0, 800.0])).tolist() == [0.0, 0.5, 1.0]
    assert float(sigmoid(2.0)) == pytest.approx(expit(2.0))


def test_logit_is_clipped_at_the_ends() -> None:
    assert logit(0.3) == pytest.approx(scipy_logit(0.3))
    assert (logit(0.0), logit(1.0)) == (pytest.approx(-27.631, abs=1e-3), pytest.approx(27.631, abs=1e-3))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_intervals_agree_with_statsmodels(confidence: float) -> None:
    hits, totals = np.array([0, 3, 50]), np.array([10, 20, 50])
    low, high = wilson_interval(hits, totals, confidence=confidence)
    expected = proportion_confint(hits, totals, alpha=1 - confidence, method="wilson")
    assert (low, high) == (pytest.approx(expected[0], abs=1e-12), pytest.approx(expected[1], abs=1e-12))


def test_only_a_large_regression_uses_several_blas_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    minimize, thread_counts = scipy.optimize.minimize, []

    def record_threads(*arguments: Any, **options: Any) -> Any:
        thread_counts.append({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
        return minimize(*arguments, **options)

    monkeypatch.setattr(scipy.optimize, "minimize", record_threads)
    monkeypatch.setattr(stats, "SMALL_DESIGN_MATRIX_SIZE", 8)
    labels = np.array([0.0, 1.0, 1.0, 1.0])
    with threadpool_limits(2, "blas"):
        for column_count in (1, 2, 3):
            solution = fit_logistic(np.zeros((4, column_count)), labels, np.ones(4), 1.0)
            assert solution[-1] == pytest.approx(logit(0.75), abs=1e-3)
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {2}
    assert thread_counts == [{1}, {1}, {2}]
