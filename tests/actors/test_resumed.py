"""What engines are told when a run goes on from a checkpoint, and when one is lost around it. Actors are stand-ins."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.recovery import LastingPublisher
from actors.supervisor import Crew, Member
from rluf.config.settings import Settings
from rluf.types import Group, Prompt, Sample

PROMPT = Prompt("p", ({"role": "user", "content": "Hello?"},), (1, 2), "", "train")
SAMPLE = Sample("p", (1, 2), (3,) * 24, (-1.0,) * 24, ((0, 0),), "stop", "Hi.")


class Standing:
    """Answers every call of a handle from a table, as an actor would."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, list[str]()

    def __getattr__(self, method: str) -> Any:
        return Standing.Method(self, method)

    class Method:
        """One method of the handle."""

        def __init__(self, of: Standing, name: str) -> None:
            self.of, self.name = of, name

        def options(self, **_: Any) -> Standing.Method:
            return self

        async def remote(self, *_: Any) -> Any:
            self.of.asked.append(self.name)
            return self.of.answers.get(self.name)


def engine(index: int) -> Member:
    return Member("rollout", index, cast(ActorHandle[Any], Standing(logprobs=[-1.0] * 24)))


def learner() -> Member:
    answers = {"logprobs": [[-1.0] * 24], "begin_publish": {}}
    return Member("learner", 0, cast(ActorHandle[Any], Standing(**answers)))


def crew(engines: int) -> Crew:
    return Crew(rollouts=[engine(index) for index in range(engines)], learners=[learner()])


def first_group() -> ObjectRef[Group]:
    found = asyncio.get_running_loop().create_future()
    found.set_result(Group(PROMPT, (SAMPLE,), 0))
    return cast("ObjectRef[Group]", found)


async def test_every_engine_is_read_after_a_resumption_though_one_came_back_before_the_first_publish() -> None:
    before = LastingPublisher(Settings(), crew(2), lambda _: None)
    await before.prepare(first_group())
    resumed = LastingPublisher(Settings(), crew(2), lambda _: None)
    resumed.restore(before.state())
    fresh = engine(1)
    resumed.crew.rollouts[1] = fresh
    await resumed.meet(fresh, 3, behind=False)
    await resumed.prepare(first_group())
    assert await resumed.publish(4) == {"probe": pytest.approx(0.0), "probe_s": pytest.approx(0.0, abs=5.0)}


async def test_no_engine_at_the_first_publish_is_no_failure() -> None:
    publisher = LastingPublisher(Settings(), crew(0), lambda _: None)
    await publisher.prepare(first_group())
    assert publisher.state()["worst"] == 0.0
