"""A/B test analysis of an event log: arm assignment, sample-ratio check, effects with CUPED, Holm, sequential looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.errors import DataError
from rluf.evaluate.effects import (
    MIN_USERS_PER_ARM,
    EffectEstimate,
    UserTotals,
    always_valid_margin,
    always_valid_p_values,
    crossed_effect,
    cuped_effect,
    holm_adjust,
    mean_effect,
    mixture_variance,
    pre_period_covariate,
    proportion_effect,
    ratio_effect,
    sample_ratio_test,
)
from rluf.evaluate.events import SECONDS_PER_DAY, EventLog, assign_users, sum_by_user
from rluf.utils.stats import Ints

SAMPLE_RATIO_ALPHA = 0.001
"""Below this p the arm sizes do not match the planned shares, and no figure of the experiment can be trusted."""
MAX_CROSSED_USER_SHARE = 0.05
"""Maximum share of users seen in both arms. They are excluded; with more of them it is not a user-level experiment."""
ANY_LOVE_METRIC = "users_who_loved"
"""Share of users with one heart or more: the metric of the two-proportion test."""
USER_LEVEL_METRICS = (ANY_LOVE_METRIC, "responses")
"""Metrics of a user, which need users randomized by arm; the others are ratios over responses."""


@dataclass(frozen=True, slots=True)
class ExperimentDesign:
    """How the experiment was set up.

    `control` and `treatment` name arms of the log; with `assignment_salt` the users of the log are assigned to the two
    arms by hash instead, for an A/A test. `is_crossed`: responses, not users, were randomized. `shares` are the arms'
    shares of users (of responses if crossed). Events before `start_time` (seconds since 1970) are the pre-period.
    `planned_users` over both arms is where the always-valid interval is tightest.
    """

    control: str
    treatment: str
    shares: tuple[float, float] = (0.5, 0.5)
    assignment_salt: str | None = None
    is_crossed: bool = False
    start_time: float | None = None
    metric_names: tuple[str, ...] = ()
    alpha: float = 0.05
    look_count: int = 0
    planned_users: int | None = None


@dataclass(frozen=True, slots=True)
class ArmAssignment:
    """User indices per arm [U], row masks per arm [N], pre-period row mask [N], and the number of users in both."""

    arm_users: tuple[Ints, Ints]
    arm_rows: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    pre_period_rows: NDArray[np.bool_]
    crossed_user_count: int


def assign_arms(events: EventLog, design: ExperimentDesign) -> ArmAssignment:
    """Assign the users seen in the experiment to arms. DataError for unknown arms or too many users in both."""
    start_time = -np.inf if design.start_time is None else design.start_time
    is_experiment = events.timestamps >= start_time
    if not is_experiment.any():
        raise DataError("no event is at or after --start; give the time at which the experiment began")
    if design.assignment_salt is not None:
        arm_of_user = assign_users(events.user_ids, design.assignment_salt, design.shares)
        seen_users = np.unique(events.user_index[is_experiment])
        hashed = seen_users[arm_of_user[seen_users] == 0], seen_users[arm_of_user[seen_users] == 1]
        _check_arm_sizes(hashed, ("hashed control", "hashed treatment"))
        # Both arms may use all rows: sum_by_user selects by user, and each user is in one arm only.
        return ArmAssignment(hashed, (is_experiment, is_experiment), ~is_experiment, 0)
    arm_names = (design.control, design.treatment)
    for name in arm_names:
        if name not in events.arm_names:
            raise DataError(f"no event has the arm {name!r}; the log has {', '.join(events.arm_names)}")
    control_rows, treatment_rows = (
        is_experiment & (events.arm_index == events.arm_names.index(name)) for name in arm_names
    )
    control_users, treatment_users = (np.unique(events.user_index[rows]) for rows in (control_rows, treatment_rows))
    crossed_users = np.intersect1d(control_users, treatment_users)
    all_users = np.union1d(control_users, treatment_users)
    if design.is_crossed:
        _check_arm_sizes((control_users, treatment_users), arm_names)
        no_rows = np.zeros(len(is_experiment), bool)
        return ArmAssignment((all_users, all_users), (control_rows, treatment_rows), no_rows, len(crossed_users))
    if len(crossed_users) > MAX_CROSSED_USER_SHARE * len(all_users):
        raise DataError(
            f"{len(crossed_users)} of {len(all_users)} users saw both {arm_names[0]} and {arm_names[1]}, so the arms "
            "are not independent: randomize by user; if the log also covers the time before the experiment, give "
            "its --start; if responses, not users, were randomized, use --crossed"
        )
    exclusive = np.setdiff1d(control_users, crossed_users), np.setdiff1d(treatment_users, crossed_users)
    _check_arm_sizes(exclusive, arm_names)
    return ArmAssignment(exclusive, (control_rows, treatment_rows), ~is_experiment, len(crossed_users))


def _check_arm_sizes(arm_users: Sequence[Ints], arm_names: Sequence[str]) -> None:
    for users, name in zip(arm_users, arm_names, strict=True):
        if len(users) < 2:
            raise DataError(f"arm {name!r} has {len(users)} users; an experiment needs 2 or more in each arm")


def select_metrics(events: EventLog, requested: Sequence[str]) -> list[str]:
    """The requested metrics; by default love, users who loved, continued, returned and usage, if the log has them."""
    available = [
        *events.metric_values, "responses", "turns", *([ANY_LOVE_METRIC] if "love" in events.metric_values else []),
    ]  # fmt: skip
    unknown = [name for name in requested if name not in available]
    if unknown:
        raise DataError(f"no metric {unknown[0]!r} in this log; available: {', '.join(available)}")
    defaults = ("love", ANY_LOVE_METRIC, "continued", "returned", "responses", "turns")
    return list(requested) or [name for name in defaults if name in available]


def analyze_experiment(events: EventLog, design: ExperimentDesign) -> dict[str, Any]:
    """Analyze the experiment; returns plain types. Raises DataError.

    For each metric: `effect` (fixed horizon, by user), `cuped` if there is a pre-period, `p` and `p_holm` (of the CUPED
    effect if there is one), `always_valid` at the last look. Read none of it unless `srm` (the sample-ratio check) is
    ok.
    """
    assignment = assign_arms(events, design)
    metrics = select_metrics(events, design.metric_names)
    if design.is_crossed:
        metrics = [name for name in metrics if name not in USER_LEVEL_METRICS]
    user_counts = [len(users) for users in assignment.arm_users]
    arm_totals = [
        sum_by_user(events, rows, users) for rows, users in zip(assignment.arm_rows, assignment.arm_users, strict=True)
    ]
    response_counts = [int(totals["responses"].sums.sum()) for totals in arm_totals]
    chi2, p_value = sample_ratio_test(response_counts if design.is_crossed else user_counts, design.shares)
    pre_period_totals = None
    if assignment.pre_period_rows.any():
        pre_period_totals = [sum_by_user(events, assignment.pre_period_rows, users) for users in assignment.arm_users]
    results = {name: _analyze_metric(name, arm_totals, pre_period_totals, design) for name in metrics}
    adjusted_p_values = holm_adjust([result["p"] for result in results.values()]).tolist()
    looks = _sequential_looks(events, assignment, design, [name for name in metrics if name not in USER_LEVEL_METRICS])
    for (name, result), adjusted_p_value in zip(results.items(), adjusted_p_values, strict=True):
        result["p_holm"] = adjusted_p_value
        result["significant"] = adjusted_p_value < design.alpha
        result["always_valid"] = looks[name][-1] if looks.get(name) else None
    times = events.timestamps[assignment.arm_rows[0] | assignment.arm_rows[1]]
    return {
        "control": design.control, "treatment": design.treatment, "alpha": design.alpha,
        "start": _format_time(times[0]), "end": _format_time(times[-1]),
        "days": float((times[-1] - times[0]) / SECONDS_PER_DAY),
        "users": user_counts, "responses": response_counts, "crossed": design.is_crossed,
        "crossed_users": assignment.crossed_user_count, "duplicate_rows": events.duplicate_count,
        "pre_period": pre_period_totals is not None,
        "srm": {"shares": list(design.shares), "chi2": float(chi2), "p": float(p_value),
                "ok": bool(p_value >= SAMPLE_RATIO_ALPHA)},
        "metrics": results, "looks": looks,
    }  # fmt: skip


def _analyze_metric(
    metric: str,
    arm_totals: Sequence[dict[str, UserTotals]],
    pre_period_totals: Sequence[dict[str, UserTotals]] | None,
    design: ExperimentDesign,
) -> dict[str, Any]:
    confidence = 1.0 - design.alpha
    if metric == ANY_LOVE_METRIC:
        love_totals = [totals["love"] for totals in arm_totals]
        hit_counts = [float((totals.sums > 0.0).sum()) for totals in love_totals]
        effect = proportion_effect(
            (hit_counts[0], hit_counts[1]),
            (love_totals[0].user_count, love_totals[1].user_count),
            confidence=confidence,
        )
        return {"test": "two proportions", "effect": effect.as_dict(), "cuped": None, "p": float(effect.p)}
    metric_totals = arm_totals[0][metric], arm_totals[1][metric]
    _check_has_values(metric, metric_totals)
    effect = (crossed_effect if design.is_crossed else ratio_effect)(*metric_totals, confidence=confidence)
    test_effect, cuped = effect, None
    if pre_period_totals is not None:
        adjusted = cuped_effect(
            (metric_totals[0].linearize(), metric_totals[1].linearize()),
            pre_period_covariate((pre_period_totals[0][metric], pre_period_totals[1][metric])),
            confidence=confidence,
        )
        test_effect = adjusted.effect
        cuped = adjusted.effect.as_dict() | {
            "theta": float(adjusted.theta),
            "correlation": float(adjusted.correlation),
            "variance_cut": 1.0 - float(test_effect.error / effect.error) ** 2 if effect.error > 0.0 else 0.0,
        }
    test_name = "delta method by user, crossed" if design.is_crossed else "delta method by user"
    # With counts of 1 per user the delta method is Welch's test.
    test_name = "Welch" if metric == "responses" else test_name
    return {"test": test_name, "effect": effect.as_dict(), "cuped": cuped, "p": float(test_effect.p)}


def _check_has_values(metric: str, arm_totals: tuple[UserTotals, UserTotals]) -> None:
    for totals, arm in zip(arm_totals, ("control", "treatment"), strict=True):
        if totals.counts.sum() <= 0.0:
            raise DataError(f"the {arm} arm has no value of {metric!r}; remove it from --metrics")


def _sequential_looks(
    events: EventLog, assignment: ArmAssignment, design: ExperimentDesign, metrics: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Always-valid intervals at `look_count` equal slices of time (0: one per day), with the users seen so far.

    The mixture is fixed at the first look with enough users, from the variance at that look and the planned users. Only
    for ratios: counts that grow with time, such as responses per user, have no single true value for all looks.
    """
    is_in_arms = assignment.arm_rows[0] | assignment.arm_rows[1]
    times = events.timestamps[is_in_arms]
    look_count = design.look_count or max(1, int(np.ceil((times[-1] - times[0]) / SECONDS_PER_DAY)))
    first_seen = np.full(len(events.user_ids), np.inf)
    np.minimum.at(first_seen, events.user_index[is_in_arms], times)
    # A crossed experiment has the same users in both arms: count them once.
    counted_arms = 1 if design.is_crossed else 2
    planned_users = design.planned_users or sum(len(users) for users in assignment.arm_users[:counted_arms])
    look_effects: dict[str, list[tuple[float, int, EffectEstimate]]] = {metric: [] for metric in metrics}
    for look_time in times[0] + (times[-1] - times[0]) * np.arange(1, look_count + 1) / look_count:
        seen_users = [users[first_seen[users] <= look_time] for users in assignment.arm_users]
        if min(len(users) for users in seen_users) < MIN_USERS_PER_ARM:
            continue
        is_before_look = events.timestamps <= look_time
        arm_totals = [
            sum_by_user(events, rows & is_before_look, users)
            for rows, users in zip(assignment.arm_rows, seen_users, strict=True)
        ]
        user_count = sum(map(len, seen_users[:counted_arms]))
        for metric in metrics:
            metric_totals = arm_totals[0][metric], arm_totals[1][metric]
            if min(totals.counts.sum() for totals in metric_totals) > 0.0:
                effect = (crossed_effect if design.is_crossed else ratio_effect)(*metric_totals)
                look_effects[metric].append((look_time, user_count, effect))
    sequences = {
        metric: _always_valid_sequence(effects, planned_users, design.alpha)
        for metric, effects in look_effects.items()
        if effects
    }
    return {metric: sequence for metric, sequence in sequences.items() if sequence}


def _always_valid_sequence(
    look_effects: Sequence[tuple[float, int, EffectEstimate]], planned_users: int, alpha: float
) -> list[dict[str, Any]]:
    variance = np.array([float(effect.error) ** 2 for _, _, effect in look_effects])
    difference = np.array([float(effect.difference) for _, _, effect in look_effects])
    user_counts = np.array([user_count for _, user_count, _ in look_effects])
    first_look = int(np.argmax(variance > 0.0))
    if variance[first_look] <= 0.0:
        return []
    # The mixture may depend on the first look only: one chosen from later data would void the guarantee.
    planned_variance = variance[first_look] * user_counts[first_look] / planned_users
    tau = mixture_variance(planned_variance, alpha)
    margin = always_valid_margin(variance, tau, alpha)
    p_values = always_valid_p_values(difference, variance, tau)
    return [
        {
            "time": _format_time(look_effects[n][0]), "users": int(user_counts[n]), "difference": float(difference[n]),
            "low": float(difference[n] - margin[n]), "high": float(difference[n] + margin[n]), "p": float(p_values[n]),
        }
        for n in range(len(look_effects))
    ]  # fmt: skip


def _format_time(timestamp: float) -> str:
    return datetime.fromtimestamp(float(timestamp), UTC).isoformat(timespec="seconds")


def run_aa_check(events: EventLog, design: ExperimentDesign, *, split_count: int, seed: int) -> dict[str, Any]:
    """False-positive rate of every test over `split_count` random halvings of the control's users.

    A rate far from alpha means that the users of the metric are dependent or too few, and its p-values are unreliable.
    `low` and `high` are the 99.9% binomial limits of a valid test.
    """
    from scipy import stats

    if design.is_crossed:
        raise DataError("an A/A check randomizes users, but --crossed means that responses were; remove one of the two")
    assignment = assign_arms(events, design)
    users = assignment.arm_users[0] if design.assignment_salt is None else np.concatenate(assignment.arm_users)
    half_size = len(users) // 2
    if half_size < 2:
        raise DataError(f"an A/A check needs 4 or more users in the control arm, got {len(users)}")
    user_totals = sum_by_user(events, assignment.arm_rows[0], users)
    pre_period_totals = None
    if assignment.pre_period_rows.any():
        pre_period_totals = sum_by_user(events, assignment.pre_period_rows, users)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(len(users)), (split_count, 1)), axis=1)
    split_users = order[:, :half_size], order[:, half_size : 2 * half_size]
    low, high = (float(stats.binom.ppf(tail, split_count, design.alpha)) / split_count for tail in (0.0005, 0.9995))
    rates: dict[str, float] = {}
    for metric in select_metrics(events, design.metric_names):
        rates |= _false_positive_rates(metric, user_totals, pre_period_totals, split_users, design.alpha)
    return {
        "splits": split_count, "users": 2 * half_size, "alpha": design.alpha, "low": low, "high": high,
        "false_positives": rates,
        "suspect": [name for name, rate in rates.items() if not low <= rate <= high],
    }  # fmt: skip


def _false_positive_rates(
    metric: str,
    user_totals: dict[str, UserTotals],
    pre_period_totals: dict[str, UserTotals] | None,
    split_users: tuple[Ints, Ints],
    alpha: float,
) -> dict[str, float]:
    if metric == ANY_LOVE_METRIC:
        has_loved = (user_totals["love"].sums > 0.0).astype(np.float64)
        hit_counts = has_loved[split_users[0]].sum(-1), has_loved[split_users[1]].sum(-1)
        effect = proportion_effect(hit_counts, (split_users[0].shape[1], split_users[1].shape[1]))
        return {metric: float((effect.p < alpha).mean())}
    # Linearized at the ratio of all users rather than of each half, so that one table serves all splits.
    linearized = user_totals[metric].linearize()
    if float(linearized.std()) == 0.0:
        return {}
    effect = mean_effect(linearized[split_users[0]], linearized[split_users[1]])
    rates = {metric: float((effect.p < alpha).mean())}
    if pre_period_totals is not None:
        # The function takes two arms; passing the same users twice and cutting off the copy leaves the center as it is.
        covariate = np.concatenate(pre_period_covariate((pre_period_totals[metric], pre_period_totals[metric])))
        covariate = covariate[: len(linearized)]
        adjusted = cuped_effect(
            (linearized[split_users[0]], linearized[split_users[1]]),
            (covariate[split_users[0]], covariate[split_users[1]]),
        )
        rates[f"{metric}_cuped"] = float((adjusted.effect.p < alpha).mean())
    return rates


def measure_planning_inputs(events: EventLog, design: ExperimentDesign) -> dict[str, float]:
    """Inputs of the planner from the control arm: base_rate, responses, icc and correlation of the first metric.

    The correlation of responses within a user comes from the clustered variance: (design effect - 1) / (m - 1). That
    holds for yes/no values; DataError for other metrics. Without a pre-period the correlation is 0.
    """
    assignment = assign_arms(events, design)
    metric = (design.metric_names or ("love",))[0]
    user_totals = sum_by_user(events, assignment.arm_rows[0], assignment.arm_users[0])
    if metric not in events.metric_values or not np.isin(events.metric_values[metric], (0.0, 1.0)).any():
        raise DataError(
            f"the planner needs a rate per response, and {metric!r} is not one; put love first in --metrics"
        )
    totals = user_totals[metric]
    rate, mean_responses = float(totals.ratio), float(totals.counts.mean())
    if not 0.0 < rate < 1.0:
        raise DataError(f"{metric} is {rate:g} in the control arm, so nothing can be planned from it; give --base-rate")
    design_effect = float(totals.linearize().var(ddof=1)) * mean_responses / (rate * (1.0 - rate))
    icc = min(1.0, max(0.0, (design_effect - 1.0) / (mean_responses - 1.0))) if mean_responses > 1.0 else 0.0
    correlation = 0.0
    if assignment.pre_period_rows.any():
        before = sum_by_user(events, assignment.pre_period_rows, assignment.arm_users[0])[metric]
        covariate = pre_period_covariate((before, before))[0]
        correlation = float(np.corrcoef(totals.linearize(), covariate)[0, 1]) if covariate.std() > 0.0 else 0.0
    return {"base_rate": rate, "responses": max(1.0, mean_responses), "icc": icc, "correlation": correlation}
