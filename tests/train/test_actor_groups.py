"""Waiting for actors: each way a call can end becomes one error that names whom the run waited for."""

from __future__ import annotations

import asyncio
import itertools
import os

import pytest
import ray
from ray.exceptions import ObjectStoreFullError

from rluf.config.policy import AlgorithmSettings
from rluf.errors import ActorError, DataError, LostError, ResourceError, RlufError, StallError
from rluf.train.actor_groups import within
from rluf.train.controller import demonstrations_at, prompt_order

pytestmark = pytest.mark.usefixtures("local_ray")


class Worker:
    """An actor that ends its calls in every way there is."""

    def __init__(self, broken: bool = False) -> None:
        if broken:
            raise ValueError("no such device")

    def answer(self) -> int:
        return 7

    def refuse(self) -> None:
        raise DataError("row 3 is empty; fill it")

    def fail(self) -> None:
        raise KeyError("lost")

    def fill(self) -> None:
        raise ObjectStoreFullError("no room for 1 GiB")

    def die(self) -> None:
        os._exit(1)

    async def hang(self) -> None:
        await asyncio.sleep(60)


def ask(method: str, *, seconds: float = 30.0, broken: bool = False) -> object:
    async def one() -> object:
        worker = ray.remote(num_cpus=0)(Worker).remote(broken)
        try:
            return await within(getattr(worker, method).remote(), seconds, "worker 0 (testing)")
        finally:
            ray.kill(worker)

    return asyncio.run(one())


def test_an_answer_comes_through() -> None:
    assert ask("answer") == 7


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("refuse", DataError, r"^row 3 is empty; fill it$"),
        ("fail", ActorError, r"^worker 0 \(testing\) failed: KeyError: 'lost'"),
        ("fill", ResourceError, r"worker 0 \(testing\) found Ray's object store full.*no room for 1 GiB"),
        ("die", LostError, r"^worker 0 \(testing\) died: "),
    ],
)
def test_a_failure_names_the_actor_or_is_the_users_own(method: str, kind: type[RlufError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        ask(method)
    assert len(str(caught.value).splitlines()) == 1


def test_a_constructor_that_fails_is_told_in_one_line() -> None:
    with pytest.raises(ActorError, match=r"worker 0 \(testing\) died: ValueError: no such device"):
        ask("answer", broken=True)


def test_a_silent_actor_is_a_stall() -> None:
    with pytest.raises(StallError, match=r"waited 3 s for worker 0 \(testing\) without an answer"):
        ask("hang", seconds=3)


def test_prompt_order_covers_every_prompt_once_a_pass_and_follows_the_seed() -> None:
    first = list(itertools.islice(prompt_order([1] * 5, seed=1), 10))
    assert sorted(first[:5]) == sorted(first[5:]) == [0, 1, 2, 3, 4]
    assert first == list(itertools.islice(prompt_order([1] * 5, seed=1), 10))
    assert first != list(itertools.islice(prompt_order([1] * 5, seed=2), 10))
    assert sorted(itertools.islice(prompt_order([1, 3], seed=1), 4)) == [0, 1, 1, 1]


def test_demonstrations_fade_from_all_to_none() -> None:
    algorithm = AlgorithmSettings(demonstrations=4, steps=8)
    assert [demonstrations_at(step, algorithm) for step in range(1, 9)] == [4, 4, 3, 2, 2, 2, 1, 0]
    assert demonstrations_at(1, AlgorithmSettings(demonstrations=0)) == 0
