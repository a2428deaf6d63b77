"""The driver picks the least busy actor without a scan, and a failed group ends a wait at once."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from rluf.train.actor_calls import ActorRef, LeastBusyPicker


def make_pool(count: int) -> list[ActorRef]:
    return [ActorRef("rollout", index, cast(Any, None)) for index in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_pick_is_that_of_a_scan(count: int, seed: int) -> None:
    """With work added and finished in any order, and actors that are lost and replaced."""
    rng, picker, pool = random.Random(seed), LeastBusyPicker(), make_pool(count)
    pending: dict[str, int] = {}
    running: list[tuple[ActorRef, int]] = []
    for _ in range(600):
        expected = min(pool, key=lambda actor: (pending.get(str(actor), 0), actor.index))
        assert picker.select_actor(pool) is expected
        action = rng.random()
        if action < 0.5:
            units = rng.randrange(1, 9)
            picker.add_work(pool, expected, units)
            pending[str(expected)] = pending.get(str(expected), 0) + units
            running.append((expected, units))
        elif action < 0.95 and running:
            actor, units = running.pop(rng.randrange(len(running)))
            picker.add_work(pool, actor, -units)
            pending[str(actor)] -= units
        elif action >= 0.95:
            lost = rng.choice(pool)
            pool.remove(lost)
            pool.append(ActorRef(lost.role, lost.index, lost.handle, restarts=lost.restarts + 1))


def test_pools_do_not_share_their_order() -> None:
    picker, first, second = LeastBusyPicker(), make_pool(3), make_pool(2)
    picker.add_work(first, picker.select_actor(first), 5)
    assert picker.select_actor(first).index == 1
    # Actors are told apart by name: work of "rollout 0" counts in every pool that has it.
    assert picker.select_actor(second).index == 1


def test_memory_stays_bounded() -> None:
    picker, pool = LeastBusyPicker(), make_pool(10)
    for _ in range(5000):
        actor = picker.select_actor(pool)
        picker.add_work(pool, actor, 1)
        picker.add_work(pool, actor, -1)
    assert len(picker._pools[id(pool)][2]) <= 41
