"""Lite-PPO: the group's mean as baseline, the whole batch's standard deviation as scale."""

from __future__ import annotations

from rluf.algorithms.advantages.base import Gains, Outcomes, centred, sample_deviation

EPSILON = 1e-4


def batch_std(outcomes: Outcomes) -> Gains:
    """(R_i - group mean) / (std of the batch + 1e-4), standard deviation with n - 1 over all rewards of the step.

    Safer than the group's own deviation where rewards of a group are almost equal, as small differences of P[Love] are.
    Source: Lite-PPO, arXiv 2508.08221, section 4.1; TRL's scale_rewards="batch" has the same formula.
    """
    rows = outcomes.penalised
    scale = 1.0 / (sample_deviation([reward for row in rows for reward in row]) + EPSILON)
    return Gains([[gain * scale for gain in centred(row)] for row in rows])
