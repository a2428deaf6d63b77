"""Always-valid intervals and p-values, which hold at every look together.

An experiment with them may be monitored and stopped at any time. The estimate of an experiment that gathers users
behaves like Brownian motion in information time (1 / variance), and a normal mixture over the effect size gives a
martingale: by Ville's inequality the probability that an interval ever misses the truth is at most alpha, whatever the
number of looks. This is the mixture sequential probability ratio test (Robbins 1970; Johari, Koomen, Pekelis, Walsh
2017) and, in terms of n, the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (2021),
theorem 2.2. It is asymptotic, so the first look waits for enough events in the smaller arm: 1,000 users without a heart
say little about love.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import lambertw

from rluf.errors import DataError
from rluf.utils.stats import Floats

MIN_LOOK_USERS = 30
"""Minimum users in each arm at a look."""
MIN_LOOK_EVENTS = 20.0
"""Minimum number of events (hearts) that the pooled rate predicts for the smaller arm at a look."""


def choose_mixture_variance(planned_variance: ArrayLike, alpha: float) -> Floats:
    """Mixture variance tau^2 for which the always-valid interval is tightest at `planned_variance` [...].

    The squared margin at variance V is V (1 + 1/x) log((1 + x) / alpha^2) with x = tau^2 / V; its minimum is where
    log((1 + x) / alpha^2) = x, so 1 + x = -W(-alpha^2 / e) on the lower branch of Lambert's W.
    """
    if not 0.0 < alpha < 1.0:
        raise DataError(f"expected a false-positive rate alpha between 0 and 1, got {alpha}; use for example 0.05")
    best_ratio = -float(lambertw(-(alpha**2) / np.e, k=-1).real) - 1.0
    tau: Floats = best_ratio * np.asarray(planned_variance, dtype=np.float64)
    return tau


def compute_always_valid_margin(variance: ArrayLike, tau: ArrayLike, alpha: float) -> Floats:
    """Half-width [...] of the interval at a look where the estimate has that `variance`; `tau` is the mixture's."""
    v, mixture = np.asarray(variance, dtype=np.float64), np.asarray(tau, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = v * (v + mixture) / mixture * np.log((v + mixture) / (v * alpha**2))
    # No variance yet means no information: the interval is unbounded rather than empty.
    margin: Floats = np.where(v > 0.0, np.sqrt(squared), np.inf)
    return margin


def compute_always_valid_p_values(difference: ArrayLike, variance: ArrayLike, tau: ArrayLike) -> Floats:
    """Non-increasing p-values [..., looks]: at any look the probability of one at or below alpha is at most alpha.

    The running minimum of 1 / likelihood ratio; below alpha exactly when an interval up to now has excluded zero.
    """
    d, v, mixture = (np.asarray(array, dtype=np.float64) for array in (difference, variance, tau))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        log_ratio = 0.5 * np.log(v / (v + mixture)) + mixture * d**2 / (2.0 * v * (v + mixture))
    log_ratio = np.where(v > 0.0, log_ratio, 0.0)
    p_values: Floats = np.exp(-np.maximum.accumulate(np.maximum(log_ratio, 0.0), axis=-1))
    return p_values


def compute_sequential_width(alpha: float) -> float:
    """Margin over standard error at the planned end (3.03 for alpha 0.05; a single look has 1.96)."""
    return float(compute_always_valid_margin(1.0, choose_mixture_variance(1.0, alpha), alpha))
