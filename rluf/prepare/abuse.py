"""Rules against bots, brigades and farms: each gives every row a weight from FLOOR to 1, with its reason on the card.

A rule is a function of a `Log` and stands in RULES by name; the smallest weight of a row counts. A weight rather than a
knife: what is only odd still counts a little, and no row is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FLOOR = 0.01
"""Smallest weight of a row."""

DOUBT = 0.01
"""Adjusted tail chance below which a rate takes weight: the weight is the chance over this."""

PER_MINUTE = 8
"""Responses in a minute that a person may still read."""

REPEATS = 20
"""Near-duplicates of one prompt that count in full for a user."""

CROWD = 5
"""Users from which a prompt or response that many of them share is looked at as a group."""

SHARED = 3
"""Users of one device that count in full (a family)."""

MINUTE = 60_000_000


@dataclass(frozen=True, slots=True)
class Log:
    """N rows: codes of user, near-duplicate prompt group, response text and device (-1: not told), time in
    microseconds, whether loved, whether the user made the persona that answered; `cap` rows of a user count in full.
    """

    user: Ints
    group: Ints
    answer: Ints
    device: Ints
    time: Ints
    loved: Bools
    own: Bools
    cap: int


def _log_chance(trials: Floats, hits: Floats, alpha: float, beta: float) -> Floats:
    """Log of the beta-binomial chance of `hits` of `trials` (scipy.stats.betabinom, which takes seconds to import)."""
    from scipy.special import betaln

    ways = -betaln(trials - hits + 1, hits + 1) - np.log(trials + 1)
    found: Floats = ways + betaln(hits + alpha, trials - hits + beta) - betaln(alpha, beta)
    return found


def _upper_tail(trials: Ints, hits: Ints, alpha: float, beta: float) -> Floats:
    """Chance of `hits` or more of `trials` [M]."""
    length = trials - hits + 1
    unit = np.repeat(np.arange(len(trials)), length)
    many = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length) + hits[unit]
    chance = np.exp(_log_chance(trials[unit].astype(np.float64), many.astype(np.float64), alpha, beta))
    return np.minimum(np.bincount(unit, weights=chance, minlength=len(trials)), 1.0)


def _betabinomial_fit(trials: Ints, hits: Ints, count: Floats) -> tuple[float, float]:
    """Alpha and beta by maximum likelihood over units with (trials, hits), each seen `count` times.

    A weak prior holds the strength alpha + beta near 20 where the data say nothing of it.
    """
    from scipy.optimize import minimize

    mean = min(max(float((hits * count).sum() / (trials * count).sum()), 1e-4), 1 - 1e-4)
    n, k = trials.astype(np.float64), hits.astype(np.float64)

    def shape(theta: Floats) -> tuple[float, float]:
        m, s = 1 / (1 + np.exp(-theta[0])), np.exp(min(theta[1], 12.0))
        return float(m * s) + 1e-9, float((1 - m) * s) + 1e-9

    def loss(theta: Floats) -> float:
        likely = _log_chance(n, k, *shape(theta))
        return -float((likely * count).sum() / count.sum()) + 1e-4 * float(theta[1] - 3) ** 2

    start = np.array([np.log(mean / (1 - mean)), 3.0])
    found = minimize(loss, start, method="Nelder-Mead", options={"xatol": 0.01, "fatol": 1e-7, "maxiter": 200})
    return shape(found.x)


def ordinary(trials: Ints, hits: Ints) -> tuple[float, float] | None:
    """Alpha and beta of the beta-binomial that ordinary units [U] fit; None where nothing is loved, or everything.

    The fit starts without the sixth of units whose rate stands out most and takes back, in rounds, all that it finds
    not too unlikely (over 1 in 1,000): so a tenth of bots cannot hide by stretching it.
    """
    trials, hits = trials[trials > 0], hits[trials > 0]
    if not hits.any() or (hits == trials).all():
        return None
    pair, count = np.unique(np.stack([trials, hits], 1), axis=0, return_counts=True)
    n, k, many = pair[:, 0], pair[:, 1], count.astype(np.float64)
    mean = float(np.median(hits / trials)) or hits.sum() / trials.sum() / 2
    z = (k - n * mean) / np.sqrt(n * mean * (1 - mean) + 1e-9)
    keep = z <= np.quantile(np.repeat(z, count), 5 / 6)
    shape = (1.0, 1.0)
    for _ in range(6):
        if not (k[keep].any() and (k < n)[keep].any()):
            keep = np.ones(len(n), dtype=np.bool_)
        shape = _betabinomial_fit(n[keep], k[keep], many[keep])
        if np.array_equal(keep, keep := _upper_tail(n, k, *shape) > 1e-3):
            break
    return shape


def tail_chance(trials: Ints, hits: Ints, shape: tuple[float, float] | None) -> Floats:
    """Chance [U] of as many hits or more for each unit under `shape`, adjusted for the number of units.

    The adjustment is Benjamini's and Hochberg's (1995). All ones without a shape.
    """
    if shape is None or not len(trials):
        return np.ones(len(trials))
    pair, mine, count = np.unique(np.stack([trials, hits], 1), axis=0, return_inverse=True, return_counts=True)
    chance = _upper_tail(pair[:, 0], pair[:, 1], *shape)
    order = np.argsort(chance)
    rank = np.cumsum(count[order])
    adjusted = np.minimum.accumulate((chance[order] * len(trials) / rank)[::-1])[::-1]
    found = np.empty(len(pair))
    found[order] = np.minimum(adjusted, 1.0)
    return found[mine.reshape(-1)]


def _per_user(log: Log) -> tuple[Ints, Ints]:
    """Rows and loved rows of each user code [U]."""
    return np.bincount(log.user), np.bincount(log.user, weights=log.loved).astype(np.int64)


def _rate(log: Log) -> Floats:
    """Users who love far more of what they read than people do."""
    trials, hits = _per_user(log)
    weight = tail_chance(trials, hits, ordinary(trials, hits)) / DOUBT
    return weight[log.user]


def _moments(log: Log) -> tuple[Ints, Ints, Ints]:
    """Rows in the order of user and time, and of each distinct moment of a user its first place in that order.

    Rows that share user and time are one moment: some logs have one time for a whole conversation.
    """
    order = np.lexsort((log.time, log.user))
    user, time = log.user[order], log.time[order]
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    return order, np.flatnonzero(fresh), np.cumsum(fresh) - 1


def _burst(log: Log) -> Floats:
    """Users who got more responses in a minute than a person can read, in the minute around each row."""
    order, first, mine = _moments(log)
    user, time = log.user[order][first], log.time[order][first]
    start = int(time.min(initial=0))
    line = user * (int(time.max(initial=0)) - start + 4 * MINUTE) + (time - start)
    near = np.searchsorted(line, line + MINUTE // 2, side="right") - np.searchsorted(line, line - MINUTE // 2)
    weight = np.ones(len(log.user))
    weight[order] = np.minimum(1.0, (PER_MINUTE / near[mine]) ** 2)
    return weight


def _timing(log: Log) -> Floats:
    """Users of 20 and more moments whose pauses are all alike: entropy of pauses in half octaves below 2 bits."""
    order, first, _ = _moments(log)
    user, time = log.user[order][first], log.time[order][first]
    gap = np.diff(time)[user[1:] == user[:-1]]
    who = user[1:][user[1:] == user[:-1]]
    if not len(gap):
        return np.ones(len(log.user))
    octave = np.floor(2 * np.log2(gap / 1e6 + 1e-6)).astype(np.int64)
    octave -= octave.min()
    cells, count = np.unique(who * (octave.max() + 1) + octave, return_counts=True)
    owner = cells // (octave.max() + 1)
    total = np.bincount(who, minlength=int(log.user.max()) + 1)
    share = count / total[owner]
    entropy = np.bincount(owner, weights=-share * np.log2(share), minlength=len(total))
    weight = np.where(total >= 19, np.clip(entropy - 1.0, 0.0, 1.0), 1.0)
    return weight[log.user]


def _copies(log: Log) -> Floats:
    """Copy-paste: a prompt that a user sends again and again, and prompts or responses that a crowd loves in unison."""
    pair = log.user * (int(log.group.max(initial=0)) + 1) + log.group
    _, mine, count = np.unique(pair, return_inverse=True, return_counts=True)
    weight = np.minimum(1.0, REPEATS / count[mine])
    for key in (log.group, log.answer):
        weight = np.where(log.loved, np.minimum(weight, _unison(log, key)), weight)
    return weight


def _unison(log: Log, key: Ints) -> Floats:
    """Weight [N] of rows whose key [N] a crowd of users shares, by how much more it is loved than others are.

    Where a tenth of the rows and more share keys, as where all answer the same prompts, crowds are judged by one
    another, since prompts differ. Where sharing is rare, crowds with common users count as one gang, which is judged
    by what users love in general.
    """
    trials, hits = np.bincount(key), np.bincount(key, weights=log.loved).astype(np.int64)
    most = int(log.user.max()) + 1
    users = np.bincount(np.unique(key * most + log.user) // most)
    crowd = np.flatnonzero(users >= CROWD)
    if not len(crowd):
        return np.ones(len(key))
    weight = np.ones(len(trials))
    if trials[crowd].sum() >= 0.1 * len(key):
        weight[crowd] = tail_chance(trials[crowd], hits[crowd], ordinary(trials[crowd], hits[crowd])) / DOUBT
    else:
        gang = _gangs(log.user, key, crowd)
        rows, loved = (np.bincount(gang, weights=of[crowd]).astype(np.int64) for of in (trials, hits))
        weight[crowd] = tail_chance(rows, loved, ordinary(*_per_user(log)))[gang] / DOUBT
    return weight[key]


def _gangs(user: Ints, key: Ints, crowd: Ints) -> Ints:
    """Number from 0 of the gang of each crowd [C]: crowds that share a user are of one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    place = np.full(int(key.max()) + 1, -1)
    place[crowd] = np.arange(len(crowd))
    rows = np.flatnonzero(place[key] >= 0)
    size = len(crowd) + int(user.max()) + 1
    ends = place[key[rows]], len(crowd) + user[rows]
    graph = coo_array((np.ones(len(rows), dtype=np.int8), ends), shape=(size, size))
    _, label = connected_components(graph, directed=False)
    found: Ints = np.unique(label[: len(crowd)], return_inverse=True)[1].astype(np.int64)
    return found


def _self_love(log: Log) -> Floats:
    """Users who judge the persona that they made themselves."""
    return np.where(log.own, 0.0, 1.0)


def _device(log: Log) -> Floats:
    """Users of a device that more users share than a family has."""
    weight = np.ones(len(log.user))
    told = log.device >= 0
    if told.any():
        pairs = np.unique(np.stack([log.device[told], log.user[told]], 1), axis=0)
        users = np.bincount(pairs[:, 0])
        weight[told] = np.minimum(1.0, (SHARED / users[log.device[told]]) ** 2)
    return weight


def _cap(log: Log) -> Floats:
    """Users with more rows than the cap weigh together as much as the cap."""
    return np.minimum(1.0, log.cap / np.bincount(log.user)[log.user])


RULES: dict[str, Callable[[Log], Floats]] = {
    "rate": _rate,
    "burst": _burst,
    "timing": _timing,
    "copies": _copies,
    "self_love": _self_love,
    "device": _device,
    "cap": _cap,
}
"""The rules by name."""


def trust(log: Log, names: Sequence[str]) -> tuple[Floats, dict[str, Floats]]:
    """Weight of each row [N], and that of each rule alone [N]."""
    each = {name: np.clip(RULES[name](log), FLOOR, 1.0) for name in names} if len(log.user) else {}
    return np.minimum.reduce([np.ones(len(log.user)), *each.values()]), each
