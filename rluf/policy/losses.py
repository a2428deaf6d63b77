"""The GRPO loss by token: clipped policy term, correction for the engine's own probabilities, KL to the reference.

All functions take log-probabilities in nats over K response tokens and return one value a token; `policy_loss` weighs
and sums them. Losses are minimised.

One batch, one update (staleness 0): the learner's own current log-probabilities, detached, are the old policy. The
ratio is then 1 with a gradient and never clips; the engine's log-probabilities only say how far the sampler was from
the learner (another kernel, another rounding), which truncated importance sampling corrects.

Stale batches (staleness above 0): the engine's log-probabilities are the old policy, so the clipped ratio covers both
the age of the batch and the engine's difference, and no further correction applies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rluf.config.policy import AlgorithmSettings
from rluf.errors import SettingsError
from rluf.policy.batch import Batch


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) [K] and where the clip cut the gradient [K].

    rho = exp(logprobs - old_logprobs). Source: arXiv 1707.06347, eq. 7; two clips as in DAPO, arXiv 2503.14476.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(plain, clipped), clipped < plain


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


def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(learner probability / engine probability, cap) [K], without gradient: truncated importance sampling."""
    return torch.exp(logprobs.detach() - rollout_logprobs).clamp(max=cap)


@dataclass(frozen=True, slots=True)
class LossResult:
    """Loss of a micro-batch (scalar, with gradient) and its metrics as parts that ranks can add up.

    `sums` [len(SUMS)] add over micro-batches and ranks; `peak` is the largest learner/engine ratio.
    """

    loss: Tensor
    sums: Tensor
    peak: Tensor


SUMS = (
    "loss",
    "policy_loss",
    "kl_loss",
    "kl_k3",
    "kl_k1",
    "surprise",
    "ratio",
    "ratio_squared",
    "mismatch",
    "clipped",
    "capped",
    "response_tokens",
    "samples",
    "tokens",
)
"""Names of LossResult.sums, in order."""


def policy_loss(logprobs: Tensor, reference_logprobs: Tensor, batch: Batch, algorithm: AlgorithmSettings) -> LossResult:
    """Sum over tokens of loss_weights * (importance * clipped policy term + kl_coef * KL estimate).

    `logprobs` [K] (with gradient) and `reference_logprobs` [K] are those of `batch.targets`. The sum over all
    micro-batches and ranks of a step is the step's loss.
    """
    on_policy = algorithm.staleness == 0
    old = logprobs.detach() if on_policy else batch.rollout_logprobs
    surrogate, clipped = clipped_policy_loss(logprobs, old, batch.advantages, algorithm.clip_low, algorithm.clip_high)
    if on_policy:
        surrogate = surrogate * importance_weights(logprobs, batch.rollout_logprobs, algorithm.importance_cap)
    kl = kl_estimate(logprobs, reference_logprobs, algorithm.kl_estimator)
    policy_part = (batch.loss_weights * surrogate).sum()
    kl_part = algorithm.kl_coef * (batch.loss_weights * kl).sum()
    loss = policy_part + kl_part
    with torch.no_grad():
        counts = (batch.loss_weights > 0).float()
        log_ratio = logprobs - batch.rollout_logprobs
        ratio = log_ratio.exp() * counts
        values = (
            loss,
            policy_part,
            kl_part,
            (kl_estimate(logprobs, reference_logprobs, "k3") * counts).sum(),
            ((logprobs - reference_logprobs) * counts).sum(),
            -(logprobs * counts).sum(),
            ratio.sum(),
            ratio.square().sum(),
            ((torch.expm1(log_ratio) - log_ratio) * counts).sum(),
            (clipped * counts).sum(),
            ((ratio > algorithm.importance_cap) * counts).sum(),
            counts.sum(),
            counts.sum().clamp(max=1.0) * batch.rows.shape[0],
            torch.as_tensor(float(batch.tokens), device=loss.device),
        )
        sums = torch.stack([value.detach().double() for value in values])
    return LossResult(loss, sums, ratio.max().double())


def metrics(sums: Tensor, peak: float) -> dict[str, float]:
    """Metrics of a step from the `sums` of all its micro-batches and ranks and the largest ratio `peak`.

    kl: k3 a token; kl_sequence: k1 summed over a response, mean over samples (nats a response, signed); entropy: mean
    -logprob of the sampled tokens (an estimate); ratio_*: learner over engine probability; effective_sample_size:
    share of tokens that the uncapped ratios leave, (sum r)^2 / (n sum r^2); mismatch_kl: k3 estimate of
    KL(engine || learner).
    """
    part = dict(zip(SUMS, sums.tolist(), strict=True))
    tokens, samples = max(1.0, part["response_tokens"]), max(1.0, part["samples"])
    squares = tokens * part["ratio_squared"]
    return {
        "loss": part["loss"],
        "policy_loss": part["policy_loss"],
        "kl_loss": part["kl_loss"],
        "kl": part["kl_k3"] / tokens,
        "kl_sequence": part["kl_k1"] / samples,
        "entropy": part["surprise"] / tokens,
        "ratio_mean": part["ratio"] / tokens,
        "ratio_max": peak,
        "effective_sample_size": part["ratio"] ** 2 / squares if squares > 0 else 0.0,
        "mismatch_kl": part["mismatch"] / tokens,
        "clip_share": part["clipped"] / tokens,
        "cap_share": part["capped"] / tokens,
        "learner_tokens": part["tokens"],
    }
