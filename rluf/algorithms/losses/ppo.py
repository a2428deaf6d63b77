"""PPO's clipped surrogate, with two clips and an optional bound for negative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.config.policy import AlgorithmSettings


def ppo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) [K] and where the clip cut the gradient [K].

    rho = exp(logprobs - old_logprobs) by token. With `dual_clip` c the loss of a token with A < 0 is at most c |A|.
    Source: arXiv 1707.06347, eq. 7; two clips as in DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729, eq. 5.
    """
    del sequences
    return clipped(torch.exp(logprobs - old_logprobs), advantages, algorithm)


def clipped(ratio: Tensor, advantages: Tensor, algorithm: AlgorithmSettings) -> tuple[Tensor, Tensor]:
    """The surrogate of given ratios [K]."""
    plain = ratio * advantages
    bounded = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high) * advantages
    value, cut = torch.minimum(plain, bounded), bounded < plain
    if algorithm.dual_clip is not None:
        floor = algorithm.dual_clip * advantages
        deep = (advantages < 0) & (floor > value)
        value, cut = torch.where(deep, floor, value), cut | deep
    return -value, cut
