"""A whole A/B test from an event log: assignment, checks, effects with CUPED, Holm, and every look of the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.errors import DataError
from rluf.evaluate.effects import (
    Effect,
    Totals,
    before_values,
    crossed_effect,
    cuped_effect,
    holm,
    mean_effect,
    proportion_effect,
    ratio_effect,
    sample_ratio,
)
from rluf.evaluate.events import SECONDS_A_DAY, Events, assigned, by_user
from rluf.evaluate.sequential import FIRST_LOOK, always_valid_margin, always_valid_p, mixture_variance

Ints = NDArray[np.int64]
SRM_LEVEL = 0.001
"""Below this p the arms' sizes are not what was asked for: no figure of the experiment can be trusted."""
MOST_CROSSED = 0.05
"""Largest share of users seen in both arms; they are left out, and more of them is no user-level experiment."""
ANY = "users_who_loved"
"""Share of users with one heart or more: the metric of the two-proportion test."""
BY_USER = (ANY, "responses")
"""Metrics of a whole user, which need users split by arm; the others are ratios over responses."""


@dataclass(frozen=True, slots=True)
class Design:
    """How the experiment was set up.

    `control` and `treatment` name arms of the log; with `salt` the log's users are put into the two arms by hash
    instead, as an A/A test wants it. `crossed` says that responses were split at random, not users. `shares` are the
    arms' shares of users (of responses where crossed). Events before `start` (seconds since 1970) are the pre-period.
    `planned_users` over both arms is where the always-valid interval is tightest.
    """

    control: str
    treatment: str
    shares: tuple[float, float] = (0.5, 0.5)
    salt: str | None = None
    crossed: bool = False
    start: float | None = None
    metrics: tuple[str, ...] = ()
    alpha: float = 0.05
    looks: int = 0
    planned_users: int | None = None


@dataclass(frozen=True, slots=True)
class Arms:
    """User indices of each arm [U], each arm's rows [N], the pre-period's rows [N], and how many users were in both."""

    people: tuple[Ints, Ints]
    rows: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    before: NDArray[np.bool_]
    crossed: int


def split(events: Events, design: Design) -> Arms:
    """Who is in which arm: users seen in the experiment. DataError for unknown arms or too many users in both."""
    rows = np.ones(len(events.time), bool) if design.start is None else events.time >= design.start
    if not rows.any():
        raise DataError("no event lies at or after --start; give the time at which the experiment began")
    if design.salt is not None:
        arm_of = assigned(events.users, design.salt, design.shares)
        seen = np.unique(events.user[rows])
        people = tuple(seen[arm_of[seen] == side] for side in (0, 1))
        _enough(people, ("hashed control", "hashed treatment"))
        return Arms((people[0], people[1]), (rows, rows), ~rows, 0)
    names = (design.control, design.treatment)
    for name in names:
        if name not in events.arms:
            raise DataError(f"no event has the arm {name!r}; the log has {', '.join(events.arms)}")
    mine = rows & (events.arm == events.arms.index(names[0])), rows & (events.arm == events.arms.index(names[1]))
    sides = [np.unique(events.user[one]) for one in mine]
    both = np.intersect1d(sides[0], sides[1])
    total = len(sides[0]) + len(sides[1]) - len(both)
    if design.crossed:
        everyone = np.union1d(sides[0], sides[1])
        _enough(sides, names)
        return Arms((everyone, everyone), mine, np.zeros(len(rows), bool), len(both))
    if len(both) > MOST_CROSSED * total:
        raise DataError(
            f"{len(both)} of {total} users saw both {names[0]} and {names[1]}, whose habits would stand in both arms: "
            "split by user; if the log also holds the time before the experiment, give its --start; if responses, not "
            "users, were given an arm at random, say --crossed"
        )
    people = tuple(np.setdiff1d(side, both) for side in sides)
    _enough(people, names)
    return Arms((people[0], people[1]), mine, ~rows, len(both))


def _enough(people: Sequence[Ints], names: Sequence[str]) -> None:
    for side, name in zip(people, names, strict=True):
        if len(side) < 2:
            raise DataError(f"arm {name!r} has {len(side)} users; an experiment needs 2 or more in each")


def metric_names(events: Events, wanted: Sequence[str]) -> list[str]:
    """The metrics to test: those asked for, else love, users who loved, continued, returned and use where told."""
    known = [*events.values, "responses", "turns", *([ANY] if "love" in events.values else [])]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise DataError(f"no metric {unknown[0]!r} in this log; there are {', '.join(known)}")
    usual = ("love", ANY, "continued", "returned", "responses", "turns")
    return list(wanted) or [name for name in usual if name in known]


def analyse(events: Events, design: Design) -> dict[str, Any]:
    """Everything that can be said about the experiment, in plain types. Raises DataError.

    For each metric: `effect` (fixed horizon, by user), `cuped` where there is a pre-period, `p` and `p_holm` of CUPED's
    where there is one, `always_valid` at the last look. `srm` must hold before any of it is read.
    """
    arms = split(events, design)
    names = metric_names(events, design.metrics)
    if design.crossed:
        names = [name for name in names if name not in BY_USER]
    sizes = [len(side) for side in arms.people]
    totals = [by_user(events, rows, side) for rows, side in zip(arms.rows, arms.people, strict=True)]
    responses = [int(one["responses"].sums.sum()) for one in totals]
    chi2, p = sample_ratio(responses if design.crossed else sizes, design.shares)
    before = [by_user(events, arms.before, side) for side in arms.people] if arms.before.any() else None
    results = {name: _metric(name, totals, before, design) for name in names}
    adjusted = holm([one["p"] for one in results.values()]).tolist()
    looks = _looks(events, arms, design, [name for name in names if name not in BY_USER])
    for (name, one), p_holm in zip(results.items(), adjusted, strict=True):
        one["p_holm"] = p_holm
        one["significant"] = p_holm < design.alpha
        one["always_valid"] = looks[name][-1] if looks.get(name) else None
    times = events.time[arms.rows[0] | arms.rows[1]]
    return {
        "control": design.control, "treatment": design.treatment, "alpha": design.alpha,
        "start": _day(times[0]), "end": _day(times[-1]), "days": float((times[-1] - times[0]) / SECONDS_A_DAY),
        "users": sizes, "responses": responses, "crossed": design.crossed,
        "crossed_users": arms.crossed, "duplicate_rows": events.duplicates,
        "pre_period": before is not None,
        "srm": {"shares": list(design.shares), "chi2": float(chi2), "p": float(p), "ok": bool(p >= SRM_LEVEL)},
        "metrics": results, "looks": looks,
    }  # fmt: skip


def _metric(
    name: str, totals: Sequence[dict[str, Totals]], before: Sequence[dict[str, Totals]] | None, design: Design
) -> dict[str, Any]:
    confidence = 1.0 - design.alpha
    if name == ANY:
        hits = [float((one["love"].sums > 0.0).sum()) for one in totals]
        effect = proportion_effect((hits[0], hits[1]), (totals[0]["love"].users, totals[1]["love"].users),
                                   confidence=confidence)  # fmt: skip
        return {"test": "two proportions", "effect": effect.as_dict(), "cuped": None, "p": float(effect.p)}
    pair = totals[0][name], totals[1][name]
    _told(name, pair)
    effect = (crossed_effect if design.crossed else ratio_effect)(*pair, confidence=confidence)
    best, cuped = effect, None
    if before is not None:
        adjusted = cuped_effect(
            (pair[0].linear(), pair[1].linear()),
            before_values((before[0][name], before[1][name])),
            confidence=confidence,
        )
        best = adjusted.effect
        cuped = adjusted.effect.as_dict() | {
            "theta": float(adjusted.theta),
            "correlation": float(adjusted.correlation),
            "variance_cut": 1.0 - float(best.error / effect.error) ** 2 if effect.error > 0.0 else 0.0,
        }
    test = "delta method by user, crossed" if design.crossed else "delta method by user"
    test = "Welch" if name == "responses" else test
    return {"test": test, "effect": effect.as_dict(), "cuped": cuped, "p": float(best.p)}


def _told(name: str, pair: tuple[Totals, Totals]) -> None:
    for one, arm in zip(pair, ("control", "treatment"), strict=True):
        if one.counts.sum() <= 0.0:
            raise DataError(f"the {arm} arm has no value of {name!r}; leave it out of --metrics")


def _looks(events: Events, arms: Arms, design: Design, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Always-valid intervals at `looks` equal slices of time (0: one a day), with the users seen so far.

    The mixture is fixed at the first look that has enough users, from the variance then and the planned users. Only for
    ratios: counts that grow with time, such as responses a user, have no one truth for all looks.
    """
    either = arms.rows[0] | arms.rows[1]
    times = events.time[either]
    count = design.looks or max(1, int(np.ceil((times[-1] - times[0]) / SECONDS_A_DAY)))
    first = np.full(len(events.users), np.inf)
    np.minimum.at(first, events.user[either], times)
    several = 1 if design.crossed else 2
    planned = design.planned_users or sum(len(side) for side in arms.people[:several])
    kept: dict[str, list[tuple[float, int, Effect]]] = {name: [] for name in names}
    for cut in times[0] + (times[-1] - times[0]) * np.arange(1, count + 1) / count:
        seen = [side[first[side] <= cut] for side in arms.people]
        if min(len(side) for side in seen) < FIRST_LOOK:
            continue
        until = events.time <= cut
        totals = [by_user(events, rows & until, side) for rows, side in zip(arms.rows, seen, strict=True)]
        for name in names:
            pair = totals[0][name], totals[1][name]
            if min(one.counts.sum() for one in pair) > 0.0:
                effect = (crossed_effect if design.crossed else ratio_effect)(*pair)
                kept[name].append((cut, sum(map(len, seen[:several])), effect))
    sequences = {name: _sequence(found, planned, design.alpha) for name, found in kept.items() if found}
    return {name: found for name, found in sequences.items() if found}


def _sequence(found: Sequence[tuple[float, int, Effect]], planned: int, alpha: float) -> list[dict[str, Any]]:
    variance = np.array([float(effect.error) ** 2 for _, _, effect in found])
    difference = np.array([float(effect.difference) for _, _, effect in found])
    users = np.array([count for _, count, _ in found])
    start = int(np.argmax(variance > 0.0))
    if variance[start] <= 0.0:
        return []
    tau = mixture_variance(variance[start] * users[start] / planned, alpha)
    margin = always_valid_margin(variance, tau, alpha)
    p = always_valid_p(difference, variance, tau)
    return [
        {
            "time": _day(found[n][0]), "users": int(users[n]), "difference": float(difference[n]),
            "low": float(difference[n] - margin[n]), "high": float(difference[n] + margin[n]), "p": float(p[n]),
        }
        for n in range(len(found))
    ]  # fmt: skip


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).isoformat(timespec="seconds")


def aa_check(events: Events, design: Design, *, splits: int, seed: int) -> dict[str, Any]:
    """False positives of every test when the control's own users are split in two at random, `splits` times.

    A share far from alpha means that the metric's users are not independent or too few, and its p-values are not to be
    believed. `low` and `high` are what chance alone allows (99.9% binomial limits).
    """
    from scipy import stats

    arms = split(events, design)
    people = arms.people[0] if design.salt is None else np.concatenate(arms.people)
    if design.crossed:
        raise DataError("an A/A check splits users, and --crossed says that responses were split; leave out one")
    half = len(people) // 2
    if half < 2:
        raise DataError(f"an A/A check needs 4 or more users in the control arm, got {len(people)}")
    totals = by_user(events, arms.rows[0], people)
    before = by_user(events, arms.before, people) if arms.before.any() else None
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(len(people)), (splits, 1)), axis=1)
    sides = order[:, :half], order[:, half : 2 * half]
    level = {name: stats.binom.ppf(tail, splits, design.alpha) / splits
             for name, tail in (("low", 0.0005), ("high", 0.9995))}  # fmt: skip
    found: dict[str, float] = {}
    for name in metric_names(events, design.metrics):
        found |= _false_positives(name, totals, before, sides, design.alpha)
    return {
        "splits": splits, "users": 2 * half, "alpha": design.alpha, **{key: float(one) for key, one in level.items()},
        "false_positives": found,
        "suspect": [name for name, share in found.items() if not level["low"] <= share <= level["high"]],
    }  # fmt: skip


def _false_positives(
    name: str, totals: dict[str, Totals], before: dict[str, Totals] | None, sides: tuple[Ints, Ints], alpha: float
) -> dict[str, float]:
    if name == ANY:
        loved = (totals["love"].sums > 0.0).astype(np.float64)
        hits = loved[sides[0]].sum(-1), loved[sides[1]].sum(-1)
        effect = proportion_effect(hits, (sides[0].shape[1], sides[1].shape[1]))
        return {name: float((effect.p < alpha).mean())}
    # The parts of all users at the common ratio stand for each half's own: one table serves all splits.
    parts = totals[name].linear()
    if float(parts.std()) == 0.0:
        return {}
    found = {name: float((mean_effect(parts[sides[0]], parts[sides[1]]).p < alpha).mean())}
    if before is not None:
        earlier = np.concatenate(before_values((before[name], before[name])))[: len(parts)]
        adjusted = cuped_effect((parts[sides[0]], parts[sides[1]]), (earlier[sides[0]], earlier[sides[1]]))
        found[f"{name}_cuped"] = float((adjusted.effect.p < alpha).mean())
    return found


def observed(events: Events, design: Design) -> dict[str, float]:
    """What the planner needs, from the control arm: base_rate, responses, icc and correlation of the first metric.

    The correlation of responses within a user is read off the clustered variance: (design effect - 1) / (m - 1). It is
    that of yes-or-no values; DataError for a metric with others. Without a pre-period the correlation is 0.
    """
    arms = split(events, design)
    name = (design.metrics or ("love",))[0]
    totals = by_user(events, arms.rows[0], arms.people[0])
    if name not in events.values or not np.isin(events.values[name], (0.0, 1.0)).any():
        raise DataError(f"the planner reads a rate per response, and {name!r} is none; put love first in --metrics")
    one = totals[name]
    rate, size = float(one.ratio), float(one.counts.mean())
    if not 0.0 < rate < 1.0:
        raise DataError(f"{name} is {rate:g} in the control arm, so there is nothing to plan with; give --base-rate")
    effect = float(one.linear().var(ddof=1)) * size / (rate * (1.0 - rate))
    icc = min(1.0, max(0.0, (effect - 1.0) / (size - 1.0))) if size > 1.0 else 0.0
    correlation = 0.0
    if arms.before.any():
        before = by_user(events, arms.before, arms.people[0])[name]
        earlier = before_values((before, before))[0]
        correlation = float(np.corrcoef(one.linear(), earlier)[0, 1]) if earlier.std() > 0.0 else 0.0
    return {"base_rate": rate, "responses": max(1.0, size), "icc": icc, "correlation": correlation}
