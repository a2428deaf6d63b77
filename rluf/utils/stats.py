"""Array types and small statistics that several packages share."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
SMALL_DESIGN_MATRIX_SIZE = 1 << 20
"""Elements of a design matrix (8 MB) up to which a logistic regression is faster on one thread."""


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


def compute_rate_with_interval(hits: int, rows: int) -> dict[str, float]:
    """Share of hits with its 95% Wilson score interval; all of [0, 1] without rows.

    It assumes independent rows: where a few users give many rows the true interval is wider.
    """
    if not rows:
        return {"mean": 0.0, "low": 0.0, "high": 1.0, "rows": 0, "hits": 0}
    low, high = (float(limit) for limit in wilson_interval(hits, rows))
    return {"mean": hits / rows, "low": max(0.0, low), "high": min(1.0, high), "rows": rows, "hits": hits}


def fit_logistic(
    x: Floats,
    y: Floats,
    weights: Floats,
    inverse_strength: float,
    *,
    logit_offsets: Floats | float = 0.0,
    quadratic_penalty: Floats | None = None,
    fit_bias: bool = True,
    initial_solution: Floats | None = None,
) -> Floats:
    """Weights and, last, the bias [H + 1] of L2 logistic regression of y [N] in [0, 1] on x [N, H].

    The mean loss is scikit-learn's objective (C = `inverse_strength`) divided by the total weight, plus half of
    w^T P w for the `quadratic_penalty` P [H, H]. That term, offsets and soft labels are not supported by its
    LogisticRegression, and its import takes seconds in each worker. `initial_solution` is a warm start.
    """
    from scipy.optimize import minimize

    total_weight = float(weights.sum())
    ridge = 1 / (inverse_strength * total_weight)
    # Scaled with the ridge: where strong regularization shrinks the weights, the extra penalty must not vanish.
    penalty = (1 + ridge) * quadratic_penalty if quadratic_penalty is not None and quadratic_penalty.size else None

    def compute_penalized_loss(parameters: Floats) -> tuple[float, Floats]:
        w, z = parameters[:-1], x @ parameters[:-1] + parameters[-1] + logit_offsets
        penalty_gradient = ridge * w + (0.0 if penalty is None else penalty @ w)
        residuals = weights * (sigmoid(z) - y) / total_weight
        loss = float(weights @ (np.logaddexp(0, z) - y * z)) / total_weight + 0.5 * float(w @ penalty_gradient)
        return loss, np.append(residuals @ x + penalty_gradient, residuals.sum() if fit_bias else 0.0)

    start = np.zeros(x.shape[1] + 1) if initial_solution is None else initial_solution
    options = {"maxiter": 500, "gtol": 1e-5}
    # L-BFGS calls BLAS on a few hundred numbers, many times an iteration. OpenBLAS wakes all threads for each call:
    # 0.8 to 5 ms of CPU time an iteration on two busy cores, where one thread takes 0.07 ms.
    thread_count = 1 if x.size <= SMALL_DESIGN_MATRIX_SIZE else None
    with _find_thread_pools().limit(limits=thread_count, user_api="blas"):
        solution = minimize(compute_penalized_loss, start, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(solution.x, dtype=np.float64)


@cache
def _find_thread_pools() -> ThreadpoolController:
    """The BLAS libraries of this process; call it after the import of scipy, which has one of its own."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
