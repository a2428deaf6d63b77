"""Algorithm registry: advantage estimator, policy loss, loss aggregation and requirements of each `algorithm.name`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

from rluf.algorithms.advantages import AdvantageInputs, compute_advantages, find_advantage_estimator
from rluf.config.policy import POLICY_LOSS_NAMES, AlgorithmSettings
from rluf.errors import SettingsError
from rluf.utils.plugins import load_plugin

LossAggregation = Literal["sequence_mean", "token_mean", "constant", "sequence_sum", "prompt_mean"]
POLICY_LOSS_SIGNATURE = (
    "a function (logprobs, old logprobs, advantages, sequence index, settings) -> (loss, is clipped)"
)


@dataclass(frozen=True, slots=True)
class AlgorithmSpec:
    """One published algorithm.

    `advantage_estimator` names an advantage estimator, `policy_loss` a policy loss, both from the registries or as
    package.module:function. `loss_aggregation` is the weight of
    a token of a response with n tokens in a step of N responses to P prompts: sequence_mean 1 / (n N), token_mean 1 /
    (all tokens), constant 1 / (longest response allowed * N), sequence_sum 1 / N, prompt_mean 1 / P.
    `needs_reference_kl`: advantages need the KL of each response to the reference. `dynamic_sampling`: groups without
    reward variance are dropped and replaced by others (DAPO). `uses_critic`: learners turn rewards into advantages per
    token with a critic (PPO). `offline`: trains on responses of the log, not on those of the policy (KTO, DPO, SFT).
    """

    advantage_estimator: str
    policy_loss: str
    loss_aggregation: LossAggregation
    needs_reference_kl: bool = False
    dynamic_sampling: bool = False
    uses_critic: bool = False
    offline: bool = False


ALGORITHMS: Mapping[str, AlgorithmSpec] = MappingProxyType(
    {
        "grpo": AlgorithmSpec("grpo", "ppo", "sequence_mean"),
        "ppo": AlgorithmSpec("gae", "ppo", "token_mean", uses_critic=True),
        "dr_grpo": AlgorithmSpec("dr_grpo", "ppo", "constant"),
        "rloo": AlgorithmSpec("rloo", "reinforce", "sequence_sum"),
        "reinforce_pp": AlgorithmSpec("reinforce_pp", "ppo", "token_mean"),
        "reinforce_pp_baseline": AlgorithmSpec("reinforce_pp_baseline", "ppo", "token_mean"),
        "dapo": AlgorithmSpec("grpo", "ppo", "token_mean", dynamic_sampling=True),
        "lite_ppo": AlgorithmSpec("lite_ppo", "ppo", "token_mean"),
        "crpg": AlgorithmSpec("crpg", "reinforce", "sequence_mean", needs_reference_kl=True),
        "crraft": AlgorithmSpec("crraft", "reinforce", "prompt_mean", needs_reference_kl=True),
        "codpo": AlgorithmSpec("codpo", "reinforce", "prompt_mean", needs_reference_kl=True),
        "kto": AlgorithmSpec("kto", "reinforce", "sequence_sum", offline=True),
        "dpo": AlgorithmSpec("dpo", "reinforce", "prompt_mean", offline=True),
        "sft": AlgorithmSpec("sft", "reinforce", "token_mean", offline=True),
    }
)
"""Algorithm by the value of `algorithm.name`."""


@dataclass(frozen=True, slots=True)
class LearnerInputs:
    """Per-step learner inputs other than the samples.

    `advantages` [groups][samples] apply to every token of a response, `loss_weights` [groups][samples] are the share of
    each of its tokens in the loss. `policy_loss` names the loss; `kl_to_go_coef` is that of Advantages; `loss_kl_coef`
    is the coefficient of the KL in the loss (0 where the KL is in the reward). With `uses_critic`, `advantages` are
    still rewards: the learners subtract `reward_kl_coef` times the KL of each token and estimate advantages with their
    critic.
    """

    advantages: list[list[float]]
    loss_weights: list[list[float]]
    policy_loss: str = "ppo"
    loss_kl_coef: float = 0.0
    kl_to_go_coef: float = 0.0
    uses_critic: bool = False
    reward_kl_coef: float = 0.0


def find_algorithm(name: str) -> AlgorithmSpec:
    """The algorithm that `algorithm.name` selects: a name, or the package.module:name of a plug-in.

    A plug-in is an AlgorithmSpec, or a function (an advantage estimator) that is used with the loss and the aggregation
    of GRPO. Raises SettingsError for an unknown name.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    signature = "an AlgorithmSpec or a function (AdvantageInputs) -> Advantages"
    plugin = load_plugin(
        name,
        (AlgorithmSpec, Callable),
        kind="algorithm",
        known_names=ALGORITHMS,
        signature=signature,
        argument_count=1,
    )
    return plugin if isinstance(plugin, AlgorithmSpec) else AlgorithmSpec(name, "ppo", "sequence_mean")


def check_algorithm(algorithm: AlgorithmSettings) -> None:
    """Load the algorithm, its advantage estimator and its policy loss. Raises SettingsError for one that is unknown."""
    spec = find_algorithm(algorithm.name)
    find_advantage_estimator(spec.advantage_estimator)
    policy_loss = algorithm.loss or spec.policy_loss
    if policy_loss not in POLICY_LOSS_NAMES:
        signature = POLICY_LOSS_SIGNATURE
        load_plugin(
            policy_loss, kind="policy loss", known_names=POLICY_LOSS_NAMES, signature=signature, argument_count=5
        )
    if spec.loss_aggregation not in get_args(LossAggregation):
        raise SettingsError(
            f"algorithm {algorithm.name!r} has the loss aggregation {spec.loss_aggregation!r}; choose one of "
            f"{', '.join(get_args(LossAggregation))}"
        )


def requires_reference_kl(algorithm: AlgorithmSettings) -> bool:
    """Whether advantages need the log-probabilities of the reference policy."""
    spec = find_algorithm(algorithm.name)
    # With a critic the KL in the reward is applied per token by the learners, which have the reference logprobs.
    return spec.needs_reference_kl or (
        algorithm.kl_penalty == "reward" and algorithm.kl_coef > 0 and not spec.uses_critic
    )


def requires_reference(algorithm: AlgorithmSettings) -> bool:
    """Whether the learners need the reference policy at all; without it there is no KL metric."""
    spec = find_algorithm(algorithm.name)
    if spec.offline:
        return spec.advantage_estimator != "sft"
    return algorithm.kl_coef > 0 or algorithm.kl_budget is not None or spec.needs_reference_kl


def build_learner_inputs(
    algorithm: AlgorithmSettings,
    advantage_inputs: AdvantageInputs,
    *,
    max_response_tokens: int,
    kl_coef: float,
    use_gdpo: bool = False,
    demonstration_lengths: Sequence[int] = (),
) -> LearnerInputs:
    """Advantages by the estimator of the algorithm (by GDPO with `use_gdpo`) and loss weights by its aggregation.

    `max_response_tokens` is the longest response allowed, `kl_coef` the current KL coefficient. Each demonstration, of
    `demonstration_lengths` tokens, is added as a group of one response with advantage 1.
    """
    spec = find_algorithm(algorithm.name)
    advantages = compute_advantages("gdpo" if use_gdpo else spec.advantage_estimator, advantage_inputs)
    lengths = [*map(list, advantage_inputs.response_lengths), *([length] for length in demonstration_lengths)]
    policy_loss = algorithm.loss or spec.policy_loss
    # GSPO has one ratio per response, so every response must have the same weight whatever the algorithm says.
    loss_aggregation = "sequence_mean" if policy_loss == "gspo" else spec.loss_aggregation
    return LearnerInputs(
        advantages=[*advantages.sample_advantages, *([1.0] for _ in demonstration_lengths)],
        loss_weights=compute_token_weights(loss_aggregation, lengths, max_response_tokens),
        policy_loss=policy_loss,
        loss_kl_coef=kl_coef if algorithm.kl_penalty != "reward" else 0.0,
        kl_to_go_coef=advantages.kl_to_go_coef,
        uses_critic=spec.uses_critic,
        reward_kl_coef=kl_coef if spec.uses_critic and algorithm.kl_penalty == "reward" else 0.0,
    )


def mask_truncated(learner_inputs: LearnerInputs, finished: Sequence[Sequence[bool]]) -> LearnerInputs:
    """Learner inputs in which truncated responses have no loss; `finished` [groups][samples].

    The other weights stay as they are, and the advantages too: a truncated response still counts in the mean of its
    group. As TRL's mask_truncated_completions and the overlong filtering of DAPO, arXiv 2503.14476, section 3.4.
    """
    loss_weights = [
        [weight if is_finished else 0.0 for weight, is_finished in zip(weights, flags, strict=True)]
        for weights, flags in zip(learner_inputs.loss_weights, finished, strict=True)
    ]
    return replace(learner_inputs, loss_weights=loss_weights)


def split_mini_batches(group_count: int, mini_batch_count: int) -> list[list[int]]:
    """Indices of the groups of each mini-batch, dealt in turn, so that sizes differ by at most one; none is empty."""
    count = max(1, min(mini_batch_count, group_count))
    return [list(range(start, group_count, count)) for start in range(count)]


def scale_mini_batch_weights(
    learner_inputs: LearnerInputs, response_lengths: Sequence[Sequence[int]], mini_batches: Sequence[Sequence[int]]
) -> LearnerInputs:
    """Learner inputs whose loss weights add up in each mini-batch to what they add up to over the step.

    The loss of a mini-batch is then a mean of the same kind as that of a whole batch.
    """
    if len(mini_batches) == 1:
        return learner_inputs

    def sum_weights(groups: Iterable[int]) -> float:
        return math.fsum(
            weight * length
            for group in groups
            for weight, length in zip(learner_inputs.loss_weights[group], response_lengths[group], strict=True)
        )

    total = sum_weights(range(len(response_lengths)))
    loss_weights = [list(weights) for weights in learner_inputs.loss_weights]
    for groups in mini_batches:
        own_total = sum_weights(groups)
        for group in groups:
            loss_weights[group] = [weight * total / own_total if own_total else 0.0 for weight in loss_weights[group]]
    return replace(learner_inputs, loss_weights=loss_weights)


def compute_token_weights(
    loss_aggregation: LossAggregation, response_lengths: Sequence[Sequence[int]], max_response_tokens: int
) -> list[list[float]]:
    """Loss weight of a token of each response [groups][samples], see AlgorithmSpec; lengths are in tokens.

    Sources: mean by sequence as in GRPO, arXiv 2402.03300; by token as in DAPO, arXiv 2503.14476; a constant as in
    Dr. GRPO, arXiv 2503.20783.
    """
    sample_count, token_count = sum(map(len, response_lengths)), sum(map(sum, response_lengths))
    if loss_aggregation == "sequence_mean":
        return [[1.0 / (max(1, length) * sample_count) for length in lengths] for lengths in response_lengths]
    denominators = {
        "token_mean": max(1, token_count),
        "constant": max(1, max_response_tokens) * max(1, sample_count),
        "sequence_sum": max(1, sample_count),
        "prompt_mean": max(1, len(response_lengths)),
    }
    token_weight = 1.0 / denominators[loss_aggregation]
    return [[token_weight] * len(lengths) for lengths in response_lengths]
