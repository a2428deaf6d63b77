"""How good a reward model is: ranking, calibration, and what it owes to length. Numpy only, weights everywhere.

Weights bring sub-sampled rows back to the natural rate. Intervals are 95% and clustered (by user or prompt group),
since rows of one user are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
EPSILON = 1e-12


def auroc(scores: Floats, labels: Floats, weights: Floats | None = None) -> float:
    """Weighted area under the ROC curve, ties counted half; NaN when a class is missing."""
    w = np.ones_like(scores) if weights is None else weights
    _, rank = np.unique(scores, return_inverse=True)
    return _auroc_ranked(rank, labels, w)


def _auroc_ranked(rank: NDArray[np.int64], labels: Floats, weights: Floats) -> float:
    positive = np.bincount(rank, weights * labels)
    negative = np.bincount(rank, weights * (1 - labels))
    total = positive.sum() * negative.sum()
    if total <= 0:
        return math.nan
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total)


def average_precision(scores: Floats, labels: Floats, weights: Floats) -> float:
    """Area under the precision-recall curve as average precision: sum_k (recall_k - recall_k-1) * precision_k.

    Rows of equal score are one step. NaN when no row is positive.
    """
    _, rank = np.unique(-scores, return_inverse=True)
    positive, total = np.bincount(rank, weights * labels), np.bincount(rank, weights)
    if positive.sum() <= 0:
        return math.nan
    precision = np.cumsum(positive) / np.cumsum(total)
    return float((positive * precision).sum() / positive.sum())


def hanley_mcneil(area: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC from counts alone (Hanley and McNeil 1982, formula 1)."""
    if positives < 1 or negatives < 1:
        return math.nan
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    return math.sqrt(max(variance, 0.0) / (positives * negatives))


def clustered_interval(
    statistic: Callable[[Floats], float], clusters: Sequence[str], *, resamples: int = 400, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap over clusters. `statistic` takes how often each row was drawn [N]; NaNs are left out."""
    _, member = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    count = int(member.max()) + 1 if member.size else 0
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples if count else 0):
        times = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        draws.append(statistic(times[member]))
    found = np.asarray([draw for draw in draws if not math.isnan(draw)])
    if found.size == 0:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def auroc_interval(
    scores: Floats, labels: Floats, weights: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, float]:
    """AUROC with its clustered 95% interval as mean, low, high."""
    _, rank = np.unique(scores, return_inverse=True)
    low, high = clustered_interval(lambda times: _auroc_ranked(rank, labels, weights * times), clusters, seed=seed)
    return {"mean": _auroc_ranked(rank, labels, weights), "low": low, "high": high}


def accuracy_interval(
    differences: Floats, weights: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, float]:
    """Share of pairs whose chosen side scores higher (ties half) with its clustered 95% interval."""
    right = (differences > 0) + 0.5 * (differences == 0)

    def share(times: Floats) -> float:
        total = float((weights * times).sum())
        return float((weights * times * right).sum()) / total if total > 0 else math.nan

    low, high = clustered_interval(share, clusters, seed=seed)
    return {"mean": share(np.ones_like(differences)), "low": low, "high": high}


def log_loss(probabilities: Floats, labels: Floats, weights: Floats) -> float:
    """Weighted mean cross-entropy in nats."""
    p = np.clip(probabilities, EPSILON, 1 - EPSILON)
    return float(np.average(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)), weights=weights))


def entropy(rate: float) -> float:
    """Entropy in nats of a coin that falls heads with chance `rate`."""
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)


def brier(probabilities: Floats, labels: Floats, weights: Floats) -> float:
    """Weighted mean of (p - y)^2."""
    return float(np.average((probabilities - labels) ** 2, weights=weights))


def reliability(probabilities: Floats, labels: Floats, weights: Floats, *, bins: int = 10) -> list[dict[str, float]]:
    """Bins of equal mass, lowest first: each one's share of the mass, mean probability and rate of label 1.

    Equal-width bins would be empty at low base rates. Rows of equal probability stay in one bin.
    """
    order = np.argsort(probabilities, kind="stable")
    p, y, w = probabilities[order], labels[order], weights[order]
    _, first, inverse = np.unique(p, return_index=True, return_inverse=True)
    middle = np.cumsum(w) - w / 2
    place = np.minimum((bins * middle / w.sum()).astype(np.int64), bins - 1)[first][inverse]
    mass = np.bincount(place, w, minlength=bins)
    sums = zip(mass, np.bincount(place, w * p, minlength=bins), np.bincount(place, w * y, minlength=bins), strict=True)
    total = float(mass.sum())
    return [{"mass": float(m) / total, "mean": float(a / m), "rate": float(b / m)} for m, a, b in sums if m > 0]


def ece(probabilities: Floats, labels: Floats, weights: Floats, *, bins: int = 10) -> float:
    """Expected calibration error over bins of equal mass: sum_b mass_b * |mean p - mean y|."""
    return sum(b["mass"] * abs(b["mean"] - b["rate"]) for b in reliability(probabilities, labels, weights, bins=bins))


def correlation(first: Floats, second: Floats) -> float:
    """Pearson correlation; 0 when one side does not vary."""
    if first.size < 2 or first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
