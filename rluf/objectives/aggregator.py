"""Aggregate the scores of several objectives into one reward per sample.

With aggregation.method linear: R = sum_k w_k (s_k - mean_k) / scale_k, by objective name. The signal s of a model is
the logit of its calibrated value (probabilities near the base rate barely spread); that of a judge is 0 or 1, that of a
reward function its number. mean and scale are estimated before the first step, on responses of the base policy to
training prompts, and then frozen, so a weight has the same meaning throughout a run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, pstdev, stdev
from typing import Any

from rluf.config.reward import AggregationSettings, ControllerGains, ObjectivesSettings
from rluf.errors import SettingsError
from rluf.types import Score
from rluf.utils.stats import logit, sigmoid

PROBABILITY_CLIP = 1e-6
PRIOR_LOGIT_SD = 1.0
PRIOR_DEGREES = 24
"""A logit's scale is estimated as if PRIOR_DEGREES further within-prompt differences had a standard deviation of
PRIOR_LOGIT_SD. From 12 prompts x 4 samples this moves the estimate noticeably, from 96 x 4 by a few percent."""
VERDICT_SCALE = 0.5
"""Scale of an objective whose signals are all 0 or 1, the largest standard deviation that a verdict can have. A fixed
one: the standard deviation of verdicts that rarely fail depends on whether one of them failed. Other pairs of values,
such as -1 and 1, have half of their distance, the same in their unit."""
MIN_VERDICTS = 8
"""Number of signals from which two distinct values count as verdicts."""
RELATIVE_SCALE_FLOOR = 1e-3
"""Smallest scale of a reward function, relative to its mean: smaller differences count as rounding errors."""
MAX_NORMALIZED_SIGNAL = 10.0
"""Bound of a normalized signal, so that no outlier decides a step alone."""
TRUNCATION_PENALTY = 0.5
"""Distance of a truncated response below the worst finished one of its group, in the unit of the rewards (standard
deviations of the reference policy; with method calibrated half of the range)."""


def compute_signal(score: Score, uncertainty_penalty: float = 0.0) -> float:
    """The signal to normalize: logit of a model's value (clipped to [1e-6, 1 - 1e-6]), any other value as is.

    `uncertainty_penalty` k then subtracts k standard deviations of the ensemble members' calibrated logits (Coste et
    al., arXiv 2310.02743), so that the policy does not seek responses on which the members disagree. In logits, because
    at a low base rate the standard deviation of probabilities exceeds most values.
    """
    if not score.is_probability:
        return score.value
    if score.exact_logit is not None:
        return score.exact_logit - uncertainty_penalty * score.logit_spread
    return (
        logit(min(max(score.value, PROBABILITY_CLIP), 1 - PROBABILITY_CLIP)) - uncertainty_penalty * score.logit_spread
    )


@dataclass(frozen=True, slots=True)
class ReferenceStatistics:
    """One objective's signal on the base policy's responses; deviations in the unit of the signal."""

    mean: float
    pooled_sd: float
    """Standard deviation over all responses."""
    within_sd: float
    """Standard deviation of responses to one prompt, averaged in the square over prompts."""
    standard_error: float
    """Standard error of the mean; responses to one prompt are not independent."""
    prompt_count: int
    sample_count: int


@dataclass(frozen=True, slots=True)
class RewardNormalizer:
    """Zero and scale of each objective's signal, from responses of the reference policy.

    The scale is the standard deviation within a prompt. Advantages compare responses to one prompt, so this is what
    makes equal weights pull equally; most of the pooled deviation may be between prompts.
    """

    mean: Mapping[str, float]
    sd: Mapping[str, float]
    statistics: Mapping[str, ReferenceStatistics] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        signals: Mapping[str, Sequence[Sequence[float]]],
        *,
        mean_signals: Mapping[str, Sequence[Sequence[float]]] | None = None,
        logit_objectives: Collection[str] = (),
    ) -> RewardNormalizer:
        """Estimate scales from the reference policy's signals [prompts][samples], by objective.

        `mean_signals`, by default the same, give the means. The scale of `logit_objectives` is shrunk to
        PRIOR_LOGIT_SD, that of other numbers to their standard deviation over all responses; verdicts have
        VERDICT_SCALE. Raises SettingsError for an objective without signals.
        """
        for objective, rows in signals.items():
            if not any(rows):
                raise SettingsError(f"objective {objective} has no scores on the reference policy to normalize with")
        zeros = mean_signals or signals
        statistics = {
            name: _measure_signals(rows, zeros[name] if any(zeros[name]) else rows) for name, rows in signals.items()
        }
        scales = {
            name: _estimate_scale(rows, statistics[name].mean, is_logit=name in logit_objectives)
            for name, rows in signals.items()
        }
        return cls({name: values.mean for name, values in statistics.items()}, scales, statistics)

    def normalize(self, objective: str, values: Sequence[float]) -> list[float]:
        """Signals of one objective, in reference-policy standard deviations from its mean, within +-10."""
        if objective not in self.mean:
            scored = ", ".join(sorted(self.mean))
            raise SettingsError(f"objective {objective} was not scored on the reference policy (scored: {scored})")
        mean, sd, bound = self.mean[objective], self.sd[objective], MAX_NORMALIZED_SIGNAL
        return [min(max((value - mean) / sd, -bound), bound) for value in values]


def _sum_within_squares(rows: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Sum of squared deviations from the mean of each prompt, and its degrees of freedom."""
    squares = 0.0
    for row in rows:
        # The mean of equal floats can differ from them in the last bit.
        if row and min(row) < max(row):
            squares += pstdev(row) ** 2 * len(row)
    # One degree of freedom is lost to the mean of each prompt.
    return squares, sum(len(row) - 1 for row in rows if row)


def _measure_signals(rows: Sequence[Sequence[float]], mean_rows: Sequence[Sequence[float]]) -> ReferenceStatistics:
    values = [value for row in rows for value in row]
    squares, degrees = _sum_within_squares(rows)
    return ReferenceStatistics(
        mean=fmean(value for row in mean_rows for value in row),
        pooled_sd=pstdev(values),
        within_sd=math.sqrt(squares / degrees) if degrees else 0.0,
        standard_error=compute_clustered_error(mean_rows),
        prompt_count=sum(bool(row) for row in rows),
        sample_count=len(values),
    )


def _estimate_scale(rows: Sequence[Sequence[float]], mean: float, *, is_logit: bool) -> float:
    """Standard deviation within a prompt, shrunk where there are few responses; never 0."""
    values = [value for row in rows for value in row]
    distinct = set(values)
    if not is_logit and distinct <= {0.0, 1.0}:
        return VERDICT_SCALE
    if not is_logit and len(distinct) == 2 and len(values) >= MIN_VERDICTS:
        return max(VERDICT_SCALE * (max(values) - min(values)), RELATIVE_SCALE_FLOOR * abs(mean))
    squares, degrees = _sum_within_squares(rows)
    prior_sd = PRIOR_LOGIT_SD if is_logit else pstdev(values)
    scale = math.sqrt((squares + PRIOR_DEGREES * prior_sd**2) / (degrees + PRIOR_DEGREES))
    # A reward function has no unit, so a constant one gives no scale at all.
    return (
        scale if scale > RELATIVE_SCALE_FLOOR * abs(mean) else max(RELATIVE_SCALE_FLOOR * abs(mean), float(not scale))
    )


def compute_clustered_error(rows: Sequence[Sequence[float]]) -> float:
    """Standard error of the mean of values [prompts][samples], from the means of the prompts; 0 for one prompt."""
    prompt_means = [fmean(row) for row in rows if row]
    return stdev(prompt_means) / math.sqrt(len(prompt_means)) if len(prompt_means) > 1 else 0.0


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

    d is the running shortfall: the mean of floor - mean over the last steps, exponentially weighted. e is the part of
    it beyond one standard error (of the running mean and of the zero that the floor refers to), so that noise moves
    nothing. With I = clip(I + e, 0, cap / integral gain) the multiplier is max(0, P e + I gain * I + D increase of e).
    The integral alone is gradient ascent on the multiplier; the other two terms damp its oscillation. The cap keeps a
    long violation from acting long after it has ended. Source: Stooke et al., arXiv 2007.03964, algorithm 2; Safe
    RLHF, arXiv 2310.12773, averages the last episodes as well.
    """

    floors: Mapping[str, float]
    """Floor of an objective's mean, by objective."""
    gains: ControllerGains = field(default_factory=ControllerGains)
    values: dict[str, float] = field(default_factory=dict)
    """Current multipliers, by objective."""
    integral: dict[str, float] = field(default_factory=dict)
    """Accumulated shortfall, by objective."""
    previous: dict[str, float] = field(default_factory=dict)
    """Shortfall beyond one standard error in the last step, by objective."""
    running: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """By objective, exponentially weighted over steps: sum of shortfalls, sum of weights, and variance of the first."""

    def update(
        self,
        means: Mapping[str, float],
        standard_errors: Mapping[str, float] | None = None,
        zero_errors: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Update each multiplier from the step's mean of its objective; without a mean it does not change.

        `standard_errors` are those of the means, `zero_errors` those of the zero of the scale, by objective.
        """
        gains, decay = self.gains, 1.0 - 1.0 / self.gains.window_steps
        for objective, floor in self.floors.items():
            if objective not in means:
                self.values.setdefault(objective, 0.0)
                continue
            total, weight, variance = self.running.get(objective, (0.0, 0.0, 0.0))
            total, weight = decay * total + floor - means[objective], decay * weight + 1.0
            variance = decay**2 * variance + (standard_errors or {}).get(objective, 0.0) ** 2
            self.running[objective] = (total, weight, variance)
            dead_band = math.hypot(math.sqrt(variance) / weight, (zero_errors or {}).get(objective, 0.0))
            running_shortfall = total / weight
            shortfall = math.copysign(max(0.0, abs(running_shortfall) - dead_band), running_shortfall)
            # No derivative at the first step, and none while the mean recovers: only a growing shortfall pushes.
            increase = max(0.0, shortfall - self.previous.get(objective, shortfall))
            self.previous[objective] = shortfall
            largest = gains.integral_cap / gains.integral if gains.integral else 0.0
            self.integral[objective] = min(max(0.0, self.integral.get(objective, 0.0) + shortfall), largest)
            multiplier = (
                gains.proportional * shortfall + gains.integral * self.integral[objective] + gains.derivative * increase
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
    overlong_penalties: Sequence[float] = ()
    """Subtracted from the rewards; empty without algorithm.overlong_buffer."""
    plain_objectives: Collection[str] = ()
    """Objectives whose signals are no logits: those of judges and reward functions, here or in a service."""


@dataclass(frozen=True, slots=True)
class StepRewards:
    """Rewards [groups][samples] of a step, the normalized signals and weights behind them, and metrics to log."""

    rewards: list[list[float]]
    normalized_signals: dict[str, list[list[float]]]
    objective_weights: list[dict[str, float]]
    metrics: dict[str, float] = field(default_factory=dict)


class RewardAggregator:
    """Combines the objectives, by name, over one run. `fit_reference` comes before the first batch.

    Its state outlives a step: reference-policy statistics, scores of the base policy's responses, and multipliers.
    """

    def __init__(self, objectives: ObjectivesSettings, aggregation: AggregationSettings) -> None:
        """`objectives` give the weights, `aggregation` the method, floors and topics."""
        self.objectives = objectives
        self.aggregation = aggregation
        self.normalizer: RewardNormalizer | None = None
        self.baseline_signals: dict[str, dict[str, float]] = {}
        self.multipliers = LagrangeMultipliers(aggregation.floors, aggregation.multipliers)
        self.suspended_objectives: frozenset[str] = frozenset()
        """Objectives whose weight is 0 while a reward hacking alarm is active."""

    def record_baseline(self, prompt_id: str, signals: Mapping[str, Sequence[float]]) -> None:
        """Record the mean signals of the base policy's responses to a prompt, as the baseline to calibrate against."""
        self.baseline_signals[prompt_id] = {objective: fmean(values) for objective, values in signals.items()}

    def get_state(self) -> dict[str, Any]:
        """The complete state as plain JSON, for a checkpoint."""
        return {
            "normalizer": None if self.normalizer is None else asdict(self.normalizer),
            "baseline_signals": self.baseline_signals,
            "multipliers": {
                name: dict(getattr(self.multipliers, name)) for name in ("values", "integral", "previous", "running")
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; the floors come from the settings, which may have changed."""
        normalizer = state["normalizer"]
        if normalizer is not None:
            # Checkpoints of earlier releases have no statistics.
            statistics = {name: ReferenceStatistics(**row) for name, row in normalizer.get("statistics", {}).items()}
            self.normalizer = RewardNormalizer(normalizer["mean"], normalizer["sd"], statistics)
        self.baseline_signals = {str(key): dict(signals) for key, signals in state["baseline_signals"].items()}
        multipliers = {**state["multipliers"], "floors": self.aggregation.floors, "gains": self.aggregation.multipliers}
        multipliers["running"] = {name: tuple(sums) for name, sums in multipliers.get("running", {}).items()}
        self.multipliers = LagrangeMultipliers(**multipliers)

    def fit_reference(self, groups: Sequence[GroupScores]) -> RewardNormalizer:
        """Fix zero and scale of every objective from responses of the base policy to training prompts.

        Scales are those on prompts without an objective of their own, where the weights apply; means are over the
        prompts that count for the objective's floor.
        """
        owners, names = self.aggregation.topic_objectives, list(groups[0].signals)
        plain_groups = [group for group in groups if group.topic not in owners] or groups
        self.normalizer = RewardNormalizer.fit(
            {name: [group.signals[name] for group in plain_groups] for name in names},
            mean_signals={
                name: [group.signals[name] for group in groups if owners.get(group.topic, name) == name]
                for name in names
            },
            logit_objectives=[
                name
                for name, objective in self.objectives.by_objective.items()
                if objective.source in ("model", "serve") and name not in groups[0].plain_objectives
            ],
        )
        return self.normalizer

    def describe_reference(self) -> dict[str, dict[str, float]]:
        """By objective: weight, effective weight on the base policy, and the statistics; empty before `fit_reference`.

        The effective weight is the standard deviation, among responses to one prompt, of what the objective adds to the
        reward. It equals the weight up to shrinkage; verdicts that rarely differ have a smaller one.
        """
        if self.normalizer is None:
            return {}
        weights = {name: objective.weight for name, objective in self.objectives.by_objective.items()}
        return {
            name: {
                "weight": weights.get(name, 0.0),
                "effective_weight": weights.get(name, 0.0) * statistics.within_sd / self.normalizer.sd[name],
                "scale": self.normalizer.sd[name],
                **asdict(statistics),
            }
            for name, statistics in self.normalizer.statistics.items()
        }

    def aggregate(self, groups: Sequence[GroupScores], *, apply_gate: bool = False) -> StepRewards:
        """Rewards of a batch. Without `fit_reference` this batch is the reference.

        Truncated responses get less than the finished ones of their group (`lower_truncated`). With `apply_gate`, a
        response that failed a judge gets the lowest reward of the step (at most 0 with method calibrated); elsewhere
        advantages account for judges. Raises SettingsError when objectives and scores do not match.
        """
        objectives = list(groups[0].signals)
        normalizer = self.normalizer or self.fit_reference(groups)
        normalized_signals = {
            name: [normalizer.normalize(name, group.signals[name]) for group in groups] for name in objectives
        }
        metrics: dict[str, float] = {}
        if self.aggregation.method == "constrained":
            self._update_multipliers(groups, normalized_signals)
            metrics = {f"multiplier_{name}": value for name, value in self.multipliers.values.items()}
        weights = [self._get_active_weights(group.topic) for group in groups]
        is_calibrated = self.aggregation.method == "calibrated"
        if is_calibrated:
            rewards = [
                self._compute_calibrated_rewards(group, group_weights)
                for group, group_weights in zip(groups, weights, strict=True)
            ]
        else:
            rewards = [
                sum_weighted_signals(group.signals, group_weights, normalizer)
                for group, group_weights in zip(groups, weights, strict=True)
            ]
        rewards = [_subtract_penalties(row, group) for row, group in zip(rewards, groups, strict=True)]
        # The signals as well: gdpo computes advantages from them and not from the rewards.
        normalized_signals = {
            name: [_subtract_penalties(row, group) for row, group in zip(rows, groups, strict=True)]
            for name, rows in normalized_signals.items()
        }
        if apply_gate:
            # Calibrated rewards lie in (0, 1), so 0 is below all of them but those of truncated responses.
            lowest = min(map(min, rewards))
            rewards = _apply_gate_to_groups(rewards, groups, min(lowest, 0.0) if is_calibrated else lowest)
            normalized_signals = {
                name: _apply_gate_to_groups(group_signals, groups, min(map(min, group_signals)))
                for name, group_signals in normalized_signals.items()
            }
        if any(group.gate_verdicts for group in groups):
            metrics["gate_pass_rate"] = fmean(float(verdict) for group in groups for verdict in group.gate_verdicts)
        return StepRewards(rewards, normalized_signals, weights, metrics)

    def measure_spread(self, group: GroupScores) -> float:
        """Standard deviation of the rewards of a group, where 1 is that of independent objectives on the base policy.

        0 for equal rewards, also where objectives cancel: dividing by a deviation of rounding errors, advantages would
        be noise.
        """
        weights, names = self._get_active_weights(group.topic), group.signals.keys()
        normalizer = self.normalizer or RewardNormalizer(dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0))
        rewards = _subtract_penalties(sum_weighted_signals(group.signals, weights, normalizer), group)
        return pstdev(rewards) / (math.hypot(*weights.values()) or 1.0) if min(rewards) < max(rewards) else 0.0

    def _get_active_weights(self, topic: str) -> dict[str, float]:
        """Weight of each objective on prompts of the topic, with the present multipliers; 0 for suspended objectives.

        With multipliers the weights are those of the Lagrangian at the scale of the weights: (w_k + multiplier_k) /
        (1 + sum of multipliers). Topics with an objective of their own keep theirs. Source: Safe RLHF, arXiv
        2310.12773, eq. 11 and its published code.
        """
        multipliers: Mapping[str, float] = {}
        if topic not in self.aggregation.topic_objectives:
            multipliers = self.multipliers.values
        active_weights = {
            name: 0.0 if name in self.suspended_objectives else weight + multipliers.get(name, 0.0)
            for name, weight in self.aggregation.get_topic_weights(self.objectives, topic).items()
        }
        # Divided by the sum: large multipliers would otherwise act like a larger learning rate.
        scale = 1.0 + sum(value for name, value in multipliers.items() if name not in self.suspended_objectives)
        return {name: weight / scale for name, weight in active_weights.items()}

    def _compute_calibrated_rewards(self, group: GroupScores, weights: Mapping[str, float]) -> list[float]:
        """sum_k w_k sigmoid(r_k - r_k of the base policy) / sum_k w_k, in (0, 1): CGPO, arXiv 2409.20370, eq. 7.

        A prompt without a recorded baseline is calibrated against the mean of its own responses. A reward function has
        any unit, in which the sigmoid may be 0 or 1 for all responses, so its differences are divided by its scale.
        """
        scales = {
            name: self.normalizer.sd[name]
            for name, objective in self.objectives.by_objective.items()
            if self.normalizer is not None
            and (objective.source == "function" or (objective.source == "serve" and name in group.plain_objectives))
        }
        active_weights = {name: weight for name, weight in weights.items() if weight}
        group_means = {name: fmean(values) for name, values in group.signals.items()}
        baseline = self.baseline_signals.get(group.prompt_id, group_means)
        weight_sum = sum(active_weights.values()) or 1.0
        sample_count = len(next(iter(group.signals.values())))
        return [
            sum(
                weight * float(sigmoid((group.signals[name][index] - baseline[name]) / scales.get(name, 1.0)))
                for name, weight in sorted(active_weights.items())
            )
            / weight_sum
            for index in range(sample_count)
        ]

    def _update_multipliers(
        self, groups: Sequence[GroupScores], normalized_signals: Mapping[str, list[list[float]]]
    ) -> None:
        """Update the multipliers from the means of the step; topics with an own objective count for its floor only."""
        topic_objectives, normalizer = self.aggregation.topic_objectives, self.normalizer
        means, standard_errors, zero_errors = {}, {}, {}
        for objective in self.aggregation.floors:
            rows = [
                group_signals
                for group, group_signals in zip(groups, normalized_signals[objective], strict=True)
                if topic_objectives.get(group.topic, objective) == objective
            ]
            if rows:
                means[objective] = fmean(value for row in rows for value in row)
                standard_errors[objective] = compute_clustered_error(rows)
            if normalizer is not None and (statistics := normalizer.statistics.get(objective)) is not None:
                zero_errors[objective] = statistics.standard_error / normalizer.sd[objective]
                if rows:
                    # Few prompts say little about their own spread, and one says nothing.
                    reference_error = zero_errors[objective] * math.sqrt(statistics.prompt_count / len(rows))
                    standard_errors[objective] = max(standard_errors[objective], reference_error)
        self.multipliers.update(means, standard_errors, zero_errors)


def _apply_gate_to_groups(
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


def _subtract_penalties(values: Sequence[float], group: GroupScores) -> list[float]:
    """Values of a group minus the overlong penalties, those of truncated responses lowered."""
    penalties = group.overlong_penalties or [0.0] * len(values)
    return lower_truncated([value - penalty for value, penalty in zip(values, penalties, strict=True)], group.finished)


def compute_overlong_penalties(lengths: Sequence[int], max_tokens: int, buffer_tokens: int) -> list[float]:
    """Penalty of each response: 0 up to `max_tokens` - `buffer_tokens`, then rising linearly to 1 at `max_tokens`.

    Empty without a buffer. Source: the soft overlong punishment of DAPO, arXiv 2503.14476, eq. 13.
    """
    if not buffer_tokens:
        return []
    return [min(1.0, max(0.0, (length - max_tokens + buffer_tokens) / buffer_tokens)) for length in lengths]


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
