"""Restart budget: how often an actor may be restarted, and which prompts the error names."""

from __future__ import annotations

import pytest

from rluf.errors import ActorError
from rluf.train.actor_calls import RESTART_WINDOW_S, RestartBudget


def test_restarts_are_counted_per_actor_and_hour() -> None:
    budget = RestartBudget(2)
    for now in (0.0, 1.0):
        budget.record_failure("rollout 0", "died", now)
    budget.record_failure("rollout 1", "died", 2.0)
    budget.record_failure("rollout 0", "died", RESTART_WINDOW_S + 0.5)
    message = r"^rollout 0 was lost 3 times within an hour.*max_restarts_per_hour=2; .*: died$"
    with pytest.raises(ActorError, match=message):
        budget.record_failure("rollout 0", "died", RESTART_WINDOW_S + 0.7)


def test_a_budget_of_zero_allows_no_restart() -> None:
    with pytest.raises(ActorError, match="lost 1 times"):
        RestartBudget(0).record_failure("rollout 0", "died", 0.0)


@pytest.mark.parametrize(("second_prompt", "is_named"), [("bad", True), ("fine", False)])
def test_a_prompt_in_flight_at_every_loss_is_named(second_prompt: str, is_named: bool) -> None:
    budget = RestartBudget(1)
    budget.record_in_flight("rollout 0", "rollout 0", "bad")
    budget.record_in_flight("rollout 0", "rollout 0", "other")
    budget.record_failure("rollout 0", "died", 0.0)
    budget.record_in_flight("rollout 0", "rollout 0, start 2", second_prompt)
    with pytest.raises(ActorError) as raised:
        budget.record_failure("rollout 0", "died", 1.0)
    assert ("prompt bad was in flight each time, check it" in str(raised.value)) is is_named
