"""REINFORCE++: rewards whitened over the tokens of the whole batch, with or without a group's mean as baseline."""

from __future__ import annotations

import math

from rluf.algorithms.advantages.base import Gains, Outcomes, Rows, centred

EPSILON = 1e-8


def reinforce_pp(outcomes: Outcomes) -> Gains:
    """Whitened token returns R_i - kl_coef * (KL still to come), no critic, no group.

    Source: arXiv 2501.03262, section 3; whitening as in verl: (x - mean) / sqrt(var + 1e-8) over all response tokens,
    variance with n - 1.
    """
    return _whitened(outcomes.rewards, outcomes, outcomes.kl_coef if outcomes.drifts else 0.0)


def reinforce_pp_baseline(outcomes: Outcomes) -> Gains:
    """The group's mean is taken off first, then all is whitened over the batch; a KL in the reward counts by response.

    Source: arXiv 2501.03262, section 3.2.
    """
    return _whitened([centred(rewards) for rewards in outcomes.penalised], outcomes, 0.0)


def _whitened(rewards: Rows, outcomes: Outcomes, kl_coef: float) -> Gains:
    """Whiten x = reward - kl_coef * togo over tokens from sums a sample: no token leaves the learners for it."""
    flat = [reward for row in rewards for reward in row]
    lengths = [length for row in outcomes.lengths for length in row] or [1] * len(flat)
    togo, squared = [0.0] * len(flat), [0.0] * len(flat)
    if kl_coef:
        togo = [drift.togo for row in outcomes.drifts for drift in row]
        squared = [drift.togo_squared for row in outcomes.drifts for drift in row]
    tokens = sum(lengths)
    if tokens < 2 or (not kl_coef and min(flat) == max(flat)):
        return Gains([[0.0] * len(row) for row in rewards])
    mean = math.fsum(n * r - kl_coef * t for n, r, t in zip(lengths, flat, togo, strict=True)) / tokens
    spread = math.fsum(
        n * (r - mean) ** 2 - 2 * kl_coef * (r - mean) * t + kl_coef**2 * s
        for n, r, t, s in zip(lengths, flat, togo, squared, strict=True)
    )
    scale = 1.0 / math.sqrt(max(0.0, spread) / (tokens - 1) + EPSILON)
    return Gains([[(reward - mean) * scale for reward in row] for row in rewards], slope=kl_coef * scale)
