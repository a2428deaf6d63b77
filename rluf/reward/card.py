"""Reward card: metrics of a reward model on the test split, and the comparison with an earlier model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from rluf.reward import metrics
from rluf.reward.calibration import (
    Calibration,
    compute_prior_shift,
    fit_isotonic,
    fit_pair_scale,
    fit_platt,
    fit_temperature,
)
from rluf.reward.trainer import EncodedSplit, FitResult
from rluf.utils.stats import Floats, sigmoid


def fit_calibration(dev_split: EncodedSplit, logits: Floats, base_calibration: Calibration, method: str) -> Calibration:
    """Fit `base_calibration` on dev logits (one per sequence); `method` is platt, temperature, isotonic or none.

    Labels: prior correction, then the method. Pairs: a scale that makes differences the log-odds of winning, and an
    offset that puts the mean logged response at 0.5, so a value reads as the chance to beat an average logged response.
    """
    if method == "none":
        return base_calibration
    if dev_split.is_pairwise:
        scale = fit_pair_scale(logits[: len(dev_split)] - logits[len(dev_split) :], dev_split.weights)
        center = float(np.average(logits, weights=np.tile(dev_split.weights, 2)))
        return replace(base_calibration, method="centered", prior_shift=0.0, scale=scale, offset=-scale * center)
    z = logits + base_calibration.prior_shift
    if method == "isotonic":
        return replace(base_calibration, method=method, knots=fit_isotonic(z, dev_split.labels, dev_split.weights))
    if method == "temperature":
        return replace(base_calibration, method=method, scale=fit_temperature(z, dev_split.labels, dev_split.weights))
    scale, offset = fit_platt(z, dev_split.labels, dev_split.weights)
    return replace(base_calibration, method=method, scale=scale, offset=offset)


def build_reward_card(
    calibration: Calibration, test_split: EncodedSplit, raw_logits: Sequence[float], *, seed: int
) -> dict[str, Any]:
    """Metrics on the test split from `raw_logits`, one per sequence. Intervals are 95%, clustered."""
    logits, lengths, count = calibration.calibrate_logits(raw_logits), test_split.response_lengths, len(test_split)
    card: dict[str, Any] = {
        "objective": calibration.objective,
        "n": count,
        "clusters": len(set(test_split.clusters)),
        "score_length_r": metrics.pearson_correlation(logits, lengths),
        "calibration": asdict(calibration),
    }
    if test_split.is_pairwise:
        logit_differences, length_differences = logits[:count] - logits[count:], lengths[:count] - lengths[count:]
        card |= compute_pair_metrics(
            logit_differences, test_split.weights, length_differences, test_split.clusters, seed=seed
        )
    else:
        card |= compute_label_metrics(
            logits, test_split.labels, test_split.weights, lengths, test_split.clusters, seed=seed
        )
    return round_for_json(card)


def compute_label_metrics(
    logits: Floats, labels: Floats, weights: Floats, lengths: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Ranking, calibration and length baseline of calibrated `logits` [N] against labels 0 or 1 [N].

    `weights` [N] restore sampled rows to the natural rate; `lengths` [N] are characters of the response; intervals
    are 95%, resampled by `clusters` [N]. Metrics that need both labels are NaN when one is missing.
    """
    probabilities = sigmoid(logits)
    base_rate = float(np.average(labels, weights=weights))
    positives = int(labels.sum())
    loss = metrics.log_loss(probabilities, labels, weights)
    length_auroc = metrics.auroc(lengths, labels, weights)
    auroc = metrics.auroc_interval(logits, labels, weights, clusters, seed=seed)
    return {
        "auroc": auroc,
        "auroc_se_hanley_mcneil": metrics.hanley_mcneil_std_error(auroc["mean"], positives, len(labels) - positives),
        # The baseline may prefer short or long responses, whichever ranks better.
        "length_floor_auroc": max(length_auroc, 1 - length_auroc),
        "pr_auc": metrics.average_precision(logits, labels, weights),
        "base_rate": base_rate,
        "positives": positives,
        "mean_value": float(np.average(probabilities, weights=weights)),
        "log_loss": loss,
        "normalised_entropy": loss / metrics.binary_entropy(base_rate) if 0 < base_rate < 1 else math.nan,
        "brier": metrics.brier_score(probabilities, labels, weights),
        "ece": metrics.expected_calibration_error(probabilities, labels, weights),
        "reliability": metrics.reliability_bins(probabilities, labels, weights),
    }


def compute_pair_metrics(
    differences: Floats, weights: Floats, length_differences: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Accuracy and calibration of P(chosen beats rejected) = sigmoid(difference of calibrated logits), pairs [N].

    `length_differences` [N] are characters of the chosen minus those of the rejected response.
    """
    probabilities = sigmoid(differences)
    wins = np.ones_like(probabilities)
    length_accuracy = metrics.accuracy_interval(length_differences, weights, clusters, seed=seed)["mean"]
    loss = metrics.log_loss(probabilities, wins, weights)
    # Every pair counts from both sides: with the chosen side alone all labels are 1 and calibration is undefined.
    both_probabilities = np.concatenate([probabilities, 1 - probabilities])
    both_labels, both_weights = np.concatenate([wins, 1 - wins]), np.tile(weights, 2)
    return {
        "pair_accuracy": metrics.accuracy_interval(differences, weights, clusters, seed=seed),
        "length_floor_accuracy": max(length_accuracy, 1 - length_accuracy),
        "base_rate": 0.5,
        "log_loss": loss,
        "normalised_entropy": loss / math.log(2),
        "brier": metrics.brier_score(probabilities, wins, weights),
        "ece": metrics.expected_calibration_error(both_probabilities, both_labels, both_weights),
        "reliability": metrics.reliability_bins(both_probabilities, both_labels, both_weights),
    }


def compare_models(test_split: EncodedSplit, logits: Floats, earlier_logits: Floats, *, seed: int) -> dict[str, Any]:
    """Compare calibrated logits with an earlier model's, one per sequence of the same test rows.

    The difference has a 95% interval from resampling users or prompts, with both models on the same resample.
    """
    count = len(test_split)
    models = (logits, earlier_logits)

    def ranking_metric(model_index: int, row_counts: Floats) -> float:
        z, weights = models[model_index], test_split.weights * row_counts
        if not test_split.is_pairwise:
            return metrics.auroc(z, test_split.labels, weights)
        differences = z[:count] - z[count:]
        is_correct = (differences > 0) + 0.5 * (differences == 0)
        return float(np.average(is_correct, weights=weights)) if row_counts.any() else math.nan

    ones = np.ones(count)
    low, high = metrics.clustered_bootstrap_interval(
        lambda row_counts: ranking_metric(0, row_counts) - ranking_metric(1, row_counts),
        test_split.clusters,
        seed=seed,
    )
    difference = {"mean": ranking_metric(0, ones) - ranking_metric(1, ones), "low": low, "high": high}
    metric_name = "pair_accuracy" if test_split.is_pairwise else "auroc"
    return round_for_json(
        {
            metric_name: ranking_metric(1, ones),
            f"{metric_name}_difference": difference,
            "score_r": metrics.pearson_correlation(logits, earlier_logits),
        }
    )


def summarize_training(
    fit_results: Sequence[FitResult], train_split: EncodedSplit, dev_split: EncodedSplit
) -> dict[str, Any]:
    """Rows, throughput and history of the training of all members, for the card. Tokens exclude padding."""
    seconds = sum(result.train_seconds for result in fit_results)
    tokens = sum(result.token_count for result in fit_results)
    prior_shift = 0.0 if train_split.is_pairwise else compute_prior_shift(train_split.labels, train_split.weights)
    return round_for_json(
        {
            "train_rows": len(train_split),
            "train_positives": int(train_split.labels.sum()),
            "train_prior_shift": prior_shift,
            "dev_rows": len(dev_split),
            "members": len(fit_results),
            "best_epoch": fit_results[0].best_epoch + 1,
            "dev_log_loss": fit_results[0].best_loss,
            "train_seconds": seconds,
            "examples": sum(result.examples for result in fit_results),
            "train_tokens": tokens,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "history": fit_results[0].history,
        }
    )


def round_for_json(value: Any) -> Any:
    """Convert to JSON-ready values: floats rounded to 6 digits, NaN as null."""
    if isinstance(value, dict):
        return {key: round_for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [round_for_json(item) for item in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else round(float(value), 6)
    return value
