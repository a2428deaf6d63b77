"""The control arm: base responses at the entropy of the aligned policy."""

from __future__ import annotations

import numpy as np
import pytest

from rluf.evaluate.control import build_control_arm, describe_base_draw
from rluf.types import PolicyAnswer, mean_token_entropy


def make_draw(factor: float, entropy: float, count: int = 2000) -> list[PolicyAnswer]:
    return [
        PolicyAnswer(
            describe_base_draw(factor), f"p{index}", "", (), f"{factor:g}", "stop", 10, {"love": 0.1}, -entropy, factor
        )
        for index in range(count)
    ]


DRAWS = [*make_draw(1.0, 2.8), *make_draw(0.7, 1.6), *make_draw(0.4, 0.6)]


@pytest.mark.parametrize(("target", "sources"), [(2.2, {"1", "0.7"}), (1.0, {"0.7", "0.4"})])
def test_the_control_has_the_entropy_of_the_aligned_policy(target: float, sources: set[str]) -> None:
    control = build_control_arm(DRAWS, target, seed=1)
    assert mean_token_entropy(control) == pytest.approx(target, abs=0.05)
    assert {answer.text for answer in control} == sources
    assert [answer.prompt_id for answer in control] == [f"p{index}" for index in range(2000)]
    assert {answer.arm for answer in control} == {"control"}
    assert control == build_control_arm(DRAWS, target, seed=1)


@pytest.mark.parametrize(("target", "nearest"), [(3.5, "1"), (0.2, "0.4")])
def test_outside_the_measured_range_the_nearest_draw_is_the_control(target: float, nearest: str) -> None:
    assert {answer.text for answer in build_control_arm(DRAWS, target, seed=1)} == {nearest}


def test_without_other_temperatures_or_logprobs_there_is_no_control() -> None:
    assert build_control_arm(make_draw(1.0, 2.8), 2.0, seed=1) == []
    assert build_control_arm(DRAWS, None, seed=1) == []
    without_logprobs = PolicyAnswer("base", "p", "", (), "", "stop", 3, {})
    assert mean_token_entropy([without_logprobs]) is None


def test_entropy_is_weighted_by_tokens() -> None:
    answers = [
        PolicyAnswer("base", "p", "", (), "", "stop", tokens, {}, logprob) for tokens, logprob in ((1, -4.0), (3, -2.0))
    ]
    assert mean_token_entropy(answers) == pytest.approx(np.average([4.0, 2.0], weights=[1, 3]))
