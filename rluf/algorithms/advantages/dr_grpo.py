"""Dr. GRPO: how much better a sample is than its group's mean, without dividing by the spread."""

from __future__ import annotations

from rluf.algorithms.advantages.base import Gains, Outcomes, centred


def dr_grpo(outcomes: Outcomes) -> Gains:
    """R_i - mean over the group; dividing by the deviation would favour prompts with almost equal rewards.

    Source: arXiv 2503.20783 (with tokens weighed by a constant length, see rluf.algorithms.registry).
    """
    return Gains([centred(rewards) for rewards in outcomes.penalised])
