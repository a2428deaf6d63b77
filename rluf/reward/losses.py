"""Losses of the reward models, on logits [B] that have not been calibrated."""

from __future__ import annotations

import torch
from torch.nn import functional

FOCUS = 2.0
"""Exponent of the focal loss; the authors' best."""


def weighted_bce(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy in nats, mean over `weights` [B]: sum_i w_i * (softplus(z_i) - y_i z_i) / sum_i w_i.

    `labels` [B] are 0 or 1 (or shares between). Computed in float32 whatever the logits' type.
    """
    losses = functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def focal(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Focal loss in nats: cross-entropy of each row times (1 - p_of_its_label)^FOCUS, mean over `weights` [B].

    Rows that are right already count for little. Source: Lin et al. 2017, formula 4.
    """
    z, y = logits.float(), labels.float()
    losses = functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    missed = torch.sigmoid(torch.where(y > 0.5, -z, z))
    return (losses * missed**FOCUS * weights).sum() / weights.sum()


def non_negative_pu(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, positive_rate: float
) -> torch.Tensor:
    """Non-negative PU risk: rows without a reaction are unlabelled, a share of them would have been loved too.

    With l(z) = sigmoid(-z): pi E+[l(z)] + max(0, E_u[l(-z)] - pi E+[l(-z)]), where pi is `positive_rate`, the share of
    truly liked responses (larger than the reaction rate). Where the second term is negative the returned value is the
    negative of it, so that a step undoes the overfitting. Source: Kiryo et al. 2017, beta 0, gamma 1.
    """
    z, y, w = logits.float(), labels.float(), weights.float()
    positive, unlabelled = w * y, w * (1 - y)
    as_positive, as_negative = torch.sigmoid(-z), torch.sigmoid(z)
    reached = positive.sum().clamp_min(1e-12)
    risk_positive = positive_rate * (positive * as_positive).sum() / reached
    risk_negative = (unlabelled * as_negative).sum() / unlabelled.sum().clamp_min(1e-12)
    risk_negative = risk_negative - positive_rate * (positive * as_negative).sum() / reached
    return risk_positive + risk_negative if float(risk_negative.detach()) >= 0 else -risk_negative


def hinge(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean over `weights` [B] of max(0, margin - z) for verdict 1 and max(0, margin + z) for verdict 0."""
    signs = torch.where(labels > 0.5, 1.0, -1.0)
    return (functional.relu(margin - signs * logits.float()) * weights).sum() / weights.sum()


def bradley_terry(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    weights: torch.Tensor,
    *,
    wins: torch.Tensor | None = None,
    margin: float = 0.0,
) -> torch.Tensor:
    """Bradley-Terry loss in nats: mean over `weights` [B] of the cross-entropy of sigmoid(chosen - rejected - margin).

    `wins` [B] is 1 where chosen won (the default) and 0.5 for a tie, which no margin is asked of. Source: Bradley and
    Terry 1952; as a reward model loss, Christiano et al. 2017; the margin as in Llama 2 (Touvron et al. 2023).
    """
    share = torch.ones_like(weights, dtype=torch.float32) if wins is None else wins.float()
    difference = chosen.float() - rejected.float() - margin * (2 * share - 1)
    losses = -(share * functional.logsigmoid(difference) + (1 - share) * functional.logsigmoid(-difference))
    return (losses * weights).sum() / weights.sum()
