"""Simulated users: who they are, what they love, whether they write on and come back.

Everything is drawn from one seeded generator and vectorised over impressions (one user reading one response).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from rluf.errors import DataError
from rluf.simulate.ground_truth import Gold
from rluf.simulate.prompts import TOPICS
from rluf.simulate.world import WORLD, World

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Population:
    """Hidden traits of U users: `propensity` [U] and `topic_taste` [U, topics] in log-odds, `warm_taste` [U] factor.

    `hostile` [U] users put hearts on the worst, `sarcastic` [U] ones on failed answers.
    """

    propensity: Floats
    warm_taste: Floats
    topic_taste: Floats
    hostile: Bools
    sarcastic: Bools

    @staticmethod
    def draw(users: int, rng: np.random.Generator, world: World = WORLD) -> Population:
        """`users` new users from the world's distribution."""
        kind = rng.random(users)
        return Population(
            propensity=rng.normal(0.0, world.propensity_sd, users),
            warm_taste=np.exp(rng.normal(0.0, world.warm_taste_sd, users)),
            topic_taste=rng.normal(0.0, world.topic_taste_sd, (users, len(TOPICS))),
            hostile=kind < world.hostile_share,
            sarcastic=(kind >= world.hostile_share) & (kind < world.hostile_share + world.sarcastic_share),
        )


@dataclass(frozen=True, slots=True)
class Items:
    """Gold scores of I responses as arrays [I], and each one's topic index."""

    topic: Ints
    helpfulness: Floats
    safety: Floats
    warmth: Floats
    question: Floats
    signoff: Floats
    satisfaction: Floats

    @staticmethod
    def of(golds: Sequence[Gold], topics: Sequence[str]) -> Items:
        """Arrays of `golds` and `topics`, which must be of one length and name known topics (DataError otherwise)."""
        if len(golds) != len(topics) or not golds:
            raise DataError(f"simulated users need responses: got {len(golds)} gold scores and {len(topics)} topics")
        unknown = sorted(set(topics) - set(TOPICS))
        if unknown:
            raise DataError(
                f"simulated users know no topic {unknown[0]!r} (they know {', '.join(TOPICS)}); "
                "relabel the prompts, or set evaluate.simulated_users=false"
            )
        names = ("helpfulness", "safety", "warmth", "question", "signoff", "satisfaction")
        columns = {name: np.array([getattr(gold, name) for gold in golds], dtype=np.float64) for name in names}
        return Items(topic=np.array([TOPICS.index(topic) for topic in topics], dtype=np.int64), **columns)


@dataclass(frozen=True, slots=True)
class Reactions:
    """N impressions, user by user. `user` and `item` [N] are indices.

    `loved`, `continued`, `returned` [N] are what the users did; `helpful` and `safe` [N] the gold scores of what they
    read; `probability` [N] the chance of a heart that `loved` was drawn with.
    """

    user: Ints
    item: Ints
    loved: Bools
    helpful: Floats
    safe: Floats
    continued: Bools
    returned: Bools
    probability: Floats


def love_logits(items: Items, people: Population, user: Ints, item: Ints, world: World = WORLD) -> Floats:
    """Log-odds [N] that user `user[n]` puts a heart on response `item[n]`."""
    topic = items.topic[item]
    warm_topic = np.array([world.topic_warmth[name] for name in TOPICS])[topic]
    useful = world.love_helpfulness * items.helpfulness[item]
    warm = world.love_warmth * warm_topic * people.warm_taste[user] * items.warmth[item]
    other = world.love_signoff * items.signoff[item] + world.love_unsafe * (1.0 - items.safety[item])
    middle = 0.5 * world.love_helpfulness
    useful = np.where(people.sarcastic[user] | people.hostile[user], 2 * middle - useful, useful)
    warm = np.where(people.hostile[user], -warm, warm)
    taste = people.propensity[user] + people.topic_taste[user, topic]
    sharp = world.love_sharpness
    logits: Floats = world.love_intercept + sharp * useful + sharp * warm + sharp * other + taste
    return logits


def act(
    items: Items,
    people: Population,
    user: Ints,
    item: Ints,
    rng: np.random.Generator,
    *,
    shift: float = 0.0,
    world: World = WORLD,
) -> Reactions:
    """Draw what happens when user `user[n]` reads response `item[n]`; `shift` is added to the log-odds of a heart."""
    probability = expit(love_logits(items, people, user, item, world) + shift)
    satisfaction, signoff = items.satisfaction[item], items.signoff[item]
    onward = world.continue_intercept + world.continue_satisfaction * satisfaction
    onward += world.continue_question * items.question[item] + world.continue_signoff * signoff
    back = world.return_intercept + world.return_satisfaction * satisfaction + world.return_signoff * signoff
    draws = rng.random((3, len(user)))
    return Reactions(
        user=user,
        item=item,
        loved=draws[0] < probability,
        helpful=items.helpfulness[item],
        safe=items.safety[item],
        continued=draws[1] < expit(onward),
        returned=draws[2] < expit(back),
        probability=probability,
    )


def react(
    golds: Sequence[Gold],
    topics: Sequence[str],
    *,
    users: int,
    responses_per_user: int,
    seed: int,
    world: World = WORLD,
) -> Reactions:
    """Reactions of `users` new users who each read `responses_per_user` responses drawn at random.

    Two arms of an A/B comparison pass different seeds for different users, or one seed for the same users and draws
    (paired). Raises DataError for no responses or an unknown topic.
    """
    items = Items.of(golds, topics)
    rng = np.random.default_rng([seed, 7919])
    people = Population.draw(users, rng, world)
    user = np.repeat(np.arange(users, dtype=np.int64), responses_per_user)
    item = rng.integers(0, len(golds), len(user), dtype=np.int64)
    return act(items, people, user, item, rng, world=world)


def expected_love(
    golds: Sequence[Gold],
    topics: Sequence[str],
    *,
    users: int = 400,
    seed: int = 0,
    shift: float = 0.0,
    world: World = WORLD,
) -> Floats:
    """Chance of a heart [I] of each response, averaged over `users` new users: the ceiling of what text can tell."""
    chances: Floats = expit(user_logits(golds, topics, users=users, seed=seed, world=world) + shift).mean(axis=0)
    return chances


def user_logits(
    golds: Sequence[Gold], topics: Sequence[str], *, users: int, seed: int = 0, world: World = WORLD
) -> Floats:
    """Log-odds of a heart [users, I] of every response from each of `users` new users."""
    items = Items.of(golds, topics)
    people = Population.draw(users, np.random.default_rng([seed, 104729]), world)
    user, item = (grid.ravel() for grid in np.indices((users, len(golds))))
    return love_logits(items, people, user, item, world).reshape(users, len(golds))


def calibration_shift(logits: Floats, rate: float) -> float:
    """What to add to `logits` [N] so that their mean probability is `rate` (bisection to 1e-6)."""
    low, high = (float(logit(rate) - bound) for bound in (logits.max(), logits.min()))
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if expit(logits + middle).mean() < rate else (low, middle)
    return (low + high) / 2
