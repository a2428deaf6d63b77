"""Reward overoptimization: the gold score as a function of the distance from the start policy.

Gao, Schulman, Hilton (2210.10760): with d = sqrt(KL(policy || start)), the gold score is d (a - b log d) after
reinforcement learning and d (a - b d) for best-of-n. Both are linear in a and b. The first is not valid near d = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import curve_fit

from rluf.errors import DataError

Floats = NDArray[np.float64]
CurveForm = Literal["rl", "bon"]
MIN_POLICIES = 4
Z_95 = 1.959964


def gold_score_curve(distance: ArrayLike, a: float, b: float, form: CurveForm = "rl") -> Floats:
    """Gold score [...] at distances d = sqrt(KL) [...] above 0."""
    d = np.asarray(distance, dtype=np.float64)
    curve: Floats = d * (a - b * (np.log(d) if form == "rl" else d))
    return curve


def best_of_n_kl(sample_count: ArrayLike) -> Floats:
    """KL in nats between best-of-n sampling and the policy itself: log n - (n - 1) / n."""
    count = np.asarray(sample_count, dtype=np.float64)
    kl: Floats = np.log(count) - (count - 1.0) / count
    return kl


@dataclass(frozen=True, slots=True)
class OveroptimizationCurve:
    """Fitted curve; `a_se`, `b_se` are standard errors, `peak` is the distance of the highest gold score or None.

    `turned`: the farthest policy is beyond the peak and b is significantly above 0, so the gold score is falling. `r2`
    is the share of the variance of the gold scores that the curve explains.
    """

    form: CurveForm
    a: float
    b: float
    a_se: float
    b_se: float
    peak: float | None
    peak_kl: float | None
    turned: bool
    r2: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers of the curve."""
        return {name: getattr(self, name) for name in self.__slots__}


def fit_curve(
    kl_values: ArrayLike, gold_scores: ArrayLike, *, form: CurveForm = "rl", standard_errors: ArrayLike | None = None
) -> OveroptimizationCurve:
    """Fit the curve to `gold_scores` [n] (minus that of the start policy) at `kl_values` [n] in nats.

    `standard_errors` [n] weight the points. DataError for fewer than four policies with KL above 0, or equal KL.
    """
    divergence, y = np.asarray(kl_values, dtype=np.float64), np.asarray(gold_scores, dtype=np.float64)
    has_moved = divergence > 0.0
    if has_moved.sum() < MIN_POLICIES or np.ptp(divergence[has_moved]) == 0.0:
        raise DataError(
            f"{int(has_moved.sum())} policies with a KL above 0 are not enough for a curve; give {MIN_POLICIES} or "
            "more at different KL"
        )
    d, y = np.sqrt(divergence[has_moved]), y[has_moved]
    sigma = None if standard_errors is None else np.asarray(standard_errors, dtype=np.float64)[has_moved]

    def predict_score(distance: Floats, a: float, b: float) -> Floats:
        return gold_score_curve(distance, a, b, form)

    (a, b), covariance = curve_fit(predict_score, d, y, p0=(1.0, 0.1), sigma=sigma, absolute_sigma=sigma is not None)
    a_se, b_se = np.sqrt(np.diag(covariance))
    peak = None
    if b > 0.0 and (form == "rl" or a > 0.0):
        peak = float(np.exp(a / b - 1.0) if form == "rl" else a / (2.0 * b))
    total_variation = float(np.square(y - y.mean()).sum())
    r2 = 1.0 - float(np.square(y - predict_score(d, a, b)).sum()) / total_variation if total_variation > 0.0 else 0.0
    turned = peak is not None and bool(d.max() > peak) and bool(b - Z_95 * b_se > 0.0)
    return OveroptimizationCurve(
        form, float(a), float(b), float(a_se), float(b_se), peak, None if peak is None else peak**2, turned, r2
    )
