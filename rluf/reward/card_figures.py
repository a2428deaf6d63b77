"""Figures of a reward model on rows with a label and on pairs: what the reward card and `rluf.evaluate score` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rluf.reward import metrics
from rluf.reward.calibration import Floats, sigmoid


def label_figures(
    logits: Floats, labels: Floats, weights: Floats, lengths: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Ranking, calibration and the length floor of calibrated `logits` [N] against labels 0 or 1 [N].

    `weights` [N] bring sampled rows back to the natural rate; `lengths` [N] are characters of the response; intervals
    are 95%, resampled by `clusters` [N]. Figures that need both labels are NaN where one is missing.
    """
    values = sigmoid(logits)
    rate = float(np.average(labels, weights=weights))
    positives = int(labels.sum())
    loss = metrics.log_loss(values, labels, weights)
    length = metrics.auroc(lengths, labels, weights)
    area = metrics.auroc_interval(logits, labels, weights, clusters, seed=seed)
    return {
        "auroc": area,
        "auroc_se_hanley_mcneil": metrics.hanley_mcneil(area["mean"], positives, len(labels) - positives),
        "length_floor_auroc": max(length, 1 - length),
        "pr_auc": metrics.average_precision(logits, labels, weights),
        "base_rate": rate,
        "positives": positives,
        "mean_value": float(np.average(values, weights=weights)),
        "log_loss": loss,
        "normalised_entropy": loss / metrics.entropy(rate) if 0 < rate < 1 else math.nan,
        "brier": metrics.brier(values, labels, weights),
        "ece": metrics.ece(values, labels, weights),
        "reliability": metrics.reliability(values, labels, weights),
    }


def pair_figures(
    differences: Floats, weights: Floats, longer: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Accuracy and calibration of P(chosen beats rejected) = sigmoid(difference of calibrated logits), pairs [N].

    `longer` [N] is by how many characters the chosen response is the longer one.
    """
    values = sigmoid(differences)
    wins = np.ones_like(values)
    floor = metrics.accuracy_interval(longer, weights, clusters, seed=seed)["mean"]
    loss = metrics.log_loss(values, wins, weights)
    both, heads = np.concatenate([values, 1 - values]), np.concatenate([wins, 1 - wins])
    return {
        "pair_accuracy": metrics.accuracy_interval(differences, weights, clusters, seed=seed),
        "length_floor_accuracy": max(floor, 1 - floor),
        "base_rate": 0.5,
        "log_loss": loss,
        "normalised_entropy": loss / math.log(2),
        "brier": metrics.brier(values, wins, weights),
        "ece": metrics.ece(both, heads, np.tile(weights, 2)),
        "reliability": metrics.reliability(both, heads, np.tile(weights, 2)),
    }


def plain(value: Any) -> Any:
    """JSON-ready: numbers rounded to 6 digits, NaN as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else round(float(value), 6)
    return value
