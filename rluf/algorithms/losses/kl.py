"""KL to the reference policy: estimates from samples, and the controller that steers its coefficient."""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.errors import SettingsError

ADAPTIVE_CLIP = 0.2
ADAPTIVE_HORIZON = 10_000
"""Samples in which the coefficient may change by a factor of about e^ADAPTIVE_CLIP."""


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate [K] of KL(policy || reference) from the policy's own samples, l = logprobs - reference_logprobs.

    k1 = l (unbiased, signed; no gradient on average as a loss), k2 = l^2 / 2 (its gradient is the KL's, on policy),
    k3 = exp(-l) - 1 + l (unbiased, never negative; GRPO's). Source: J. Schulman, "Approximating KL divergence".
    Raises SettingsError for another name.
    """
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise SettingsError(f"algorithm.kl_estimator={estimator!r} is unknown; choose from k1, k2, k3")


def adapted(coefficient: float, kl: float, target: float | None, samples: int) -> float:
    """The KL coefficient after a step of `samples` whose KL was `kl` nats a token; as it is without a `target`.

    coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / 10,000). Source: Ziegler et al., arXiv 1909.08593,
    section 2.2, with the constants of its published code.
    """
    if target is None:
        return coefficient
    error = min(max(kl / target - 1.0, -ADAPTIVE_CLIP), ADAPTIVE_CLIP)
    return coefficient * (1.0 + error * samples / ADAPTIVE_HORIZON)
