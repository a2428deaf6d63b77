"""Aggregate the scores of several objectives into one reward per sample.

With aggregation.method linear: R = sum_k w_k (s_k - mean_k) / sd_k, by objective name. The signal s of a model is the
logit of its calibrated value (probabilities near the base rate barely spread); that of a judge is 0 or 1, that of a
reward function its number. mean and sd are
frozen on responses of the reference policy, so a weight has the same meaning throughout a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, pstdev
from typing import Any

from rluf.config.reward import AggregationSettings, ObjectivesSettings
from rluf.errors import SettingsError
from rluf.types import Score
from rluf.utils.stats import logit, sigmoid

PROBABILITY_CLIP = 1e-6
PROPORTIONAL_GAIN = 1.0
INTEGRAL_GAIN = 0.5
DERIVATIVE_GAIN = 0.5
TRUNCATION_PENALTY = 0.5
"""Distance of a truncated response below the worst finished one of its group, in the unit of the rewards (standard
deviations of the reference policy; with method calibrated half of the range)."""


def compute_signal(score: Score, uncertainty_penalty: float = 0.0) -> float:
    """The signal to normalize: logit of a model's value (clipped to [1e-6, 1 - 1e-6]), any other value as is.

    `uncertainty_penalty` k first subtracts k standard deviations over the ensemble's members (Coste et al., arXiv
    2310.02743), so that the policy does not seek responses on which the members disagree.
    """
    if not score.is_probability:
        return score.value
    lower_bound = score.value - uncertainty_penalty * score.spread
    return logit(min(max(lower_bound, PROBABILITY_CLIP), 1 - PROBABILITY_CLIP))


@dataclass(frozen=True, slots=True)
class RewardNormalizer:
    """Mean and standard deviation of each objective's signal on the reference policy."""

    mean: Mapping[str, float]
    sd: Mapping[str, float]

    @classmethod
    def fit(cls, signals: Mapping[str, Sequence[float]]) -> RewardNormalizer:
        """Freeze the statistics of reference-policy signals, by objective name.

        An objective with a constant signal gets sd 1. Raises SettingsError for an objective without signals.
        """
        for objective, values in signals.items():
            if not values:
                raise SettingsError(f"objective {objective} has no scores on the reference policy to normalize with")
        means = {objective: fmean(values) for objective, values in signals.items()}
        deviations = {objective: pstdev(values) for objective, values in signals.items()}
        # Equal values have a standard deviation of rounding errors, relative to their size: treat it as 0.
        smallest = {objective: 1e-9 * max(1.0, abs(mean)) for objective, mean in means.items()}
        return cls(means, {name: sd if sd > smallest[name] else 1.0 for name, sd in deviations.items()})

    def normalize(self, objective: str, values: Sequence[float]) -> list[float]:
        """Signals of one objective, in reference-policy standard deviations from its mean."""
        if objective not in self.mean:
            scored = ", ".join(sorted(self.mean))
            raise SettingsError(f"objective {objective} was not scored on the reference policy (scored: {scored})")
        return [(value - self.mean[objective]) / self.sd[objective] for value in values]


def sum_weighted_signals(
    signals: Mapping[str, Sequence[float]], weights: Mapping[str, float], normalizer: RewardNormalizer
) -> list[float]:
    """Reward of each sample: the weighted sum of normalized signals, matched by objective name, never by position.

    Objectives of weight 0 may be missing. Raises SettingsError for a weighted objective without scores, for scores
    without a weight, and for lists of different length.
    """
    unscored = [objective for objective, weight in weights.items() if weight and objective not in signals]
    unweighted = [objective for objective in signals if objective not in weights]
    if unscored or unweighted:
        raise SettingsError(
            f"objectives and scores do not match: weighted but not scored: {', '.join(unscored) or 'none'}; "
            f"scored but without a weight: {', '.join(unweighted) or 'none'}"
        )
    sample_counts = {objective: len(values) for objective, values in signals.items()}
    if len(set(sample_counts.values())) > 1:
        raise SettingsError(f"objectives scored different numbers of samples: {sample_counts}")
    rewards = [0.0] * max(sample_counts.values(), default=0)
    # In sorted order: floating-point sums depend on the order, and a resumed run must get equal rewards.
    for objective in sorted(signals):
        if weights[objective]:
            for index, value in enumerate(normalizer.normalize(objective, signals[objective])):
                rewards[index] += weights[objective] * value
    return rewards


@dataclass(slots=True)
class LagrangeMultipliers:
    """Lagrange multipliers for floors on mean scores, each updated by a PID controller.

    With d = floor - mean (positive below the floor): I = max(0, I + d), and the multiplier is
    max(0, 1.0 d + 0.5 I + 0.5 max(0, d - previous d)). The integral alone is gradient ascent on the multiplier; the
    other two terms damp its oscillation. Source: Stooke et al., arXiv 2007.03964, algorithm 2.
    """

    floors: Mapping[str, float]
    """Floor of an objective's mean, by objective."""
    values: dict[str, float] = field(default_factory=dict)
    """Current multipliers, by objective."""
    integral: dict[str, float] = field(default_factory=dict)
    """Accumulated shortfall, by objective."""
    previous: dict[str, float] = field(default_factory=dict)
    """Shortfall of the last step, by objective."""

    def update(self, means: Mapping[str, float]) -> dict[str, float]:
        """Update each multiplier from the step's mean of its objective; without a mean it does not change."""
        for objective, floor in self.floors.items():
            if objective not in means:
                self.values.setdefault(objective, 0.0)
                continue
            shortfall = floor - means[objective]
            # No derivative at the first step, and none while the mean recovers: only a growing shortfall pushes.
            increase = max(0.0, shortfall - self.previous.get(objective, shortfall))
            self.integral[objective] = max(0.0, self.integral.get(objective, 0.0) + shortfall)
            self.previous[objective] = shortfall
            multiplier = (
                PROPORTIONAL_GAIN * shortfall + INTEGRAL_GAIN * self.integral[objective] + DERIVATIVE_GAIN * increase
            )
            self.values[objective] = max(0.0, multiplier)
        return dict(self.values)


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Scores and judge verdicts of one group: its prompt, signals [samples] by objective, and gate verdicts."""

    prompt_id: str
    topic: str
    signals: Mapping[str, Sequence[float]]
    gate_verdicts: Sequence[bool] = ()
    finished: Sequence[bool] = ()
    """Whether each response ended by itself; empty where truncation does not count."""


@dataclass(frozen=True, slots=True)
class StepRewards:
    """Rewards [groups][samples] of a step, the normalized signals and weights behind them, and metrics to log."""

    rewards: list[list[float]]
    normalized_signals: dict[str, list[list[float]]]
    objective_weights: list[dict[str, float]]
    metrics: dict[str, float] = field(default_factory=dict)


class RewardAggregator:
    """Combines the objectives, by name, over one run. The first batch must come from the reference policy.

    Its state outlives a step: reference-policy statistics, scores of the base policy's responses, and multipliers.
    """

    def __init__(self, objectives: ObjectivesSettings, aggregation: AggregationSettings) -> None:
        """`objectives` give the weights, `aggregation` the method, floors and topics."""
        self.objectives = objectives
        self.aggregation = aggregation
        self.normalizer: RewardNormalizer | None = None
        self.baseline_signals: dict[str, dict[str, float]] = {}
        self.multipliers = LagrangeMultipliers(aggregation.floors)
        self.suspended_objectives: frozenset[str] = frozenset()
        """Objectives whose weight is 0 while a reward hacking alarm is active."""

    def record_baseline(self, prompt_id: str, signals: Mapping[str, Sequence[float]]) -> None:
        """Record the mean signals of the base policy's responses to a prompt, as the baseline to calibrate against."""
        self.baseline_signals[prompt_id] = {objective: fmean(values) for objective, values in signals.items()}

    def state(self) -> dict[str, Any]:
        """The complete state as plain JSON, for a checkpoint."""
        return {
            "normalizer": None if self.normalizer is None else asdict(self.normalizer),
            "baseline_signals": self.baseline_signals,
            "multipliers": asdict(self.multipliers),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; the floors come from the settings, which may have changed."""
        statistics = state["normalizer"]
        self.normalizer = None if statistics is None else RewardNormalizer(**statistics)
        self.baseline_signals = {str(key): dict(signals) for key, signals in state["baseline_signals"].items()}
        self.multipliers = LagrangeMultipliers(**{**state["multipliers"], "floors": self.aggregation.floors})

    def aggregate(self, groups: Sequence[GroupScores], *, apply_gate: bool = True) -> StepRewards:
        """Rewards of a batch.

        Truncated responses get less than the finished ones of their group (`lower_truncated`). With `apply_gate`, a
        response that failed a judge gets the lowest reward of the step (0 with method calibrated).
        Raises SettingsError when objectives and scores do not match.
        """
        objectives = list(groups[0].signals)
        if self.normalizer is None:
            self.normalizer = RewardNormalizer.fit(
                {name: [value for group in groups for value in group.signals[name]] for name in objectives}
            )
        normalizer = self.normalizer
        normalized_signals = {
            name: [normalizer.normalize(name, group.signals[name]) for group in groups] for name in objectives
        }
        weights = [self._get_active_weights(group.topic) for group in groups]
        metrics: dict[str, float] = {}
        is_calibrated = self.aggregation.method == "calibrated"
        if is_calibrated:
            rewards = [
                self._compute_calibrated_rewards(group, group_weights)
                for group, group_weights in zip(groups, weights, strict=True)
            ]
        else:
            if self.aggregation.method == "constrained":
                weights = self._compute_constrained_weights(groups, normalized_signals, weights)
                metrics = {f"multiplier_{name}": value for name, value in self.multipliers.values.items()}
            rewards = [
                sum_weighted_signals(group.signals, group_weights, normalizer)
                for group, group_weights in zip(groups, weights, strict=True)
            ]
        if any(not all(group.finished) for group in groups):
            rewards = [lower_truncated(row, group.finished) for row, group in zip(rewards, groups, strict=True)]
            # The signals as well: gdpo computes advantages from them and not from the rewards.
            normalized_signals = {
                name: [lower_truncated(row, group.finished) for row, group in zip(rows, groups, strict=True)]
                for name, rows in normalized_signals.items()
            }
        if apply_gate:
            # Calibrated rewards lie in (0, 1), so 0 is below all of them.
            rewards = _gate_groups(rewards, groups, 0.0 if is_calibrated else min(map(min, rewards)))
            normalized_signals = {
                name: _gate_groups(group_signals, groups, min(map(min, group_signals)))
                for name, group_signals in normalized_signals.items()
            }
        if any(group.gate_verdicts for group in groups):
            metrics["gate_pass_rate"] = fmean(float(verdict) for group in groups for verdict in group.gate_verdicts)
        return StepRewards(rewards, normalized_signals, weights, metrics)

    def _get_active_weights(self, topic: str) -> dict[str, float]:
        """Weight of each objective on prompts of the topic; 0 for suspended objectives."""
        return {
            name: 0.0 if name in self.suspended_objectives else weight
            for name, weight in self.aggregation.get_topic_weights(self.objectives, topic).items()
        }

    def _compute_calibrated_rewards(self, group: GroupScores, weights: Mapping[str, float]) -> list[float]:
        """sum_k w_k sigmoid(r_k - r_k of the base policy) / sum_k w_k, in (0, 1): CGPO, arXiv 2409.20370, eq. 7.

        A prompt without a recorded baseline is calibrated against the mean of its own responses.
        """
        active_weights = {name: weight for name, weight in weights.items() if weight}
        group_means = {name: fmean(values) for name, values in group.signals.items()}
        baseline = self.baseline_signals.get(group.prompt_id, group_means)
        weight_sum = sum(active_weights.values()) or 1.0
        sample_count = len(next(iter(group.signals.values())))
        return [
            sum(
                weight * float(sigmoid(group.signals[name][index] - baseline[name]))
                for name, weight in sorted(active_weights.items())
            )
            / weight_sum
            for index in range(sample_count)
        ]

    def _compute_constrained_weights(
        self,
        groups: Sequence[GroupScores],
        normalized_signals: Mapping[str, list[list[float]]],
        weights: Sequence[Mapping[str, float]],
    ) -> list[dict[str, float]]:
        """Weights of the Lagrangian at the scale of the weights: (w_k + multiplier_k) / (1 + sum of multipliers).

        Topics with an objective of their own keep their weights and count only for that objective's floor. Source: Safe
        RLHF, arXiv 2310.12773, eq. 11 and its published code.
        """
        topic_objectives = self.aggregation.topic_objectives
        means = {}
        for objective in self.aggregation.floors:
            values = [
                value
                for group, group_signals in zip(groups, normalized_signals[objective], strict=True)
                if topic_objectives.get(group.topic, objective) == objective
                for value in group_signals
            ]
            if values:
                means[objective] = fmean(values)
        multipliers = self.multipliers.update(means)
        # Divided by the sum: large multipliers would otherwise act like a larger learning rate.
        scale = 1.0 + sum(multipliers.values())
        return [
            dict(group_weights)
            if group.topic in topic_objectives
            else {name: (weight + multipliers.get(name, 0.0)) / scale for name, weight in group_weights.items()}
            for group, group_weights in zip(groups, weights, strict=True)
        ]


def _gate_groups(
    values: Sequence[Sequence[float]], groups: Sequence[GroupScores], failed_value: float
) -> list[list[float]]:
    return [
        apply_judge_gate(group_values, group.gate_verdicts, failed_value)
        for group_values, group in zip(values, groups, strict=True)
    ]


def apply_judge_gate(values: Sequence[float], verdicts: Sequence[bool], failed_value: float) -> list[float]:
    """Replace the value of each response that failed a judge by `failed_value`; without verdicts, change nothing."""
    if not verdicts:
        return list(values)
    return [value if passed else failed_value for value, passed in zip(values, verdicts, strict=True)]


def lower_truncated(values: Sequence[float], finished: Sequence[bool]) -> list[float]:
    """Lower the value of each truncated response to TRUNCATION_PENALTY below the group's worst finished one.

    min(own value, lowest finished value) - TRUNCATION_PENALTY: a reward model reads a cut text as if it had ended, so
    its score must not outrank a finished response; among each other truncated responses keep an order by score. The
    fixed distance is that of the overlong penalty of DAPO, arXiv 2503.14476, section 3.4, without its buffer. Without
    `finished` nothing changes.
    """
    lowest = min((value for value, is_finished in zip(values, finished, strict=False) if is_finished), default=math.inf)
    return [
        value if is_finished else min(value, lowest) - TRUNCATION_PENALTY
        for value, is_finished in zip(values, finished or [True] * len(values), strict=True)
    ]
