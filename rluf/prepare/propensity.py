"""Propensity: the probability of any reaction, from where the response was displayed and how active the user is.

The response's text is not a feature: what this column lets a loss correct is exposure and self-selection, not taste
(Schnabel et al. 2016, "Recommendations as Treatments"). A loss may weight a row by the inverse, clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.utils.stats import Floats, Ints

_MAX_LEVELS = 20
"""Most frequent levels of a feature that have a coefficient of their own; the others share one."""

_MIN_PROPENSITY = 1e-3


def bin_by_octave(counts: Ints) -> Ints:
    """Counts [N] by powers of two: 0 for 0 and 1, 1 for 2 and 3, and so on."""
    return np.floor(np.log2(np.maximum(counts, 1))).astype(np.int64)


def estimate_propensity(features: Mapping[str, Ints], reacted: NDArray[np.bool_]) -> tuple[Floats, dict[str, Floats]]:
    """Probability of any reaction [N] by logistic regression on level codes [N]; and each feature's log-odds by level.

    Rows with the same combination of levels are fitted as one, weighted by their number, so the fit costs the same for
    a thousand rows as for ten million.
    """
    if not len(reacted) or reacted.all() or not reacted.any():
        return np.full(len(reacted), float(reacted.mean()) if len(reacted) else 0.0), {}
    level_arrays = []
    for codes in features.values():
        code_counts = np.bincount(codes)
        rank = np.empty(len(code_counts), dtype=np.int64)
        rank[np.argsort(-code_counts, kind="stable")] = np.arange(len(code_counts))
        level_arrays.append(np.minimum(rank, _MAX_LEVELS)[codes])
    # One number for each combination of levels, in base _MAX_LEVELS + 1.
    cell_code = np.zeros(len(reacted), dtype=np.int64)
    for levels in level_arrays:
        cell_code = cell_code * (_MAX_LEVELS + 1) + levels
    _, first_rows, cell_index = np.unique(cell_code, return_index=True, return_inverse=True)
    design_matrix = np.concatenate([np.eye(_MAX_LEVELS + 1)[levels[first_rows]] for levels in level_arrays], axis=1)
    hits = np.bincount(cell_index, weights=reacted)
    logits, coefficients = _fit_logistic(design_matrix, hits, np.bincount(cell_index) - hits)
    propensity = 1 / (1 + np.exp(-logits))[cell_index]
    feature_coefficients = np.split(coefficients, len(level_arrays))
    return np.maximum(propensity, _MIN_PROPENSITY), dict(zip(features, feature_coefficients, strict=True))


def _fit_logistic(design_matrix: Floats, hits: NDArray[Any], misses: NDArray[Any]) -> tuple[Floats, Floats]:
    """Log-odds [M] and coefficients of a logistic regression on M cells, with half the squared norm as penalty.

    Equal to scikit-learn's LogisticRegression at C = 1 (a test compares them).
    """
    # Not scikit-learn itself: its import takes seconds in each worker.
    from scipy.optimize import minimize
    from scipy.special import expit

    def penalized_loss(theta: Floats) -> tuple[float, Floats]:
        intercept, weights = theta[0], theta[1:]
        logits = design_matrix @ weights + intercept
        log_loss = (hits * np.logaddexp(0, -logits) + misses * np.logaddexp(0, logits)).sum()
        gradient = (hits + misses) * expit(logits) - hits
        # The intercept has no penalty.
        value = log_loss + weights @ weights / 2
        return float(value), np.concatenate([[gradient.sum()], design_matrix.T @ gradient + weights])

    start = np.zeros(design_matrix.shape[1] + 1)
    theta = minimize(penalized_loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return design_matrix @ theta[1:] + theta[0], theta[1:]
