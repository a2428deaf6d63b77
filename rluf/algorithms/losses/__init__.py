"""Policy losses by name, the KL to the reference policy, and the correction for engine/learner mismatch."""

from __future__ import annotations

from rluf.algorithms.losses.kl import estimate_kl, update_kl_coef
from rluf.algorithms.losses.policy import (
    METRIC_SUM_NAMES,
    POLICY_LOSSES,
    LossResult,
    compute_importance_weights,
    compute_kl_to_go,
    compute_loss_metrics,
    compute_policy_loss,
    compute_reference_kl,
    find_policy_loss,
    sum_kl_by_response,
)

__all__ = [
    "METRIC_SUM_NAMES",
    "POLICY_LOSSES",
    "LossResult",
    "compute_importance_weights",
    "compute_kl_to_go",
    "compute_loss_metrics",
    "compute_policy_loss",
    "compute_reference_kl",
    "estimate_kl",
    "find_policy_loss",
    "sum_kl_by_response",
    "update_kl_coef",
]
