"""Robustness of a reward model to perturbed responses, and its metrics on slices of the test rows, for the card."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rluf.reward.augment import RESPONSE_PERTURBATIONS
from rluf.reward.card import round_for_json
from rluf.reward.metrics import auroc
from rluf.reward.model import RewardModel
from rluf.utils.stats import Floats, sigmoid

logger = logging.getLogger(__name__)

MAX_RESPONSES = 200
"""Number of responses to which each perturbation is applied."""
SLICE_COLUMNS = ("topic", "locale", "turn", "model_version", "activity")
MIN_SLICE_ROWS = 20
"""Slices with fewer rows are left out."""


def measure_robustness(
    model: RewardModel, records: Sequence[Mapping[str, Any]], *, is_pairwise: bool, seed: int
) -> dict[str, Any]:
    """For each perturbation: the shift of the mean calibrated logit in standard deviations, and the effect on ranking.

    `rank_kept` is the share of pairs of rows whose order does not change when both are perturbed (1 is perfect);
    `raised` is the share of responses whose score rises. `records` are rows of the test split.
    """
    column = "chosen" if is_pairwise else "response"
    rows = [row for row in records if str(row[column]).strip()]
    rows = random.Random(seed).sample(rows, min(MAX_RESPONSES, len(rows)))
    original_logits = _score_responses(model, rows, [str(row[column]) for row in rows])
    logit_sd = float(original_logits.std()) or 1.0
    table = {}
    for number, (name, perturb) in enumerate(RESPONSE_PERTURBATIONS.items(), start=1):
        logger.info(
            "%s: robustness perturbation=%s (%d of %d) responses=%d",
            model.calibration.objective,
            name,
            number,
            len(RESPONSE_PERTURBATIONS),
            len(rows),
        )
        perturbed_responses = [
            perturb(str(row[column]), random.Random(f"{seed} {row_index}")) for row_index, row in enumerate(rows)
        ]
        perturbed_logits = _score_responses(model, rows, perturbed_responses)
        shifts = perturbed_logits - original_logits
        table[name] = {
            "mean_shift_sd": float(shifts.mean()) / logit_sd,
            "raised": float((shifts > 0).mean()),
            "rank_kept": _rank_agreement(original_logits, perturbed_logits),
        }
    return round_for_json({"rows": len(rows), "logit_sd": logit_sd, "changes": table})


def _score_responses(model: RewardModel, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> Floats:
    items = [(list(row["messages"]), response) for row, response in zip(rows, responses, strict=True)]
    return model.calibration.calibrate_logits(model.compute_raw_logits(model.encoder.encode(items)))


def _format_count_range(count: int) -> str:
    """Range of the power of two that contains the count: 1, 2-3, 4-7 and so on."""
    low = 1 << (count.bit_length() - 1)
    return "1" if count == 1 else f"{low}-{2 * low - 1}"


def _numeric_sort_key(name: str) -> tuple[int, str]:
    """Sort key that puts 8-15 before 16-31; names without a leading number come first, by name."""
    leading_part = name.partition("-")[0]
    return int(leading_part) if name[:1].isdigit() and leading_part.isdecimal() else 0, name


def _rank_agreement(before: Floats, after: Floats) -> float:
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
        for value in sorted(set(column_values.tolist()), key=_numeric_sort_key):
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
