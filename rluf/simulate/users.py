"""Simulated users: traits, hearts, whether and how they continue the conversation, and whether they return next day.

Everything is sampled from one seeded generator and vectorized over impressions (one user reading one response). The
order of the calls to the generator is part of the world: another order gives other users (see world.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from rluf.errors import DataError
from rluf.simulate.ground_truth import GroundTruth
from rluf.simulate.prompts import TOPICS
from rluf.simulate.world import WORLD, SimulatedWorld
from rluf.utils.stats import Bools, Floats, Ints


@dataclass(frozen=True, slots=True)
class UserPopulation:
    """Hidden traits of U users: `propensity` [U] and `topic_taste` [U, topics] in log-odds, factor `warm_taste` [U].

    Hostile users [U] give hearts to the worst responses, sarcastic users [U] to failed ones.
    """

    propensity: Floats
    warm_taste: Floats
    topic_taste: Floats
    is_hostile: Bools
    is_sarcastic: Bools

    @staticmethod
    def sample(user_count: int, rng: np.random.Generator, world: SimulatedWorld = WORLD) -> UserPopulation:
        """Sample new users from the distribution of the world."""
        # One draw for both kinds: no user is hostile and sarcastic.
        kind = rng.random(user_count)
        return UserPopulation(
            propensity=rng.normal(0.0, world.propensity_sd, user_count),
            warm_taste=np.exp(rng.normal(0.0, world.warm_taste_sd, user_count)),
            topic_taste=rng.normal(0.0, world.topic_taste_sd, (user_count, len(TOPICS))),
            is_hostile=kind < world.hostile_share,
            is_sarcastic=(kind >= world.hostile_share) & (kind < world.hostile_share + world.sarcastic_share),
        )


@dataclass(frozen=True, slots=True)
class ResponseFeatures:
    """Ground truth and topic index of I responses as arrays [I]."""

    topic_index: Ints
    helpfulness: Floats
    safety: Floats
    warmth: Floats
    question: Floats
    signoff: Floats
    satisfaction: Floats

    @staticmethod
    def from_truths(truths: Sequence[GroundTruth], topics: Sequence[str]) -> ResponseFeatures:
        """Convert to arrays; DataError unless both have the same length and all topics are known."""
        if len(truths) != len(topics) or not truths:
            raise DataError(
                f"simulated users need responses with one topic each: got {len(truths)} responses, {len(topics)} topics"
            )
        unknown = sorted(set(topics) - set(TOPICS))
        if unknown:
            raise DataError(
                f"topic {unknown[0]!r} is unknown to the simulated users, expected one of {', '.join(TOPICS)}; relabel "
                "the prompts, or set evaluate.simulated_users=0"
            )
        names = ("helpfulness", "safety", "warmth", "question", "signoff", "satisfaction")
        columns = {name: np.array([getattr(truth, name) for truth in truths], dtype=np.float64) for name in names}
        return ResponseFeatures(
            topic_index=np.array([TOPICS.index(topic) for topic in topics], dtype=np.int64), **columns
        )


@dataclass(frozen=True, slots=True)
class SimulatedReactions:
    """N impressions; `user` and `item` [N] are indices of users and responses.

    `loved`, `continued`, `returned` [N] are the actions of the users, `follow_up` [N] the kind of their next message
    (index of FOLLOW_UPS, 0 for those who leave), `helpful` and `safe` [N] the ground truth of the responses, and
    `probability` [N] is the probability of a heart that `loved` was sampled with.
    """

    user: Ints
    item: Ints
    loved: Bools
    helpful: Floats
    safe: Floats
    continued: Bools
    follow_up: Ints
    returned: Bools
    probability: Floats


def love_logits(
    responses: ResponseFeatures, population: UserPopulation, user: Ints, item: Ints, world: SimulatedWorld = WORLD
) -> Floats:
    """Log-odds [N] that user `user[n]` gives a heart to response `item[n]`."""
    topic_index = responses.topic_index[item]
    topic_warmth = np.array([world.topic_warmth[topic] for topic in TOPICS])[topic_index]
    helpfulness_term = world.love_helpfulness * responses.helpfulness[item]
    warmth_term = world.love_warmth * topic_warmth * population.warm_taste[user] * responses.warmth[item]
    other_term = world.love_signoff * responses.signoff[item] + world.love_unsafe * (1.0 - responses.safety[item])
    # Mirrored about the middle of the range, so a useless response has the effect of a perfect one and vice versa.
    midpoint = 0.5 * world.love_helpfulness
    is_contrary = population.is_sarcastic[user] | population.is_hostile[user]
    helpfulness_term = np.where(is_contrary, 2 * midpoint - helpfulness_term, helpfulness_term)
    warmth_term = np.where(population.is_hostile[user], -warmth_term, warmth_term)
    taste = population.propensity[user] + population.topic_taste[user, topic_index]
    sharpness = world.love_sharpness
    # Each term times sharpness rather than their sum: the order of operations decides the last bits of the logits.
    logits: Floats = (
        world.love_intercept + sharpness * helpfulness_term + sharpness * warmth_term + sharpness * other_term + taste
    )
    return logits


def simulate_reactions(
    responses: ResponseFeatures,
    population: UserPopulation,
    user: Ints,
    item: Ints,
    rng: np.random.Generator,
    *,
    shift: float = 0.0,
    world: SimulatedWorld = WORLD,
) -> SimulatedReactions:
    """Sample the reaction of user `user[n]` to response `item[n]`; `shift` is added to the log-odds of a heart."""
    probability = expit(love_logits(responses, population, user, item, world) + shift)
    satisfaction, signoff = responses.satisfaction[item], responses.signoff[item]
    uniforms = rng.random((5, len(user)))
    # Unsatisfied users continue too, more rarely: they rephrase or complain.
    is_satisfied = uniforms[3] < satisfaction
    continue_logits = world.continue_intercept + world.continue_satisfaction * is_satisfied
    continue_logits += world.continue_question * responses.question[item] + world.continue_signoff * signoff
    return_logits = world.return_intercept + world.return_satisfaction * satisfaction
    return_logits += world.return_signoff * signoff
    continued = uniforms[1] < expit(continue_logits)
    is_second_kind = uniforms[4] < np.where(is_satisfied, world.asks_more_share, world.complains_share)
    return SimulatedReactions(
        user=user,
        item=item,
        loved=uniforms[0] < probability,
        helpful=responses.helpfulness[item],
        safe=responses.safety[item],
        continued=continued,
        follow_up=np.where(continued, np.where(is_satisfied, 1, 3) + is_second_kind, 0),
        returned=uniforms[2] < expit(return_logits),
        probability=probability,
    )


def simulate_population(
    truths: Sequence[GroundTruth],
    topics: Sequence[str],
    *,
    user_count: int,
    responses_per_user: int,
    seed: int,
    world: SimulatedWorld = WORLD,
) -> SimulatedReactions:
    """Reactions of `user_count` new users who each read `responses_per_user` random responses.

    Two arms of an A/B comparison pass different seeds for different users, or one seed for the same users and samples
    (paired). Raises DataError for no responses or an unknown topic.
    """
    responses = ResponseFeatures.from_truths(truths, topics)
    rng = np.random.default_rng([seed, 7919])
    population = UserPopulation.sample(user_count, rng, world)
    user = np.repeat(np.arange(user_count, dtype=np.int64), responses_per_user)
    item = rng.integers(0, len(truths), len(user), dtype=np.int64)
    return simulate_reactions(responses, population, user, item, rng, world=world)


def expected_love_probability(
    truths: Sequence[GroundTruth],
    topics: Sequence[str],
    *,
    user_count: int = 400,
    seed: int = 0,
    shift: float = 0.0,
    world: SimulatedWorld = WORLD,
) -> Floats:
    """Probability of a heart [I] per response, averaged over new users: the best possible prediction from text."""
    logits = love_logits_by_user(truths, topics, user_count=user_count, seed=seed, world=world)
    probabilities: Floats = expit(logits + shift).mean(axis=0)
    return probabilities


def love_logits_by_user(
    truths: Sequence[GroundTruth],
    topics: Sequence[str],
    *,
    user_count: int,
    seed: int = 0,
    world: SimulatedWorld = WORLD,
) -> Floats:
    """Log-odds of a heart [users, I] for every response and each of `user_count` new users."""
    responses = ResponseFeatures.from_truths(truths, topics)
    population = UserPopulation.sample(user_count, np.random.default_rng([seed, 104729]), world)
    user, item = (grid.ravel() for grid in np.indices((user_count, len(truths))))
    return love_logits(responses, population, user, item, world).reshape(user_count, len(truths))


def find_logit_shift(logits: Floats, love_rate: float) -> float:
    """Find the shift of `logits` [N] for which their mean probability is `love_rate` (bisection to 1e-6)."""
    # Shifting the largest logit to logit(love_rate) makes the mean too low, shifting the smallest there too high.
    low, high = (float(logit(love_rate) - bound) for bound in (logits.max(), logits.min()))
    while high - low > 1e-6:
        shift = (low + high) / 2
        low, high = (shift, high) if expit(logits + shift).mean() < love_rate else (low, shift)
    return (low + high) / 2
