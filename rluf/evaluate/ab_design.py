"""Design of an A/B test: arms, metrics with their roles, guardrails, and the assignment of a log's users to arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rluf.errors import DataError, SettingsError
from rluf.evaluate.events import EventLog, assign_users
from rluf.prepare.schema import LOVE_REACTION
from rluf.utils.stats import Ints

MAX_CROSSED_USER_SHARE = 0.05
"""Maximum share of users seen in several arms. They are excluded; with more of them it is not a user-level test."""
ANY_LOVE_METRIC = "users_who_loved"
"""Share of users with one heart or more: the metric of the two-proportion test."""
USER_LEVEL_METRICS = (ANY_LOVE_METRIC, "responses")
"""Metrics of a user, which need users randomized by arm; the others are ratios over responses."""
DEFAULT_METRICS = (LOVE_REACTION, ANY_LOVE_METRIC, "continued", "returned", "responses", "turns")


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A metric that the treatment must not harm by more than `margin`, set before the experiment.

    A negative margin is the largest tolerated fall, a positive one the largest tolerated rise (of complaints);
    `is_relative`: a share of the control's value, else in the metric's own unit.
    """

    metric: str
    margin: float
    is_relative: bool


@dataclass(frozen=True, slots=True)
class QuantileMetric:
    """Quantile `level` (0 to 1) of a numeric column over responses, such as the 95th percentile of latency."""

    column: str
    level: float

    @property
    def name(self) -> str:
        """Name in reports: latency_p95."""
        return f"{self.column}_p{self.level * 100:g}"


@dataclass(frozen=True, slots=True)
class ExperimentDesign:
    """How the experiment was set up.

    `control`, `treatment` and `other_treatments` name arms of the log; with `assignment_salt` the users of the log are
    assigned to the arms by hash instead, for an A/A test. `is_crossed`: responses, not users, were randomized. `shares`
    are the arms' shares of users (of responses if crossed), control first. Events before `start_time` (seconds since
    1970) are the pre-period. `primary_names` are the metrics that decide (default: the first of `metric_names`, else
    love), over which alone alpha is divided. `cap` is the quantile at which numeric values are capped. `planned_users`
    over all arms is where the always-valid interval is tightest. `lift` and `power` say what "undecided" lacks.
    """

    control: str
    treatment: str
    shares: tuple[float, ...] = (0.5, 0.5)
    assignment_salt: str | None = None
    is_crossed: bool = False
    start_time: float | None = None
    metric_names: tuple[str, ...] = ()
    alpha: float = 0.05
    look_count: int = 0
    planned_users: int | None = None
    other_treatments: tuple[str, ...] = ()
    primary_names: tuple[str, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    quantile_metrics: tuple[QuantileMetric, ...] = ()
    cap: float | None = None
    lift: float = 0.1
    power: float = 0.8
    has_segments: bool = False

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Control first, then the treatments."""
        return self.control, self.treatment, *self.other_treatments


@dataclass(frozen=True, slots=True)
class ArmAssignment:
    """User indices [U] and row mask [N] of each arm, control first; pre-period row mask [N].

    `crossed_user_count` users were seen in several arms; unless the design is crossed they are excluded, with
    `crossed_row_count` rows. `other_row_count` rows belong to no arm of the design.
    """

    arm_users: tuple[Ints, ...]
    arm_rows: tuple[NDArray[np.bool_], ...]
    pre_period_rows: NDArray[np.bool_]
    crossed_user_count: int = 0
    crossed_row_count: int = 0
    other_row_count: int = 0


def parse_guardrail(text: str) -> Guardrail:
    """Guardrail of NAME:MARGIN, such as helpful:-2% or latency:+50. SettingsError if it is not one."""
    name, _, margin_text = text.rpartition(":")
    is_relative = margin_text.endswith("%")
    try:
        margin = float(margin_text.removesuffix("%")) / (100.0 if is_relative else 1.0)
    except ValueError:
        margin = 0.0
    if not name or not np.isfinite(margin) or margin == 0.0 or (is_relative and margin <= -1.0):
        raise SettingsError(
            f"--guard {text}: expected NAME:MARGIN with a margin other than 0, such as helpful:-2% (at most 2% lower) "
            "or complaints:+5% (at most 5% higher)"
        )
    return Guardrail(name, margin, is_relative)


def parse_quantile_metric(text: str) -> QuantileMetric:
    """Quantile metric of COLUMN:LEVEL, such as latency:0.95. SettingsError if it is not one."""
    name, _, level_text = text.rpartition(":")
    try:
        level = float(level_text)
    except ValueError:
        level = 0.0
    if not name or not 0.0 < level < 1.0:
        raise SettingsError(f"--quantile {text}: expected COLUMN:LEVEL with a level between 0 and 1: latency:0.95")
    return QuantileMetric(name, level)


def assign_arms(events: EventLog, design: ExperimentDesign) -> ArmAssignment:
    """Assign the users seen in the experiment to arms. DataError for unknown arms or too many users in several."""
    arm_names = design.arm_names
    if len(set(arm_names)) < len(arm_names) or len(design.shares) != len(arm_names):
        raise DataError(
            f"expected different arms with one share each, got {', '.join(arm_names)} and --shares "
            f"{' '.join(f'{share:g}' for share in design.shares)}"
        )
    start_time = -np.inf if design.start_time is None else design.start_time
    is_experiment = events.timestamps >= start_time
    if not is_experiment.any():
        raise DataError("no event is at or after --start; give the time at which the experiment began")
    if design.assignment_salt is not None:
        arm_of_user = assign_users(events.user_ids, design.assignment_salt, design.shares)
        seen_users = np.unique(events.user_index[is_experiment])
        hashed = tuple(seen_users[arm_of_user[seen_users] == arm] for arm in range(len(arm_names)))
        _check_arm_sizes(hashed, [f"hashed {name}" for name in arm_names])
        # All arms may use all rows: sum_by_user selects by user, and each user is in one arm only.
        return ArmAssignment(hashed, (is_experiment,) * len(arm_names), ~is_experiment)
    for name in arm_names:
        if name not in events.arm_names:
            raise DataError(f"no event has the arm {name!r}; the log has {', '.join(events.arm_names)}")
    arm_rows = tuple(is_experiment & (events.arm_index == events.arm_names.index(name)) for name in arm_names)
    other_row_count = int(is_experiment.sum() - sum(rows.sum() for rows in arm_rows))
    arm_users = tuple(np.unique(events.user_index[rows]) for rows in arm_rows)
    all_users, arm_counts = np.unique(np.concatenate(arm_users), return_counts=True)
    crossed_users = all_users[arm_counts > 1]
    if design.is_crossed:
        _check_arm_sizes(arm_users, arm_names)
        no_rows = np.zeros(len(is_experiment), bool)
        return ArmAssignment(
            (all_users,) * len(arm_names), arm_rows, no_rows, len(crossed_users), other_row_count=other_row_count
        )
    if len(crossed_users) > MAX_CROSSED_USER_SHARE * len(all_users):
        raise DataError(
            f"{len(crossed_users)} of {len(all_users)} users saw {'both' if len(arm_names) == 2 else 'several of'} "
            f"{' and '.join(arm_names)}, so the arms are not independent: randomize by user; if the log also covers "
            "the time before the experiment, give its --start; if responses, not users, were randomized, use --crossed"
        )
    exclusive = tuple(np.setdiff1d(users, crossed_users) for users in arm_users)
    _check_arm_sizes(exclusive, arm_names)
    in_arms = np.logical_or.reduce(arm_rows)
    crossed_row_count = int((in_arms & np.isin(events.user_index, crossed_users)).sum())
    return ArmAssignment(exclusive, arm_rows, ~is_experiment, len(crossed_users), crossed_row_count, other_row_count)


def _check_arm_sizes(arm_users: Sequence[Ints], arm_names: Sequence[str]) -> None:
    for users, name in zip(arm_users, arm_names, strict=True):
        if len(users) < 2:
            raise DataError(f"arm {name!r} has {len(users)} users; an experiment needs 2 or more in each arm")


def select_metrics(events: EventLog, design: ExperimentDesign) -> tuple[list[str], list[str]]:
    """Metrics to test and the primary ones.

    By default love, users who loved, continued, returned, usage, and the additional columns of the log.

    DataError for a metric that the log does not have, and when the log has reactions but none of them is love: a name
    that was not understood would read as "no difference".
    """
    available = [
        *events.metric_values, "responses", "turns",
        *([ANY_LOVE_METRIC] if LOVE_REACTION in events.metric_values else []),
    ]  # fmt: skip
    # A name outside the log, such as a quantile metric, stays in `roles` so that it is reported below.
    quantile_names = [metric.name for metric in design.quantile_metrics]
    columns = [name for name in events.metric_values if name not in events.reaction_counts]
    defaults = [name for name in dict.fromkeys([*DEFAULT_METRICS, *columns]) if name in available]
    names = list(dict.fromkeys([
        *design.primary_names, *(design.metric_names or defaults), *(guard.metric for guard in design.guardrails),
    ]))  # fmt: skip
    names = [name for name in names if name not in quantile_names]
    if design.is_crossed:
        _check_crossed_metrics(design)
        names = [name for name in names if name not in USER_LEVEL_METRICS]
    unknown = [name for name in names if name not in available]
    if unknown:
        raise DataError(f"no metric {unknown[0]!r} in this log; available: {', '.join([*available, *quantile_names])}")
    others = {name: count for name, count in events.reaction_counts.items() if name != LOVE_REACTION and count}
    if others and not events.metric_values[LOVE_REACTION].any() and {LOVE_REACTION, ANY_LOVE_METRIC} & set(names):
        listing = ", ".join(f"{name!r} ({count})" for name, count in list(others.items())[:10])
        raise DataError(
            f"no response has the reaction love, but the log has {listing}; say which one means love with --love NAME, "
            "or test other metrics with --metrics"
        )
    _check_guardrails(events, design.guardrails)
    return names, list(design.primary_names) or list(design.metric_names[:1]) or names[:1]


def _check_crossed_metrics(design: ExperimentDesign) -> None:
    """DataError for a metric of users in a crossed design, where users have no arm."""
    named = [*design.primary_names, *design.metric_names, *(guardrail.metric for guardrail in design.guardrails)]
    for name in named:
        if name in USER_LEVEL_METRICS:
            raise DataError(f"{name!r} is a metric of users, who have no arm with --crossed; remove one of the two")
    if design.assignment_salt is not None:
        raise DataError("--salt assigns users to arms, but --crossed means that responses were; remove one of the two")


def _check_guardrails(events: EventLog, guardrails: Sequence[Guardrail]) -> None:
    """DataError for two margins of one metric, and for a margin that no share can exceed."""
    names = [guardrail.metric for guardrail in guardrails]
    for guardrail in guardrails:
        name, margin = guardrail.metric, guardrail.margin
        if names.count(name) > 1:
            raise DataError(f"--guard names {name!r} {names.count(name)} times; give each metric one margin")
        is_share = name == ANY_LOVE_METRIC or (name in events.metric_values and events.is_yes_no(name))
        if is_share and not guardrail.is_relative and abs(margin) >= 1.0:
            raise DataError(
                f"--guard {name}:{margin:+g} is in the metric's unit, and a share between 0 and 1 cannot change by "
                f"that much; for {abs(margin):g} percent write {name}:{margin:+g}%"
            )
