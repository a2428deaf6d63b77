"""An estimate with its 95% interval, and z scores of two samples. The interval of a comparison is in two_way.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class IntervalEstimate:
    """A point estimate with its interval; `low` <= `mean` <= `high`."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, as written to summary.json."""
        return asdict(self)


def two_proportion_z(base_values: ArrayLike, aligned_values: ArrayLike) -> float:
    """z of aligned against base for two shares (values 0 or 1) with the pooled rate; 0.0 when neither arm varies."""
    base, aligned = np.asarray(base_values, dtype=np.float64), np.asarray(aligned_values, dtype=np.float64)
    pooled = float((base.sum() + aligned.sum()) / (base.size + aligned.size))
    error = float(np.sqrt(pooled * (1.0 - pooled) * (1.0 / base.size + 1.0 / aligned.size)))
    return float((aligned.mean() - base.mean()) / error) if error > 0.0 else 0.0


def welch_z(base_values: ArrayLike, aligned_values: ArrayLike) -> float:
    """z of aligned against base for two means with unequal variances; 0.0 when neither arm varies."""
    base, aligned = np.asarray(base_values, dtype=np.float64), np.asarray(aligned_values, dtype=np.float64)
    if min(base.size, aligned.size) < 2:
        return 0.0
    error = float(np.sqrt(base.var(ddof=1) / base.size + aligned.var(ddof=1) / aligned.size))
    return float((aligned.mean() - base.mean()) / error) if error > 0.0 else 0.0
