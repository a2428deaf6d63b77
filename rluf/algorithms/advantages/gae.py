"""PPO's advantages: generalised advantage estimation over the tokens of each response, from a critic's values.

The driver only knows rewards, so its estimator hands them on; learners, who hold the critic, do the rest by token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.algorithms.advantages.base import Gains, Outcomes

GAMMA = 1.0
"""Discount: a response is short, and its reward comes at the end."""
EPSILON = 1e-8


def gae_rewards(outcomes: Outcomes) -> Gains:
    """The rewards as they are: learners turn them into advantages."""
    return Gains([list(row) for row in outcomes.rewards])


def token_rewards(rewards: Tensor, drift: Tensor, sequences: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token [K]: -kl_coef * drift (k1 of that token), and the response's reward at its last token.

    `rewards` [K] has a response's reward at each of its tokens, `sequences` [K] the number of each token's response.
    Source: arXiv 1909.08593, section 2.2, by token as in InstructGPT, arXiv 2203.02155.
    """
    last = torch.ones_like(sequences, dtype=torch.bool)
    last[:-1] = sequences[1:] != sequences[:-1]
    return rewards * last - kl_coef * drift


def gae(rewards: Tensor, values: Tensor, sequences: Tensor, lam: float) -> Tensor:
    """Advantages [K]: sum_l (GAMMA lam)^l d_(t+l), d_t = r_t + GAMMA V_(t+1) - V_t, V after the end being 0.

    `values` [K] are the critic's before each token. Tokens of a response follow one another. Source: arXiv 1506.02438,
    eq. 16.
    """
    found: list[float] = []
    coming = next_value = 0.0
    owner: int | None = None
    entries = list(zip(rewards.tolist(), values.tolist(), sequences.tolist(), strict=True))
    for reward, value, sequence in reversed(entries):
        if sequence != owner:
            coming, next_value, owner = 0.0, 0.0, sequence
        coming = reward + GAMMA * next_value - value + GAMMA * lam * coming
        next_value = value
        found.append(coming)
    return torch.tensor(found[::-1], dtype=torch.float32, device=rewards.device)


def moments(advantages: Tensor, counted: Tensor) -> Tensor:
    """Count, sum and sum of squares of the advantages [K] that are `counted` [K]; they add up over ranks [3]."""
    chosen = advantages[counted].double()
    return torch.stack([counted.sum().double(), chosen.sum(), chosen.square().sum()])


def whitened(advantages: Tensor, total: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8) with the `moments` of the whole step, variance with n - 1, as in verl."""
    count, mean = max(2.0, float(total[0])), float(total[1]) / max(1.0, float(total[0]))
    variance = max(0.0, float(total[2]) - count * mean**2) / (count - 1)
    return (advantages - mean) / (variance + EPSILON) ** 0.5
