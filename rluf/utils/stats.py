"""Array types and small statistics that several packages share."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def sigmoid(logits: ArrayLike) -> Floats:
    """1 / (1 + exp(-z)), element by element, [...]."""
    # The tanh form has no exponential that overflows for large negative z.
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64))), dtype=np.float64)


def logit(probability: float) -> float:
    """log(p / (1 - p)); p is clipped to [1e-12, 1 - 1e-12]."""
    clipped = min(max(probability, 1e-12), 1 - 1e-12)
    return math.log(clipped) - math.log1p(-clipped)


def wilson_interval(hits: ArrayLike, totals: ArrayLike, *, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Score limits of a proportion (Wilson 1927), lower and upper, [...] each. Rows must be independent."""
    k, n = np.asarray(hits, dtype=np.float64), np.asarray(totals, dtype=np.float64)
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share = k / n
    center = (share + z**2 / (2.0 * n)) / (1.0 + z**2 / n)
    margin = z / (1.0 + z**2 / n) * np.sqrt(share * (1.0 - share) / n + z**2 / (4.0 * n**2))
    return center - margin, center + margin
