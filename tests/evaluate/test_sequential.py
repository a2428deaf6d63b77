"""Always-valid intervals: the published formula, the best mixture, p-values against intervals, repeated looks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from rluf.errors import DataError
from rluf.evaluate.effects import UserTotals, estimate_ratio_effect
from rluf.evaluate.sequential import (
    choose_mixture_variance,
    compute_always_valid_margin,
    compute_always_valid_p_values,
    compute_sequential_width,
)


@given(st.integers(1, 100_000), st.floats(1e-4, 10.0), st.floats(0.01, 0.2))
def test_margin_matches_the_published_formula(n: int, rho2: float, alpha: float) -> None:
    """Waudby-Smith et al. (2021), theorem 2.2, for observations of variance 1."""
    published = np.sqrt(2 * (n * rho2 + 1) / (n**2 * rho2) * np.log(np.sqrt(n * rho2 + 1) / alpha))
    assert float(compute_always_valid_margin(1 / n, rho2, alpha)) == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_mixture_variance_minimizes_the_margin(alpha: float) -> None:
    optimum = optimize.minimize_scalar(
        lambda log_tau: float(compute_always_valid_margin(0.3, np.exp(log_tau), alpha)),
        bounds=(-5, 8), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    assert float(choose_mixture_variance(0.3, alpha)) == pytest.approx(np.exp(optimum.x), rel=1e-4)


def test_p_value_falls_below_alpha_when_the_interval_excludes_zero() -> None:
    rng = np.random.default_rng(0)
    variance = 1 / np.arange(10, 500, 7)
    difference = 0.12 + np.cumsum(rng.normal(size=len(variance))) * 0.01
    tau = choose_mixture_variance(variance[-1], 0.05)
    excludes_zero = np.abs(difference) > compute_always_valid_margin(variance, tau, 0.05)
    p_values = compute_always_valid_p_values(difference, variance, tau)
    assert ((p_values <= 0.05) == np.logical_or.accumulate(excludes_zero)).all()
    assert (np.diff(p_values) <= 0).all()
    assert excludes_zero.any()
    assert not excludes_zero[0]


def test_zero_variance_gives_an_unbounded_interval() -> None:
    assert float(compute_always_valid_margin(0.0, 1.0, 0.05)) == np.inf
    assert compute_always_valid_p_values([1.0], [0.0], 1.0).tolist() == [1.0]
    with pytest.raises(DataError, match="alpha between 0 and 1, got 0"):
        choose_mixture_variance(1.0, 0.0)


def test_width_factor_at_the_planned_end() -> None:
    assert compute_sequential_width(0.05) == pytest.approx(3.035, abs=1e-3)


def test_repeated_looks_keep_the_false_positive_rate() -> None:
    """600 A/A experiments with several responses per user and a look every 10 users; a plain test errs often."""
    rng = np.random.default_rng(1)
    run_count, user_count, first_look = 600, 600, 100
    counts = rng.integers(1, 8, (2, run_count, user_count)).astype(float)
    sums = rng.binomial(counts.astype(int), rng.beta(1, 5, counts.shape)).astype(float)
    look_sizes = range(first_look, user_count + 1, 10)
    effects = [
        estimate_ratio_effect(*(UserTotals(sums[arm, :, :n], counts[arm, :, :n]) for arm in (0, 1))) for n in look_sizes
    ]
    difference, error = (
        np.stack([getattr(effect, name) for effect in effects], -1) for name in ("difference", "error")
    )
    tau = choose_mixture_variance(error[:, :1] ** 2 * first_look / user_count, 0.05)
    is_rejected = compute_always_valid_p_values(difference, error**2, tau)[:, -1] < 0.05
    is_rejected_naively = np.stack([effect.p for effect in effects], -1).min(-1) < 0.05
    assert is_rejected.mean() <= 0.05
    assert is_rejected_naively.mean() > 0.15
