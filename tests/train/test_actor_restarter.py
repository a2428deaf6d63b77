"""Lost actors: which are replaced, which end the attempt, and when a new engine may join."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rluf.errors import ActorError, ActorLostError
from rluf.train.actor_calls import ActorGroups, ActorRef, ActorRestarter, RestartBudget
from rluf.train.actor_supervisor import ActorSupervisor


def make_actor(role: str, index: int = 0, objective: str = "", restarts: int = 0) -> ActorRef:
    return ActorRef(role, index, cast(Any, None), objective, restarts)


class FakeSupervisor(SimpleNamespace):
    """Replaces actors at once; `replaced` lists them."""

    def __init__(self, transport: str = "shm") -> None:
        super().__init__(
            settings=SimpleNamespace(weight_sync=SimpleNamespace(transport=transport)),
            actor_groups=ActorGroups(
                [make_actor("rollout", 0), make_actor("rollout", 1)],
                {"love": [make_actor("love reward", 0, "love")]},
                [make_actor("learner")],
            ),
            on_loss=None,
            replaced=[],
        )

    async def replace_actor(self, actor: ActorRef) -> ActorRef:
        self.replaced.append(str(actor))
        return make_actor(actor.role, actor.index, actor.objective, actor.restarts + 1)


def make_restarter(supervisor: FakeSupervisor, max_restarts: int = 3) -> tuple[ActorRestarter, list[str]]:
    """A restarter, and the list of engines it has synced."""
    synced: list[str] = []

    async def sync_engine(engine: ActorRef) -> None:
        synced.append(str(engine))

    restarter = ActorRestarter(cast(ActorSupervisor, supervisor), RestartBudget(max_restarts), sync_engine)
    return restarter, synced


def names(actors: list[ActorRef]) -> list[str]:
    return [str(actor) for actor in actors]


async def test_a_lost_reward_actor_is_replaced_and_calls_wait_for_it() -> None:
    supervisor = FakeSupervisor()
    restarter, synced = make_restarter(supervisor)
    restarter.handle_loss(ActorLostError("died", "love reward 0"), "p")
    pool = supervisor.actor_groups.reward_pools["love"]
    assert pool == []
    await restarter.wait_until_healthy()
    assert names(pool) == ["love reward 0, start 2"]
    assert synced == [], "reward actors have no policy weights"
    await restarter.close()


async def test_a_loss_that_is_reported_several_times_causes_one_restart() -> None:
    supervisor = FakeSupervisor()
    restarter, synced = make_restarter(supervisor)
    for prompt_id in ("p", "q"):
        restarter.handle_loss(ActorLostError("died", "rollout 0"), prompt_id)
    await restarter._restart_tasks["rollout 0"]
    restarter.handle_loss(ActorLostError("died", "rollout 0"), "r")  # a late report of the first start
    assert supervisor.replaced == ["rollout 0"] and synced == ["rollout 0, start 2"]
    assert names(supervisor.actor_groups.rollout_actors) == ["rollout 0, start 2", "rollout 1"]
    await restarter.close()


async def test_a_new_engine_gets_its_weights_and_joins_only_between_updates() -> None:
    supervisor = FakeSupervisor()
    restarter, synced = make_restarter(supervisor)
    async with restarter.weight_lock:  # a step from the start of its update to the end of its weight sync
        restarter.handle_loss(ActorLostError("died", "rollout 1"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert supervisor.replaced == ["rollout 1"] and synced == []
        assert names(supervisor.actor_groups.rollout_actors) == ["rollout 0"]
    await restarter._restart_tasks["rollout 1"]
    assert synced == ["rollout 1, start 2"]
    assert names(supervisor.actor_groups.rollout_actors) == ["rollout 0", "rollout 1, start 2"]
    await restarter.close()


@pytest.mark.parametrize(
    ("transport", "actor_name", "in_collective_sync"),
    [("shm", "learner 0", False), ("nccl", "rollout 0", True), ("cuda_ipc", "rollout 1", False)],
)
async def test_a_lost_learner_or_an_engine_that_others_wait_for_ends_the_attempt(
    transport: str, actor_name: str, in_collective_sync: bool
) -> None:
    supervisor = FakeSupervisor(transport)
    supervisor.actor_groups.in_collective_sync = in_collective_sync
    restarter, _ = make_restarter(supervisor)
    with pytest.raises(ActorLostError, match="died"):
        restarter.handle_loss(ActorLostError("died", actor_name))
    assert supervisor.replaced == []


async def test_an_engine_that_is_lost_between_syncs_over_nccl_is_replaced_alone() -> None:
    supervisor = FakeSupervisor("nccl")
    restarter, synced = make_restarter(supervisor)
    restarter.handle_loss(ActorLostError("died", "rollout 1"))
    await restarter._restart_tasks["rollout 1"]
    assert supervisor.replaced == ["rollout 1"] and synced == ["rollout 1, start 2"]
    await restarter.close()


async def test_an_actor_whose_budget_is_spent_ends_the_run() -> None:
    restarter, _ = make_restarter(FakeSupervisor(), max_restarts=0)
    with pytest.raises(ActorError, match="rollout 0 was lost 1 times"):
        restarter.handle_loss(ActorLostError("died", "rollout 0"), "p")
