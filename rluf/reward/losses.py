"""Reward model losses on uncalibrated logits [B]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from rluf.config.reward import RewardModelSettings
from rluf.errors import DataError

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Loss of logits (pairs: chosen, then rejected), labels and weights."""
FOCAL_EXPONENT = 2.0
"""Exponent of the focal loss, the best value in the paper."""
LIKED_SHARE = 0.2
"""Share of all responses that are truly liked, about three times the usual reaction rate."""
PU_CLASS_PRIOR = 0.15
"""Share of the responses without a reaction that are truly liked: (pi - c) / (1 - c) with pi = LIKED_SHARE and the
usual reaction rate c = 0.06."""
HINGE_MARGIN = 1.0
"""Distance from the boundary, in logits, beyond which a row has no loss. Any other margin only rescales the logits."""


def weighted_bce_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy in nats, mean over `weights` [B]: sum_i w_i * (softplus(z_i) - y_i z_i) / sum_i w_i.

    `labels` [B] are 0 or 1 (or fractions). Computed in float32 whatever the dtype of the logits.
    """
    losses = functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Focal loss in nats: cross-entropy of each row times (1 - p_of_its_label)^FOCAL_EXPONENT, mean over `weights` [B].

    Rows that are already classified correctly contribute little. Source: Lin et al. 2017, formula 4.
    """
    z, y = logits.float(), labels.float()
    losses = functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    error_probability = torch.sigmoid(torch.where(y > 0.5, -z, z))
    return (losses * error_probability**FOCAL_EXPONENT * weights).sum() / weights.sum()


def non_negative_pu_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, class_prior: float = PU_CLASS_PRIOR
) -> torch.Tensor:
    """Non-negative PU risk: rows without a reaction are unlabeled, since some of them would have been loved too.

    With l(z) = sigmoid(-z): pi E+[l(z)] + max(0, E_u[l(-z)] - pi E+[l(-z)]), where pi is `class_prior`, the share of
    the unlabeled rows that are truly liked. Source: Kiryo et al. 2017, beta 0, gamma 1.
    """
    z, y, w = logits.float(), labels.float(), weights.float()
    positive, unlabeled = w * y, w * (1 - y)
    loss_as_positive, loss_as_negative = torch.sigmoid(-z), torch.sigmoid(z)
    # A batch may have no positive row: the clamps turn 0 / 0 into 0.
    positive_weight = positive.sum().clamp_min(1e-12)
    risk_positive = class_prior * (positive * loss_as_positive).sum() / positive_weight
    risk_negative = (unlabeled * loss_as_negative).sum() / unlabeled.sum().clamp_min(1e-12)
    risk_negative = risk_negative - class_prior * (positive * loss_as_negative).sum() / positive_weight
    # A negative risk can only come from overfitting. Its negation is returned, so that the step undoes it.
    return risk_positive + risk_negative if float(risk_negative.detach()) >= 0 else -risk_negative


def check_unlabeled_rows(rows: Sequence[Mapping[str, Any]], source_name: str) -> None:
    """Raise DataError where non_negative_pu_loss does not apply.

    Most rows of label 0 must have no reaction, and fewer rows have label 1 than are taken to be liked.
    """
    others = [row for row in rows if not row["label"]]
    reacted_count = sum(row.get("reaction") is not None for row in others)
    liked_share = sum(row["weight"] for row in rows if row["label"]) / sum(row["weight"] for row in rows)
    problem = None
    if 2 * reacted_count > len(others):
        problem = (
            f"{reacted_count} of the {len(others)} rows of label 0 have a reaction, so that they are not unlabeled"
        )
    elif liked_share >= LIKED_SHARE:
        problem = (
            f"{liked_share:.0%} of the rows have label 1, but {LIKED_SHARE:.0%} of all responses are taken to be liked"
        )
    if problem:
        raise DataError(f"{source_name}: loss nnpu does not apply: {problem}; set reward.<name>.loss=bce")


def hinge_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over `weights` [B] of max(0, HINGE_MARGIN - z) for label 1 and max(0, HINGE_MARGIN + z) for label 0."""
    signs = torch.where(labels > 0.5, 1.0, -1.0)
    return (functional.relu(HINGE_MARGIN - signs * logits.float()) * weights).sum() / weights.sum()


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss in nats: mean over `weights` [B] of -log sigmoid(chosen - rejected).

    Readers drop ties, so that chosen always won. Source: Bradley and Terry 1952; as a reward model loss, Christiano et
    al. 2017.
    """
    losses = -functional.logsigmoid(chosen.float() - rejected.float())
    # Pairs that are equal as the model reads them weigh nothing, and may be all of a step's.
    return (losses * weights).sum() / weights.sum().clamp_min(1e-12)


def build_loss(model_settings: RewardModelSettings) -> LossFunction:
    """Loss function of logits, labels and weights that the settings name."""

    def pairwise_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chosen, rejected = logits.chunk(2)
        return bradley_terry_loss(chosen, rejected, weights)

    loss_functions: dict[str, LossFunction] = {
        "bce": weighted_bce_loss,
        "focal": focal_loss,
        "nnpu": non_negative_pu_loss,
        "hinge": hinge_loss,
        "bradley_terry": pairwise_loss,
    }
    return loss_functions[model_settings.loss]


def compute_step_loss(
    loss_function: LossFunction,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    copy_positions: Sequence[int],
) -> torch.Tensor:
    """Loss of a step: `loss_function` on its rows, and a comparison with the source for the rows at `copy_positions`.

    `logits` are those of the rows, then those of the sources of the copies. A copy with label 0 would teach that its
    text is bad, and it is the text of a good row. The comparison -log sigmoid(source - copy) cancels out over prompts
    for a model that ignores them, so only reading the prompt lowers it.
    """
    if not copy_positions:
        return loss_function(logits, labels, weights)
    is_copy = torch.zeros(len(labels), dtype=torch.bool, device=logits.device)
    is_copy[list(copy_positions)] = True
    row_logits, source_logits = logits[: len(labels)], logits[len(labels) :]
    comparison = -functional.logsigmoid(source_logits - row_logits[is_copy])
    total = (weights[is_copy] * comparison).sum()
    if not is_copy.all():
        label_loss = loss_function(row_logits[~is_copy], labels[~is_copy], weights[~is_copy])
        total = total + label_loss * (~is_copy).sum()
    return total / len(labels)
