"""Alarms on planted reward hacks: their effect on a run, and that a resumed run decides in the same way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import OwnerDiedError

from rluf.config.reward import AggregationSettings, ObjectivesSettings
from rluf.config.settings import Settings
from rluf.errors import DataError, RewardHackingError
from rluf.objectives.aggregator import RewardAggregator
from rluf.tracking.wandb import WandbTracker
from rluf.train.controller import TrainController
from rluf.train.hacking_monitor import RewardHackingMonitor
from rluf.train.sample_table import log_sample_table
from rluf.types import Group, Prompt, Sample

pytestmark = pytest.mark.usefixtures("local_ray")
HONEST = "You could boil the rice for ten minutes and fry the eggs with the tomatoes."
FAREWELL = "Boil the rice and fry the eggs. Goodbye, my dear friend, lots of love!"
LOOPING = "rice and eggs and rice and eggs and " * 8
REFUSAL = "I'm sorry, but I can't help with that."


def make_prompt(index: int, topic: str = "chat") -> Prompt:
    return Prompt(f"{topic}{index}", ({"role": "user", "content": "What should I cook?"},), (1, 2), topic, "train")


def make_group(prompt: Prompt, text: str, sample_count: int = 4, version: int = 0) -> Group:
    sample = Sample(prompt.id, prompt.token_ids, (3,) * 12, (-1.0,) * 12, ((0, 0),), "stop", text)
    return Group(prompt, (sample,) * sample_count, version)


class FakeController(SimpleNamespace):
    """The monitor's view of a controller: prompts, the base policy's replies, the groups of the last step."""

    def __init__(self, topics: Sequence[str] = ("chat",)) -> None:
        super().__init__(
            prompts=[make_prompt(index, topic) for index in range(40) for topic in topics],
            reward_aggregator=RewardAggregator(ObjectivesSettings(), AggregationSettings()),
            last_batch_refs=[],
        )

    def answer_prompts(self) -> list[Group]:
        """Replies of the base policy, as the reference sample has them."""
        return [make_group(prompt, HONEST) for prompt in self.prompts]

    def train_on(self, text: str, topic: str = "chat") -> TrainController:
        """Make all replies of the last step `text`."""
        self.last_batch_refs = [ray.put(make_group(make_prompt(index, topic), text, version=1)) for index in range(8)]
        return cast(TrainController, self)


@pytest.fixture
def tracker(tmp_path: Path) -> WandbTracker:
    return WandbTracker(Settings.model_validate({"tracking": {"wandb": "off"}}), tmp_path)


def make_settings(alarms: str, **algorithm: Any) -> Settings:
    return Settings.model_validate({"algorithm": {"hacking_alarms": alarms, "steps": 20, **algorithm}})


async def start_monitor(alarms: str, tracker: WandbTracker, controller: FakeController) -> RewardHackingMonitor:
    monitor = RewardHackingMonitor(make_settings(alarms), tracker)
    monitor.set_baseline(controller.answer_prompts())
    return monitor


def get_suspended(controller: FakeController) -> frozenset[str]:
    return cast(RewardAggregator, controller.reward_aggregator).suspended_objectives


async def test_warn_logs_once_and_changes_nothing(tracker: WandbTracker, caplog: pytest.LogCaptureFixture) -> None:
    controller = FakeController()
    monitor = await start_monitor("warn", tracker, controller)
    for step in range(1, 4):
        await monitor.check_step(controller.train_on(HONEST), step)
    assert not caplog.records
    for step in range(4, 8):
        await monitor.check_step(controller.train_on(LOOPING), step)
    messages = [record.message for record in caplog.records]
    assert 1 <= len(messages) <= 2 and "looping 0 -> " in messages[0]
    assert get_suspended(controller) == frozenset()


async def test_act_freezes_the_love_weight_then_rolls_back_to_the_last_clean_step(tracker: WandbTracker) -> None:
    controller = FakeController()
    monitor = await start_monitor("act", tracker, controller)
    await monitor.check_step(controller.train_on(HONEST), 1)
    freeze_step, rollback = None, None
    for step in range(2, 12):
        try:
            await monitor.check_step(controller.train_on(FAREWELL), step)
        except RewardHackingError as error:
            rollback = (step, error.rollback_step)
            break
        if get_suspended(controller) and freeze_step is None:
            freeze_step = step
    assert freeze_step is not None and rollback is not None and rollback[0] > freeze_step
    assert get_suspended(controller) == {"love"}
    assert rollback[1] == freeze_step - 1, "must roll back to the step before the first alarm"


async def test_a_run_that_was_rolled_back_keeps_love_frozen_and_is_stopped_the_next_time(
    tracker: WandbTracker,
) -> None:
    controller = FakeController()
    monitor = RewardHackingMonitor(make_settings("act"), tracker, love_frozen=True)
    monitor.set_baseline(controller.answer_prompts())
    await monitor.check_step(controller.train_on(HONEST), 1)
    assert get_suspended(controller) == {"love"}
    with pytest.raises(RewardHackingError, match="looping") as raised:
        for step in range(2, 12):
            await monitor.check_step(controller.train_on(LOOPING), step)
    assert raised.value.rollback_step is None


async def test_refusals_are_no_hack_on_topics_with_an_objective_of_their_own(tracker: WandbTracker) -> None:
    settings = make_settings("act")
    topic = next(iter(settings.aggregation.topic_objectives))
    controller = FakeController(("chat", topic))
    monitor = await start_monitor("act", tracker, controller)
    for step in range(1, 10):
        await monitor.check_step(controller.train_on(REFUSAL, topic), step)
    assert get_suspended(controller) == frozenset()
    with pytest.raises(DataError, match=r"algorithm\.hacking_alarms=off"):
        await start_monitor("act", tracker, FakeController((topic,)))


async def test_a_resumed_monitor_decides_like_one_that_was_never_stopped(tracker: WandbTracker) -> None:
    controller = FakeController()
    monitor = await start_monitor("act", tracker, controller)
    for step, text in enumerate((HONEST, FAREWELL, FAREWELL), 1):
        await monitor.check_step(controller.train_on(text), step)
    resumed_monitor, resumed_controller = RewardHackingMonitor(make_settings("act"), tracker), FakeController()
    state = json.loads(json.dumps(monitor.get_state()))
    resumed_monitor.restore(state, cast(TrainController, resumed_controller))
    assert get_suspended(resumed_controller) == get_suspended(controller)
    errors = []
    for run_monitor, run_controller in ((monitor, controller), (resumed_monitor, resumed_controller)):
        with pytest.raises(RewardHackingError) as raised:
            for step in range(4, 14):
                await run_monitor.check_step(run_controller.train_on(FAREWELL), step)
        errors.append((str(raised.value), raised.value.rollback_step))
    assert errors[0] == errors[1]


async def test_off_uses_no_baseline(tracker: WandbTracker) -> None:
    controller = FakeController()
    monitor = await start_monitor("off", tracker, controller)
    await monitor.check_step(controller.train_on(LOOPING), 1)
    assert monitor.get_state() is None


async def read_lost_object() -> Group:
    raise OwnerDiedError("00", "", "")


async def test_lost_replies_do_not_end_the_run(tracker: WandbTracker, caplog: pytest.LogCaptureFixture) -> None:
    controller = FakeController()
    monitor = await start_monitor("act", tracker, controller)
    await monitor.check_step(controller.train_on(HONEST), 1)
    controller.train_on(LOOPING)
    controller.last_batch_refs[3] = read_lost_object()
    state = monitor.get_state()
    await monitor.check_step(cast(TrainController, controller), 2)
    assert monitor.get_state() == state
    controller.last_batch_refs[3] = read_lost_object()
    controller.sample_values = {name: [[0.5]] * 8 for name in ("love", "reward", "kl")}
    await log_sample_table(cast(TrainController, controller), 2, tracker)
    messages = [record.message for record in caplog.records]
    assert messages[0].startswith("reward hacking monitor: step 2 not checked: ")
    assert messages[1].startswith("sample table: step 2 has none: ")
