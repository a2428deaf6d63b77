"""GRPO: how much better a sample is than the others of its prompt, in standard deviations of the group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

EPSILON = 1e-6


def grpo(rewards: Sequence[float]) -> list[float]:
    """(R_i - mean) / (std + 1e-6) over the group, population standard deviation; all zero when rewards are equal.

    Source: DeepSeekMath, arXiv 2402.03300, outcome supervision. Equal rewards are told apart from almost equal ones
    exactly, so that rounding in the mean cannot become an advantage. Raises ValueError on an empty group or a reward
    that is not finite.
    """
    if not rewards or not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"advantages need at least one reward, all finite, but got {list(rewards)}")
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    deviation = math.sqrt(fmean((reward - mean) ** 2 for reward in rewards))
    return [(reward - mean) / (deviation + EPSILON) for reward in rewards]
