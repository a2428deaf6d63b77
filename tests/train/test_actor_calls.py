"""Calls to actors: each way a call can end is one error that names the actor, and lost actors are retried."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import ObjectStoreFullError

from rluf.config.policy import AlgorithmSettings
from rluf.errors import ActorError, ActorLostError, DataError, DeadlineError, ResourceError, RlufError
from rluf.tracking.timeline import RunTimeline
from rluf.train.actor_calls import ActorCalls, ActorRef, ActorRestarter, call_with_timeout
from rluf.train.policy_update import count_demonstrations

pytestmark = pytest.mark.usefixtures("local_ray")


class Worker:
    """An actor that ends its calls in every possible way."""

    def __init__(self, is_broken: bool = False) -> None:
        if is_broken:
            raise ValueError("no such device")

    def answer(self) -> int:
        return 7

    def refuse(self) -> None:
        raise DataError("row 3 is empty; fill it")

    def fail(self) -> None:
        raise KeyError("lost")

    def fail_with_note(self) -> None:
        error = TypeError("not a text")
        error.add_note("raised by reward function 'mine:score'")
        raise error

    def fill(self) -> None:
        raise ObjectStoreFullError("no room for 1 GiB")

    def die(self) -> None:
        os._exit(1)

    async def hang(self) -> None:
        await asyncio.sleep(60)


@pytest.fixture(scope="module")
def worker(local_ray: None) -> Any:
    """An actor for all tests that do not end it."""
    return start_worker()


def start_worker(is_broken: bool = False) -> Any:
    return ray.remote(num_cpus=0)(Worker).remote(is_broken)


def call_worker(worker: Any, method: str, timeout_s: float = 30.0) -> object:
    async def call() -> object:
        return await call_with_timeout(getattr(worker, method).remote(), timeout_s, "worker 0 (testing)")

    return asyncio.run(call())


def test_a_result_is_returned(worker: Any) -> None:
    assert call_worker(worker, "answer") == 7


@pytest.mark.parametrize(
    ("method", "error_type", "message"),
    [
        ("refuse", DataError, r"^row 3 is empty; fill it$"),
        ("fail", ActorError, r"^worker 0 \(testing\) failed: KeyError: 'lost'"),
        (
            "fail_with_note",
            ActorError,
            r"failed: TypeError: not a text; raised by reward function 'mine:score'; run.log",
        ),
        ("fill", ResourceError, r"worker 0 \(testing\) found Ray's object store full.*no room for 1 GiB"),
        ("die", ActorLostError, r"^worker 0 \(testing\) died: "),
    ],
)
def test_a_failure_names_the_actor_or_is_the_actors_own_error(
    method: str, error_type: type[RlufError], message: str, worker: Any
) -> None:
    with pytest.raises(error_type, match=message) as raised:
        call_worker(start_worker() if method == "die" else worker, method)
    assert len(str(raised.value).splitlines()) == 1


def test_a_failing_constructor_is_one_line_and_no_lost_actor() -> None:
    with pytest.raises(ActorError, match=r"worker 0 \(testing\) died: ValueError: no such device") as raised:
        call_worker(start_worker(is_broken=True), "answer")
    assert not isinstance(raised.value, ActorLostError)


def test_a_silent_actor_is_a_deadline_error(worker: Any) -> None:
    with pytest.raises(DeadlineError, match=r"waited 3 s for worker 0 \(testing\) without a reply"):
        call_worker(worker, "hang", timeout_s=3)


class StandInMethod:
    """An actor's method in this process: returns `result`, or raises it."""

    def __init__(self, result: object, log: list[str], name: str) -> None:
        self.result, self.log, self.name = result, log, name

    def options(self, **_: object) -> StandInMethod:
        return self

    async def remote(self, *_: object) -> object:
        self.log.append(self.name)
        await asyncio.sleep(0)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def make_calls(pool: list[ActorRef]) -> tuple[ActorCalls, list[str]]:
    """Calls whose restarter removes a lost actor, and its log of losses."""
    losses: list[str] = []

    def handle_loss(error: ActorLostError, prompt_id: str) -> None:
        losses.append(f"{error.actor_name} {prompt_id}")
        pool[:] = [actor for actor in pool if str(actor) != error.actor_name]

    async def wait_until_healthy() -> None:
        assert pool

    restarter = SimpleNamespace(handle_loss=handle_loss, wait_until_healthy=wait_until_healthy)
    return ActorCalls(cast(ActorRestarter, restarter), RunTimeline()), losses


def make_actor(index: int, result: object, log: list[str]) -> ActorRef:
    handle = SimpleNamespace(answer=StandInMethod(result, log, f"rollout {index}"))
    return ActorRef("rollout", index, cast(Any, handle))


async def call_pool(calls: ActorCalls, pool: list[ActorRef]) -> Any:
    return await calls.call(pool, "answer", timeout_s=5.0, task_name="answer", activity="testing", prompt_id="p")


async def test_calls_go_to_the_least_busy_actor() -> None:
    log: list[str] = []
    pool = [make_actor(index, index, log) for index in range(2)]
    calls, _ = make_calls(pool)
    await asyncio.gather(*(call_pool(calls, pool) for _ in range(4)))
    assert log == ["rollout 0", "rollout 1", "rollout 0", "rollout 1"]


async def test_a_call_on_a_lost_actor_is_repeated_on_another_one() -> None:
    log: list[str] = []
    pool = [make_actor(0, ActorLostError("died", "rollout 0"), log), make_actor(1, 7, log)]
    calls, losses = make_calls(pool)
    assert await call_pool(calls, pool) == 7
    assert (log, losses) == (["rollout 0", "rollout 1"], ["rollout 0 p"])


async def test_a_lost_object_is_not_retried() -> None:
    log: list[str] = []
    pool = [make_actor(0, ActorLostError("an object is gone"), log)]
    calls, losses = make_calls(pool)
    with pytest.raises(ActorLostError, match="an object is gone"):
        await call_pool(calls, pool)
    assert (log, losses) == (["rollout 0"], [])


def test_demonstrations_decay_from_all_to_none() -> None:
    algorithm = AlgorithmSettings(demonstrations=4, steps=8)
    assert [count_demonstrations(step, algorithm) for step in range(1, 9)] == [4, 4, 3, 2, 2, 2, 1, 0]
    assert count_demonstrations(1, AlgorithmSettings(demonstrations=0)) == 0
