"""How well a reaction can be foretold from text at all, and a dial that sets it.

Users differ in what no text shows, so even who knows the world cannot rank hearts without error. With p(y) the chance
of a heart on response y over all users, the score p(y) itself has the best AUROC there is (Neyman and Pearson 1933):
that of positives drawn in proportion to p and negatives in proportion to 1 - p, which needs no labels. The dial scales
the effects of the text (World.love_sharpness) until that ceiling, at a given rate of hearts, is the one asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rluf.errors import DataError
from rluf.reward.metrics import auroc
from rluf.simulate.experiment import gold_of
from rluf.simulate.log import ACTIVITY_SHAPE
from rluf.simulate.users import Items, Population, act, calibration_shift, user_logits
from rluf.simulate.world import WORLD, World

Floats = NDArray[np.float64]
SHARPEST = 8.0
"""Largest factor that the dial tries."""
PRECISION = 1e-4
"""How near the ceiling comes to the one asked for."""


@dataclass(frozen=True, slots=True)
class Dial:
    """A world at a stated difficulty. `shift` is added to the log-odds of every heart, so that they are as frequent as
    asked; `chances` [I] are the true chances of the responses it was set on, `ceiling` the AUROC they allow."""

    world: World
    shift: float
    ceiling: float
    chances: Floats


def bayes_auroc(chances: Floats) -> float:
    """The best AUROC that any score of the text can have when response i is loved with `chances[i]` [I]."""
    return auroc(chances, chances)


def set_dial(
    rows: Sequence[Mapping[str, Any]],
    *,
    rate: float,
    ceiling: float | None = None,
    world: World = WORLD,
    users: int = 200,
    seed: int = 0,
) -> Dial:
    """The world in which `rows` (messages, topic, response) are loved at `rate` and `ceiling` is the best AUROC.

    Without `ceiling` the world's own sharpness stays, and the ceiling is only told. DataError when no sharpness up to
    SHARPEST reaches it on these rows.
    """
    golds, topics = [gold_of(row) for row in rows], [str(row["topic"]) for row in rows]

    def at(sharpness: float) -> Dial:
        tried = replace(world, love_sharpness=sharpness)
        logits = user_logits(golds, topics, users=users, seed=seed, world=tried)
        shift = calibration_shift(logits, rate)
        chances = expit(logits + shift).mean(axis=0)
        return Dial(tried, shift, bayes_auroc(chances), chances)

    if ceiling is None:
        return at(world.love_sharpness)
    low, high = 0.0, SHARPEST
    top = at(high)
    if not 0.5 < ceiling <= top.ceiling:
        raise DataError(f"a ceiling of {ceiling:g} cannot be had on these rows; choose from 0.5 to {top.ceiling:.3f}")
    found = top
    while abs(found.ceiling - ceiling) > PRECISION and high - low > 1e-6:
        middle = (low + high) / 2
        found = at(middle)
        low, high = (middle, high) if found.ceiling < ceiling else (low, middle)
    return found


def relabelled(rows: Sequence[Mapping[str, Any]], dial: Dial, *, users: int, seed: int) -> list[dict[str, Any]]:
    """`rows` again, each read by one of `users` new users of the dial's world: other user_id, reaction, continued and
    returned, all else as it was. Some users read much more than others. Equal arguments give equal rows."""
    rng = np.random.default_rng([seed, 32_452_843])
    items = Items.of([gold_of(row) for row in rows], [str(row["topic"]) for row in rows])
    people = Population.draw(users, rng, dial.world)
    activity = rng.gamma(ACTIVITY_SHAPE, size=users)
    user = rng.choice(users, len(rows), p=activity / activity.sum())
    seen = act(items, people, user, np.arange(len(rows)), rng, shift=dial.shift, world=dial.world)
    return [
        {
            **row,
            "user_id": f"user-{seed}-{user[n]}",
            "reaction": "love" if seen.loved[n] else None,
            "continued": bool(seen.continued[n]),
            "returned": bool(seen.returned[n]),
        }
        for n, row in enumerate(rows)
    ]
