"""Loss of a micro-batch: a policy loss by name, importance correction, and the KL to the reference policy.

All functions take log-probabilities in nats over K response tokens and return one value per token;
compute_policy_loss weighs and sums them. Losses are minimized.

The old policy of the ratio is the learner before the first update on the batch (algorithm.old_policy). With one update
that is the detached current log-probability: the ratio is 1 with a gradient and never clips. With several, the learner
computes it once before the first. The engine's log-probabilities (the behavior policy) then only measure how far the
sampler is from the learner (other kernels, other rounding, older weights), which importance_correction corrects; so the
two are decoupled, as in AReaL, arXiv 2505.24298, section 5.2.

By default stale batches (max_staleness above 0) with one update have the engine as old policy: the clipped ratio covers
both the age of the batch and the difference between the engine and the learner. No further correction applies, except
for REINFORCE, which has no ratio.

Demonstrations (responses of the log, without rollout log-probabilities) count as if the learner had just sampled them:
with advantage 1 their gradient is that of the mean log-likelihood, which InstructGPT (arXiv 2203.02155, eq. 2) mixes
into its policy loss in the same way. They are excluded from the KL and from the metrics of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rluf.algorithms.advantages import SampleKL
from rluf.algorithms.packing import PackedBatch
from rluf.algorithms.registry import POLICY_LOSS_SIGNATURE
from rluf.config.policy import IMPORTANCE_CORRECTIONS, AlgorithmSettings
from rluf.errors import SettingsError
from rluf.utils.plugins import load_plugin

DUAL_CLIP = 3.0
"""Bound of the clipped loss in units of |advantage| where that is negative, as in verl (clip_ratio_c)."""
KL_ERROR_CLIP = 0.2
"""Largest relative error of the KL that one update of the coefficient reacts to."""
MAX_LOG_RATIO, MAX_K3 = 20.0, 10.0
"""Bounds of every log ratio before exp() and of k3 in nats, as in verl and NeMo-RL: exp(30) in k3 would end a run, and
the gradient of exp(89), which float32 cannot hold, is NaN even where the ratio is clipped."""
GEOMETRIC_CAP = 1.05
"""Cap of the geometric mean of a response's ratios. It averages over tokens, so rounding stays within 1 +- 0.02."""
METRIC_SUM_NAMES = (
    "loss", "policy_loss", "kl_loss", "kl_k3", "kl_k1", "negative_logprob", "ratio", "ratio_squared", "mismatch_kl",
    "clipped_tokens", "capped_tokens", "response_tokens", "samples", "batch_tokens", "demonstration_nll",
    "demonstration_tokens",
)  # fmt: skip
"""Names of LossResult.metric_sums, in order."""


def estimate_kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate [K] of KL(policy || reference) from the policy's own samples, l = logprobs - reference_logprobs.

    k1 = l (unbiased, signed; no gradient on average as a loss), k2 = l^2 / 2 (its gradient is that of the KL, on
    policy), k3 = exp(-l) - 1 + l (unbiased, never negative; GRPO's; at most MAX_K3). Source: J. Schulman,
    "Approximating KL divergence". Raises SettingsError for another name.
    """
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (torch.expm1(-bounded) + bounded).clamp(max=MAX_K3)
    raise SettingsError(f"algorithm.kl_penalty: expected k1, k2 or k3, got {estimator!r}")


def update_kl_coef(
    kl_coef: float, kl_per_token: float, target_kl: float | None, sample_count: int, horizon: int
) -> float:
    """KL coefficient after a step with `kl_per_token` nats per token; unchanged without a target.

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * min(1, samples / horizon)). Source: Ziegler et al., arXiv
    1909.08593, section 2.2; its published code has a horizon of 10,000 samples, which is 200 default steps.
    """
    if target_kl is None:
        return kl_coef
    relative_error = min(max(kl_per_token / target_kl - 1.0, -KL_ERROR_CLIP), KL_ERROR_CLIP)
    # A step of more than five horizons would make the coefficient negative.
    return kl_coef * (1.0 + relative_error * min(1.0, sample_count / horizon))


def ppo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) [K] and where the clip removed the gradient [K].

    rho = exp(logprobs - old_logprobs) per token. The loss of a token with A < 0 is at most DUAL_CLIP |A|.
    Source: arXiv 1707.06347, eq. 7; two clips as in DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729, eq. 5.
    """
    del sequence_index
    return clip_surrogate(compute_ratio(logprobs - old_logprobs), advantages, algorithm)


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """GSPO: the clipped surrogate [K] with one ratio per response, s_i = exp(mean of logprobs - old_logprobs).

    Requires the sequence_mean loss aggregation (token weight 1 / length), which build_learner_inputs selects. Source:
    arXiv 2507.18071, eq. 5 and 7.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return clip_surrogate(torch.exp(average_by_sequence(log_ratio, sequence_index)), advantages, algorithm)


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """CISPO: -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logprobs [K] and where the ratio was clipped [K].

    The clipped ratio is a constant weight, so a clipped token keeps its gradient. Source: MiniMax-M1, arXiv 2506.13585,
    eq. 4 and 5.
    """
    del sequence_index
    ratio = compute_ratio(logprobs.detach() - old_logprobs)
    ratio_weight = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    return -ratio_weight * advantages * logprobs, ratio_weight != ratio


def reinforce(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """-A logprobs [K], without any clip. Also the loss of CGPO's optimizers, whose advantages are their weights.

    Source: R. J. Williams, "Simple statistical gradient-following algorithms", 1992.
    """
    del old_logprobs, sequence_index, algorithm
    return -advantages * logprobs, torch.zeros_like(advantages, dtype=torch.bool)


def compute_ratio(log_ratio: Tensor) -> Tensor:
    """exp of log ratios [K], which are bounded first."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def clip_surrogate(ratio: Tensor, advantages: Tensor, algorithm: AlgorithmSettings) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate of the given ratios [K] and where a clip removed the gradient [K]."""
    unclipped = ratio * advantages
    bounded = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high) * advantages
    surrogate, is_clipped = torch.minimum(unclipped, bounded), bounded < unclipped
    # For A < 0 the minimum above is unbounded as the ratio grows: one stale token could dominate a step.
    floor = DUAL_CLIP * advantages
    below_floor = (advantages < 0) & (floor > surrogate)
    return -torch.where(below_floor, floor, surrogate), is_clipped | below_floor


def sum_by_sequence(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Sum of `values` [K] over the response of each token, repeated at its tokens [K].

    `sequence_index` [K] is the response that each token belongs to.
    """
    count = int(sequence_index.max()) + 1 if len(sequence_index) else 0
    return values.new_zeros(count).index_add(0, sequence_index, values)[sequence_index]


def average_by_sequence(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Mean of `values` [K] over the response of each token, repeated at its tokens [K]."""
    return sum_by_sequence(values, sequence_index) / sum_by_sequence(torch.ones_like(values), sequence_index)


def compute_suffix_sums(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Sum of `values` [K] from each token to the end of its response, itself included [K], float64.

    Tokens of a response are consecutive.
    """
    # Without a loop: the total of the response minus an exclusive prefix sum, counted from the start of the response.
    # In float64, since prefix sums over the whole micro-batch are large and their difference is small.
    values = values.double()
    exclusive_prefix = values.cumsum(0) - values
    is_first_token = torch.ones_like(sequence_index, dtype=torch.bool)
    is_first_token[1:] = sequence_index[1:] != sequence_index[:-1]
    start_prefix = exclusive_prefix
    if len(values):
        start_prefix = exclusive_prefix[is_first_token][is_first_token.cumsum(0) - 1]
    return sum_by_sequence(values, sequence_index) - (exclusive_prefix - start_prefix)


PolicyLossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, AlgorithmSettings], tuple[Tensor, Tensor]]

POLICY_LOSSES: Mapping[str, PolicyLossFunction] = MappingProxyType(
    {"ppo": ppo, "gspo": gspo, "cispo": cispo, "reinforce": reinforce}
)
"""Policy loss by name: (logprobs, old logprobs, advantages, sequence index, settings) -> loss [K], is clipped [K]."""


@dataclass(frozen=True, slots=True)
class LossResult:
    """Loss of a micro-batch (scalar, with gradient) and its metrics as sums that add up over ranks.

    `metric_sums` [len(METRIC_SUM_NAMES)] add up over micro-batches and ranks; `max_ratio` is the largest ratio of
    learner to engine probability.
    """

    loss: Tensor
    metric_sums: Tensor
    max_ratio: Tensor


def compute_policy_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor | None,
    batch: PackedBatch,
    algorithm: AlgorithmSettings,
    *,
    loss_name: str = "ppo",
    kl_coef: float | None = None,
    kl_to_go_coef: float = 0.0,
    start_logprobs: Tensor | None = None,
) -> LossResult:
    """Sum over tokens of loss_weights * (importance weight * policy loss + KL coefficient * KL estimate).

    `logprobs` [K] (with gradient) and `reference_logprobs` [K] are those of `batch.target_ids`; without a reference the
    KL is 0. `start_logprobs` [K] are the learner's before the first update on the batch, by default `logprobs`. The sum
    over all micro-batches and ranks of a step is the loss of the step. `loss_name` is that of find_policy_loss,
    `kl_coef` replaces that of the settings (0 where the KL is in the reward). The advantage of each token is reduced
    by `kl_to_go_coef` times its KL to go (k1 of the engine's logprobs).
    """
    has_learner_ratio = algorithm.has_learner_ratio(loss_name)
    is_sampled = ~batch.rollout_logprobs.isnan()
    learner_logprobs = logprobs.detach() if start_logprobs is None else start_logprobs
    reference_logprobs = logprobs.detach() if reference_logprobs is None else reference_logprobs
    # A demonstration has no engine's logprob: it counts as if the learner had just sampled it, at every update.
    rollout_logprobs = torch.where(is_sampled, batch.rollout_logprobs, logprobs.detach())
    old_logprobs = (
        torch.where(is_sampled, learner_logprobs, logprobs.detach()) if has_learner_ratio else rollout_logprobs
    )
    advantages = batch.advantages
    if kl_to_go_coef:
        advantages = advantages - kl_to_go_coef * compute_kl_to_go(reference_logprobs, batch).to(advantages.dtype)
    loss_function = find_policy_loss(loss_name)
    token_loss, is_clipped = loss_function(logprobs, old_logprobs, advantages, batch.sequence_index, algorithm)
    if algorithm.entropy_coef:
        token_loss = token_loss + algorithm.entropy_coef * estimate_negative_entropy(logprobs, is_sampled)
    is_capped = torch.zeros_like(is_sampled)
    # A ratio that is relative to the engine would be squared by the correction.
    if algorithm.importance_correction != "off" and (has_learner_ratio or loss_name == "reinforce"):
        # REINFORCE has no ratio, so that its correction covers the updates on this batch as well.
        importance_weights = compute_importance_weights(
            logprobs if loss_name == "reinforce" else old_logprobs,
            rollout_logprobs,
            batch.sequence_index,
            correction=algorithm.importance_correction,
            ratio_cap=algorithm.importance_correction_cap,
        )
        token_loss = token_loss * importance_weights
        is_capped = (importance_weights == 0) | (importance_weights >= algorithm.importance_correction_cap)
    token_kl = is_sampled * estimate_kl(logprobs, reference_logprobs, algorithm.kl_estimator)
    policy_loss = (batch.loss_weights * token_loss).sum()
    kl_loss = (algorithm.kl_coef if kl_coef is None else kl_coef) * (batch.loss_weights * token_kl).sum()
    total_loss = policy_loss + kl_loss
    with torch.no_grad():
        counted = (is_sampled & (batch.loss_weights > 0)).float()
        demonstrated = (~is_sampled).float()
        log_ratio = (logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp() * counted
        values = (
            total_loss,
            policy_loss,
            kl_loss,
            (estimate_kl(logprobs, reference_logprobs, "k3") * counted).sum(),
            ((logprobs - reference_logprobs) * counted).sum(),
            -(logprobs * counted).sum(),
            ratio.sum(),
            ratio.square().sum(),
            ((torch.expm1(log_ratio) - log_ratio) * counted).sum(),
            (is_clipped * counted).sum(),
            (is_capped * counted).sum(),
            counted.sum(),
            torch.as_tensor(float(batch.sequence_index[counted > 0].unique().numel()), device=total_loss.device),
            torch.as_tensor(float(batch.token_count), device=total_loss.device),
            -(logprobs * demonstrated).sum(),
            demonstrated.sum(),
        )
        # One float64 vector, so that ranks need a single all-reduce and counts stay exact.
        metric_sums = torch.stack([value.detach().double() for value in values])
    return LossResult(total_loss, metric_sums, ratio.max().double())


def find_policy_loss(loss_name: str) -> PolicyLossFunction:
    """The policy loss of a name or package.module:function. Raises SettingsError for an unknown name."""
    if loss_name in POLICY_LOSSES:
        return POLICY_LOSSES[loss_name]
    loss_function: PolicyLossFunction = load_plugin(
        loss_name,
        kind="policy loss",
        known_names=POLICY_LOSSES,
        signature=POLICY_LOSS_SIGNATURE,
        argument_count=5,
    )

    def check_loss(logprobs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        result: Any = loss_function(logprobs, *arguments)
        tensors = list(result) if isinstance(result, tuple | list) else [result]
        # A mean would be counted for every token, and a column would become a square.
        if [getattr(tensor, "shape", None) for tensor in tensors] != [logprobs.shape] * 2 or (
            logprobs.requires_grad and not tensors[0].requires_grad
        ):
            shapes = [list(tensor.shape) if isinstance(tensor, Tensor) else tensor for tensor in tensors]
            raise SettingsError(
                f"policy loss {loss_name!r}: expected two tensors of shape {list(logprobs.shape)}, the loss of each "
                f"token with its gradient and where a clip removed it, got {str(shapes)[:200]}"
            )
        return tensors[0], tensors[1]

    return check_loss


def compute_importance_weights(
    logprobs: Tensor, rollout_logprobs: Tensor, sequence_index: Tensor, *, correction: str, ratio_cap: float
) -> Tensor:
    """Importance weights [K], without gradient, from r = learner probability / engine probability.

    token: min(r, cap) (truncated importance sampling); sequence: the same with the product of r over the response;
    mask: r where 1 / cap <= r <= cap, else 0 (as IcePop); sequence_mask: the product over the response where it is at
    most cap, else 0; geometric: min(g, cap), g the geometric mean of r over the response, which does not degenerate
    with its length; geometric_mask: min(r, cap) where 1 / GEOMETRIC_CAP <= g <= GEOMETRIC_CAP, else 0 (the
    seq-mask-tis of OpenRLHF). Sources: Yao et al., "Your efficient RL framework secretly brings you off-policy
    RL training", 2025; Ling Team, "Every step evolves" (IcePop), arXiv 2510.18855. Raises SettingsError for another
    name.
    """
    log_ratio = logprobs.detach() - rollout_logprobs
    if correction == "token":
        return torch.exp(log_ratio).clamp(max=ratio_cap)
    if correction == "mask":
        ratio = torch.exp(log_ratio)
        return torch.where((ratio <= ratio_cap) & (ratio >= 1.0 / ratio_cap), ratio, torch.zeros_like(ratio))
    if correction in ("geometric", "geometric_mask"):
        mean_log_ratio = average_by_sequence(log_ratio, sequence_index)
        if correction == "geometric":
            return torch.exp(mean_log_ratio).clamp(max=ratio_cap)
        # The mean over the response decides: one rare token must not mask all of a long response.
        is_near = mean_log_ratio.abs() <= math.log(GEOMETRIC_CAP)
        return torch.where(is_near, torch.exp(log_ratio).clamp(max=ratio_cap), torch.zeros_like(log_ratio))
    # The product of hundreds of ratios may overflow to inf, which the cap bounds and the mask removes.
    sequence_ratio = torch.exp(sum_by_sequence(log_ratio, sequence_index))
    if correction == "sequence":
        return sequence_ratio.clamp(max=ratio_cap)
    if correction == "sequence_mask":
        return torch.where(sequence_ratio <= ratio_cap, sequence_ratio, torch.zeros_like(sequence_ratio))
    raise SettingsError(
        f"algorithm.importance_correction: expected {', '.join(IMPORTANCE_CORRECTIONS)}, got {correction!r}"
    )


def estimate_negative_entropy(logprobs: Tensor, is_sampled: Tensor) -> Tensor:
    """Surrogate [K] whose gradient is an estimate of that of minus the entropy, from the sampled tokens.

    The gradient of -H is E[(log pi + c) grad log pi] for any c; c is minus the mean log-probability, which reduces
    variance. No distribution over the vocabulary is needed. 0 for tokens that the policy did not sample.
    """
    values = logprobs.detach()
    mean = (values * is_sampled).sum() / is_sampled.sum().clamp(min=1)
    return is_sampled * (values - mean) * logprobs


def compute_kl_to_go(reference_logprobs: Tensor, batch: PackedBatch) -> Tensor:
    """KL to go [K], float64: k1 of the engine's logprobs from each token to its response's end; 0 in demonstrations."""
    # Demonstrations have NaN rollout logprobs, which would spread through the cumulative sum to every later token.
    token_kl = (batch.rollout_logprobs - reference_logprobs).nan_to_num(0.0)
    return compute_suffix_sums(token_kl, batch.sequence_index)


def compute_reference_kl(
    reference_logprobs: Tensor, batch: PackedBatch, logprobs: Tensor | None = None
) -> list[SampleKL]:
    """KL statistics of each response of a packed micro-batch [N], from `logprobs` [K] or else the engine's."""
    own_logprobs = batch.rollout_logprobs if logprobs is None else logprobs
    token_kl = (own_logprobs - reference_logprobs).nan_to_num(0.0).double()
    kl_to_go = compute_suffix_sums(token_kl, batch.sequence_index)
    response_count = int(batch.sequence_index[-1]) + 1
    sums = [
        token_kl.new_zeros(response_count).index_add(0, batch.sequence_index, values).tolist()
        for values in (token_kl, kl_to_go, kl_to_go.square())
    ]
    return [SampleKL(*response_sums) for response_sums in zip(*sums, strict=True)]


def sum_kl_by_response(reference_logprobs: Tensor, batch: PackedBatch, logprobs: Tensor) -> Tensor:
    """k1 of `logprobs` [K] to the reference, summed over each response of a packed micro-batch [N], nats, signed."""
    token_kl = (logprobs.detach() - reference_logprobs).double()
    return token_kl.new_zeros(int(batch.sequence_index[-1]) + 1).index_add(0, batch.sequence_index, token_kl)


def compute_loss_metrics(
    metric_sums: Tensor, max_ratio: float, *, update_count: int = 1, has_reference: bool = True
) -> dict[str, float]:
    """Metrics of a step from the `metric_sums` of all its micro-batches and ranks and the largest ratio.

    Losses are means over the `update_count` updates. Without a reference there is no KL.
    kl: k3 per token; kl_sequence: k1 summed over a response, mean over samples (nats per response, signed); entropy:
    mean -logprob of the sampled tokens (an estimate); ratio_*: learner over engine probability; effective_sample_size:
    share of tokens that the uncapped ratios leave, (sum r)^2 / (n sum r^2); ratio_capped_fraction: share of tokens
    whose importance weight is at the cap or 0; mismatch_kl: k3 estimate of KL(engine || learner); demonstration_nll:
    mean -logprob of the demonstrations' tokens, if there were any.
    """
    sums = dict(zip(METRIC_SUM_NAMES, metric_sums.tolist(), strict=True))
    token_count, sample_count = max(1.0, sums["response_tokens"]), max(1.0, sums["samples"])
    ratio_squares = token_count * sums["ratio_squared"]
    demonstration_metrics = {}
    if sums["demonstration_tokens"]:
        demonstration_metrics["demonstration_nll"] = sums["demonstration_nll"] / sums["demonstration_tokens"]
    kl_metrics = {
        "kl_loss": sums["kl_loss"] / update_count,
        "kl": sums["kl_k3"] / token_count,
        "kl_sequence": sums["kl_k1"] / sample_count,
    }
    return {
        "loss": sums["loss"] / update_count,
        "policy_loss": sums["policy_loss"] / update_count,
        **(kl_metrics if has_reference else {}),
        "entropy": sums["negative_logprob"] / token_count,
        "ratio_mean": sums["ratio"] / token_count,
        "ratio_max": max_ratio,
        "effective_sample_size": sums["ratio"] ** 2 / ratio_squares if ratio_squares > 0 else 0.0,
        "mismatch_kl": sums["mismatch_kl"] / token_count,
        "clip_share": sums["clipped_tokens"] / token_count,
        "ratio_capped_fraction": sums["capped_tokens"] / token_count,
        "learner_tokens": sums["batch_tokens"],
        **demonstration_metrics,
    }
