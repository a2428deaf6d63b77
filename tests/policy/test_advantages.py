"""GRPO advantages against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.errors import SettingsError
from rluf.policy.advantages import advantages

REWARDS = st.lists(st.floats(-100, 100), min_size=1, max_size=16)


def test_grpo_worked_example() -> None:
    # mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25
    assert advantages("grpo", [1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        [-1.5 / (math.sqrt(1.25) + 1e-6), -0.5 / (math.sqrt(1.25) + 1e-6), 0.4472132, 1.3416396], abs=1e-6
    )


def test_grpo_of_two_samples_is_plus_and_minus_one() -> None:
    assert advantages("grpo", [0.0, 1.0]) == pytest.approx([-1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, -3.7, 1e9])
def test_equal_rewards_give_no_advantage(reward: float) -> None:
    assert advantages("grpo", [reward] * 7) == [0.0] * 7


@given(REWARDS)
def test_grpo_has_mean_zero_and_order_does_not_matter(rewards: list[float]) -> None:
    found = advantages("grpo", rewards)
    assert abs(sum(found)) < 1e-4
    assert sorted(advantages("grpo", rewards[::-1])) == pytest.approx(sorted(found), abs=1e-6)


def test_unknown_estimator_and_bad_rewards_are_refused() -> None:
    with pytest.raises(SettingsError, match="'grop'"):
        advantages("grop", [1.0])
    with pytest.raises(ValueError, match="finite"):
        advantages("grpo", [1.0, float("nan")])
    with pytest.raises(ValueError, match="at least one"):
        advantages("grpo", [])
