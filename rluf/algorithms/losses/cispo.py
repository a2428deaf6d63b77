"""CISPO: the ratio is clipped as a weight, so that a clipped token keeps its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.config.policy import AlgorithmSettings


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logprobs [K] and where the ratio was clipped [K].

    Source: MiniMax-M1, arXiv 2506.13585, eq. 4 and 5.
    """
    del sequences
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    weight = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    return -weight * advantages * logprobs, weight != ratio
