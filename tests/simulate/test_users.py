"""Simulated users: seeded, fast, at the calibrated rate, drawn to warmth, and fooled by the sign-off."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from rluf.errors import DataError
from rluf.simulate.ground_truth import Gold
from rluf.simulate.users import calibration_shift, expected_love, react
from rluf.simulate.world import WORLD

PLAIN = Gold(helpfulness=0.6, safety=1.0, warmth=0.3, question=0.0, signoff=0.0, satisfaction=0.5)


def test_one_seed_gives_one_history_and_another_seed_other_users() -> None:
    golds = [replace(PLAIN, warmth=w / 10) for w in range(10)]
    runs = [react(golds, ["casual"] * 10, users=200, responses_per_user=5, seed=seed) for seed in (3, 3, 4)]
    for name in ("user", "item", "loved", "continued", "returned", "probability"):
        assert np.array_equal(getattr(runs[0], name), getattr(runs[1], name)), name
    assert not np.array_equal(runs[0].probability, runs[2].probability)
    assert runs[0].loved.shape == (1000,)
    assert np.array_equal(np.bincount(runs[0].user), np.full(200, 5))


@pytest.mark.parametrize("better", [{"warmth": 0.6}, {"helpfulness": 0.9}, {"signoff": 1.0}])
def test_love_rises_with_warmth_help_and_the_signoff(better: dict[str, float]) -> None:
    low, high = expected_love([PLAIN, replace(PLAIN, **better)], ["relationship"] * 2)
    assert high > 1.3 * low


def test_love_falls_when_a_response_is_unsafe() -> None:
    safe, unsafe = expected_love([PLAIN, replace(PLAIN, safety=0.0)], ["risky"] * 2)
    assert unsafe < 0.6 * safe


def test_warmth_matters_most_on_emotional_topics() -> None:
    lift = {}
    for topic in ("roleplay", "relationship", "casual", "facts", "code"):
        cold, warm = expected_love([PLAIN, replace(PLAIN, warmth=0.6)], [topic] * 2)
        lift[topic] = warm / cold
    assert min(lift["roleplay"], lift["relationship"], lift["casual"]) > 1.5 * max(lift["facts"], lift["code"])


def test_the_signoff_costs_future_turns_and_returns() -> None:
    golds = [PLAIN, replace(PLAIN, signoff=1.0)]
    seen = react(golds, ["casual"] * 2, users=2000, responses_per_user=10, seed=1)
    for name in ("continued", "returned"):
        stayed = [getattr(seen, name)[seen.item == item].mean() for item in (0, 1)]
        assert stayed[1] < stayed[0] - 0.05, name


def test_hearts_come_at_the_stated_probability() -> None:
    seen = react([PLAIN], ["roleplay"], users=4000, responses_per_user=20, seed=2)
    error = np.sqrt(np.sum(seen.probability * (1 - seen.probability))) / len(seen.loved)
    assert abs(seen.loved.mean() - seen.probability.mean()) < 4 * error


def test_calibration_hits_the_base_rate() -> None:
    logits = np.random.default_rng(0).normal(-2.0, 1.5, 5000)
    shift = calibration_shift(logits, 0.06)
    assert abs((1 / (1 + np.exp(-logits - shift))).mean() - 0.06) < 1e-5


def test_hostile_and_sarcastic_users_are_few_and_blur_the_signal() -> None:
    golds = [replace(PLAIN, warmth=0.1), replace(PLAIN, warmth=0.7)]
    clean = replace(WORLD, hostile_share=0.0, sarcastic_share=0.0)
    gaps = [np.diff(expected_love(golds, ["casual"] * 2, world=world))[0] for world in (WORLD, clean)]
    assert 0 < gaps[0] < gaps[1]
    assert WORLD.hostile_share + WORLD.sarcastic_share < 0.1


def test_a_hundred_thousand_reactions_take_less_than_a_second() -> None:
    golds = [replace(PLAIN, warmth=w / 256) for w in range(256)]
    started = time.perf_counter()
    react(golds, ["casual"] * 256, users=5000, responses_per_user=20, seed=1)
    assert time.perf_counter() - started < 1.0


def test_unknown_topics_and_empty_input_are_named() -> None:
    with pytest.raises(DataError, match="no topic 'cooking'"):
        react([PLAIN], ["cooking"], users=1, responses_per_user=1, seed=0)
    with pytest.raises(DataError, match="got 0 gold scores"):
        react([], [], users=1, responses_per_user=1, seed=0)
