"""What a reward model makes of changed responses, and how it does on slices of the test rows: parts of the card."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rluf.reward.augment import CHANGES
from rluf.reward.calibration import Floats
from rluf.reward.card_figures import plain
from rluf.reward.metrics import auroc
from rluf.reward.model import RewardModel

logger = logging.getLogger(__name__)

ROWS = 200
"""Responses that are changed in each way."""
SLICES = ("topic", "locale", "turn", "model_version", "activity")
SLICE_ROWS = 20
"""A slice with fewer rows is not shown."""


def robustness(model: RewardModel, records: Sequence[Mapping[str, Any]], *, pairs: bool, seed: int) -> dict[str, Any]:
    """For each change: the shift of the mean calibrated logit in standard deviations, and how ranking fares.

    `rank_kept` is the share of pairs of rows that a change leaves in their order (1 is perfect), both rows changed;
    `raised` the share of responses whose score the change raises. `records` are rows of the test split.
    """
    key = "chosen" if pairs else "response"
    rows = [row for row in records if str(row[key]).strip()]
    rows = random.Random(seed).sample(rows, min(ROWS, len(rows)))
    before = _logits(model, rows, [str(row[key]) for row in rows])
    spread = float(before.std()) or 1.0
    table = {}
    for number, (name, change) in enumerate(CHANGES.items(), start=1):
        logger.info("card: change %d of %d, %s, of %d responses", number, len(CHANGES), name, len(rows))
        after = _logits(
            model, rows, [change(str(row[key]), random.Random(f"{seed} {i}")) for i, row in enumerate(rows)]
        )
        moved = after - before
        table[name] = {
            "mean_shift_sd": float(moved.mean()) / spread,
            "raised": float((moved > 0).mean()),
            "rank_kept": _same_order(before, after),
        }
    return plain({"rows": len(rows), "logit_sd": spread, "changes": table})


def _logits(model: RewardModel, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> Floats:
    items = [(list(row["messages"]), response) for row, response in zip(rows, responses, strict=True)]
    return model.calibration.logits(model.raw(model.encoder.encode(items)))


def _octave(count: int) -> str:
    """1, 2-3, 4-7 rows and so on."""
    low = 1 << (count.bit_length() - 1)
    return "1" if count == 1 else f"{low}-{2 * low - 1}"


def _by_number(name: str) -> tuple[int, str]:
    return int(name.partition("-")[0]) if name[:1].isdigit() and name.partition("-")[0].isdecimal() else 0, name


def _same_order(before: Floats, after: Floats) -> float:
    first = np.sign(before[:, None] - before[None])
    second = np.sign(after[:, None] - after[None])
    pairs = ~np.eye(len(before), dtype=bool)
    return float((first == second)[pairs].mean()) if len(before) > 1 else 1.0


def slices(records: Sequence[Mapping[str, Any]], logits: Floats, labels: Floats | None) -> dict[str, Any]:
    """AUROC and mean value (pairs: accuracy, `logits` being differences) by topic, locale, turn, version and activity.

    Activity is how many rows the user has, by powers of two: a model that ranks busy users only shows there. A column
    that the rows lack and slices of fewer than SLICE_ROWS rows are left out.
    """
    found: dict[str, Any] = {}
    if "user_id" in records[0]:
        rows = Counter(str(row["user_id"]) for row in records)
        records = [{**row, "activity": _octave(rows[str(row["user_id"])])} for row in records]
    for column in SLICES:
        if column not in records[0]:
            continue
        values = np.asarray([str(row[column]) for row in records])
        parts = {}
        for value in sorted(set(values.tolist()), key=_by_number):
            mask = values == value
            if mask.sum() < SLICE_ROWS:
                continue
            part: dict[str, Any] = {"n": int(mask.sum())}
            if labels is None:
                part["pair_accuracy"] = float((logits[mask] > 0).mean() + 0.5 * (logits[mask] == 0).mean())
            else:
                part |= {"auroc": auroc(logits[mask], labels[mask]), "rate": float(labels[mask].mean())}
                part["mean_value"] = float((1 / (1 + np.exp(-logits[mask]))).mean())
            parts[value] = part
        if parts:
            found[column] = parts
    return plain(found)
