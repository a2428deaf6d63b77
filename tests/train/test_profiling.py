"""Profiles through real Ray actors: every call leaves a span, traces are written, and nothing is recorded while off."""

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
from rluf.config.settings import Settings
from rluf.tracking.timeline import TorchProfiler, ray_timeline_span
from rluf.train.actor_calls import ActorGroups, ActorRef
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.controller import StepTimer, TrainController
from rluf.train.profiling import StepProfiler
from rluf.types import Group, GroupInfo, Prompt, Sample, Score

pytestmark = pytest.mark.usefixtures("local_ray")
PROMPT = Prompt("p1", ({"role": "user", "content": "hi"},), (1, 2), "chat", "train")


class OneTokenEngine:
    """Responds to every prompt with one token."""

    def generate_group(
        self, prompt: Prompt, sample_count: int, seed: int, temperature: float | None = None
    ) -> tuple[Group, GroupInfo]:
        sample = Sample(prompt.id, prompt.token_ids, (3,), (-1.0,), ((0, 0),), "stop", str(seed))
        group = Group(prompt, (sample,) * sample_count, 0)
        return group, group.info


class ConstantScorer:
    """Scores 0.5 for love, slowly."""

    def score_group(self, group: Group) -> dict[str, list[Score]]:
        time.sleep(0.02)
        return {"love": [Score("love", 0.5, 0.0) for _ in group.samples]}


class MatmulLearner:
    """Multiplies a matrix per step."""

    def __init__(self) -> None:
        self._profiler = TorchProfiler()

    def start_profiler(self) -> None:
        self._profiler.start()

    def train_step(self) -> None:
        torch.ones(4, 4) @ torch.ones(4, 4)

    def stop_profiler(self, trace_path: str) -> None:
        self._profiler.stop(Path(trace_path))


def start_actor(role: str, actor_class: type, objective: str = "") -> ActorRef:
    return ActorRef(role, 0, ray.remote(num_cpus=0.1)(actor_class).remote(), objective)


def read_names(trace_path: Path) -> set[str]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace_path.read_bytes()))["traceEvents"]
    thread_names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return {event["name"] for event in events} | thread_names


def get_task_name(event: dict[str, Any]) -> str:
    """The name of a named task, which Ray's timeline stores as the event's category."""
    return str(event.get("cat", "")).removeprefix("task::")


def test_steps_are_profiled_from_the_second_on(tmp_path: Path) -> None:
    settings = Settings(algorithm=AlgorithmSettings(steps=4))
    supervisor = ActorSupervisor(settings, tmp_path, {}, with_learners=True)
    learner = start_actor("learner", MatmulLearner)
    supervisor.actor_groups = ActorGroups(
        [start_actor("rollout", OneTokenEngine)],
        {"love": [start_actor("love reward", ConstantScorer, "love")]},
        [learner],
    )

    async def run() -> None:
        controller = TrainController(settings, supervisor, [PROMPT])
        profiler = StepProfiler(controller, tmp_path, 2)
        for step in range(1, 5):
            await profiler.start_if_due(step)
            timer = StepTimer(timeline=controller.timeline)
            with ray_timeline_span(f"generate and score, step {step}"):
                scored_group = await controller.sample_and_score(PROMPT, 2, step)
            assert [score.value for score in scored_group.scores["love"]] == [0.5, 0.5]
            phase_start = timer.record("generate_s", timer.start_time)
            await learner.handle.train_step.remote()
            timer.record("learn_s", phase_start)
            await profiler.stop_if_due(step)
            assert controller.timeline.enabled == (step == 2)
        assert sum(span.name == "learn" for span in controller.timeline.spans) == 2

    asyncio.run(run())
    profile_folder = tmp_path / "profile"
    assert {file.name for file in profile_folder.iterdir()} == {"timeline.json.gz", "learner-0.json.gz"}
    names = read_names(profile_folder / "timeline.json.gz")
    assert {"steps", "rollout 0", "love reward 0", "generate", "learn", "prompt p1"} <= names
    # The phase a gap is named after depends on the load of the machine; tests/tracking/test_timeline.py checks it.
    assert any(name.startswith("idle: ") for name in names)
    assert "aten::matmul" in read_names(profile_folder / "learner-0.json.gz")
    # Ray's own timeline has the driver's spans and the named tasks; Ray flushes it with a delay.
    expected = {f"generate and score, step {step}" for step in range(1, 5)}
    expected |= {"rollout 0: generate v0", "love reward 0: score v0"}
    deadline = time.monotonic() + 30
    while missing := expected - {name for event in ray.timeline() for name in (event["name"], get_task_name(event))}:
        assert time.monotonic() < deadline, missing
        time.sleep(2.0)
