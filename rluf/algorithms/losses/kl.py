"""KL to the reference policy: sample estimators, and the controller of its coefficient."""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.errors import SettingsError

KL_ERROR_CLIP = 0.2
"""Largest relative error of the KL that one update of the coefficient reacts to."""
KL_HORIZON_SAMPLES = 10_000
"""Samples in which the coefficient may change by a factor of about e^KL_ERROR_CLIP."""


def estimate_kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate [K] of KL(policy || reference) from the policy's own samples, l = logprobs - reference_logprobs.

    k1 = l (unbiased, signed; no gradient on average as a loss), k2 = l^2 / 2 (its gradient is that of the KL, on
    policy), k3 = exp(-l) - 1 + l (unbiased, never negative; GRPO's). Source: J. Schulman, "Approximating KL
    divergence". Raises SettingsError for another name.
    """
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise SettingsError(f"algorithm.kl_estimator: expected k1, k2 or k3, got {estimator!r}")


def update_kl_coef(kl_coef: float, kl_per_token: float, target_kl: float | None, sample_count: int) -> float:
    """KL coefficient after a step with `kl_per_token` nats per token; unchanged without a target.

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / 10,000). Source: Ziegler et al., arXiv 1909.08593,
    section 2.2, with the constants of its published code.
    """
    if target_kl is None:
        return kl_coef
    relative_error = min(max(kl_per_token / target_kl - 1.0, -KL_ERROR_CLIP), KL_ERROR_CLIP)
    return kl_coef * (1.0 + relative_error * sample_count / KL_HORIZON_SAMPLES)
