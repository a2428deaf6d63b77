"""The reward card: what a reward model can and cannot do, on test users it never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rluf.objectives import metrics
from rluf.objectives.calibration import Calibration, Floats, fit_platt, fit_scale, prior_shift, sigmoid
from rluf.objectives.training import Fit, Rows


def calibrate(objective: str, dev: Rows, logits: Floats, shift: float, max_tokens: int) -> Calibration:
    """Calibration from dev logits (one a sequence).

    Labels: prior correction, then Platt. Pairs: a scale so that differences are log-odds of winning, and an offset that
    puts the mean logged response at 0.5: a value then reads as the chance to beat an average logged response.
    """
    if not dev.pairs:
        scale, offset = fit_platt(logits + shift, dev.labels, dev.weights)
        return Calibration(objective, "platt", shift, scale, offset, max_tokens)
    scale = fit_scale(logits[: len(dev)] - logits[len(dev) :], dev.weights)
    centre = float(np.average(logits, weights=np.tile(dev.weights, 2)))
    return Calibration(objective, "centred", 0.0, scale, -scale * centre, max_tokens)


def make_card(calibration: Calibration, test: Rows, raw: Sequence[float], *, seed: int) -> dict[str, Any]:
    """Figures on the test split, where `raw` holds one logit a sequence. Intervals are 95%, clustered."""
    logits = calibration.logits(raw)
    card: dict[str, Any] = {
        "objective": calibration.objective,
        "n": len(test),
        "clusters": len(set(test.clusters)),
        "score_length_r": metrics.correlation(logits, test.lengths),
        "calibration": asdict(calibration),
    }
    figures = _pair_figures(test, logits, seed) if test.pairs else _label_figures(test, logits, seed)
    return _plain({**card, **figures})


def _label_figures(test: Rows, logits: Floats, seed: int) -> dict[str, Any]:
    labels, weights = test.labels, test.weights
    values = sigmoid(logits)
    rate = float(np.average(labels, weights=weights))
    positives = int(labels.sum())
    loss = metrics.log_loss(values, labels, weights)
    length = metrics.auroc(test.lengths, labels, weights)
    area = metrics.auroc_interval(logits, labels, weights, test.clusters, seed=seed)
    return {
        "auroc": area,
        "auroc_se_hanley_mcneil": metrics.hanley_mcneil(area["mean"], positives, len(test) - positives),
        "length_floor_auroc": max(length, 1 - length),
        "base_rate": rate,
        "positives": positives,
        "mean_value": float(np.average(values, weights=weights)),
        "log_loss": loss,
        "normalised_entropy": loss / metrics.entropy(rate) if 0 < rate < 1 else math.nan,
        "brier": metrics.brier(values, labels, weights),
        "ece": metrics.ece(values, labels, weights),
    }


def _pair_figures(test: Rows, logits: Floats, seed: int) -> dict[str, Any]:
    count, weights = len(test), test.weights
    differences = logits[:count] - logits[count:]
    longer = test.lengths[:count] - test.lengths[count:]
    values = sigmoid(differences)
    floor = metrics.accuracy_interval(longer, weights, test.clusters, seed=seed)["mean"]
    loss = metrics.log_loss(values, test.labels, weights)
    both, heads = np.concatenate([values, 1 - values]), np.concatenate([test.labels, 1 - test.labels])
    return {
        "pair_accuracy": metrics.accuracy_interval(differences, weights, test.clusters, seed=seed),
        "length_floor_accuracy": max(floor, 1 - floor),
        "base_rate": 0.5,
        "log_loss": loss,
        "normalised_entropy": loss / math.log(2),
        "brier": metrics.brier(values, test.labels, weights),
        "ece": metrics.ece(both, heads, np.tile(weights, 2)),
    }


def describe_training(found: Fit, train: Rows, dev: Rows) -> dict[str, Any]:
    """Rows, pace and history of the training, for the card. Tokens are counted without padding."""
    return _plain(
        {
            "train_rows": len(train),
            "train_positives": int(train.labels.sum()),
            "train_prior_shift": 0.0 if train.pairs else prior_shift(train.labels, train.weights),
            "dev_rows": len(dev),
            "best_epoch": found.best_epoch + 1,
            "dev_log_loss": found.best_loss,
            "train_seconds": found.seconds,
            "train_tokens": found.tokens,
            "tokens_per_second": found.tokens / max(found.seconds, 1e-9),
            "history": found.history,
        }
    )


def _plain(value: Any) -> Any:
    """JSON-ready: numbers rounded to 6 digits, NaN as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else round(float(value), 6)
    return value
