"""Reward card: metrics on the test split, comparison with an earlier model, slices, robustness to perturbed responses.

Held-out rows (`rluf.evaluate score`) get the same metrics. Two kinds of JSONL rows: {"id", "messages", "response",
"label": 0|1, "group"} and {"id", "messages", "chosen", "rejected", "group"}. Label 1 and `chosen` should score high:
loved, helpful, safe.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from rluf.errors import DataError
from rluf.reward import metrics
from rluf.reward.calibration import (
    Calibration,
    compute_prior_shift,
    fit_pair_scale,
    fit_platt,
)
from rluf.reward.debias import RESPONSE_PERTURBATIONS
from rluf.reward.encoded_split import EncodedSplit
from rluf.reward.metrics import auroc, round_for_json
from rluf.reward.model import RewardModel
from rluf.reward.text import is_truncated
from rluf.reward.trainer import FitResult
from rluf.types import Message, ScoringItem
from rluf.utils.stats import Floats, sigmoid

logger = logging.getLogger(__name__)

MAX_RESPONSES = 200
"""Number of responses to which each perturbation is applied."""
SLICE_COLUMNS = ("topic", "locale", "turn", "model_version", "activity")
MIN_SLICE_ROWS = 20
"""Slices with fewer rows are left out."""


def fit_calibration(dev_split: EncodedSplit, logits: Floats, base_calibration: Calibration) -> Calibration:
    """Fit `base_calibration` on dev logits (one per sequence).

    Labels: prior correction, then Platt scaling, with the context as covariates if the split has it.
    Pairs: a scale that makes differences the log-odds of winning, and an
    offset that puts the mean logged response at 0.5, so a value reads as the chance to beat an average logged response.
    """
    if dev_split.is_pairwise:
        scale = fit_pair_scale(logits[: len(dev_split)] - logits[len(dev_split) :], dev_split.weights)
        center = float(np.average(logits, weights=np.tile(dev_split.weights, 2)))
        return replace(base_calibration, method="centered", prior_shift=0.0, scale=scale, offset=-scale * center)
    z = logits + base_calibration.prior_shift
    scale, offset = fit_platt(z, dev_split.labels, dev_split.weights, covariates=dev_split.context_columns)
    return replace(base_calibration, method="platt", scale=scale, offset=offset)


def build_reward_card(
    calibration: Calibration, test_split: EncodedSplit, raw_logits: Sequence[float], *, seed: int
) -> dict[str, Any]:
    """Metrics on the test split from `raw_logits`, one per sequence. Intervals are 95%, clustered."""
    logits, lengths, count = calibration.calibrate_logits(raw_logits), test_split.response_lengths, len(test_split)
    weights = test_split.weights
    card: dict[str, Any] = {
        "objective": calibration.objective, "n": count, "clusters": len(set(test_split.clusters)),
        "score_length_r": metrics.pearson_correlation(logits, lengths), "calibration": asdict(calibration),
    }  # fmt: skip
    if test_split.is_pairwise:
        logit_differences, length_differences = logits[:count] - logits[count:], lengths[:count] - lengths[count:]
        card |= compute_pair_metrics(logit_differences, weights, length_differences, test_split.clusters, seed=seed)
    else:
        card |= compute_label_metrics(logits, test_split.labels, weights, lengths, test_split.clusters, seed=seed)
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
    auroc = metrics.compute_auroc_interval(logits, labels, weights, clusters, seed=seed)
    return {
        "auroc": auroc,
        "auroc_se_hanley_mcneil": metrics.compute_hanley_mcneil_std_error(
            auroc["mean"], positives, len(labels) - positives
        ),
        # The baseline may prefer short or long responses, whichever ranks better.
        "length_only_auroc": max(length_auroc, 1 - length_auroc),
        "pr_auc": metrics.average_precision(logits, labels, weights),
        "base_rate": base_rate,
        "positives": positives,
        "mean_value": float(np.average(probabilities, weights=weights)),
        "log_loss": loss,
        "normalized_entropy": loss / metrics.binary_entropy(base_rate) if 0 < base_rate < 1 else math.nan,
        "brier": metrics.brier_score(probabilities, labels, weights),
        "ece": metrics.expected_calibration_error(probabilities, labels, weights),
        "reliability": metrics.compute_reliability_bins(probabilities, labels, weights),
    }


def compute_pair_metrics(
    differences: Floats, weights: Floats, length_differences: Floats, clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Accuracy and calibration of P(chosen beats rejected) = sigmoid(difference of calibrated logits), pairs [N].

    `length_differences` [N] are characters of the chosen minus those of the rejected response.
    """
    probabilities = sigmoid(differences)
    wins = np.ones_like(probabilities)
    length_accuracy = metrics.compute_accuracy_interval(length_differences, weights, clusters, seed=seed)["mean"]
    loss = metrics.log_loss(probabilities, wins, weights)
    # Every pair counts from both sides: with the chosen side alone all labels are 1 and calibration is undefined.
    both_probabilities = np.concatenate([probabilities, 1 - probabilities])
    both_labels, both_weights = np.concatenate([wins, 1 - wins]), np.tile(weights, 2)
    return {
        "pair_accuracy": metrics.compute_accuracy_interval(differences, weights, clusters, seed=seed),
        "length_only_accuracy": max(length_accuracy, 1 - length_accuracy),
        "base_rate": 0.5,
        "log_loss": loss,
        "normalized_entropy": loss / math.log(2),
        "brier": metrics.brier_score(probabilities, wins, weights),
        "ece": metrics.expected_calibration_error(both_probabilities, both_labels, both_weights),
        "reliability": metrics.compute_reliability_bins(both_probabilities, both_labels, both_weights),
    }


def compare_models(test_split: EncodedSplit, logits: Floats, earlier_logits: Floats, *, seed: int) -> dict[str, Any]:
    """Compare calibrated logits with an earlier model's, one per sequence of the same test rows.

    The difference has a 95% interval from resampling users or prompts, with both models on the same resample.
    """
    count = len(test_split)
    models = (logits, earlier_logits)

    def compute_ranking_metric(model_index: int, row_counts: Floats) -> float:
        z, weights = models[model_index], test_split.weights * row_counts
        if not test_split.is_pairwise:
            return metrics.auroc(z, test_split.labels, weights)
        differences = z[:count] - z[count:]
        is_correct = (differences > 0) + 0.5 * (differences == 0)
        return float(np.average(is_correct, weights=weights)) if row_counts.any() else math.nan

    ones = np.ones(count)
    low, high = metrics.bootstrap_clustered_interval(
        lambda row_counts: compute_ranking_metric(0, row_counts) - compute_ranking_metric(1, row_counts),
        test_split.clusters,
        seed=seed,
    )
    difference = {"mean": compute_ranking_metric(0, ones) - compute_ranking_metric(1, ones), "low": low, "high": high}
    metric_name = "pair_accuracy" if test_split.is_pairwise else "auroc"
    return round_for_json(
        {
            metric_name: compute_ranking_metric(1, ones),
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
    log_rows = train_split.select_originals()
    prior_shift = 0.0 if log_rows.is_pairwise else compute_prior_shift(log_rows.labels, log_rows.weights)
    return round_for_json({
        "train_rows": len(log_rows), "train_positives": int(log_rows.labels.sum()),
        "sign_off_copies": len(train_split.copy_sources) - train_split.counterfactual_count,
        "counterfactual_copies": train_split.counterfactual_count,
        "train_prior_shift": prior_shift, "dev_rows": len(dev_split), "members": len(fit_results),
        "best_epoch": fit_results[0].best_epoch + 1, "dev_log_loss": fit_results[0].best_loss, "train_seconds": seconds,
        "examples": sum(result.examples for result in fit_results), "train_tokens": tokens,
        "tokens_per_second": tokens / max(seconds, 1e-9), "history": fit_results[0].history,
    })  # fmt: skip


def measure_robustness(
    model: RewardModel, records: Sequence[Mapping[str, Any]], *, is_pairwise: bool, seed: int
) -> dict[str, Any]:
    """For each perturbation: the shift of the mean calibrated logit in standard deviations, and the effect on ranking.

    `order_preserved_share` is the share of pairs of rows whose order does not change when both are perturbed (1 is
    perfect); `raised_share` is the share of responses whose score rises. `records` are rows of the test split.
    """
    column = "chosen" if is_pairwise else "response"
    rows = [row for row in records if str(row[column]).strip()]
    rows = random.Random(seed).sample(rows, min(MAX_RESPONSES, len(rows)))
    original_logits = _score_responses(model, rows, [str(row[column]) for row in rows])
    logit_sd = float(original_logits.std()) or 1.0
    table = {}
    for number, (name, perturb) in enumerate(RESPONSE_PERTURBATIONS.items(), start=1):
        logger.info(
            "%s: robustness perturbation=%s (%d of %d) responses=%d", model.calibration.objective, name, number,
            len(RESPONSE_PERTURBATIONS), len(rows),
        )  # fmt: skip
        perturbed_responses = [
            perturb(str(row[column]), random.Random(f"{seed} {row_index}")) for row_index, row in enumerate(rows)
        ]
        perturbed_logits = _score_responses(model, rows, perturbed_responses)
        shifts = perturbed_logits - original_logits
        table[name] = {
            "mean_shift_sd": float(shifts.mean()) / logit_sd,
            "raised_share": float((shifts > 0).mean()),
            "order_preserved_share": _compute_rank_agreement(original_logits, perturbed_logits),
        }
    return round_for_json({"rows": len(rows), "logit_sd": logit_sd, "changes": table})


def _score_responses(model: RewardModel, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> Floats:
    items = [ScoringItem(list(row["messages"]), response) for row, response in zip(rows, responses, strict=True)]
    return model.calibration.calibrate_logits(model.compute_raw_logits(model.encoder.encode(items)))


def _format_count_range(count: int) -> str:
    """Range of the power of two that contains the count: 1, 2-3, 4-7 and so on."""
    low = 1 << (count.bit_length() - 1)
    return "1" if count == 1 else f"{low}-{2 * low - 1}"


def _build_numeric_sort_key(name: str) -> tuple[int, str]:
    """Sort key that puts 8-15 before 16-31; names without a leading number come first, by name."""
    leading_part = name.partition("-")[0]
    return int(leading_part) if name[:1].isdigit() and leading_part.isdecimal() else 0, name


def _compute_rank_agreement(before: Floats, after: Floats) -> float:
    """Share of pairs of rows that have the same order in both."""
    order_before = np.sign(before[:, None] - before[None])
    order_after = np.sign(after[:, None] - after[None])
    off_diagonal = ~np.eye(len(before), dtype=bool)
    return float((order_before == order_after)[off_diagonal].mean()) if len(before) > 1 else 1.0


def compute_slices(records: Sequence[Mapping[str, Any]], logits: Floats, labels: Floats | None) -> dict[str, Any]:
    """AUROC and mean value (pairs: accuracy; `logits` are differences) by topic, locale, turn, version and activity.

    Columns that the rows lack and slices of fewer than MIN_SLICE_ROWS rows are left out.
    """
    slices: dict[str, Any] = {}
    if "user_id" in records[0]:
        # Activity is the user's row count by powers of two: it exposes a model that ranks only busy users well.
        row_counts = Counter(str(row["user_id"]) for row in records)
        records = [{**row, "activity": _format_count_range(row_counts[str(row["user_id"])])} for row in records]
    for column in SLICE_COLUMNS:
        if column not in records[0]:
            continue
        column_values = np.asarray([str(row[column]) for row in records])
        metrics_by_value = {}
        for value in sorted(set(column_values.tolist()), key=_build_numeric_sort_key):
            in_slice = column_values == value
            if in_slice.sum() < MIN_SLICE_ROWS:
                continue
            metrics: dict[str, Any] = {"n": int(in_slice.sum())}
            slice_logits = logits[in_slice]
            if labels is None:
                metrics["pair_accuracy"] = float((slice_logits > 0).mean() + 0.5 * (slice_logits == 0).mean())
            else:
                metrics |= {"auroc": auroc(slice_logits, labels[in_slice]), "rate": float(labels[in_slice].mean())}
                metrics["mean_value"] = float(sigmoid(slice_logits).mean())
            metrics_by_value[value] = metrics
        if metrics_by_value:
            slices[column] = metrics_by_value
    return round_for_json(slices)


HeldoutRow = Mapping[str, Any]


def parse_heldout_row(line: str | bytes, location: str) -> HeldoutRow:
    """Parse one row of either kind. Raises DataError that names `location` (file and line) and the problem."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{location} is not valid JSON ({error}); write one object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{location} is not a JSON object; write one object per line")
    text_columns = ("chosen", "rejected") if is_pair_row(row) else ("response",)
    if not all(isinstance(row.get(column), str) for column in text_columns):
        raise DataError(f"{location} has neither response (with label) nor chosen and rejected as text; add them")
    if not is_pair_row(row) and row.get("label") not in (0, 1):
        raise DataError(f"{location} has label {row.get('label')!r}; expected 0 or 1")
    for column in text_columns:
        key = "finish_reason" if column == "response" else f"{column}_finish_reason"
        if row.get(key) not in ("stop", "length", None):
            raise DataError(f"{location} has {key} {row[key]!r}; expected stop or length, or leave it out")
    if not _is_conversation(row.get("messages")):
        raise DataError(f"{location} has no valid messages; expected a list of objects with text role and content")
    return row


def _is_conversation(messages: object) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def is_pair_row(row: HeldoutRow) -> bool:
    """Whether the row is a pair (chosen and rejected) rather than a labeled response."""
    return "chosen" in row or "rejected" in row


def score_heldout_rows(model: RewardModel, rows: Sequence[HeldoutRow]) -> list[dict[str, Any]]:
    """Score each row, in order: id, group, the inputs of the metrics, and `score`.

    Labeled rows: score is the calibrated probability and `logit` its logit. Pairs: score is the probability that chosen
    beats rejected, `chosen` and `rejected` are the two probabilities, and `margin` is the difference of their logits.
    Lengths are characters of the response.
    """
    items = []
    for row in rows:
        messages: list[Message] = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        text_columns = ("chosen", "rejected") if is_pair_row(row) else ("response",)
        items += [ScoringItem(messages, row[column], is_truncated(row, column)) for column in text_columns]
    # One pass over all texts; the iterator hands each row its one or two logits back.
    raw_logits = model.compute_raw_logits(model.encoder.encode(items))
    logits = iter(model.calibration.calibrate_logits(raw_logits).tolist())
    scored_rows = []
    for row in rows:
        scored_row = {"id": row.get("id"), "group": row.get("group")}
        if is_pair_row(row):
            chosen, rejected = next(logits), next(logits)
            scored_row |= {"score": _to_probability(chosen - rejected), "margin": chosen - rejected}
            scored_row |= {"chosen": _to_probability(chosen), "rejected": _to_probability(rejected)}
            scored_row |= {"chosen_length": len(row["chosen"]), "rejected_length": len(row["rejected"])}
        else:
            logit = next(logits)
            scored_row |= {"label": int(row["label"]), "score": _to_probability(logit), "logit": logit}
            scored_row |= {"length": len(row["response"])}
        scored_rows.append(scored_row)
    return scored_rows


def _to_probability(logit: float) -> float:
    return float(sigmoid(np.asarray(logit)))


def summarize_scores(scored_rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """AUROC or pair accuracy with a 95% interval clustered by group, ECE, Brier, n and length baseline.

    A row without a group is a cluster of its own. Raises DataError when there are no rows or both kinds are mixed.
    """
    rows = list(scored_rows)
    if not rows:
        raise DataError("there is no row to score; check the data file")
    is_pairwise = "margin" in rows[0]
    if any(("margin" in row) != is_pairwise for row in rows):
        raise DataError("labeled rows and pairs are mixed in one file; score them as two files")
    clusters = [f"row {i}" if row["group"] is None else str(row["group"]) for i, row in enumerate(rows)]
    weights = np.ones(len(rows))
    if is_pairwise:
        length_differences = _get_column(rows, "chosen_length") - _get_column(rows, "rejected_length")
        summary = compute_pair_metrics(_get_column(rows, "margin"), weights, length_differences, clusters)
        length_preference = float(length_differences.mean())
    else:
        lengths, labels, logits = (_get_column(rows, key) for key in ("length", "label", "logit"))
        summary = compute_label_metrics(logits, labels, weights, lengths, clusters)
        length_preference = metrics.pearson_correlation(lengths, labels)
        summary["score_length_r"] = metrics.pearson_correlation(logits, lengths)
    summary["length_only_prefers"] = "longer" if length_preference >= 0 else "shorter"
    kind = "pairs" if is_pairwise else "labels"
    return round_for_json({"kind": kind, "n": len(rows), "clusters": len(set(clusters)), **summary})


def _get_column(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    return np.asarray([float(row[key]) for row in rows])
