"""RLOO: a sample against the mean of the others of its group."""

from __future__ import annotations

from rluf.algorithms.advantages.base import Gains, Outcomes, centred


def rloo(outcomes: Outcomes) -> Gains:
    """R_i - mean of the other rewards = G / (G - 1) (R_i - mean): an unbiased baseline. A lone sample gains nothing.

    Source: arXiv 2402.14740, eq. 8.
    """
    found = []
    for rewards in outcomes.penalised:
        scale = len(rewards) / max(1, len(rewards) - 1)
        found.append([scale * gain for gain in centred(rewards)])
    return Gains(found)
