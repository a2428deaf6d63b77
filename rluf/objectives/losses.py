"""Losses of the reward models, on logits [B] that have not been calibrated."""

from __future__ import annotations

import torch
from torch.nn import functional


def weighted_bce(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy in nats, mean over `weights` [B]: sum_i w_i * (softplus(z_i) - y_i z_i) / sum_i w_i.

    `labels` [B] are 0 or 1 (or shares between). Computed in float32 whatever the logits' type.
    """
    losses = functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss in nats: mean over `weights` [B] of -log sigmoid(chosen - rejected).

    Source: Bradley and Terry 1952; as a reward model loss, Christiano et al. 2017.
    """
    losses = -functional.logsigmoid(chosen.float() - rejected.float())
    return (losses * weights).sum() / weights.sum()
