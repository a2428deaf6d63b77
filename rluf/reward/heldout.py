"""Score held-out rows with a reward model and summarize the scores, for `rluf.evaluate score`.

Two kinds of JSONL rows: {"id", "messages", "response", "label": 0|1, "group"} and {"id", "messages", "chosen",
"rejected", "group"}. Label 1 and `chosen` should score high: loved, helpful, safe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rluf.errors import DataError
from rluf.reward import metrics
from rluf.reward.card import compute_label_metrics, compute_pair_metrics, round_for_json
from rluf.reward.model import RewardModel
from rluf.reward.text import ScoringItem
from rluf.types import Message
from rluf.utils.stats import Floats, sigmoid

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
    items: list[ScoringItem] = []
    for row in rows:
        messages: list[Message] = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        text_columns = ("chosen", "rejected") if is_pair_row(row) else ("response",)
        items += [(messages, row[column]) for column in text_columns]
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
    summary["length_floor_prefers"] = "longer" if length_preference >= 0 else "shorter"
    kind = "pairs" if is_pairwise else "labels"
    return round_for_json({"kind": kind, "n": len(rows), "clusters": len(set(clusters)), **summary})


def _get_column(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    return np.asarray([float(row[key]) for row in rows])
