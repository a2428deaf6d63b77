"""Who reacts at all: the chance of any reaction, from where the response was shown and how active the user is.

Never from the response's text: what this column lets a loss undo is exposure and self-selection, not taste
(Schnabel et al. 2016, "Recommendations as treatments"). A loss may weigh a row by one over it, clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEVELS = 20
"""Commonest levels of a feature that have a coefficient of their own; the others share one."""

_LOWEST = 1e-3


def octaves(counts: Ints) -> Ints:
    """Counts [N] by powers of two: 0 for 0 and 1, 1 for 2 and 3, and so on."""
    return np.floor(np.log2(np.maximum(counts, 1))).astype(np.int64)


def propensity(features: Mapping[str, Ints], reacted: NDArray[np.bool_]) -> tuple[Floats, dict[str, Floats]]:
    """Chance of any reaction [N] by logistic regression on level codes [N], and each feature's log-odds by level.

    Rows of one combination of levels are fitted as one, weighted by their number, so the fit costs the same for a
    thousand rows as for ten million.
    """
    if not len(reacted) or reacted.all() or not reacted.any():
        return np.full(len(reacted), float(reacted.mean()) if len(reacted) else 0.0), {}
    levels = []
    for codes in features.values():
        count = np.bincount(codes)
        rank = np.empty(len(count), dtype=np.int64)
        rank[np.argsort(-count, kind="stable")] = np.arange(len(count))
        levels.append(np.minimum(rank, _LEVELS)[codes])
    code = np.zeros(len(reacted), dtype=np.int64)
    for level in levels:
        code = code * (_LEVELS + 1) + level
    _, first, mine = np.unique(code, return_index=True, return_inverse=True)
    design = np.concatenate([np.eye(_LEVELS + 1)[level[first]] for level in levels], axis=1)
    hits = np.bincount(mine, weights=reacted)
    rows = np.bincount(mine)
    logits, coefficients = _logistic(design, hits, rows - hits)
    chance = 1 / (1 + np.exp(-logits))[mine]
    parts = np.split(coefficients, len(levels))
    return np.maximum(chance, _LOWEST), dict(zip(features, parts, strict=True))


def _logistic(design: Floats, hits: NDArray[Any], misses: NDArray[Any]) -> tuple[Floats, Floats]:
    """Log-odds [M] and coefficients of a logistic regression on M cells, with half their squares as penalty.

    This is scikit-learn's LogisticRegression at C = 1 (a test compares them), without the seconds that its import takes
    in each worker.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    def loss(theta: Floats) -> tuple[float, Floats]:
        logits = design @ theta[1:] + theta[0]
        value = (hits * np.logaddexp(0, -logits) + misses * np.logaddexp(0, logits)).sum() + theta[1:] @ theta[1:] / 2
        slope = (hits + misses) * expit(logits) - hits
        return float(value), np.concatenate([[slope.sum()], design.T @ slope + theta[1:]])

    start = np.zeros(design.shape[1] + 1)
    theta = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return design @ theta[1:] + theta[0], theta[1:]
