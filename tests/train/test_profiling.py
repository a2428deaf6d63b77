"""Profiles through real Ray actors: every call leaves a span, traces are written, and nothing is kept while off."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from rluf.config.policy import AlgorithmSettings
from rluf.config.run import RunSettings
from rluf.config.settings import Settings
from rluf.tracking.profiler import TorchProfiler
from rluf.train.actor_groups import Crew, Member
from rluf.train.controller import Clock, Pipeline
from rluf.train.profiling import Profiler, pump
from rluf.types import Group, GroupInfo, Prompt, Sample, Score

pytestmark = pytest.mark.usefixtures("local_ray")
PROMPT = Prompt("p1", ({"role": "user", "content": "hi"},), (1, 2), "chat", "train")


class Engine:
    """Answers every prompt with one token."""

    def generate(self, prompt: Prompt, samples: int, seed: int) -> tuple[Group, GroupInfo]:
        one = Sample(prompt.id, prompt.token_ids, (3,), (-1.0,), ((0, 0),), "stop", str(seed))
        group = Group(prompt, (one,) * samples, 0)
        return group, group.info


class Scorer:
    """Loves everything by half."""

    def score(self, group: Group) -> dict[str, list[Score]]:
        time.sleep(0.02)
        return {"love": [Score("love", 0.5, 0.0) for _ in group.samples]}


class Learner:
    """Multiplies a matrix a step."""

    def __init__(self) -> None:
        self._profiler = TorchProfiler()

    def begin_profile(self) -> None:
        self._profiler.start()

    def learn(self) -> None:
        torch.ones(4, 4) @ torch.ones(4, 4)

    def end_profile(self, path: str) -> None:
        self._profiler.stop(Path(path))


def member(role: str, kind: type) -> Member:
    return Member(role, 0, ray.remote(num_cpus=0.1)(kind).remote())


def names(path: Path) -> set[str]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events} | {
        event["args"]["name"] for event in events if event["name"] == "thread_name"
    }


def task(event: dict[str, Any]) -> str:
    """The name of a task that has one of its own, which Ray's timeline tells as the event's category."""
    return str(event.get("cat", "")).removeprefix("task::")


def test_steps_are_profiled_from_the_second_on(tmp_path: Path) -> None:
    settings = Settings(run=RunSettings(profile_steps=2), algorithm=AlgorithmSettings(steps=4))
    crew = Crew([member("rollout", Engine)], {"love": [member("love reward", Scorer)]}, [member("learner", Learner)])

    async def run() -> None:
        pipeline = Pipeline(settings, crew, [PROMPT])
        profiler = Profiler(pipeline, tmp_path)
        for step in range(1, 5):
            await profiler.before(step)
            clock = Clock(timeline=pipeline.timeline)
            with pump(f"generate and score, step {step}"):
                scored = await pipeline.group(PROMPT, 2, step)
            assert [score.value for score in scored.scores["love"]] == [0.5, 0.5]
            now = clock.lap("generate_s", clock.started)
            await crew.learners[0].handle.learn.remote()
            clock.lap("learn_s", now)
            await profiler.after(step)
            assert pipeline.timeline.on == (step == 2)
        assert sum(span.name == "learn" for span in pipeline.timeline.spans) == 2

    asyncio.run(run())
    assert {file.name for file in (tmp_path / "profile").iterdir()} == {"pumps.json.gz", "learner-0.json.gz"}
    seen = names(tmp_path / "profile" / "pumps.json.gz")
    assert {"steps", "rollout 0", "love reward 0", "generate", "learn", "prompt p1"} <= seen
    # Which phase a gap is named after depends on how busy the machine is: tests/tracking/test_timeline.py has it exact.
    assert any(name.startswith("idle: ") for name in seen)
    assert "aten::matmul" in names(tmp_path / "profile" / "learner-0.json.gz")
    # Ray's own timeline has the pumps and the named tasks.
    wanted = {f"generate and score, step {step}" for step in range(1, 5)}
    wanted |= {"rollout 0: generate v0", "love reward 0: score v0"}
    deadline = time.monotonic() + 30
    while missing := wanted - {named for event in ray.timeline() for named in (event["name"], task(event))}:
        assert time.monotonic() < deadline, missing
        time.sleep(2.0)
