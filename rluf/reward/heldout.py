"""Held-out rows as `rluf.evaluate score` reads them, their scores, and the figures that follow.

Two shapes of JSONL rows: {"id", "messages", "response", "label": 0|1, "group"} and {"id", "messages", "chosen",
"rejected", "group"}. Label 1 and `chosen` are what a score should be high for: loved, helpful, safe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rluf.errors import DataError
from rluf.reward import metrics
from rluf.reward.calibration import Floats, sigmoid
from rluf.reward.card_figures import label_figures, pair_figures, plain
from rluf.reward.model import RewardModel
from rluf.reward.text import Item
from rluf.types import Message

Row = Mapping[str, Any]


def parse_row(line: str | bytes, where: str) -> Row:
    """One row of either shape. Raises DataError naming `where` (file and line) and what is wrong."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON ({error}); give one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object; give one object a line")
    texts = ("chosen", "rejected") if is_pair(row) else ("response",)
    if not all(isinstance(row.get(key), str) for key in texts):
        raise DataError(f"{where} has neither response (with label) nor chosen and rejected as text; add them")
    if not is_pair(row) and row.get("label") not in (0, 1):
        raise DataError(f"{where} has label {row.get('label')!r}; it must be 0 or 1")
    if not _is_conversation(row.get("messages")):
        raise DataError(f"{where} has no messages; give a list of objects with role and content, both text")
    return row


def _is_conversation(messages: object) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def is_pair(row: Row) -> bool:
    """Whether the row is of the second shape."""
    return "chosen" in row or "rejected" in row


def score_rows(model: RewardModel, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A score for each row, in order: id, group, what the figures need, and `score`.

    Labelled rows: score is the calibrated probability, with `logit` behind it. Pairs: score is the chance that chosen
    beats rejected, with `chosen` and `rejected` the two probabilities and `margin` the difference of their logits.
    Lengths are characters of the response.
    """
    items: list[Item] = []
    for row in rows:
        messages: list[Message] = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        items += [(messages, row[key]) for key in (("chosen", "rejected") if is_pair(row) else ("response",))]
    logits = iter(model.calibration.logits(model.raw(model.encoder.encode(items))).tolist())
    found = []
    for row in rows:
        known = {"id": row.get("id"), "group": row.get("group")}
        if is_pair(row):
            chosen, rejected = next(logits), next(logits)
            known |= {"score": _chance(chosen - rejected), "margin": chosen - rejected}
            known |= {"chosen": _chance(chosen), "rejected": _chance(rejected)}
            known |= {"chosen_length": len(row["chosen"]), "rejected_length": len(row["rejected"])}
        else:
            logit = next(logits)
            known |= {"label": int(row["label"]), "score": _chance(logit), "logit": logit}
            known |= {"length": len(row["response"])}
        found.append(known)
    return found


def _chance(logit: float) -> float:
    return float(sigmoid(np.asarray(logit)))


def summarise(scores: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of scored rows: AUROC or pair accuracy with a 95% interval clustered by group, ECE, Brier, n, length.

    A row without a group is its own cluster. Raises DataError when there are no rows or both shapes occur.
    """
    rows = list(scores)
    if not rows:
        raise DataError("there is no row to score; check the data file")
    pairs = "margin" in rows[0]
    if any(("margin" in row) != pairs for row in rows):
        raise DataError("labelled rows and pairs are mixed in one file; score them as two files")
    clusters = [f"row {i}" if row["group"] is None else str(row["group"]) for i, row in enumerate(rows)]
    ones = np.ones(len(rows))
    if pairs:
        longer = _column(rows, "chosen_length") - _column(rows, "rejected_length")
        figures = pair_figures(_column(rows, "margin"), ones, longer, clusters)
        direction = float(longer.mean())
    else:
        lengths, labels, logits = (_column(rows, key) for key in ("length", "label", "logit"))
        figures = label_figures(logits, labels, ones, lengths, clusters)
        direction = metrics.correlation(lengths, labels)
        figures["score_length_r"] = metrics.correlation(logits, lengths)
    figures["length_floor_prefers"] = "longer" if direction >= 0 else "shorter"
    return plain({"kind": "pairs" if pairs else "labels", "n": len(rows), "clusters": len(set(clusters)), **figures})


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    return np.asarray([float(row[key]) for row in rows])
