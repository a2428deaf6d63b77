"""GSPO: PPO's surrogate with one ratio a response."""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.algorithms.losses.ppo import clipped
from rluf.algorithms.losses.sequences import sequence_means
from rluf.config.policy import AlgorithmSettings


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate [K] of s_i = exp(mean of logprobs - old_logprobs over the response), equal at its tokens.

    Tokens must be weighed by 1 / length, which rluf.algorithms.registry sees to. Source: arXiv 2507.18071, eq. 5 and 7.
    """
    return clipped(torch.exp(sequence_means(logprobs - old_logprobs, sequences)), advantages, algorithm)
