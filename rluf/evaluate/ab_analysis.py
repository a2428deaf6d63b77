"""A/B test analysis of an event log: sample ratio, effects with CUPED, verdicts, and sequential looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from scipy import stats

from rluf.errors import DataError
from rluf.evaluate.ab_design import (
    ANY_LOVE_METRIC,
    USER_LEVEL_METRICS,
    ArmAssignment,
    ExperimentDesign,
    assign_arms,
    select_metrics,
)
from rluf.evaluate.effects import (
    MIN_NORMAL_INFORMATION,
    EffectEstimate,
    TestQuantiles,
    UserTotals,
    adjust_by_holm,
    adjust_totals_by_cuped,
    build_pre_period_covariate,
    estimate_crossed_effect,
    estimate_proportion_effect,
    estimate_ratio_effect,
    measure_information,
    rerandomize_quantiles,
    sample_ratio_test,
)
from rluf.evaluate.events import SECONDS_PER_DAY, EventLog, cap_values, sum_by_user
from rluf.evaluate.quantile_effects import estimate_quantile_effect
from rluf.evaluate.segments import analyze_segments
from rluf.evaluate.sequential import (
    MIN_LOOK_EVENTS,
    MIN_LOOK_USERS,
    choose_mixture_variance,
    compute_always_valid_margin,
    compute_always_valid_p_values,
)
from rluf.evaluate.verdicts import judge_guardrail, judge_primary
from rluf.prepare.schema import LOVE_REACTION

SAMPLE_RATIO_ALPHA = 0.001
"""Below this p the arm sizes do not match the planned shares, and no figure of the experiment can be trusted."""
_CUPED = " with CUPED"
MIN_CUPED_USERS = 30
"""Minimum users in each arm for CUPED: with 5 users its fitted slope raises false alarms from 5% to 12%."""


@dataclass(frozen=True, slots=True)
class MetricResult:
    """Effect of one metric without and with CUPED (None without), the quantiles behind it, and its description."""

    effect: EffectEstimate
    quantiles: TestQuantiles
    test_name: str
    cuped_effect: EffectEstimate | None = None
    cuped_correlation: float = 0.0
    expected_events: float | None = None

    @property
    def best(self) -> EffectEstimate:
        """The effect to decide by."""
        return self.effect if self.cuped_effect is None else self.cuped_effect

    def as_dict(self) -> dict[str, Any]:
        """Plain types."""
        cuped = None
        if self.cuped_effect is not None:
            variance_cut = 0.0
            if self.effect.error > 0.0:
                variance_cut = 1.0 - float(self.cuped_effect.error / self.effect.error) ** 2
            cuped = self.cuped_effect.as_dict() | {"correlation": self.cuped_correlation, "variance_cut": variance_cut}
        return {"test": self.test_name, "effect": self.effect.as_dict(), "cuped": cuped, "p": float(self.best.p),
                "expected_events": self.expected_events}  # fmt: skip


def analyze_experiment(events: EventLog, design: ExperimentDesign) -> dict[str, Any]:
    """Analyze the experiment; returns plain types. Raises DataError.

    `comparisons` has an entry for each treatment: its metrics, each with `effect` (fixed horizon, by user), `cuped` if
    there is a pre-period, `p` and `p_holm` (of the CUPED effect if there is one; Holm over the primary metrics and all
    treatments, and separately over the other metrics), `verdict`, and `always_valid` at the last look. With a single
    treatment its entries are also at the top. Read none of it unless `srm` (the sample-ratio check) is ok.
    """
    assignment = assign_arms(events, design)
    metrics, primaries = select_metrics(events, design)
    if design.cap is not None:
        events = cap_values(events, design.cap)
    arm_totals = _sum_arms(events, assignment, assignment.arm_rows, design)
    pre_period_totals = None
    if assignment.pre_period_rows.any():
        rows = (assignment.pre_period_rows,) * len(assignment.arm_rows)
        pre_period_totals = _sum_arms(events, assignment, rows, design)
    results = {
        treatment: _analyze_metrics(metrics, arm_totals, pre_period_totals, arm, design)
        | _analyze_quantiles(events, assignment, arm, design)
        for arm, treatment in enumerate(design.arm_names[1:], start=1)
    }
    adjusted = _adjust_p_values(results, primaries)
    user_counts = [len(users) for users in assignment.arm_users]
    comparisons = {}
    for arm, treatment in enumerate(design.arm_names[1:], start=1):
        looks = _build_sequential_looks(events, assignment, arm, design, primaries, metrics)
        rendered = {}
        for name, result in results[treatment].items():
            adjusted_p = adjusted[treatment, name]
            rendered[name] = result.as_dict() | {
                "p_holm": adjusted_p, "significant": adjusted_p < design.alpha,
                "always_valid": looks[name][-1] if looks.get(name) else None,
            }  # fmt: skip
            test_count = len(primaries) * len(results) if name in primaries else 0
            rendered[name] |= _judge(name, result, adjusted_p, test_count, (user_counts[0], user_counts[arm]), design)
        comparisons[treatment] = {"metrics": rendered, "looks": looks}
        if design.has_segments:
            judged = [*primaries, *(guardrail.metric for guardrail in design.guardrails)]
            comparisons[treatment]["segments"] = analyze_segments(events, assignment, arm, judged, alpha=design.alpha)
    report = _describe_log(events, assignment, design, arm_totals, pre_period_totals is not None)
    report["primary"] = primaries
    return report | {"comparisons": comparisons} | (comparisons[design.treatment] if len(comparisons) == 1 else {})


def _describe_log(
    events: EventLog,
    assignment: ArmAssignment,
    design: ExperimentDesign,
    arm_totals: Sequence[dict[str, UserTotals]],
    has_pre_period: bool,
) -> dict[str, Any]:
    """Sizes of the arms, what was dropped, and the sample ratio over all arms."""
    user_counts = [len(users) for users in assignment.arm_users]
    # Not from the metric "responses", which may be capped.
    response_counts = [int(totals["turns"].sums.sum()) for totals in arm_totals]
    chi2, p_value = sample_ratio_test(response_counts if design.is_crossed else user_counts, design.shares)
    times = events.timestamps[np.logical_or.reduce(assignment.arm_rows)]
    return {
        "control": design.control, "treatment": design.treatment, "arms": list(design.arm_names),
        "alpha": design.alpha, "start": _format_time(times[0]), "end": _format_time(times[-1]),
        "days": float((times[-1] - times[0]) / SECONDS_PER_DAY),
        "users": user_counts, "responses": response_counts, "crossed": design.is_crossed,
        "crossed_users": assignment.crossed_user_count, "crossed_responses": assignment.crossed_row_count,
        "other_responses": assignment.other_row_count,
        "other_arms": [name for name in events.arm_names if name not in design.arm_names],
        "missing_user_responses": events.missing_user_count,
        "duplicate_rows": events.duplicate_count, "reactions": events.reaction_counts,
        "love_spellings": events.love_spellings, "notes": list(events.notes), "pre_period": has_pre_period,
        "srm": {"shares": list(design.shares), "chi2": float(chi2), "p": float(p_value),
                "ok": bool(p_value >= SAMPLE_RATIO_ALPHA)},
    }  # fmt: skip


def _sum_arms(
    events: EventLog, assignment: ArmAssignment, rows: Sequence[Any], design: ExperimentDesign
) -> list[dict[str, UserTotals]]:
    """Totals by user of each arm; a cap applies to responses per user as well."""
    arm_totals = [sum_by_user(events, *pair) for pair in zip(rows, assignment.arm_users, strict=True)]
    counts = np.concatenate([totals["responses"].sums for totals in arm_totals])
    limit = np.inf if design.cap is None else np.quantile(counts, design.cap, method="lower")
    for totals in arm_totals:
        totals["responses"] = UserTotals.from_arrays(np.minimum(totals["responses"].sums, limit))
    return arm_totals


def _analyze_metrics(
    metrics: Sequence[str],
    arm_totals: Sequence[dict[str, UserTotals]],
    pre_period_totals: Sequence[dict[str, UserTotals]] | None,
    arm: int,
    design: ExperimentDesign,
) -> dict[str, MetricResult]:
    """Effects of one treatment on each metric; ratios of randomized users share their re-randomized arms."""
    confidence = 1.0 - design.alpha
    z = np.asarray(stats.norm.isf(design.alpha / 2.0))
    results: dict[str, MetricResult] = {}
    pairs: dict[str, tuple[UserTotals, UserTotals]] = {}
    correlations: dict[str, float] = {}
    effects: dict[str, tuple[EffectEstimate, TestQuantiles]] = {}
    for name in metrics:
        if name == ANY_LOVE_METRIC:
            totals = count_lovers(arm_totals[0]), count_lovers(arm_totals[arm])
            # The normal test rejects too often where a few users decide: 1 of 20 against 10 of 2,000.
            if has_few_events(*totals):
                pairs[name] = totals
                continue
            hits, sizes = zip(*((float(t.sums.sum()), t.user_count) for t in totals), strict=True)
            effect = estimate_proportion_effect((hits[0], hits[1]), (sizes[0], sizes[1]), confidence=confidence)
            results[name] = MetricResult(effect, TestQuantiles(-z, z), "two proportions")
            continue
        totals = arm_totals[0][name], arm_totals[arm][name]
        _check_has_values(name, totals, (design.control, design.arm_names[arm]))
        if design.is_crossed and has_few_events(*totals) and not any((t.sums % 1.0).any() for t in totals):
            # Each response was randomized, so each is a unit of the re-randomization.
            pairs[name] = split_responses(totals[0]), split_responses(totals[1])
            effects |= _estimate_ratios({name: pairs[name]}, confidence)
            continue
        if design.is_crossed:
            effect = estimate_crossed_effect(*totals, confidence=confidence)
            quantiles = TestQuantiles(effect.quantile_low, effect.quantile_high)
            results[name] = MetricResult(effect, quantiles, "delta method by user, crossed")
            continue
        pairs[name] = totals
        if pre_period_totals is not None and min(total.user_count for total in totals) >= MIN_CUPED_USERS:
            covariates = build_pre_period_covariate((pre_period_totals[0][name], pre_period_totals[arm][name]))
            cuped = adjust_totals_by_cuped(totals, covariates)
            pairs[f"{name}{_CUPED}"] = cuped.totals
            correlations[name] = float(cuped.correlation)
    effects |= _estimate_ratios({name: pair for name, pair in pairs.items() if name not in effects}, confidence)
    for name in (name for name in metrics if name in pairs):
        effect, quantiles = effects[name]
        cuped_effect, cuped_quantiles = effects.get(f"{name}{_CUPED}", (None, quantiles))
        is_rerandomized = cuped_quantiles.sorted_statistics is not None
        unit = "response" if design.is_crossed else "user"
        results[name] = MetricResult(
            effect, cuped_quantiles, f"{'re-randomization' if is_rerandomized else 'delta method'} by {unit}",
            cuped_effect, correlations.get(name, 0.0), _count_expected_events(*pairs[name]),
        )  # fmt: skip
    return {name: results[name] for name in metrics}


def count_lovers(totals: dict[str, UserTotals]) -> UserTotals:
    """1 for each user with one heart or more, else 0."""
    return UserTotals.from_arrays(totals[LOVE_REACTION].sums > 0.0)


def split_responses(totals: UserTotals) -> UserTotals:
    """Yes/no responses of all users, each as a unit of its own."""
    hits, count = int(totals.sums.sum()), int(totals.counts.sum())
    return UserTotals.from_arrays(np.repeat([1.0, 0.0], [hits, count - hits]))


def _estimate_ratios(
    pairs: dict[str, tuple[UserTotals, UserTotals]], confidence: float
) -> dict[str, tuple[EffectEstimate, TestQuantiles]]:
    """Effect and quantiles of each pair of totals; re-randomized quantiles for those with little information."""
    uncertain = [name for name, pair in pairs.items() if measure_information(*pair) < MIN_NORMAL_INFORMATION]
    quantiles: dict[str, TestQuantiles | None] = dict.fromkeys(pairs)
    if uncertain:
        rerandomized = rerandomize_quantiles([pairs[name] for name in uncertain], confidence=confidence)
        quantiles |= dict(zip(uncertain, rerandomized, strict=True))
    estimates = {}
    for name, pair in pairs.items():
        effect = estimate_ratio_effect(*pair, confidence=confidence, quantiles=quantiles[name])
        estimates[name] = effect, quantiles[name] or TestQuantiles(effect.quantile_low, effect.quantile_high)
    return estimates


def _analyze_quantiles(
    events: EventLog, assignment: ArmAssignment, arm: int, design: ExperimentDesign
) -> dict[str, MetricResult]:
    results = {}
    for metric in design.quantile_metrics:
        if metric.column not in events.metric_values:
            raise DataError(f"no column {metric.column!r} for --quantile; available: {', '.join(events.metric_values)}")
        masks = [
            assignment.arm_rows[index] & np.isin(events.user_index, assignment.arm_users[index]) for index in (0, arm)
        ]
        values = events.metric_values[metric.column]
        effect = estimate_quantile_effect(
            (values[masks[0]], values[masks[1]]), (events.user_index[masks[0]], events.user_index[masks[1]]),
            metric.level, confidence=1.0 - design.alpha,
        )  # fmt: skip
        quantiles = TestQuantiles(effect.quantile_low, effect.quantile_high)
        results[metric.name] = MetricResult(effect, quantiles, "quantile by user")
    return results


def _count_expected_events(control: UserTotals, treatment: UserTotals) -> float | None:
    """Events (hearts) that the pooled rate predicts for the smaller arm; None unless the values are a rate."""
    sums = control.sums.sum() + treatment.sums.sum()
    counts = control.counts.sum() + treatment.counts.sum()
    if not 0.0 <= sums <= counts:
        return None
    return float(min(sums, counts - sums) / counts * min(control.counts.sum(), treatment.counts.sum()))


def has_few_events(control: UserTotals, treatment: UserTotals) -> bool:
    """Whether the pooled rate predicts too few events in the smaller arm for the normal test of two proportions."""
    expected_events = _count_expected_events(control, treatment)
    return expected_events is not None and expected_events < MIN_LOOK_EVENTS


def _check_has_values(metric: str, arm_totals: tuple[UserTotals, UserTotals], arm_names: tuple[str, str]) -> None:
    for totals, arm in zip(arm_totals, arm_names, strict=True):
        if totals.counts.sum() <= 0.0:
            raise DataError(f"the {arm} arm has no value of {metric!r}; remove it from --metrics")


def _adjust_p_values(
    results: dict[str, dict[str, MetricResult]], primaries: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Holm-adjusted p of each treatment and metric: the primary metrics of all treatments are one family."""
    adjusted: dict[tuple[str, str], float] = {}
    for is_primary in (True, False):
        family = {
            (treatment, name): float(result.best.p)
            for treatment, metric_results in results.items()
            for name, result in metric_results.items()
            if (name in primaries) == is_primary
        }
        adjusted |= dict(zip(family, adjust_by_holm(list(family.values())).tolist(), strict=True))
    return adjusted


def _judge(
    name: str,
    result: MetricResult,
    adjusted_p: float,
    primary_tests: int,
    user_counts: tuple[int, int],
    design: ExperimentDesign,
) -> dict[str, Any]:
    """Role and verdict of a metric; `primary_tests` are the tests that share alpha, 0 if it is not primary."""
    limits: dict[str, Any] = {"user_count": sum(user_counts), "alpha": design.alpha, "power": design.power}
    guardrail = next((guardrail for guardrail in design.guardrails if guardrail.metric == name), None)
    judged: dict[str, Any] = {"role": "secondary"}
    if guardrail is not None:
        judged = {
            "role": "guardrail",
            "guardrail": judge_guardrail(
                guardrail, result.best, result.quantiles, **limits, smaller_arm=min(user_counts)
            ),
        }
    if primary_tests:
        primary = judge_primary(result.best, adjusted_p, lift=design.lift, test_count=primary_tests, **limits)
        judged |= {"role": "primary", "primary": primary}
    return judged


def _build_sequential_looks(
    events: EventLog,
    assignment: ArmAssignment,
    arm: int,
    design: ExperimentDesign,
    primaries: Sequence[str],
    metrics: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """Always-valid intervals at `look_count` equal slices of time (0: one per day), with the users seen so far.

    The mixture is fixed at the first look with enough events, from the variance at that look and the planned users.
    Only for ratios: counts that grow with time, such as responses per user, have no single true value for all looks.
    Alpha is divided by the treatments and, for primary metrics, by their number.
    """
    arms = (0, arm)
    is_in_arms = assignment.arm_rows[0] | assignment.arm_rows[arm]
    times = events.timestamps[is_in_arms]
    look_count = design.look_count or max(1, int(np.ceil((times[-1] - times[0]) / SECONDS_PER_DAY)))
    first_seen = np.full(len(events.user_ids), np.inf)
    np.minimum.at(first_seen, events.user_index[is_in_arms], times)
    # A crossed experiment has the same users in both arms: count them once.
    counted_arms = (0,) if design.is_crossed else arms
    all_users = sum(len(assignment.arm_users[index]) for index in counted_arms)
    planned_users = all_users
    if design.planned_users:
        planned_users = round(design.planned_users * (design.shares[0] + design.shares[arm]) / sum(design.shares))
    look_effects: dict[str, list[tuple[float, int, EffectEstimate]]] = {
        metric: [] for metric in metrics if metric not in USER_LEVEL_METRICS
    }
    for look_time in times[0] + (times[-1] - times[0]) * np.arange(1, look_count + 1) / look_count:
        users = [assignment.arm_users[index][first_seen[assignment.arm_users[index]] <= look_time] for index in arms]
        if min(map(len, users)) < MIN_LOOK_USERS:
            continue
        is_before_look = events.timestamps <= look_time
        totals = [
            sum_by_user(events, assignment.arm_rows[index] & is_before_look, seen_users)
            for index, seen_users in zip(arms, users, strict=True)
        ]
        user_count = sum(map(len, users[: len(counted_arms)]))
        for metric, effects in look_effects.items():
            pair = totals[0][metric], totals[1][metric]
            expected_events = _count_expected_events(*pair)
            # Once begun, a sequence goes to its end: leaving out looks by what they show would void the guarantee.
            is_enough = bool(effects) or expected_events is None or expected_events >= MIN_LOOK_EVENTS
            if is_enough and min(total.counts.sum() for total in pair) > 0.0:
                effect = (estimate_crossed_effect if design.is_crossed else estimate_ratio_effect)(*pair)
                effects.append((look_time, user_count, effect))
    sequences = {}
    for metric, effects in look_effects.items():
        test_count = (len(design.arm_names) - 1) * (len(primaries) if metric in primaries else 1)
        if sequence := _compute_always_valid_sequence(effects, planned_users, design.alpha / test_count):
            sequences[metric] = sequence
    return sequences


def _compute_always_valid_sequence(
    look_effects: Sequence[tuple[float, int, EffectEstimate]], planned_users: int, alpha: float
) -> list[dict[str, Any]]:
    variance = np.array([float(effect.error) ** 2 for _, _, effect in look_effects])
    if not (variance > 0.0).any():
        return []
    difference = np.array([float(effect.difference) for _, _, effect in look_effects])
    user_counts = np.array([user_count for _, user_count, _ in look_effects])
    first_look = int(np.argmax(variance > 0.0))
    # The mixture may depend on the first look only: one chosen from later data would void the guarantee.
    planned_variance = variance[first_look] * user_counts[first_look] / planned_users
    tau = choose_mixture_variance(planned_variance, alpha)
    margin = compute_always_valid_margin(variance, tau, alpha)
    p_values = compute_always_valid_p_values(difference, variance, tau)
    return [
        {
            "time": _format_time(look_effects[n][0]), "users": int(user_counts[n]), "difference": float(difference[n]),
            "low": float(difference[n] - margin[n]), "high": float(difference[n] + margin[n]), "p": float(p_values[n]),
        }
        for n in range(len(look_effects))
    ]  # fmt: skip


def _format_time(timestamp: float) -> str:
    return datetime.fromtimestamp(float(timestamp), UTC).isoformat(timespec="seconds")
