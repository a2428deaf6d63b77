"""Effects by segment: partial pooling towards the overall effect, and the limit of the worst group.

The effect of each group is shrunk by empirical Bayes (normal-normal; between-group variance of DerSimonian and Laird
1986; Morris 1983): a small group borrows from the others, so the extremes of many groups are not read as findings. The
limit of the worst group corrects for the number of groups (Bonferroni), because the worst is picked after looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rluf.evaluate.ab_design import USER_LEVEL_METRICS, ArmAssignment
from rluf.evaluate.effects import UserTotals, estimate_ratio_effect
from rluf.evaluate.events import EventLog
from rluf.utils.stats import Bools, Floats, Ints

MIN_SEGMENT_USERS = 30
"""Minimum users in each arm of a group; smaller groups are counted but not estimated."""
ACTIVITY_GROUPS = 10
MIN_POOLED_GROUPS = 2


def analyze_segments(
    events: EventLog, assignment: ArmAssignment, arm: int, metrics: Sequence[str], *, alpha: float
) -> dict[str, Any]:
    """Shrunken effects of one treatment by topic, locale, activity decile and users who never react.

    Activity and reactions are those of the pre-period: during the experiment the treatment may change them, and groups
    that it formed cannot be compared. Without a pre-period these two are left out. Topics share users, so their
    estimates are slightly correlated.
    """
    labels = dict(events.segments) | _label_users(events, assignment)
    masks = [assignment.arm_rows[index] & np.isin(events.user_index, assignment.arm_users[index]) for index in (0, arm)]
    segments: dict[str, Any] = {}
    for segment, (index, names) in labels.items():
        by_metric = {
            metric: shrink_groups(_estimate_groups(events, masks, metric, index, names), alpha=alpha)
            for metric in dict.fromkeys(metrics)
            if metric in events.metric_values and metric not in USER_LEVEL_METRICS
        }
        segments[segment] = {metric: result for metric, result in by_metric.items() if result is not None}
    return {segment: results for segment, results in segments.items() if results}


def _label_users(events: EventLog, assignment: ArmAssignment) -> dict[str, tuple[Ints, tuple[str, ...]]]:
    """Activity decile and "never reacted before" of the user of each row, from the pre-period."""
    before = assignment.pre_period_rows
    if not before.any():
        return {}
    user_count = len(events.user_ids)
    counts = np.bincount(events.user_index[before], minlength=user_count)
    edges = np.quantile(counts, np.arange(1, ACTIVITY_GROUPS) / ACTIVITY_GROUPS)
    # Equal edges (many users with one response) leave a decile empty; its users are in the next one.
    decile = np.searchsorted(edges, counts, side="right")
    labels = {"activity": (decile[events.user_index], tuple(f"decile {n + 1}" for n in range(ACTIVITY_GROUPS)))}
    if events.reaction_counts:
        has_reaction = np.zeros(len(events.user_index), bool)
        for name in events.reaction_counts:
            has_reaction |= events.metric_values[name] > 0.0
        reacted = np.bincount(events.user_index[before & has_reaction], minlength=user_count) > 0
        labels["reacts"] = reacted[events.user_index].astype(np.int64), ("never reacted", "reacted")
    return labels


def _estimate_groups(
    events: EventLog, masks: Sequence[Bools], metric: str, index: Ints, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Difference and standard error of a metric in each group; without them if it has too few users."""
    values = events.metric_values[metric]
    has_value = ~np.isnan(values)
    groups = []
    for number, name in enumerate(names):
        rows = (index == number) & has_value
        totals = [_sum_rows(values, events.user_index, rows & mask) for mask in masks]
        user_counts = [total.user_count for total in totals]
        group: dict[str, Any] = {"group": name, "users": user_counts}
        # A standard error from a few users is itself noise and would get a weight in the pooled mean.
        if min(user_counts) >= MIN_SEGMENT_USERS:
            effect = estimate_ratio_effect(totals[0], totals[1])
            if float(effect.error) > 0.0:
                group |= {"control": float(effect.control), "difference": float(effect.difference),
                          "error": float(effect.error)}  # fmt: skip
        groups.append(group)
    return groups


def _sum_rows(values: Floats, user_index: Ints, rows: NDArray[np.bool_]) -> UserTotals:
    position = np.unique(user_index[rows], return_inverse=True)[1]
    return UserTotals(
        np.bincount(position, weights=values[rows]).astype(np.float64), np.bincount(position).astype(np.float64)
    )


def shrink_groups(groups: Sequence[dict[str, Any]], *, alpha: float) -> dict[str, Any] | None:
    """Partial pooling of the groups' differences; None with fewer than two estimated groups.

    Each group gets `shrunken`, `low` and `high` (1 - alpha). `between_sd` is the spread of the true effects, `p` that
    of a test for any spread (Cochran's Q), `worst` the group with the lowest limit after correction for the number of
    groups.
    """
    estimated = [group for group in groups if "error" in group]
    if len(estimated) < MIN_POOLED_GROUPS:
        return None
    difference, error = (np.array([group[key] for group in estimated]) for key in ("difference", "error"))
    weights = 1.0 / error**2
    fixed_mean = float((weights * difference).sum() / weights.sum())
    q = float((weights * (difference - fixed_mean) ** 2).sum())
    df = len(estimated) - 1
    # Method of moments (DerSimonian, Laird 1986): the part of Q beyond what errors alone would give.
    between = max(0.0, (q - df) / float(weights.sum() - np.square(weights).sum() / weights.sum()))
    total_weights = 1.0 / (error**2 + between)
    mean = float((total_weights * difference).sum() / total_weights.sum())
    own_share = between / (between + error**2)
    shrunken = own_share * difference + (1.0 - own_share) * mean
    # The second term is the noise of the mean that a group is shrunk towards.
    shrunken_error = np.sqrt(own_share * error**2 + (1.0 - own_share) ** 2 / total_weights.sum())
    z = float(stats.norm.isf(alpha / 2.0))
    worst_limits = shrunken - float(stats.norm.isf(alpha / len(estimated))) * shrunken_error
    results = [
        group
        | {"shrunken": float(value), "low": float(value - z * group_error), "high": float(value + z * group_error)}
        for group, value, group_error in zip(estimated, shrunken, shrunken_error, strict=True)
    ]
    worst = int(worst_limits.argmin())
    return {
        "mean": mean, "between_sd": between**0.5, "p": float(stats.chi2.sf(q, df)), "groups": results,
        "too_small": len(groups) - len(estimated),
        "worst": {"group": results[worst]["group"], "limit": float(worst_limits[worst])},
    }  # fmt: skip
