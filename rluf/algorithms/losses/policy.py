"""The loss of a micro-batch: a policy term by name, correction for the engine's own probabilities, KL to the reference.

All functions take log-probabilities in nats over K response tokens and return one value a token; `policy_loss` weighs
and sums them. Losses are minimised.

One batch, one update (staleness 0): the learner's own current log-probabilities, detached, are the old policy. The
ratio is then 1 with a gradient and never clips; the engine's log-probabilities only say how far the sampler was from
the learner (another kernel, another rounding), which truncated importance sampling corrects.

Stale batches (staleness above 0): the engine's log-probabilities are the old policy, so the clipped ratio covers both
the age of the batch and the engine's difference, and no further correction applies, but for REINFORCE, which has no
ratio of its own.

Demonstrations (responses of the log, without rollout log-probabilities) count as if the learner itself had just
sampled them: with advantage 1 their gradient is that of the mean log-likelihood, which InstructGPT (arXiv 2203.02155,
eq. 2) mixes into its policy loss in the same way. They take no part in the KL nor in the metrics of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from rluf.algorithms.advantages import Drift
from rluf.algorithms.batch import Batch
from rluf.algorithms.losses.cispo import cispo
from rluf.algorithms.losses.gspo import gspo
from rluf.algorithms.losses.importance_correction import importance_weights
from rluf.algorithms.losses.kl import kl_estimate
from rluf.algorithms.losses.ppo import ppo
from rluf.algorithms.losses.reinforce import reinforce
from rluf.algorithms.losses.sequences import still_to_come
from rluf.config.policy import AlgorithmSettings

Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor, AlgorithmSettings], tuple[Tensor, Tensor]]

LOSSES: Mapping[str, Surrogate] = MappingProxyType({"ppo": ppo, "gspo": gspo, "cispo": cispo, "reinforce": reinforce})
"""Policy loss by name: (logprobs, old logprobs, advantages, sequence numbers, settings) -> loss [K], clipped [K]."""


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
    "demonstrated",
    "demonstration_tokens",
)
"""Names of LossResult.sums, in order."""


def policy_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    batch: Batch,
    algorithm: AlgorithmSettings,
    *,
    loss: str = "ppo",
    kl_coef: float | None = None,
    slope: float = 0.0,
) -> LossResult:
    """Sum over tokens of loss_weights * (importance * policy term + KL coefficient * KL estimate).

    `logprobs` [K] (with gradient) and `reference_logprobs` [K] are those of `batch.targets`. The sum over all
    micro-batches and ranks of a step is the step's loss. `loss` names the policy term (LOSSES), `kl_coef` replaces the
    settings' own (0 where the KL is in the reward), `slope` takes off each token's advantage that many times the KL
    still to come in its response (k1 of the engine's logprobs).
    """
    on_policy = algorithm.staleness == 0
    sampled = ~batch.rollout_logprobs.isnan()
    rollout = torch.where(sampled, batch.rollout_logprobs, logprobs.detach())
    old = logprobs.detach() if on_policy else rollout
    gains = batch.advantages
    if slope:
        gains = gains - slope * kl_to_go(reference_logprobs, batch).to(gains.dtype)
    surrogate, clipped = LOSSES[loss](logprobs, old, gains, batch.sequences, algorithm)
    if on_policy or loss == "reinforce":  # other losses have the ratio to the engine in themselves
        surrogate = surrogate * importance_weights(
            logprobs, rollout, batch.sequences, kind=algorithm.importance, cap=algorithm.importance_cap
        )
    kl = sampled * kl_estimate(logprobs, reference_logprobs, algorithm.kl_estimator)
    policy_part = (batch.loss_weights * surrogate).sum()
    kl_part = (algorithm.kl_coef if kl_coef is None else kl_coef) * (batch.loss_weights * kl).sum()
    total = policy_part + kl_part
    with torch.no_grad():
        counts = (sampled & (batch.loss_weights > 0)).float()
        shown = (~sampled).float()
        log_ratio = logprobs - rollout
        ratio = log_ratio.exp() * counts
        values = (
            total,
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
            torch.as_tensor(float(batch.sequences[counts > 0].unique().numel()), device=total.device),
            torch.as_tensor(float(batch.tokens), device=total.device),
            -(logprobs * shown).sum(),
            shown.sum(),
        )
        sums = torch.stack([value.detach().double() for value in values])
    return LossResult(total, sums, ratio.max().double())


def kl_to_go(reference_logprobs: Tensor, batch: Batch) -> Tensor:
    """k1 of the engine's logprobs from each token to the end of its response [K], float64; 0 in demonstrations."""
    drift = (batch.rollout_logprobs - reference_logprobs).nan_to_num(0.0)
    return still_to_come(drift, batch.sequences)


def drifts_of(reference_logprobs: Tensor, batch: Batch, logprobs: Tensor | None = None) -> list[Drift]:
    """Drift of each response of a packed micro-batch [N], from the engine's logprobs or from `logprobs` [K] given."""
    own = batch.rollout_logprobs if logprobs is None else logprobs
    drift = (own - reference_logprobs).nan_to_num(0.0).double()
    togo = still_to_come(drift, batch.sequences)
    count = int(batch.sequences[-1]) + 1
    sums = [drift.new_zeros(count).index_add(0, batch.sequences, v).tolist() for v in (drift, togo, togo.square())]
    return [Drift(*parts) for parts in zip(*sums, strict=True)]


def kl_by_response(reference_logprobs: Tensor, batch: Batch, logprobs: Tensor) -> Tensor:
    """k1 of `logprobs` [K] to the reference, summed over each response of a packed micro-batch [N], nats, signed."""
    drift = (logprobs.detach() - reference_logprobs).double()
    return drift.new_zeros(int(batch.sequences[-1]) + 1).index_add(0, batch.sequences, drift)


def metrics(sums: Tensor, peak: float) -> dict[str, float]:
    """Metrics of a step from the `sums` of all its micro-batches and ranks and the largest ratio `peak`.

    kl: k3 a token; kl_sequence: k1 summed over a response, mean over samples (nats a response, signed); entropy: mean
    -logprob of the sampled tokens (an estimate); ratio_*: learner over engine probability; effective_sample_size:
    share of tokens that the uncapped ratios leave, (sum r)^2 / (n sum r^2); mismatch_kl: k3 estimate of
    KL(engine || learner); demonstration_nll: mean -logprob of the demonstrations' tokens, if there were any.
    """
    part = dict(zip(SUMS, sums.tolist(), strict=True))
    tokens, samples = max(1.0, part["response_tokens"]), max(1.0, part["samples"])
    squares = tokens * part["ratio_squared"]
    shown = part["demonstration_tokens"]
    imitation = {"demonstration_nll": part["demonstrated"] / shown} if shown else {}
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
        **imitation,
    }
