"""Which training rows are kept, and how much each counts, so that the natural rate can be told from the sample.

Loved rows are rare, so unloved ones are dropped at random. A kept row weighs one over the share of its class that was
kept: the weighted mean of the labels is then exactly the rate before sampling, and a loss or a calibration with these
weights estimates the natural one (King and Zeng 2001, "Logistic regression in rare events data", weighting).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Quota:
    """Rows of each class before sampling and after it."""

    positives: int
    negatives: int
    keep_positives: int
    keep_negatives: int

    @property
    def positive_weight(self) -> float:
        """Weight of a kept positive row: one over the share of positives kept (0 when there are none)."""
        return self.positives / self.keep_positives if self.keep_positives else 0.0

    @property
    def negative_weight(self) -> float:
        """Weight of a kept negative row: one over the share of negatives kept (0 when there are none)."""
        return self.negatives / self.keep_negatives if self.keep_negatives else 0.0


def quota(positives: int, negatives: int, *, positive_share: float | None, max_rows: int) -> Quota:
    """How many rows of each class to keep.

    Negatives are cut until positives are `positive_share` of the rows (never the other way round: where positives are
    commoner already, all stay; None leaves the classes as they are); past `max_rows` both classes are cut alike, and
    one row of a class that had any is kept.
    """
    keep_negatives = negatives
    if positive_share is not None and positives:
        keep_negatives = min(negatives, max(1, round(positives * (1 - positive_share) / positive_share)))
    keep_positives, total = positives, positives + keep_negatives
    if total > max_rows:
        lowest, highest = min(1, positives), max_rows - min(1, keep_negatives)
        keep_positives = min(max(round(positives * max_rows / total), lowest), highest)
        keep_negatives = max_rows - keep_positives
    return Quota(positives, negatives, keep_positives, keep_negatives)


def sample_salt(seed: int) -> str:
    """Salt of the hash of row ids that says which rows are sampled first."""
    return f"sample-{seed % 10**9}"


def choose(rank: NDArray[np.float64], positive: NDArray[np.bool_], plan: Quota) -> NDArray[np.float64]:
    """Weight of each row [N], 0 for a dropped one. Rows of the lowest rank [N] in their class are kept.

    With the hash of the row's id as rank the choice hangs on ids and seed alone, not on the rows' order.
    """
    weight = np.zeros(len(rank), dtype=np.float64)
    for mask, keep, value in (
        (positive, plan.keep_positives, plan.positive_weight),
        (~positive, plan.keep_negatives, plan.negative_weight),
    ):
        rows = np.flatnonzero(mask)
        if keep:
            weight[rows[np.argpartition(rank[rows], keep - 1)[:keep]]] = value
    return weight
