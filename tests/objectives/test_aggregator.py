"""Combinations by name: calibrated against a base reply, under floors, and gated by judges."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from rluf.config.reward import ObjectivesSettings
from rluf.objectives.aggregation import Standardiser
from rluf.objectives.aggregator import Combiner, Opinions, sigmoid
from rluf.objectives.multipliers import Multipliers

PLAIN = Standardiser(
    dict.fromkeys(("love", "helpfulness", "safety"), 0.0), dict.fromkeys(("love", "helpfulness", "safety"), 1.0)
)


def combiner(combine: str, weights: Sequence[float], **other: object) -> Combiner:
    names = ("love", "helpfulness", "safety")
    shares = {name: {"weight": weight} for name, weight in zip(names, weights, strict=True)}
    made = Combiner(ObjectivesSettings.model_validate({"combine": combine, **shares, **other}))
    made.standardiser = PLAIN
    return made


def opinions(
    love: list[float], help_: list[float], safe: list[float], topic: str = "", passed: Sequence[bool] = ()
) -> Opinions:
    return Opinions("p", topic, {"love": love, "helpfulness": help_, "safety": safe}, passed)


def test_linear_is_the_weighted_sum_of_standardised_signals() -> None:
    found = combiner("linear", (0.5, 0.25, 0.25)).combine([opinions([1.0, 2.0], [4.0, 0.0], [0.0, 8.0])])
    assert found.rewards == [[1.5, 3.0]]
    assert found.metrics == {}


def test_the_first_batch_freezes_the_scale() -> None:
    made = Combiner(ObjectivesSettings())
    made.combine([opinions([0.0, 2.0], [1.0, 3.0], [5.0, 7.0])])
    frozen = made.standardiser
    made.combine([opinions([10.0, 20.0], [10.0, 30.0], [50.0, 70.0])])
    assert made.standardiser is frozen
    assert frozen is not None and frozen.mean["love"] == 1.0


def test_calibrated_by_hand() -> None:
    made = combiner("calibrated", (0.3, 0.7, 0.0))
    made.remember("p", {"love": [1.0, 3.0], "helpfulness": [0.0], "safety": [0.0]})
    found = made.combine([opinions([2.0, 4.0], [0.0, -1.0], [9.0, 9.0])])
    # the base reply scores 2 and 0: love gives s(0), s(2); helpfulness s(0), s(-1)
    low = 1 / (1 + math.e)
    assert found.rewards[0] == pytest.approx([0.5, 0.3 / (1 + math.exp(-2)) + 0.7 * low], abs=1e-9)


def test_an_unknown_prompt_is_calibrated_against_its_own_group() -> None:
    found = combiner("calibrated", (1.0, 0.0, 0.0)).combine([opinions([1.0, 3.0], [0.0] * 2, [0.0] * 2)])
    assert found.rewards[0] == pytest.approx([sigmoid(-1.0), sigmoid(1.0)])


def test_sigmoid_does_not_overflow() -> None:
    assert (sigmoid(-800.0), sigmoid(800.0), sigmoid(0.0)) == (0.0, 1.0, 0.5)


def test_judges_gate() -> None:
    gate = [True, False]
    rows = [opinions([1.0, 9.0], [0.0] * 2, [0.0] * 2, passed=gate), opinions([-2.0, 0.0], [0.0] * 2, [0.0] * 2)]
    found = combiner("linear", (1.0, 0.0, 0.0)).combine(rows)
    assert found.rewards == [[1.0, -2.0], [-2.0, 0.0]]
    assert found.metrics == {"passed": 0.5}
    assert combiner("linear", (1.0, 0.0, 0.0)).combine(rows, gate=False).rewards[0] == [1.0, 9.0]
    assert combiner("calibrated", (1.0, 0.0, 0.0)).combine(rows).rewards[0] == [pytest.approx(sigmoid(-4.0)), 0.0]
    assert combiner("gdpo", (1.0, 0.0, 0.0)).combine(rows).parts["love"] == [[1.0, -2.0], [-2.0, 0.0]]


def test_multipliers_by_hand() -> None:
    made = Multipliers({"safety": 0.0})
    # below by 0.4: I = 0.4, no rise yet: 1.0 * 0.4 + 0.5 * 0.4
    assert made.update({"safety": -0.4})["safety"] == pytest.approx(0.6)
    # below by 1.0: I = 1.4, rise 0.6: 1.0 + 0.7 + 0.3
    assert made.update({"safety": -1.0})["safety"] == pytest.approx(2.0)
    # above by 0.5: I = 0.9: -0.5 + 0.45
    assert made.update({"safety": 0.5})["safety"] == 0.0
    # above by 2: the integral stops at 0 and does not count what lies above the floor
    assert made.update({"safety": 2.0})["safety"] == 0.0
    assert made.update({"safety": -0.1})["safety"] == pytest.approx(0.1 + 0.05 + 0.5 * 2.1)
    assert made.update({})["safety"] == made.values["safety"]


def test_constrained_weighs_what_is_below_its_floor() -> None:
    made = combiner("constrained", (1.0, 0.0, 0.0), floors=["safety:0.5"])
    found = made.combine([opinions([2.0, 0.0], [0.0] * 2, [0.0, 0.0])])
    push = 0.5 + 0.5 * 0.5
    assert found.metrics == {"multiplier_safety": pytest.approx(push)}
    assert found.weights[0] == {"love": 1 / (1 + push), "helpfulness": 0.0, "safety": push / (1 + push)}
    assert found.rewards[0] == pytest.approx([2.0 / (1 + push), 0.0])


def test_a_topic_with_an_owner_keeps_its_weights_and_counts_for_its_owner_only() -> None:
    made = combiner("constrained", (1.0, 0.0, 0.0), floors=["safety:0", "helpfulness:0"], alone=["risky:safety"])
    found = made.combine([opinions([2.0, 0.0], [-9.0] * 2, [-1.0, -3.0], topic="risky")])
    assert found.weights[0] == {"love": 0.0, "helpfulness": 0.0, "safety": 1.0}
    assert found.metrics == {"multiplier_safety": pytest.approx(3.0), "multiplier_helpfulness": 0.0}


def test_a_combiner_goes_on_where_its_state_was_taken() -> None:
    first = Combiner(ObjectivesSettings.model_validate({"combine": "constrained", "floors": ["safety:0.5"]}))
    batches = [[opinions([0.1 * i, 2.0], [4.0, 0.3], [-1.0, 0.5 * i])] for i in range(1, 5)]
    first.remember("p", {"love": [1.0, 2.0]})
    for batch in batches[:2]:
        first.combine(batch)
    assert first.multipliers.values["safety"] > 0
    again = Combiner(first.objectives)
    again.restore(json.loads(json.dumps(first.state())))
    assert again.replies == first.replies
    for batch in batches[2:]:
        assert again.combine(batch) == first.combine(batch)
    assert again.state() == first.state()
