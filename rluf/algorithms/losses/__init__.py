"""Policy losses by name, the KL to the reference, and the correction for what engine and learner disagree on."""

from __future__ import annotations

from rluf.algorithms.losses.importance_correction import importance_weights
from rluf.algorithms.losses.kl import adapted, kl_estimate
from rluf.algorithms.losses.policy import (
    LOSSES,
    SUMS,
    LossResult,
    drifts_of,
    kl_by_response,
    kl_to_go,
    metrics,
    policy_loss,
)

__all__ = [
    "LOSSES",
    "SUMS",
    "LossResult",
    "adapted",
    "drifts_of",
    "importance_weights",
    "kl_by_response",
    "kl_estimate",
    "kl_to_go",
    "metrics",
    "policy_loss",
]
