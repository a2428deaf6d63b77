"""Intervals that hold at every look at once, so that an experiment may be watched and stopped at any time.

The estimate of an experiment that gathers users behaves like Brownian motion in information time (1 / variance), and a
normal mixture over the size of the effect gives a martingale: by Ville's inequality the chance that an interval ever
misses the truth is at most alpha, however often one looks. This is the mixture sequential probability ratio test
(Robbins 1970; Johari, Koomen, Pekelis, Walsh 2017) and, in terms of n, the asymptotic confidence sequence of
Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (2021), theorem 2.2. It is asymptotic: the first look needs enough users.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import lambertw

from rluf.errors import DataError

Floats = NDArray[np.float64]
FIRST_LOOK = 100
"""Fewest users in each arm at a look: before that the estimate is not near enough to normal to be looked at."""


def mixture_variance(planned: ArrayLike, alpha: float) -> Floats:
    """Variance tau^2 of the mixture that makes the interval tightest where the estimate's variance is `planned` [...].

    The squared margin at variance V is V (1 + 1/x) log((1 + x) / alpha^2) with x = tau^2 / V; its least value is where
    log((1 + x) / alpha^2) = x, so 1 + x = -W(-alpha^2 / e) on the lower branch of Lambert's W.
    """
    if not 0.0 < alpha < 1.0:
        raise DataError(f"alpha={alpha} is no false-positive rate; choose one between 0 and 1, such as 0.05")
    best = -float(lambertw(-(alpha**2) / np.e, k=-1).real) - 1.0
    tau: Floats = best * np.asarray(planned, dtype=np.float64)
    return tau


def always_valid_margin(variance: ArrayLike, tau: ArrayLike, alpha: float) -> Floats:
    """Half-width [...] of the interval at a look where the estimate has that `variance`; `tau` is the mixture's."""
    v, mixture = np.asarray(variance, dtype=np.float64), np.asarray(tau, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        squared = v * (v + mixture) / mixture * np.log((v + mixture) / (v * alpha**2))
    margin: Floats = np.where(v > 0.0, np.sqrt(squared), np.inf)
    return margin


def always_valid_p(difference: ArrayLike, variance: ArrayLike, tau: ArrayLike) -> Floats:
    """p-values [..., looks] that never rise: at any look the chance of one at or below alpha is at most alpha.

    The running minimum of 1 / likelihood ratio; below alpha exactly when an interval so far has excluded zero.
    """
    d, v, mixture = (np.asarray(one, dtype=np.float64) for one in (difference, variance, tau))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        log_ratio = 0.5 * np.log(v / (v + mixture)) + mixture * d**2 / (2.0 * v * (v + mixture))
    log_ratio = np.where(v > 0.0, log_ratio, 0.0)
    p: Floats = np.exp(-np.maximum.accumulate(np.maximum(log_ratio, 0.0), axis=-1))
    return p


def width_factor(alpha: float) -> float:
    """Margin over standard error at the planned end (3.03 for alpha 0.05, against 1.96 for a single look)."""
    return float(always_valid_margin(1.0, mixture_variance(1.0, alpha), alpha))
