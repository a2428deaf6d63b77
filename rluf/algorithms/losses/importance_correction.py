"""Importance correction: what a token's loss weighs where learner and engine disagree on its probability."""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.algorithms.losses.sequences import sequence_sums
from rluf.errors import SettingsError


def importance_weights(
    logprobs: Tensor, rollout_logprobs: Tensor, sequences: Tensor, *, kind: str, cap: float
) -> Tensor:
    """Weights [K] without gradient from r = learner probability / engine probability.

    token: min(r, cap) (truncated importance sampling); sequence: the same with the product of r over the response;
    mask: r where 1 / cap <= r <= cap, else 0 (as IcePop); sequence_mask: the response's product where it is at most
    cap, else 0; off: 1. Sources: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
    2025; Ling Team, "Every step evolves" (IcePop), arXiv 2510.18855. Raises SettingsError for another kind.
    """
    log_ratio = logprobs.detach() - rollout_logprobs
    if kind == "token":
        return torch.exp(log_ratio).clamp(max=cap)
    if kind == "mask":
        ratio = torch.exp(log_ratio)
        return torch.where((ratio <= cap) & (ratio >= 1.0 / cap), ratio, torch.zeros_like(ratio))
    if kind == "off":
        return torch.ones_like(log_ratio)
    whole = torch.exp(sequence_sums(log_ratio, sequences))
    if kind == "sequence":
        return whole.clamp(max=cap)
    if kind == "sequence_mask":
        return torch.where(whole <= cap, whole, torch.zeros_like(whole))
    raise SettingsError(
        f"algorithm.importance={kind!r} is unknown; choose from token, sequence, mask, sequence_mask, off"
    )
