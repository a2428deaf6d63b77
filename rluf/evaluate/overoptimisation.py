"""How far a policy may move before more reward means less worth: the curve of gold against the distance moved.

Gao, Schulman, Hilton (2210.10760): with d = sqrt(KL(policy || start)), the gold score is d (a - b log d) after
reinforcement learning and d (a - b d) for best-of-n. Both are linear in a and b. The first does not hold near d = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import curve_fit

from rluf.errors import DataError

Floats = NDArray[np.float64]
Form = Literal["rl", "bon"]
FEWEST = 4
Z = 1.959964


def gold(distance: ArrayLike, a: float, b: float, form: Form = "rl") -> Floats:
    """Gold score [...] at distances d = sqrt(KL) [...] above 0."""
    d = np.asarray(distance, dtype=np.float64)
    curve: Floats = d * (a - b * (np.log(d) if form == "rl" else d))
    return curve


def best_of_n_kl(n: ArrayLike) -> Floats:
    """KL in nats of the best of n samples from the policy that drew them: log n - (n - 1) / n."""
    count = np.asarray(n, dtype=np.float64)
    kl: Floats = np.log(count) - (count - 1.0) / count
    return kl


@dataclass(frozen=True, slots=True)
class Curve:
    """The fitted curve. `a_se`, `b_se` standard errors, `peak` the distance where gold is highest (None: it rises on).

    `turned` says that the farthest policy seen lies beyond the peak, and b is clear of 0: gold is falling. `r2` is the
    share of gold's variance that the curve explains.
    """

    form: Form
    a: float
    b: float
    a_se: float
    b_se: float
    peak: float | None
    peak_kl: float | None
    turned: bool
    r2: float

    def as_dict(self) -> dict[str, Any]:
        """The curve in plain numbers."""
        return {name: getattr(self, name) for name in self.__slots__}


def fit(kl: ArrayLike, scores: ArrayLike, *, form: Form = "rl", errors: ArrayLike | None = None) -> Curve:
    """Fit the curve to gold `scores` [n] (less the start policy's) at `kl` [n] nats, weighed by `errors` [n] if given.

    DataError for fewer than four policies with KL above 0, or KL all alike.
    """
    divergence, y = np.asarray(kl, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    moved = divergence > 0.0
    if moved.sum() < FEWEST or np.ptp(divergence[moved]) == 0.0:
        raise DataError(
            f"{int(moved.sum())} policies with a KL above 0 make no curve; give {FEWEST} or more at different KL"
        )
    d, y = np.sqrt(divergence[moved]), y[moved]
    sigma = None if errors is None else np.asarray(errors, dtype=np.float64)[moved]

    def curve(distance: Floats, a: float, b: float) -> Floats:
        return gold(distance, a, b, form)

    (a, b), covariance = curve_fit(curve, d, y, p0=(1.0, 0.1), sigma=sigma, absolute_sigma=sigma is not None)
    a_se, b_se = np.sqrt(np.diag(covariance))
    peak = None
    if b > 0.0 and (form == "rl" or a > 0.0):
        peak = float(np.exp(a / b - 1.0) if form == "rl" else a / (2.0 * b))
    spread = float(np.square(y - y.mean()).sum())
    r2 = 1.0 - float(np.square(y - curve(d, a, b)).sum()) / spread if spread > 0.0 else 0.0
    turned = peak is not None and bool(d.max() > peak) and bool(b - Z * b_se > 0.0)
    return Curve(
        form, float(a), float(b), float(a_se), float(b_se), peak, None if peak is None else peak**2, turned, r2
    )
