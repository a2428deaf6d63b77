"""The control arm: base responses at the entropy of the aligned policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rluf.evaluate.control import build_control_arm, describe_base_draw
from rluf.types import PolicyAnswer, compute_mean_token_entropy


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
    assert compute_mean_token_entropy(control) == pytest.approx(target, abs=0.05)
    assert {answer.text for answer in control} == sources
    assert [answer.prompt_id for answer in control] == [f"p{index}" for index in range(2000)]
    assert {answer.arm for answer in control} == {"control"}
    assert control == build_control_arm(DRAWS, target, seed=1)


@pytest.mark.parametrize(("target", "nearest"), [(3.5, "1"), (0.2, "0.4")])
def test_outside_the_measured_range_the_nearest_draw_is_the_control(target: float, nearest: str) -> None:
    assert {answer.text for answer in build_control_arm(DRAWS, target, seed=1)} == {nearest}


def test_the_base_arm_adds_draws_and_the_cooler_draw_of_a_prompt_repeats() -> None:
    base_arm = [
        replace(answer, arm="base", text=f"base {index}") for index in range(3) for answer in make_draw(1.0, 2.8, 500)
    ]
    draws = [*base_arm, *make_draw(1.0, 2.8, 500), *make_draw(0.7, 1.6, 500), *make_draw(0.4, 0.6, 500)]
    control = build_control_arm(draws, 2.5, seed=1)
    assert Counter(answer.prompt_id for answer in control) == dict.fromkeys((f"p{index}" for index in range(500)), 4)
    counts = Counter(answer.text for answer in control)
    # Each of the four draws at the warmer temperature takes its own position; the rest are the cooler draw.
    assert counts["0.7"] / len(control) == pytest.approx(0.25, abs=0.03)
    assert [counts[name] / 500 for name in ("base 0", "base 1", "base 2", "1")] == pytest.approx([0.75] * 4, abs=0.06)
    assert compute_mean_token_entropy(control) == pytest.approx(2.5, abs=0.04)
    # At the entropy of the base itself, the control is all of its draws.
    assert Counter(answer.text for answer in build_control_arm(draws, 3.0, seed=1)) == {
        "base 0": 500, "base 1": 500, "base 2": 500, "1": 500,
    }  # fmt: skip


def test_without_other_temperatures_or_logprobs_there_is_no_control() -> None:
    assert build_control_arm(make_draw(1.0, 2.8), 2.0, seed=1) == []
    assert build_control_arm(DRAWS, None, seed=1) == []
    without_logprobs = PolicyAnswer("base", "p", "", (), "", "stop", 3, {})
    assert compute_mean_token_entropy([without_logprobs]) is None


def test_entropy_is_weighted_by_tokens() -> None:
    answers = [
        PolicyAnswer("base", "p", "", (), "", "stop", tokens, {}, logprob) for tokens, logprob in ((1, -4.0), (3, -2.0))
    ]
    assert compute_mean_token_entropy(answers) == pytest.approx(np.average([4.0, 2.0], weights=[1, 3]))
