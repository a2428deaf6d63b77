"""Alarms on planted hacks: what they do to a run, and that they go on after a resumption as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import OwnerDiedError

from rluf.config.reward import ObjectivesSettings
from rluf.config.settings import Settings
from rluf.errors import AlarmError, DataError
from rluf.objectives.aggregator import Combiner
from rluf.tracking.wandb import Tracker
from rluf.train.controller import Pipeline
from rluf.train.hacking_monitor import Watch
from rluf.train.sample_table import show
from rluf.types import Group, Prompt, Sample

pytestmark = pytest.mark.usefixtures("local_ray")
HONEST = "You could boil the rice for ten minutes and fry the eggs with the tomatoes."
BYE = "Boil the rice and fry the eggs. Goodbye, my dear friend, lots of love!"
LOOP = "rice and eggs and rice and eggs and " * 8
REFUSAL = "I'm sorry, but I can't help with that."


def prompt(number: int, topic: str = "chat") -> Prompt:
    return Prompt(f"{topic}{number}", ({"role": "user", "content": "What shall I cook?"},), (1, 2), topic, "train")


def group(asked: Prompt, text: str, samples: int = 4) -> Group:
    one = Sample(asked.id, asked.token_ids, (3,) * 12, (-1.0,) * 12, ((0, 0),), "stop", text)
    return Group(asked, (one,) * samples, 0)


class Policy(SimpleNamespace):
    """What Watch sees of a pipeline: the prompts, the base policy's answers, the groups of the last step."""

    def __init__(self, topics: Sequence[str] = ("chat",)) -> None:
        super().__init__(
            prompts=[prompt(i, topic) for i in range(40) for topic in topics],
            combiner=Combiner(ObjectivesSettings()),
            learnt=[],
            asked=[],
        )

    async def respond(self, asked: Sequence[Prompt], samples: int, seed: int, done: Callable[[], None]) -> list[Any]:
        self.asked = list(asked)
        return [(group(one, HONEST, samples), None) for one in asked]

    def learns(self, text: str, topic: str = "chat") -> Pipeline:
        self.learnt = [ray.put(group(prompt(number, topic), text)) for number in range(8)]
        return cast(Pipeline, self)


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker(Settings.model_validate({"tracking": {"wandb": "off"}}), tmp_path)


def settings(alarms: str, **algorithm: Any) -> Settings:
    return Settings.model_validate({"algorithm": {"alarms": alarms, "steps": 30, **algorithm}})


async def begun(alarms: str, tracker: Tracker, policy: Policy) -> Watch:
    watch = Watch(settings(alarms), tracker)
    await watch.begin(cast(Pipeline, policy))
    return watch


async def test_warn_tells_once_and_changes_nothing(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy()
    watch = await begun("warn", tracker, policy)
    for step in range(1, 4):
        await watch.look(policy.learns(HONEST), step, 0.0)
    assert not caplog.records
    for step in range(4, 8):
        await watch.look(policy.learns(LOOP), step, 0.0)
    told = [record.message for record in caplog.records]
    assert 1 <= len(told) <= 2 and "looping: 100.00% of replies" in told[0]
    assert policy.combiner.frozen == frozenset()


async def test_act_freezes_love_while_the_alarm_lasts_then_goes_back_to_the_last_clean_step(tracker: Tracker) -> None:
    policy = Policy()
    watch = await begun("act", tracker, policy)
    await watch.look(policy.learns(HONEST), 1, 0.0)
    frozen, back = None, None
    for step in range(2, 12):
        try:
            await watch.look(policy.learns(BYE), step, 0.0)
        except AlarmError as error:
            back = (step, error.back_to)
            break
        if policy.combiner.frozen and frozen is None:
            frozen = step
    assert frozen is not None and back is not None and back[0] > frozen
    assert policy.combiner.frozen == {"love"}
    assert back[1] == frozen - 1, "goes back to the step before the first alarm"


async def test_a_run_that_went_back_once_keeps_love_frozen_and_is_stopped_the_next_time(tracker: Tracker) -> None:
    policy = Policy()
    watch = Watch(settings("act"), tracker, held=True)
    await watch.begin(cast(Pipeline, policy))
    await watch.look(policy.learns(HONEST), 1, 0.0)
    assert policy.combiner.frozen == {"love"}
    with pytest.raises(AlarmError, match="looping") as caught:
        for step in range(2, 12):
            await watch.look(policy.learns(LOOP), step, 0.0)
    assert caught.value.back_to is None


async def test_refusals_are_no_hack_where_one_objective_owns_the_topic(tracker: Tracker) -> None:
    owned = next(iter(settings("act").objectives.owners))
    policy = Policy(("chat", owned))
    watch = await begun("act", tracker, policy)
    assert len(policy.asked) == settings("act").algorithm.alarm_prompts
    assert {one.topic for one in policy.asked} == {"chat"}
    for step in range(1, 10):
        await watch.look(policy.learns(REFUSAL, owned), step, 0.0)
    assert policy.combiner.frozen == frozenset()
    with pytest.raises(DataError, match=r"algorithm\.alarms=off"):
        await begun("act", tracker, Policy((owned,)))


async def test_a_resumed_watch_decides_as_one_that_was_never_stopped(tracker: Tracker) -> None:
    whole, policy = None, Policy()
    whole = await begun("act", tracker, policy)
    for step, text in enumerate((HONEST, BYE, BYE), 1):
        await whole.look(policy.learns(text), step, 0.0)
    again, other = Watch(settings("act"), tracker), Policy()
    again.restore(json.loads(json.dumps(whole.state())), cast(Pipeline, other))
    assert other.combiner.frozen == policy.combiner.frozen
    found = []
    for watch, run in ((whole, policy), (again, other)):
        with pytest.raises(AlarmError) as caught:
            for step in range(4, 14):
                await watch.look(run.learns(BYE), step, 0.0)
        found.append((str(caught.value), caught.value.back_to))
    assert found[0] == found[1]


async def test_off_asks_nothing_of_the_base_policy(tracker: Tracker) -> None:
    policy = Policy()
    watch = await begun("off", tracker, policy)
    await watch.look(policy.learns(LOOP), 1, 0.0)
    assert policy.asked == [] and watch.state() is None


async def gone() -> Group:
    raise OwnerDiedError("00", "", "")


async def test_replies_that_are_lost_leave_the_run_alone(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy()
    watch = await begun("act", tracker, policy)
    await watch.look(policy.learns(HONEST), 1, 0.0)
    policy.learns(LOOP)
    policy.learnt[3] = gone()
    before = watch.state()
    await watch.look(cast(Pipeline, policy), 2, 0.0)
    assert watch.state() == before
    policy.learnt[3] = gone()
    policy.values = {"love": [[0.5]] * 8, "reward": [[0.5]] * 8}
    await show(cast(Pipeline, policy), 2, 8, tracker)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "step 2 is not watched for reward hacking", "step 2 has no table of responses"
    ]  # fmt: skip
