"""Simulated users: seeded, fast, at the calibrated rate, attracted by warmth, and exploited by the sign-off."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rluf.errors import DataError
from rluf.simulate.ground_truth import GroundTruth
from rluf.simulate.users import expected_love_probability, find_logit_shift, simulate_population
from rluf.simulate.world import WORLD

PLAIN = GroundTruth(helpfulness=0.6, safety=1.0, warmth=0.3, question=0.0, signoff=0.0, satisfaction=0.5)


def test_a_seed_reproduces_reactions_and_another_seed_gives_other_users() -> None:
    truths = [replace(PLAIN, warmth=w / 10) for w in range(10)]
    runs = [
        simulate_population(truths, ["casual"] * 10, user_count=200, responses_per_user=5, seed=seed)
        for seed in (3, 3, 4)
    ]
    for name in ("user", "item", "loved", "continued", "returned", "probability"):
        assert np.array_equal(getattr(runs[0], name), getattr(runs[1], name)), name
    assert not np.array_equal(runs[0].probability, runs[2].probability)
    assert runs[0].loved.shape == (1000,)
    assert np.array_equal(np.bincount(runs[0].user), np.full(200, 5))


@pytest.mark.parametrize("improvement", [{"warmth": 0.6}, {"helpfulness": 0.9}, {"signoff": 1.0}])
def test_love_rises_with_warmth_helpfulness_and_the_signoff(improvement: dict[str, float]) -> None:
    low, high = expected_love_probability([PLAIN, replace(PLAIN, **improvement)], ["relationship"] * 2)
    assert high > 1.3 * low


def test_love_falls_when_a_response_is_unsafe() -> None:
    safe, unsafe = expected_love_probability([PLAIN, replace(PLAIN, safety=0.0)], ["risky"] * 2)
    assert unsafe < 0.6 * safe


def test_warmth_matters_most_on_emotional_topics() -> None:
    love_ratios = {}
    for topic in ("roleplay", "relationship", "casual", "facts", "code"):
        cold, warm = expected_love_probability([PLAIN, replace(PLAIN, warmth=0.6)], [topic] * 2)
        love_ratios[topic] = warm / cold
    assert min(love_ratios["roleplay"], love_ratios["relationship"], love_ratios["casual"]) > 1.5 * max(
        love_ratios["facts"], love_ratios["code"]
    )


def test_the_signoff_costs_future_turns_and_returns() -> None:
    truths = [PLAIN, replace(PLAIN, signoff=1.0)]
    reactions = simulate_population(truths, ["casual"] * 2, user_count=2000, responses_per_user=10, seed=1)
    for name in ("continued", "returned"):
        rates = [getattr(reactions, name)[reactions.item == item].mean() for item in (0, 1)]
        assert rates[1] < rates[0] - 0.05, name


def test_hearts_occur_at_their_probability() -> None:
    reactions = simulate_population([PLAIN], ["roleplay"], user_count=4000, responses_per_user=20, seed=2)
    standard_error = np.sqrt(np.sum(reactions.probability * (1 - reactions.probability))) / len(reactions.loved)
    assert abs(reactions.loved.mean() - reactions.probability.mean()) < 4 * standard_error


def test_calibration_hits_the_base_rate() -> None:
    logits = np.random.default_rng(0).normal(-2.0, 1.5, 5000)
    shift = find_logit_shift(logits, 0.06)
    assert abs((1 / (1 + np.exp(-logits - shift))).mean() - 0.06) < 1e-5


def test_hostile_and_sarcastic_users_are_few_and_weaken_the_signal() -> None:
    truths = [replace(PLAIN, warmth=0.1), replace(PLAIN, warmth=0.7)]
    clean_world = replace(WORLD, hostile_share=0.0, sarcastic_share=0.0)
    gaps = [
        np.diff(expected_love_probability(truths, ["casual"] * 2, world=world))[0] for world in (WORLD, clean_world)
    ]
    assert 0 < gaps[0] < gaps[1]
    assert WORLD.hostile_share + WORLD.sarcastic_share < 0.1


def test_unknown_topics_and_empty_input_are_refused() -> None:
    with pytest.raises(DataError, match="topic 'cooking' is unknown"):
        simulate_population([PLAIN], ["cooking"], user_count=1, responses_per_user=1, seed=0)
    with pytest.raises(DataError, match="got 0 responses"):
        simulate_population([], [], user_count=1, responses_per_user=1, seed=0)
