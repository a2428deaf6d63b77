"""The reward card: what a reward model can and cannot do, on test users it never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from rluf.reward import metrics
from rluf.reward.calibration import (
    Calibration,
    Floats,
    fit_isotonic,
    fit_platt,
    fit_scale,
    fit_temperature,
    prior_shift,
)
from rluf.reward.card_figures import label_figures, pair_figures, plain
from rluf.reward.trainer import Fit, Rows


def calibrate(dev: Rows, logits: Floats, base: Calibration, method: str) -> Calibration:
    """`base` with what dev logits (one a sequence) tell; `method` is platt, temperature, isotonic or none.

    Labels: prior correction, then the method. Pairs: a scale so that differences are log-odds of winning, and an offset
    that puts the mean logged response at 0.5: a value then reads as the chance to beat an average logged response.
    """
    if method == "none":
        return base
    if dev.pairs:
        scale = fit_scale(logits[: len(dev)] - logits[len(dev) :], dev.weights)
        centre = float(np.average(logits, weights=np.tile(dev.weights, 2)))
        return replace(base, method="centred", prior_shift=0.0, scale=scale, offset=-scale * centre)
    z = logits + base.prior_shift
    if method == "isotonic":
        return replace(base, method=method, knots=fit_isotonic(z, dev.labels, dev.weights))
    if method == "temperature":
        return replace(base, method=method, scale=fit_temperature(z, dev.labels, dev.weights))
    scale, offset = fit_platt(z, dev.labels, dev.weights)
    return replace(base, method=method, scale=scale, offset=offset)


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
    count = len(test)
    if test.pairs:
        differences, longer = logits[:count] - logits[count:], test.lengths[:count] - test.lengths[count:]
        figures = pair_figures(differences, test.weights, longer, test.clusters, seed=seed)
    else:
        figures = label_figures(logits, test.labels, test.weights, test.lengths, test.clusters, seed=seed)
    return plain({**card, **figures})


def compare(test: Rows, logits: Floats, before: Floats, *, seed: int) -> dict[str, Any]:
    """This model's calibrated logits beside an earlier model's `before`, one a sequence of the same test rows.

    The difference has a 95% interval from resampling users or prompts, both models on the same draw.
    """
    count = len(test)
    if test.pairs:
        right = [((z[:count] - z[count:]) > 0) + 0.5 * ((z[:count] - z[count:]) == 0) for z in (logits, before)]

        def figure(which: int, times: Floats) -> float:
            return float(np.average(right[which], weights=test.weights * times)) if times.any() else math.nan
    else:

        def figure(which: int, times: Floats) -> float:
            return metrics.auroc((logits, before)[which], test.labels, test.weights * times)

    ones = np.ones(count)
    low, high = metrics.clustered_interval(lambda times: figure(0, times) - figure(1, times), test.clusters, seed=seed)
    difference = {"mean": figure(0, ones) - figure(1, ones), "low": low, "high": high}
    name = "pair_accuracy" if test.pairs else "auroc"
    return plain(
        {name: figure(1, ones), f"{name}_difference": difference, "score_r": metrics.correlation(logits, before)}
    )


def describe_training(members: Sequence[Fit], train: Rows, dev: Rows) -> dict[str, Any]:
    """Rows, pace and history of the training of each member, for the card. Tokens are counted without padding."""
    seconds, tokens = sum(fit.seconds for fit in members), sum(fit.tokens for fit in members)
    return plain(
        {
            "train_rows": len(train),
            "train_positives": int(train.labels.sum()),
            "train_prior_shift": 0.0 if train.pairs else prior_shift(train.labels, train.weights),
            "dev_rows": len(dev),
            "members": len(members),
            "best_epoch": members[0].best_epoch + 1,
            "dev_log_loss": members[0].best_loss,
            "train_seconds": seconds,
            "examples": sum(fit.examples for fit in members),
            "train_tokens": tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "history": members[0].history,
        }
    )
