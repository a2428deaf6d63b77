"""What a method's name stands for: its weights, its loss, and the lesson that learners get."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.algorithms.advantages import ESTIMATORS, Drift, Outcomes
from rluf.algorithms.losses import LOSSES
from rluf.algorithms.registry import METHODS, make_lesson, needs_drifts, token_weights, varied
from rluf.config.policy import AlgorithmSettings
from rluf.config.rules import CGPO, LIKELIHOOD

LENGTHS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=6)


def named(name: str, **other: object) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"name": name, **other})


def test_settings_registry_and_rules_name_the_same_methods() -> None:
    assert set(get_args(AlgorithmSettings.model_fields["name"].annotation)) == set(METHODS)
    losses = get_args(get_args(AlgorithmSettings.model_fields["loss"].annotation)[0])
    assert set(losses) == set(LOSSES)
    assert {m.estimator for m in METHODS.values()} <= set(ESTIMATORS)
    assert {name for name, method in METHODS.items() if method.loss == "reinforce"} == set(LIKELIHOOD)
    assert {name for name, method in METHODS.items() if method.drifts} == set(CGPO)


def test_weights_by_hand() -> None:
    lengths = [[2, 4], [6]]
    assert token_weights("sequence", lengths, 10) == [[1 / 6, 1 / 12], [1 / 18]]
    assert token_weights("token", lengths, 10) == [[1 / 12, 1 / 12], [1 / 12]]
    assert token_weights("constant", lengths, 10) == [[1 / 30, 1 / 30], [1 / 30]]
    assert token_weights("sum", lengths, 10) == [[1 / 3, 1 / 3], [1 / 3]]
    assert token_weights("prompt", lengths, 10) == [[1 / 2, 1 / 2], [1 / 2]]
    assert token_weights("sequence", [[0]], 10) == [[1.0]]


@given(LENGTHS)
def test_means_weigh_one_in_all(lengths: list[list[int]]) -> None:
    for weighing in ("sequence", "token"):
        weights = token_weights(weighing, lengths, 40)  # type: ignore[arg-type]
        total = sum(w * n for row, sizes in zip(weights, lengths, strict=True) for w, n in zip(row, sizes, strict=True))
        assert total == pytest.approx(1.0)


def test_a_demonstration_joins_every_method_with_advantage_one() -> None:
    drifts = [[Drift(0.1), Drift(0.2)]]
    for name in (name for name, method in METHODS.items() if not method.logged):
        outcomes = Outcomes([[0.2, 0.8]], [[3, 5]], drifts)
        lesson = make_lesson(named(name), outcomes, longest=10, kl_coef=0.02, shown=[4])
        assert lesson.advantages[1] == [1.0] and len(lesson.weights[1]) == 1 and lesson.weights[1][0] > 0
        assert lesson.kl_coef == 0.02


def test_the_default_is_grpo_with_a_mean_over_tokens_then_samples() -> None:
    outcomes = Outcomes([[0.0, 1.0]], [[3, 5]])
    lesson = make_lesson(AlgorithmSettings(), outcomes, longest=10, kl_coef=0.02)
    assert lesson.loss == "ppo" and lesson.slope == 0.0
    assert lesson.weights == [[1 / 6, 1 / 10]]
    assert not needs_drifts(AlgorithmSettings())


def test_kl_in_the_reward_leaves_the_loss() -> None:
    algorithm = named("reinforce_pp", kl_in="reward")
    outcomes = Outcomes([[0.0, 1.0]], [[3, 5]], [[Drift(0.1, 0.2, 0.1), Drift(0.2, 0.3, 0.2)]], kl_coef=0.5)
    lesson = make_lesson(algorithm, outcomes, longest=10, kl_coef=0.5)
    assert needs_drifts(algorithm) and lesson.kl_coef == 0.0 and lesson.slope > 0.5


def test_gspo_weighs_by_response_whatever_the_method() -> None:
    outcomes = Outcomes([[0.0, 1.0]], [[3, 5]])
    lesson = make_lesson(named("dapo", loss="gspo"), outcomes, longest=10, kl_coef=0.0)
    assert (lesson.loss, lesson.weights) == ("gspo", [[1 / 6, 1 / 10]])


def test_dapo_drops_groups_that_no_objective_that_counts_tells_apart() -> None:
    signals = {"love": [0.5, 0.5], "safety": [0.0, 1.0]}
    assert not varied(signals, {"love": 1.0, "safety": 0.0})
    assert varied(signals, {"love": 1.0, "safety": 0.1})


def test_the_guide_has_a_line_for_every_name() -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `algorithm\.name: (\w+)`", text, re.MULTILINE)) == set(METHODS)
    assert set(re.findall(r"^\| `algorithm\.loss: (\w+)`", text, re.MULTILINE)) == set(LOSSES)
