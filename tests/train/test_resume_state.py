"""Weights of the engines when a run resumes from a checkpoint and when an engine is lost meanwhile; stand-in actors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray import ObjectRef
from ray.actor import ActorHandle

from rluf.checkpoint.format import RunCheckpoint, RunState
from rluf.config.settings import Settings
from rluf.errors import ActorLostError
from rluf.tracking.wandb import WandbTracker
from rluf.train.actor_calls import ActorCalls, ActorGroups, ActorRef, ActorRestarter, RestartBudget
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.checkpoint_manager import CheckpointManager
from rluf.train.controller import TrainController
from rluf.train.hacking_monitor import RewardHackingMonitor
from rluf.train.loop import TrainingRun, _run_from_checkpoint
from rluf.train.weight_sync import WeightSync
from rluf.train.work_buffer import ScoredGroup
from rluf.types import Group, PolicyAnswer, Prompt, Sample, TrainResult

PROMPT = Prompt("p", ({"role": "user", "content": "Hello?"},), (1, 2), "", "train")
SAMPLE = Sample("p", (1, 2), (3,) * 24, (-1.0,) * 24, ((0, 0),), "stop", "Hi.")


class StandInHandle:
    """Answers every call of an actor's handle from a table; an exception in the table is raised once."""

    def __init__(self, **results: Any) -> None:
        self.results, self.calls = results, list[str]()

    def __getattr__(self, method: str) -> Any:
        return StandInHandle.Method(self, method)

    class Method:
        """One method of the handle."""

        def __init__(self, handle: StandInHandle, name: str) -> None:
            self.handle, self.name = handle, name

        def options(self, **_: Any) -> StandInHandle.Method:
            return self

        async def remote(self, *_: Any) -> Any:
            self.handle.calls.append(self.name)
            result = self.handle.results.get(self.name)
            if isinstance(result, Exception):
                del self.handle.results[self.name]
                raise result
            return result


def make_engine(index: int, **results: Any) -> ActorRef:
    handle = StandInHandle(probe_logprobs=[-1.0] * 24, **results)
    return ActorRef("rollout", index, cast(ActorHandle[Any], handle))


def make_learner() -> ActorRef:
    handle = StandInHandle(probe_logprobs=[[-1.0] * 24], begin_weight_sync={})
    return ActorRef("learner", 0, cast(ActorHandle[Any], handle))


def make_actor_groups(engine_count: int) -> ActorGroups:
    engines = [make_engine(index) for index in range(engine_count)]
    return ActorGroups(rollout_actors=engines, learner_actors=[make_learner()])


def make_group_ref() -> ObjectRef[Group]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(Group(PROMPT, (SAMPLE,), 0))
    return cast("ObjectRef[Group]", future)


def get_calls(actor: ActorRef) -> list[str]:
    return cast(StandInHandle, actor.handle).calls


async def test_every_engine_is_read_after_a_resume_even_if_one_was_restarted_before_the_first_sync() -> None:
    before = WeightSync(Settings(), make_actor_groups(2))
    await before.prepare_probe(make_group_ref())
    actor_groups = make_actor_groups(2)
    resumed = WeightSync(Settings(), actor_groups)
    resumed.restore(before.get_state())
    restarted = make_engine(1)
    actor_groups.rollout_actors[1] = restarted
    await resumed.sync_new_engine(restarted, 3, needs_weights=False)
    await resumed.prepare_probe(make_group_ref())
    metrics = await resumed.sync(4)
    assert metrics == {"sync_logprob_gap": pytest.approx(0.0), "sync_check_s": pytest.approx(0.0, abs=5.0)}


async def test_a_first_sync_without_engines_is_no_failure() -> None:
    weight_sync = WeightSync(Settings(), make_actor_groups(0))
    await weight_sync.prepare_probe(make_group_ref())
    assert weight_sync.get_state()["worst_gap"] == 0.0
    assert (await weight_sync.sync(1))["sync_logprob_gap"] == 0.0


async def test_a_sync_during_which_an_engine_is_lost_starts_again_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From phase 1, with no call of before outstanding, and the restarted engine waits for its end."""
    actor_groups = make_actor_groups(1)
    lost_engine = make_engine(1, load_weight_bucket=ActorLostError("killed", "rollout 1"))
    actor_groups.rollout_actors.append(lost_engine)
    learner_handle = cast(StandInHandle, actor_groups.learner_actors[0].handle)
    buckets = iter([{"bucket": 0}, {"bucket": 0}, None])
    learner_handle.results["send_next_weight_bucket"] = None
    monkeypatch.setattr(StandInHandle.Method, "remote", _remote_with_buckets(buckets))
    supervisor = SimpleNamespace(settings=Settings(), actor_groups=actor_groups, on_loss=None)
    synced: list[str] = []

    async def replace_actor(actor: ActorRef) -> ActorRef:
        return ActorRef(actor.role, actor.index, actor.handle, restarts=actor.restarts + 1)

    async def sync_engine(actor: ActorRef) -> None:
        synced.append(str(actor))

    supervisor.replace_actor = replace_actor
    restarter = ActorRestarter(cast(ActorSupervisor, supervisor), RestartBudget(3), sync_engine)
    weight_sync = WeightSync(Settings(), actor_groups, ActorCalls(restarter, cast(Any, None)))
    await weight_sync.prepare_probe(make_group_ref())
    async with restarter.weight_lock:
        await weight_sync.sync(1)
        await asyncio.sleep(0)
        assert [str(actor) for actor in actor_groups.rollout_actors] == ["rollout 0"] and not synced
    await restarter._restart_tasks["rollout 1"]
    assert synced == ["rollout 1, start 2"]
    assert [str(actor) for actor in actor_groups.rollout_actors] == ["rollout 0", "rollout 1, start 2"]
    survivor_calls = [call for call in get_calls(actor_groups.rollout_actors[0]) if call != "probe_logprobs"]
    attempt = ["begin_weight_update", "load_weight_bucket"]
    assert survivor_calls == [*attempt, *attempt, "finish_weight_update"]


def _remote_with_buckets(buckets: Any) -> Any:
    original = StandInHandle.Method.remote

    async def remote(method: StandInHandle.Method, *arguments: Any) -> Any:
        result = await original(method, *arguments)
        return next(buckets) if method.name == "send_next_weight_bucket" else result

    return remote


class RecordingController(TrainController):
    """A controller that records in which order engines get weights and respond, and what is saved."""

    def __init__(self, settings: Settings) -> None:
        supervisor = SimpleNamespace(settings=settings, actor_groups=make_actor_groups(1), on_loss=None)
        super().__init__(settings, cast(ActorSupervisor, supervisor), [PROMPT])
        self.events: list[str] = []
        self.weight_sync.transfer = self.record_transfer  # type: ignore[method-assign]

    async def record_transfer(self, version: int) -> None:
        assert self.actor_restarter.weight_lock.locked()
        self.events.append(f"v{version}")

    async def generate_and_score(self, *_: object) -> list[tuple[Group, ScoredGroup]]:
        self.events.append("responses")
        return []

    async def save_policy(self, path: str) -> None:
        self.events.append(Path(path).name)


@pytest.mark.parametrize(
    ("transport", "events"), [("lora", ["v2", "responses", "policy"]), ("shm", ["responses", "policy"])]
)
async def test_a_run_resumed_after_its_last_step_is_evaluated_with_its_trained_weights(
    transport: str, events: list[str], tmp_path: Path
) -> None:
    settings = Settings.model_validate(
        {
            "algorithm": {"steps": 2, "hacking_alarms": "off"},
            "learner": {"lora_rank": 4},
            "weight_sync": {"transport": transport},
            "tracking": {"wandb": "off"},
        }
    )
    checkpoints, tracker = CheckpointManager(settings, tmp_path, [PROMPT]), WandbTracker(settings, tmp_path)
    checkpoints.save_base_answers(
        [PolicyAnswer("base", PROMPT.id, "", PROMPT.messages, "Hi.", "stop", 2, {"love": 0.5})]
    )
    rows = [{"step": step} for step in (1.0, 2.0)]
    state = RunState(2, 1, {}, "", RecordingController(settings).get_state(), [], rows)
    resume_from = (RunCheckpoint(tmp_path / "checkpoints" / "step-2", 2), state)
    controller, monitor = RecordingController(settings), RewardHackingMonitor(settings, tracker)
    run = TrainingRun(settings, tmp_path, controller, controller.run_step, checkpoints, tracker, TrainResult(), monitor)
    await _run_from_checkpoint(run, resume_from, [PROMPT])
    assert controller.events == events
    await controller.sync_adapter_after_resume()
    assert controller.events == events
