"""Advantage estimators by name, with one signature: the AdvantageInputs of a step to Advantages.

They are plain float arithmetic on a few numbers per sample, in double precision, so that the driver needs no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from types import MappingProxyType
from typing import Any

from rluf.errors import SettingsError
from rluf.utils.plugins import PluginErrors, load_plugin

MAX_KL_PER_TOKEN = 0.2
"""KL to the reference policy in nats, per token of the longest response, above which CGPO gives no reward."""

SampleValues = Sequence[Sequence[float]]
"""One number per sample: [groups][samples]."""
VARIANCE_EPSILON = 1e-8
GRPO_STD_EPSILON = 1e-6
"""Added to GRPO's standard deviation of a group, as in its reference implementations."""
STD_EPSILON = 1e-4
"""Added to the standard deviations of Lite-PPO and GDPO, as in TRL."""
CODPO_BETA = 0.1
"""Inverse temperature of CODPO's preference loss."""
CODPO_LIKELIHOOD_WEIGHT = 5.0
"""Weight of the mean log-likelihood of CODPO's chosen response."""
MAX_EXPONENT = 700.0
"""Largest argument of exp() that does not overflow a float64."""
KTO_BETA = 0.1
"""Inverse temperature of KTO's loss."""
GATE_PENALTY = 2.0
"""Advantage by which a response that failed a judge differs from those that passed, in the unit of the estimator. For
GRPO that unit is a standard deviation: the worst of four responses that differ evenly is 1.3 below their mean."""
JUDGE_AWARE_ESTIMATORS = ("crpg", "crraft", "codpo", "gae")
"""Estimators that read the verdicts themselves, or whose critic gets the gate as reward (gae)."""
DPO_BETA = 0.1
"""Inverse temperature of DPO's loss."""
LIKED_THRESHOLD = 0.5
"""Rewards of logged responses are 1 (liked, chosen) or 0 (not liked, rejected)."""


@dataclass(frozen=True, slots=True)
class SampleKL:
    """KL statistics of one response in nats, from l = log p_rollout - log p_reference per token.

    `kl_sum` is the sum of l over the response (k1). `kl_to_go_sum` and `kl_to_go_squared_sum` are sums over its tokens
    of the KL to go (the sum of l from that token to the end, itself included) and of its square.
    """

    kl_sum: float
    kl_to_go_sum: float = 0.0
    kl_to_go_squared_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """Driver-side numbers of one step, by group and sample.

    `rewards` [groups][samples] are aggregated over objectives; `response_lengths` are in tokens. `sample_kl` is set
    where the algorithm or `kl_coef` needs it. `passed_judges` marks responses that passed every judge (empty: all did).
    `objective_rewards` are normalized signals by objective, with one mapping of `objective_weights` per group (GDPO).
    `kl_coef` is the coefficient of the KL subtracted from the reward (0 where the KL is a term of the loss),
    `max_response_kl` the largest KL of a response in nats (CGPO), `mismatched_kl` the mean KL of responses paired with
    other prompts (KTO).
    """

    rewards: SampleValues
    response_lengths: Sequence[Sequence[int]] = ()
    sample_kl: Sequence[Sequence[SampleKL]] = ()
    passed_judges: Sequence[Sequence[bool]] = ()
    objective_rewards: Mapping[str, SampleValues] = field(default_factory=dict)
    objective_weights: Sequence[Mapping[str, float]] = ()
    kl_coef: float = 0.0
    max_response_kl: float = math.inf
    mismatched_kl: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on an empty group, a reward that is not finite, or a field of another shape than rewards."""
        for group_rewards in self.rewards:
            if not group_rewards or not all(map(math.isfinite, group_rewards)):
                raise ValueError(
                    f"advantages: expected at least one reward per group, all finite, got {list(group_rewards)}"
                )
        group_sizes = [len(group_rewards) for group_rewards in self.rewards]
        for field_name in ("response_lengths", "sample_kl", "passed_judges"):
            field_sizes = [len(group) for group in getattr(self, field_name)]
            # These fields are optional: empty means that the algorithm does not use them.
            if field_sizes and field_sizes != group_sizes:
                raise ValueError(f"{field_name}: expected the shape of rewards, {group_sizes}, got {field_sizes}")

    @property
    def kl_penalized_rewards(self) -> list[list[float]]:
        """Rewards minus kl_coef times the KL of each response (k1): the KL penalty at response level."""
        if not (self.kl_coef and self.sample_kl):
            return [list(group_rewards) for group_rewards in self.rewards]
        return [
            [reward - self.kl_coef * response_kl.kl_sum for reward, response_kl in zip(rewards, group_kl, strict=True)]
            for rewards, group_kl in zip(self.rewards, self.sample_kl, strict=True)
        ]

    def has_passed_judges(self, group_index: int, sample_index: int) -> bool:
        """Whether the sample passed every judge."""
        return self.passed_judges[group_index][sample_index] if self.passed_judges else True

    def get_response_kl(self, group_index: int, sample_index: int) -> float:
        """KL of the sample to the reference policy in nats; 0 where sample_kl is empty."""
        return self.sample_kl[group_index][sample_index].kl_sum if self.sample_kl else 0.0


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantage of each sample [groups][samples].

    The advantage of one token is `sample_advantages` minus `kl_to_go_coef` times the KL to go at that token.
    """

    sample_advantages: list[list[float]]
    kl_to_go_coef: float = 0.0


def subtract_mean(values: Sequence[float]) -> list[float]:
    """Values minus their mean; exact zeros where all are equal."""
    # The mean of equal floats can differ from them in the last bit, and dividing by a standard deviation of the same
    # size would turn that bit into an advantage of order 1.
    if min(values) == max(values):
        return [0.0] * len(values)
    mean = fmean(values)
    return [value - mean for value in values]


def compute_sample_std(values: Sequence[float]) -> float:
    """Standard deviation with n - 1 (as torch.std); 0 for fewer than two values or equal ones."""
    if len(values) < 2 or min(values) == max(values):
        return 0.0
    mean = fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def reinforce_pp(inputs: AdvantageInputs) -> Advantages:
    """Whitened token returns R_i - kl_coef * (KL to go); no critic, no group baseline.

    Source: arXiv 2501.03262, section 3; whitening as in verl: (x - mean) / sqrt(var + 1e-8) over all response tokens,
    variance with n - 1.
    """
    return _whiten_over_tokens(inputs.rewards, inputs, inputs.kl_coef if inputs.sample_kl else 0.0)


def reinforce_pp_baseline(inputs: AdvantageInputs) -> Advantages:
    """Group mean subtracted first, then whitened over the batch; a KL in the reward is applied per response.

    Source: arXiv 2501.03262, section 3.2.
    """
    return _whiten_over_tokens([subtract_mean(rewards) for rewards in inputs.kl_penalized_rewards], inputs, 0.0)


def _whiten_over_tokens(rewards: SampleValues, inputs: AdvantageInputs, kl_coef: float) -> Advantages:
    """Whiten x = reward - kl_coef * (KL to go) over tokens, from sums per sample."""
    flat_rewards = [reward for group_rewards in rewards for reward in group_rewards]
    lengths = [length for group in inputs.response_lengths for length in group] or [1] * len(flat_rewards)
    kl_sums, squared_sums = [0.0] * len(flat_rewards), [0.0] * len(flat_rewards)
    if kl_coef:
        kl_sums = [sample.kl_to_go_sum for group in inputs.sample_kl for sample in group]
        squared_sums = [sample.kl_to_go_squared_sum for group in inputs.sample_kl for sample in group]
    token_count = sum(lengths)
    if token_count < 2 or (not kl_coef and min(flat_rewards) == max(flat_rewards)):
        return Advantages([[0.0] * len(group_rewards) for group_rewards in rewards])
    # Closed form of the token mean and variance of x from sums per response, so that no token leaves the learners:
    # over the n tokens of a response with reward r, sum x = n r - c t and sum (x - m)^2 =
    # n (r - m)^2 - 2 c (r - m) t + c^2 s, where t and s are the sums of the KL to go and of its square.
    samples = list(zip(lengths, flat_rewards, kl_sums, squared_sums, strict=True))
    mean = math.fsum(n * r - kl_coef * t for n, r, t, _ in samples) / token_count
    squared_deviation = math.fsum(
        n * (r - mean) ** 2 - 2 * kl_coef * (r - mean) * t + kl_coef**2 * s for n, r, t, s in samples
    )
    scale = 1.0 / math.sqrt(max(0.0, squared_deviation) / (token_count - 1) + VARIANCE_EPSILON)
    return Advantages(
        [[(reward - mean) * scale for reward in group_rewards] for group_rewards in rewards],
        kl_to_go_coef=kl_coef * scale,
    )


def grpo(inputs: AdvantageInputs) -> Advantages:
    """(R_i - mean) / (std + 1e-6) over the group, population standard deviation; zeros when rewards are equal.

    Source: DeepSeekMath, arXiv 2402.03300, outcome supervision.
    """
    return Advantages([standardize_rewards(rewards) for rewards in inputs.kl_penalized_rewards])


def standardize_rewards(rewards: Sequence[float]) -> list[float]:
    """GRPO advantages of one group."""
    # Equal rewards are detected exactly, so that a rounding error of the mean never becomes an advantage.
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    std = math.sqrt(fmean((reward - mean) ** 2 for reward in rewards))
    return [(reward - mean) / (std + GRPO_STD_EPSILON) for reward in rewards]


def dr_grpo(inputs: AdvantageInputs) -> Advantages:
    """Dr. GRPO: R_i - mean over the group, not divided by the standard deviation.

    The division would favor prompts with almost equal rewards. Source: arXiv 2503.20783 (its constant token weight is
    loss_aggregation="constant" in rluf.algorithms.registry).
    """
    return Advantages([subtract_mean(rewards) for rewards in inputs.kl_penalized_rewards])


def rloo(inputs: AdvantageInputs) -> Advantages:
    """RLOO: R_i - mean of the other rewards of the group = G / (G - 1) (R_i - mean). Zero for groups of one.

    The leave-one-out mean is an unbiased baseline. Source: arXiv 2402.14740, eq. 8.
    """
    sample_advantages = []
    for rewards in inputs.kl_penalized_rewards:
        scale = len(rewards) / max(1, len(rewards) - 1)
        sample_advantages.append([scale * centered for centered in subtract_mean(rewards)])
    return Advantages(sample_advantages)


def lite_ppo(inputs: AdvantageInputs) -> Advantages:
    """Lite-PPO: (R_i - group mean) / (std of the batch + 1e-4), standard deviation with n - 1 over the step's rewards.

    Safer than the group's own deviation where the rewards of a group are almost equal, as small differences of
    P[love] are. Source: Lite-PPO, arXiv 2508.08221, section 4.1; TRL's scale_rewards="batch" has the same formula.
    """
    groups = inputs.kl_penalized_rewards
    scale = 1.0 / (compute_sample_std([reward for rewards in groups for reward in rewards]) + STD_EPSILON)
    return Advantages([[centered * scale for centered in subtract_mean(rewards)] for rewards in groups])


def gdpo(inputs: AdvantageInputs) -> Advantages:
    """GDPO: A_i = sum_k w_k (r_k,i - mean_k) / (std_k + 1e-4) over the group, then whitened over the batch with + 1e-4.

    Each objective is normalized on its own, so that none hides the differences of another: samples whose rewards have
    the same sum but other components get different advantages. Standard deviations have n - 1. A KL in the reward is
    one more component. Source: arXiv 2601.05242; TRL's multi_objective_aggregation="normalize_then_sum" has the same
    formula. Raises ValueError without objective_rewards.
    """
    if not inputs.objective_rewards:
        raise ValueError("GDPO: expected the rewards of each objective in objective_rewards, got none")
    group_totals = []
    for group_index, weights in enumerate(inputs.objective_weights):
        totals = [0.0] * len(inputs.rewards[group_index])
        # Sorted, since floating-point sums depend on the order and a resumed run must repeat every bit.
        for objective in sorted(inputs.objective_rewards):
            rewards = inputs.objective_rewards[objective][group_index]
            scale = weights[objective] / (compute_sample_std(rewards) + STD_EPSILON)
            totals = [total + scale * centered for total, centered in zip(totals, subtract_mean(rewards), strict=True)]
        if inputs.kl_coef and inputs.sample_kl:
            # The penalty is already in reward units, so it is centered but not scaled.
            penalties = subtract_mean([-inputs.kl_coef * sample.kl_sum for sample in inputs.sample_kl[group_index]])
            totals = [total + penalty for total, penalty in zip(totals, penalties, strict=True)]
        group_totals.append(totals)
    batch_values = [total for totals in group_totals for total in totals]
    if not any(batch_values):
        return Advantages(group_totals)
    mean, std = fmean(batch_values), compute_sample_std(batch_values)
    return Advantages([[(total - mean) / (std + STD_EPSILON) for total in totals] for totals in group_totals])


# CGPO's three optimizers (CRPG, CRRAFT, CODPO) are weights of the log-likelihood of each response. They take calibrated
# rewards in (0, 1), the judges' verdicts, and the KL of each response to the reference in nats. Their losses are linear
# in log pi, or (CODPO) have a gradient that is, with a factor known when the batch is sampled, so the learner needs one
# number per response. Source: arXiv 2409.20370, section 4. The penalty of a truncated response may lower its reward
# below 0, where a failing response with product 0 would be better: such a reward counts as 0.
def crpg(inputs: AdvantageInputs) -> Advantages:
    """Calibrated-regularized policy gradient: A_i = w_i - mean of w over the step.

    w_i = J_i * max(R_i, 0) * clip(1 - kl_i / max_response_kl, 0, 1), where J_i is 1 when every judge passes and else 0.
    """
    group_weights = [
        [
            max(reward, 0.0)
            * inputs.has_passed_judges(group_index, sample_index)
            * min(1.0, max(0.0, 1.0 - inputs.get_response_kl(group_index, sample_index) / inputs.max_response_kl))
            for sample_index, reward in enumerate(rewards)
        ]
        for group_index, rewards in enumerate(inputs.rewards)
    ]
    step_weights = [weight for weights in group_weights for weight in weights]
    # fmean of equal floats can differ from them in the last bit: return exact zeros then.
    mean = step_weights[0] if min(step_weights) == max(step_weights) else fmean(step_weights)
    return Advantages([[weight - mean for weight in weights] for weights in group_weights])


def crraft(inputs: AdvantageInputs) -> Advantages:
    """Calibrated-regularized reward-ranked fine-tuning: the best allowed response of each prompt, weighted by reward.

    Responses that fail a judge or have a KL above max_response_kl are excluded; a prompt without any other is skipped.
    """
    sample_advantages = []
    for group_index, rewards in enumerate(inputs.rewards):
        allowed_samples = [
            index
            for index in range(len(rewards))
            if inputs.has_passed_judges(group_index, index)
            and inputs.get_response_kl(group_index, index) <= inputs.max_response_kl
        ]
        best_sample = max(allowed_samples, key=lambda index: rewards[index], default=None)
        sample_advantages.append(
            [max(reward, 0.0) if index == best_sample else 0.0 for index, reward in enumerate(rewards)]
        )
    return Advantages(sample_advantages)


def codpo(inputs: AdvantageInputs) -> Advantages:
    """Constrained online DPO: the best passing response against the worst failing one (the worst if none fails).

    loss = -log s(BETA h) - LIKELIHOOD / |y+| log pi(y+), h = (log pi/ref)(y+) - (log pi/ref)(y-). Its gradient is that
    of -(BETA s(-BETA h) + LIKELIHOOD / |y+|) log pi(y+) + BETA s(-BETA h) log pi(y-), which gives the two weights. A
    prompt without a passing response, or whose best response is also its worst, is skipped.
    """
    sample_advantages = []
    for group_index, rewards in enumerate(inputs.rewards):
        group_advantages = [0.0] * len(rewards)
        passing = [index for index in range(len(rewards)) if inputs.has_passed_judges(group_index, index)]
        failing = [index for index in range(len(rewards)) if not inputs.has_passed_judges(group_index, index)]
        chosen = max(passing, key=lambda index: rewards[index], default=None)
        rejected = min(failing or range(len(rewards)), key=lambda index: rewards[index])
        # Without a failing response, equal rewards express no preference.
        if chosen is not None and chosen != rejected and (failing or rewards[chosen] > rewards[rejected]):
            margin = inputs.get_response_kl(group_index, chosen) - inputs.get_response_kl(group_index, rejected)
            preference_weight = CODPO_BETA / (1.0 + math.exp(min(MAX_EXPONENT, CODPO_BETA * margin)))
            length = inputs.response_lengths[group_index][chosen] if inputs.response_lengths else 1
            group_advantages[chosen] = preference_weight + CODPO_LIKELIHOOD_WEIGHT / max(1, length)
            group_advantages[rejected] = -preference_weight
        sample_advantages.append(group_advantages)
    return Advantages(sample_advantages)


def kto(inputs: AdvantageInputs) -> Advantages:
    """Weight of each logged response's log-likelihood; a reward above 0.5 marks a liked response.

    With z = BETA log pi/ref of the response and z0 = max(0, BETA times the mean of log pi/ref over mismatched pairs of
    prompt and response), the loss is 1 - s(z - z0) where liked and 1 - s(z0 - z) where not. Its gradient is that of
    -w log pi, w = BETA s(z - z0) (1 - s(z - z0)), negative where the response was not liked. Both classes have equal
    weight, so a batch should contain equal numbers of them. Source: arXiv 2402.01306, eq. 8; `sample_kl` and
    `mismatched_kl` are in nats, of the policy being trained.
    """
    # The reference point z0 estimates a KL divergence, which is not negative although its sample mean can be.
    reference_point = max(0.0, inputs.mismatched_kl)
    sample_advantages = []
    for group_index, rewards in enumerate(inputs.rewards):
        group_advantages = []
        for sample_index, reward in enumerate(rewards):
            margin = KTO_BETA * (inputs.get_response_kl(group_index, sample_index) - reference_point)
            sigmoid = 1.0 / (1.0 + math.exp(-min(MAX_EXPONENT, max(-MAX_EXPONENT, margin))))
            weight = KTO_BETA * sigmoid * (1.0 - sigmoid)
            group_advantages.append(weight if reward > LIKED_THRESHOLD else -weight)
        sample_advantages.append(group_advantages)
    return Advantages(sample_advantages)


def dpo(inputs: AdvantageInputs) -> Advantages:
    """Weights of the log-likelihoods of each logged pair; the response with the higher reward is the chosen one.

    The loss is -log s(BETA h), h = (log pi/ref)(chosen) - (log pi/ref)(rejected). Its gradient is that of
    -w (log pi(chosen) - log pi(rejected)), w = BETA s(-BETA h). Source: arXiv 2305.18290, eq. 7; `sample_kl` is in
    nats, of the policy being trained.
    """
    sample_advantages = []
    for group_index, rewards in enumerate(inputs.rewards):
        signs = [1.0 if reward > LIKED_THRESHOLD else -1.0 for reward in rewards]
        margin = sum(sign * inputs.get_response_kl(group_index, index) for index, sign in enumerate(signs))
        weight = DPO_BETA / (1.0 + math.exp(min(MAX_EXPONENT, DPO_BETA * margin)))
        sample_advantages.append([sign * weight for sign in signs])
    return Advantages(sample_advantages)


def pass_through_rewards(inputs: AdvantageInputs) -> Advantages:
    """Rewards unchanged; the learners turn them into advantages."""
    return Advantages([list(rewards) for rewards in inputs.rewards])


AdvantageEstimator = Callable[[AdvantageInputs], Advantages]

ADVANTAGE_ESTIMATORS: Mapping[str, AdvantageEstimator] = MappingProxyType({
    "grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline, "lite_ppo": lite_ppo, "gdpo": gdpo, "gae": pass_through_rewards,
    "crpg": crpg, "crraft": crraft, "codpo": codpo, "kto": kto, "dpo": dpo, "sft": pass_through_rewards,
})  # fmt: skip
"""Estimator by name; rluf.algorithms.registry maps each `algorithm.name` to one."""


def find_advantage_estimator(name: str) -> AdvantageEstimator:
    """The estimator of a name or package.module:function. Raises SettingsError for an unknown name."""
    if name in ADVANTAGE_ESTIMATORS:
        return ADVANTAGE_ESTIMATORS[name]
    estimator: AdvantageEstimator = load_plugin(
        name,
        kind="advantage estimator",
        known_names=ADVANTAGE_ESTIMATORS,
        signature="a function (AdvantageInputs) -> Advantages",
        argument_count=1,
    )

    def check_advantages(inputs: AdvantageInputs) -> Advantages:
        with PluginErrors(f"advantage estimator {name!r}"):
            result = estimator(inputs)
        counts = [len(rewards) for rewards in inputs.rewards]
        # Rows of other lengths would give responses the advantages of others, and NaN would blame the prompts.
        try:
            rows = [[float(value) for value in row] for row in result.sample_advantages]
        except (AttributeError, TypeError, ValueError):
            rows = []
        if [len(row) for row in rows] != counts or not all(math.isfinite(value) for row in rows for value in row):
            raise SettingsError(
                f"advantage estimator {name!r}: expected Advantages with one finite number for each response, in "
                f"groups of {counts}, got {str(result)[:200]}"
            )
        return replace(result, sample_advantages=rows)

    return check_advantages


def compute_advantages(estimator_name: str, inputs: AdvantageInputs) -> Advantages:
    """Advantages of a step by an estimator, given by name or as package.module:function.

    Raises SettingsError for an unknown name.
    """
    estimator = find_advantage_estimator(estimator_name)
    if estimator_name in JUDGE_AWARE_ESTIMATORS or all(map(all, inputs.passed_judges)):
        return estimator(inputs)
    return apply_judge_gate(estimator, inputs)


def apply_judge_gate(estimator: AdvantageEstimator, inputs: AdvantageInputs) -> Advantages:
    """Advantages of the responses that passed all judges, computed among themselves, and a penalty for the others.

    A failure's reward is no number on the scale of the others: replaced by a low one it would dominate the group's
    standard deviation and shrink every difference between the responses that passed. Instead a response gets its
    advantage among those that passed (0 if it failed) - GATE_PENALTY * (failed - share of failures in the group). A
    group in which all fail or all pass has no penalty.
    """
    passing = [[index for index, passed in enumerate(flags) if passed] for flags in inputs.passed_judges]
    # Estimators average over a group, and one without a passing response has no average.
    groups = [index for index, samples in enumerate(passing) if samples]

    def select(values: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [[values[group][sample] for sample in passing[group]] for group in groups] if values else []

    kl_to_go_coef, sample_advantages = 0.0, [[0.0] * len(flags) for flags in inputs.passed_judges]
    if groups:
        passed_inputs = replace(
            inputs,
            rewards=select(inputs.rewards),
            response_lengths=select(inputs.response_lengths),
            sample_kl=select(inputs.sample_kl),
            passed_judges=(),
            objective_rewards={name: select(rewards) for name, rewards in inputs.objective_rewards.items()},
            objective_weights=[inputs.objective_weights[group] for group in groups] if inputs.objective_weights else (),
        )
        passed_advantages = estimator(passed_inputs)
        kl_to_go_coef = passed_advantages.kl_to_go_coef
        for group, values in zip(groups, passed_advantages.sample_advantages, strict=True):
            for sample, value in zip(passing[group], values, strict=True):
                sample_advantages[group][sample] = value
    for group_advantages, flags in zip(sample_advantages, inputs.passed_judges, strict=True):
        # Centered on the share of failures: the penalties of a group add up to zero, so the gate moves no mean.
        failed_share = 1.0 - fmean(map(float, flags))
        for index, passed in enumerate(flags):
            group_advantages[index] -= GATE_PENALTY * ((not passed) - failed_share)
    return Advantages(sample_advantages, kl_to_go_coef)
