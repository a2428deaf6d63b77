"""PPO advantages: generalized advantage estimation over response tokens, from a critic's values.

The driver knows rewards only, so its estimator passes them through; the learners own the critic and compute the rest
per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.algorithms.advantages.base import AdvantageInputs, Advantages

GAMMA = 1.0
"""Discount factor: responses are short and their reward arrives at the end."""
VARIANCE_EPSILON = 1e-8


def pass_through_rewards(inputs: AdvantageInputs) -> Advantages:
    """Rewards unchanged; the learners turn them into advantages."""
    return Advantages([list(rewards) for rewards in inputs.rewards])


def build_token_rewards(rewards: Tensor, token_kl: Tensor, sequence_index: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token [K]: -kl_coef * token_kl (k1), plus the reward of the response at its last token.

    `rewards` [K] repeats the reward of a response at each of its tokens; `sequence_index` [K] is the response of each
    token. Source: arXiv 1909.08593, section 2.2, per token as in InstructGPT, arXiv 2203.02155.
    """
    is_last_token = torch.ones_like(sequence_index, dtype=torch.bool)
    is_last_token[:-1] = sequence_index[1:] != sequence_index[:-1]
    return rewards * is_last_token - kl_coef * token_kl


def compute_gae(rewards: Tensor, values: Tensor, sequence_index: Tensor, gae_lambda: float) -> Tensor:
    """Advantages [K]: sum_l (GAMMA lambda)^l d_(t+l), d_t = r_t + GAMMA V_(t+1) - V_t, with V = 0 after the end.

    `values` [K] are the critic's before each token. Tokens of a response are consecutive. Source: arXiv 1506.02438,
    eq. 16.
    """
    reversed_advantages: list[float] = []
    next_advantage = next_value = 0.0
    current_sequence: int | None = None
    # One pass from the last token to the first, over plain floats: the recursion is sequential, and a loop over 0-d
    # tensors pays a kernel launch per operation.
    tokens = list(zip(rewards.tolist(), values.tolist(), sequence_index.tolist(), strict=True))
    for reward, value, sequence in reversed(tokens):
        if sequence != current_sequence:
            next_advantage, next_value, current_sequence = 0.0, 0.0, sequence
        next_advantage = reward + GAMMA * next_value - value + GAMMA * gae_lambda * next_advantage
        next_value = value
        reversed_advantages.append(next_advantage)
    return torch.tensor(reversed_advantages[::-1], dtype=torch.float32, device=rewards.device)


def sum_moments(advantages: Tensor, counted_mask: Tensor) -> Tensor:
    """Count, sum and sum of squares [3] of the `advantages` [K] in `counted_mask` [K], for an all-reduce over ranks."""
    counted = advantages[counted_mask].double()
    return torch.stack([counted_mask.sum().double(), counted.sum(), counted.square().sum()])


def whiten_advantages(advantages: Tensor, total_moments: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8) with the sum_moments of the whole step, variance with n - 1, as in verl."""
    count = max(2.0, float(total_moments[0]))
    mean = float(total_moments[1]) / max(1.0, float(total_moments[0]))
    variance = max(0.0, float(total_moments[2]) - count * mean**2) / (count - 1)
    return (advantages - mean) / (variance + VARIANCE_EPSILON) ** 0.5
