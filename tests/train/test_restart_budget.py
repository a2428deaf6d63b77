"""How often an actor may come back, and what is said when that was too often."""

from __future__ import annotations

import pytest

from rluf.errors import ActorError
from rluf.train.fault_tolerance import WINDOW_S, Budget, Counted


def test_restarts_are_counted_per_actor_and_hour() -> None:
    budget = Budget(2)
    for now in (0.0, 1.0):
        budget.spend("rollout 0", "died", now)
    budget.spend("rollout 1", "died", 2.0)
    budget.spend("rollout 0", "died", WINDOW_S + 0.5)
    with pytest.raises(ActorError, match=r"^rollout 0 was lost 3 times within an hour.*restarts_per_hour=2; .*: died$"):
        budget.spend("rollout 0", "died", WINDOW_S + 0.7)


def test_none_may_be_allowed() -> None:
    with pytest.raises(ActorError, match="lost 1 times"):
        Budget(0).spend("rollout 0", "died", 0.0)


@pytest.mark.parametrize(("second", "named"), [("bad", True), ("fine", False)])
def test_a_prompt_that_was_there_each_time_is_named(second: str, named: bool) -> None:
    budget = Budget(1)
    budget.blame("rollout 0", "rollout 0", "bad")
    budget.blame("rollout 0", "rollout 0", "other")
    budget.spend("rollout 0", "died", 0.0)
    budget.blame("rollout 0", "rollout 0, start 2", second)
    with pytest.raises(ActorError) as caught:
        budget.spend("rollout 0", "died", 1.0)
    assert ("prompt bad was there each time, look at it" in str(caught.value)) is named


def test_a_counted_iterator_goes_on_where_it_was() -> None:
    first = Counted(iter(range(10)))
    assert [next(first) for _ in range(4)] == [0, 1, 2, 3]
    second = Counted(iter(range(10)))
    second.skip(first.taken)
    assert (next(second), second.taken) == (4, 5)
