"""Reward model metrics: ranking, calibration and length dependence. Numpy only, all weighted.

Weights restore sub-sampled rows to the natural rate. Intervals are 95% and clustered (by user or prompt group), since
rows of one user are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.utils.stats import Floats

PROBABILITY_EPSILON = 1e-12


def auroc(scores: Floats, labels: Floats, weights: Floats | None = None) -> float:
    """Weighted area under the ROC curve, ties counted half; NaN when a class is missing."""
    w = np.ones_like(scores) if weights is None else weights
    _, ranks = np.unique(scores, return_inverse=True)
    return _auroc_from_ranks(ranks, labels, w)


def _auroc_from_ranks(ranks: NDArray[np.int64], labels: Floats, weights: Floats) -> float:
    """AUROC from dense ranks: the bootstrap changes only the weights, so the scores are sorted once."""
    positive = np.bincount(ranks, weights * labels)
    negative = np.bincount(ranks, weights * (1 - labels))
    pair_weight = positive.sum() * negative.sum()
    if pair_weight <= 0:
        return math.nan
    negative_below = np.cumsum(negative) - negative
    return float((positive * (negative_below + negative / 2)).sum() / pair_weight)


def average_precision(scores: Floats, labels: Floats, weights: Floats) -> float:
    """Area under the precision-recall curve as average precision: sum_k (recall_k - recall_k-1) * precision_k.

    Rows of equal score are one step. NaN when no row is positive.
    """
    _, ranks = np.unique(-scores, return_inverse=True)
    positive, total = np.bincount(ranks, weights * labels), np.bincount(ranks, weights)
    if positive.sum() <= 0:
        return math.nan
    precision = np.cumsum(positive) / np.cumsum(total)
    return float((positive * precision).sum() / positive.sum())


def hanley_mcneil_std_error(area: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC from counts alone (Hanley and McNeil 1982, formula 1)."""
    if positives < 1 or negatives < 1:
        return math.nan
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    return math.sqrt(max(variance, 0.0) / (positives * negatives))


def clustered_bootstrap_interval(
    statistic: Callable[[Floats], float], clusters: Sequence[str], *, resamples: int = 400, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap over clusters. `statistic` takes each row's resampled count [N]; NaNs are dropped."""
    _, cluster_index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    cluster_count = int(cluster_index.max()) + 1 if cluster_index.size else 0
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples if cluster_count else 0):
        # Counts in place of copied rows: a weighted statistic of the counts equals that of the resampled rows.
        resampled = rng.integers(0, cluster_count, cluster_count)
        cluster_counts = np.bincount(resampled, minlength=cluster_count).astype(np.float64)
        values.append(statistic(cluster_counts[cluster_index]))
    defined_values = np.asarray([value for value in values if not math.isnan(value)])
    if defined_values.size == 0:
        return math.nan, math.nan
    low, high = np.quantile(defined_values, [0.025, 0.975])
    return float(low), float(high)


def auroc_interval(
    scores: Floats, labels: Floats, weights: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, float]:
    """AUROC with its clustered 95% interval as mean, low, high."""
    _, ranks = np.unique(scores, return_inverse=True)
    low, high = clustered_bootstrap_interval(
        lambda row_counts: _auroc_from_ranks(ranks, labels, weights * row_counts), clusters, seed=seed
    )
    return {"mean": _auroc_from_ranks(ranks, labels, weights), "low": low, "high": high}


def accuracy_interval(
    differences: Floats, weights: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, float]:
    """Share of pairs whose chosen side scores higher (ties count half) with its clustered 95% interval."""
    is_correct = (differences > 0) + 0.5 * (differences == 0)

    def weighted_accuracy(row_counts: Floats) -> float:
        total = float((weights * row_counts).sum())
        return float((weights * row_counts * is_correct).sum()) / total if total > 0 else math.nan

    low, high = clustered_bootstrap_interval(weighted_accuracy, clusters, seed=seed)
    return {"mean": weighted_accuracy(np.ones_like(differences)), "low": low, "high": high}


def log_loss(probabilities: Floats, labels: Floats, weights: Floats) -> float:
    """Weighted mean cross-entropy in nats."""
    p = np.clip(probabilities, PROBABILITY_EPSILON, 1 - PROBABILITY_EPSILON)
    return float(np.average(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)), weights=weights))


def binary_entropy(rate: float) -> float:
    """Entropy in nats of a Bernoulli variable with probability `rate`."""
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)


def brier_score(probabilities: Floats, labels: Floats, weights: Floats) -> float:
    """Weighted mean of (p - y)^2."""
    return float(np.average((probabilities - labels) ** 2, weights=weights))


def reliability_bins(
    probabilities: Floats, labels: Floats, weights: Floats, *, bin_count: int = 10
) -> list[dict[str, float]]:
    """Bins of equal mass, lowest first, each with its share of the mass, mean probability and rate of label 1.

    Equal-width bins would be empty at low base rates. Rows of equal probability share a bin.
    """
    order = np.argsort(probabilities, kind="stable")
    p, y, w = probabilities[order], labels[order], weights[order]
    _, first, inverse = np.unique(p, return_index=True, return_inverse=True)
    # A row belongs to the bin that contains the middle of its mass; ties follow the first row of their probability.
    midpoints = np.cumsum(w) - w / 2
    bin_index = np.minimum((bin_count * midpoints / w.sum()).astype(np.int64), bin_count - 1)[first][inverse]
    mass, probability_sum, label_sum = (
        np.bincount(bin_index, values, minlength=bin_count) for values in (w, w * p, w * y)
    )
    total = float(mass.sum())
    return [
        {"mass": float(m) / total, "mean": float(a / m), "rate": float(b / m)}
        for m, a, b in zip(mass, probability_sum, label_sum, strict=True)
        if m > 0
    ]


def expected_calibration_error(probabilities: Floats, labels: Floats, weights: Floats, *, bin_count: int = 10) -> float:
    """Expected calibration error over bins of equal mass: sum_b mass_b * |mean p - mean y|."""
    bins = reliability_bins(probabilities, labels, weights, bin_count=bin_count)
    return sum(b["mass"] * abs(b["mean"] - b["rate"]) for b in bins)


def pearson_correlation(first: Floats, second: Floats) -> float:
    """Pearson correlation; 0 when either variable is constant."""
    if first.size < 2 or first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def round_for_json(value: Any) -> Any:
    """Convert to JSON-ready values: floats rounded to 6 digits, NaN as null."""
    if isinstance(value, dict):
        return {key: round_for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [round_for_json(item) for item in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else round(float(value), 6)
    return value
