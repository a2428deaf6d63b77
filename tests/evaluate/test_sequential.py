"""Always-valid intervals: the published formula, the best mixture, p against interval, and looks without end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from rluf.errors import DataError
from rluf.evaluate.effects import Totals, ratio_effect
from rluf.evaluate.sequential import always_valid_margin, always_valid_p, mixture_variance, width_factor


@settings(deadline=None)
@given(st.integers(1, 100_000), st.floats(1e-4, 10.0), st.floats(0.01, 0.2))
def test_margin_is_the_published_one(n: int, rho2: float, alpha: float) -> None:
    """Waudby-Smith et al. (2021), theorem 2.2, for observations of variance 1."""
    published = np.sqrt(2 * (n * rho2 + 1) / (n**2 * rho2) * np.log(np.sqrt(n * rho2 + 1) / alpha))
    assert float(always_valid_margin(1 / n, rho2, alpha)) == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_the_mixture_is_the_best_one(alpha: float) -> None:
    best = optimize.minimize_scalar(
        lambda log: float(always_valid_margin(0.3, np.exp(log), alpha)), bounds=(-5, 8), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    assert float(mixture_variance(0.3, alpha)) == pytest.approx(np.exp(best.x), rel=1e-4)


def test_p_falls_below_alpha_just_when_the_interval_leaves_zero() -> None:
    rng = np.random.default_rng(0)
    variance = 1 / np.arange(10, 500, 7)
    difference = 0.12 + np.cumsum(rng.normal(size=len(variance))) * 0.01
    tau = mixture_variance(variance[-1], 0.05)
    outside = np.abs(difference) > always_valid_margin(variance, tau, 0.05)
    p = always_valid_p(difference, variance, tau)
    assert ((p <= 0.05) == np.logical_or.accumulate(outside)).all()
    assert (np.diff(p) <= 0).all()
    assert outside.any()
    assert not outside[0]


def test_no_information_gives_no_answer() -> None:
    assert float(always_valid_margin(0.0, 1.0, 0.05)) == np.inf
    assert always_valid_p([1.0], [0.0], 1.0).tolist() == [1.0]
    with pytest.raises(DataError, match="alpha=0"):
        mixture_variance(1.0, 0.0)


def test_looking_costs_half_the_reach() -> None:
    assert width_factor(0.05) == pytest.approx(3.035, abs=1e-3)


def test_a_look_after_every_user_still_errs_at_most_at_alpha() -> None:
    """600 A/A experiments of users who read several responses, looked at every 10 users; a plain test errs often."""
    rng = np.random.default_rng(1)
    runs, users, first = 600, 600, 100
    counts = rng.integers(1, 8, (2, runs, users)).astype(float)
    sums = rng.binomial(counts.astype(int), rng.beta(1, 5, counts.shape)).astype(float)
    at = range(first, users + 1, 10)
    effects = [ratio_effect(Totals(sums[0, :, :n], counts[0, :, :n]), Totals(sums[1, :, :n], counts[1, :, :n]))
               for n in at]  # fmt: skip
    difference, error = (np.stack([getattr(one, name) for one in effects], -1) for name in ("difference", "error"))
    tau = mixture_variance(error[:, :1] ** 2 * first / users, 0.05)
    always = always_valid_p(difference, error**2, tau)[:, -1] < 0.05
    naive = np.stack([one.p for one in effects], -1).min(-1) < 0.05
    assert always.mean() <= 0.05
    assert naive.mean() > 0.15
