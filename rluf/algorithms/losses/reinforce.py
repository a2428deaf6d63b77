"""REINFORCE: the log-likelihood of each token times its advantage."""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.config.policy import AlgorithmSettings


def reinforce(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """-A logprobs [K]; nothing is clipped. Also the loss of CGPO's optimisers, whose advantages are their weights.

    Source: R. J. Williams, "Simple statistical gradient-following algorithms", 1992.
    """
    del old_logprobs, sequences, algorithm
    return -advantages * logprobs, torch.zeros_like(advantages, dtype=torch.bool)
