"""What engines are told when a run goes on from a checkpoint, and when one is lost around it. Actors are stand-ins."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray import ObjectRef
from ray.actor import ActorHandle

from rluf.checkpoint.format import Checkpoint, RunState
from rluf.config.settings import Settings
from rluf.tracking.wandb import Tracker
from rluf.train.actor_groups import Crew, Member, Supervisor
from rluf.train.checkpoint_manager import Keeper
from rluf.train.controller import ScoredGroup
from rluf.train.fault_tolerance import LastingPipeline, LastingPublisher
from rluf.train.hacking_monitor import Watch
from rluf.train.loop import Outcome, _attempt
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


class Resumed(LastingPipeline):
    """A pipeline that notes in which order engines are sent weights and asked, and what is saved."""

    def __init__(self, settings: Settings) -> None:
        supervisor = SimpleNamespace(settings=settings, crew=crew(1), on_loss=None)
        super().__init__(settings, cast(Supervisor, supervisor), [PROMPT])
        self.told: list[str] = []
        self.publisher.send = self.sent  # type: ignore[method-assign]

    async def sent(self, version: int) -> None:
        assert self.reviver.weights.locked()
        self.told.append(f"v{version}")

    async def respond(self, *_: object) -> list[tuple[Group, ScoredGroup]]:
        self.told.append("answers")
        return []

    async def save(self, path: str) -> None:
        self.told.append(Path(path).name)


@pytest.mark.parametrize(("engine", "told"), [("adapter", ["v2", "answers", "policy"]), ("shm", ["answers", "policy"])])
async def test_a_run_resumed_after_its_last_step_is_judged_by_what_it_learnt(
    engine: str, told: list[str], tmp_path: Path
) -> None:
    chosen = {
        "algorithm": {"steps": 2, "alarms": "off"}, "learner": {"lora_rank": 4}, "publish": {"engine": engine},
        "tracking": {"wandb": "off"},
    }  # fmt: skip
    settings = Settings.model_validate(chosen)
    keeper, tracker = Keeper(settings, tmp_path, [PROMPT]), Tracker(settings, tmp_path)
    keeper.keep_answers([(Group(PROMPT, (SAMPLE,), 0), {"love": (0.5,)})])
    rows = [{"step": step} for step in (1.0, 2.0)]
    state = RunState(2, 1, {}, "", Resumed(settings).state(), [], rows)
    begin = (Checkpoint(tmp_path / "checkpoints" / "step-2", 2), state)
    pipeline = Resumed(settings)
    await _attempt(settings, pipeline, keeper, begin, [PROMPT], tracker, Outcome(), Watch(settings, tracker))
    assert pipeline.told == told
    await pipeline.catch_up()
    assert pipeline.told == told
