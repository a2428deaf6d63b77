"""GRPO: how much better a sample is than the others of its prompt, in standard deviations of the group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rluf.algorithms.advantages.base import Gains, Outcomes

EPSILON = 1e-6


def grpo(outcomes: Outcomes) -> Gains:
    """(R_i - mean) / (std + 1e-6) over the group, population standard deviation; all zero when rewards are equal.

    Source: DeepSeekMath, arXiv 2402.03300, outcome supervision.
    """
    return Gains([standardised(rewards) for rewards in outcomes.penalised])


def standardised(rewards: Sequence[float]) -> list[float]:
    """One group's advantages.

    Equal rewards are told apart from almost equal ones exactly: rounding in the mean cannot become an advantage.
    """
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    deviation = math.sqrt(fmean((reward - mean) ** 2 for reward in rewards))
    return [(reward - mean) / (deviation + EPSILON) for reward in rewards]
