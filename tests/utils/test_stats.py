"""Shared statistics agree with scipy and statsmodels and do not overflow."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.special import logit as scipy_logit
from statsmodels.stats.proportion import proportion_confint

from rluf.utils.stats import logit, sigmoid, wilson_interval


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
