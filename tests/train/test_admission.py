"""Groups that a step trains on: fresh enough, and with DAPO of differing scores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from rluf.config.load import load_settings
from rluf.errors import ActorError, DeadlineError
from rluf.objectives.aggregator import StepRewards
from rluf.train import loop
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.controller import MAX_DROPPED_BATCHES, TrainController
from rluf.train.work_buffer import CountingIterator, ScoredGroup, WorkBuffer, iter_prompt_order
from rluf.types import Group, GroupInfo, Prompt, Score

INFO = GroupInfo("p", "", 0, 5, (3, 3), (True, True))
EQUAL_SCORES, DIFFERENT_SCORES = (0.5, 0.5), (0.5, 0.7)
PROMPTS = [Prompt(name, (), (1,), "", "train") for name in "abcde"]


def make_controller(*overrides: str, version: int = 0) -> TrainController:
    settings = load_settings(None, list(overrides)).settings
    controller = TrainController(settings, ActorSupervisor(settings, Path(), {}, with_learners=True), [])
    controller.version = version
    return controller


def make_scored_group(love: tuple[float, ...], *, topic: str = "", **info: Any) -> ScoredGroup:
    values = {"love": love, "helpfulness": EQUAL_SCORES, "safety": EQUAL_SCORES}
    scores = {name: tuple(Score(name, value, 0.0) for value in row) for name, row in values.items()}
    return ScoredGroup(None, replace(INFO, topic=topic, **info), scores)  # type: ignore[arg-type]


def test_grpo_accepts_every_group() -> None:
    assert make_controller()._accept_group(make_scored_group(EQUAL_SCORES))
    assert make_controller("algorithm.max_staleness=9", version=9)._accept_group(make_scored_group(DIFFERENT_SCORES))


@pytest.mark.parametrize(
    ("scored_group", "is_accepted"),
    [
        (make_scored_group(DIFFERENT_SCORES), True),
        (make_scored_group(EQUAL_SCORES), False),
        (make_scored_group(EQUAL_SCORES, passed_judges=(True, False)), True),
        (make_scored_group(EQUAL_SCORES, passed_judges=(True, True)), False),
        (make_scored_group(DIFFERENT_SCORES, topic="risky"), False),  # only safety counts there
    ],
)
def test_dapo_drops_groups_without_spread(scored_group: ScoredGroup, is_accepted: bool) -> None:
    assert make_controller("algorithm.name=dapo")._accept_group(scored_group) is is_accepted


@pytest.mark.parametrize(
    ("objectives", "info", "is_accepted"),
    [
        ({"love": (0.5, 0.5 + 1e-9)}, {}, False),
        ({"love": (0.5, 0.51)}, {}, False),  # 0.04 logits
        ({"love": (0.5, 0.6)}, {}, True),
        ({"love": (0.4, 0.6), "helpfulness": (0.6, 0.4)}, {}, False),  # they cancel: advantages would be rounding
        ({"love": (0.4, 0.6), "helpfulness": (0.6, 0.39)}, {}, False),
        ({"love": (0.4, 0.6), "helpfulness": (0.4, 0.6)}, {}, True),
        ({"safety": (0.4, 0.6)}, {}, False),  # its weight is a hundredth of the others
        ({}, {"finished": (True, False)}, True),  # the truncated one gets less
        ({"love": (0.5, 0.6)}, {"finished": (True, True)}, True),
    ],
)
def test_dapo_judges_the_spread_of_the_whole_reward(
    objectives: dict[str, tuple[float, float]], info: dict[str, Any], is_accepted: bool
) -> None:
    weights = "objectives={love: {weight: 1}, helpfulness: {weight: 1}, safety: {weight: 0.01}}"
    group = make_scored_group(EQUAL_SCORES, **info)
    scores = {name: tuple(Score(name, value, 0.0) for value in row) for name, row in objectives.items()}
    controller = make_controller("algorithm.name=dapo", weights)
    assert controller._accept_group(replace(group, scores={**group.scores, **scores})) is is_accepted


def test_a_suspended_objective_gives_no_spread() -> None:
    controller = make_controller("algorithm.name=dapo")
    controller.reward_aggregator.suspended_objectives = frozenset({"love"})
    assert not controller._accept_group(make_scored_group(DIFFERENT_SCORES))


def test_a_group_older_than_max_staleness_is_dropped() -> None:
    controller = make_controller("algorithm.max_staleness=1", version=3)
    assert not controller._accept_group(make_scored_group(DIFFERENT_SCORES, weight_version=1))
    assert controller._accept_group(make_scored_group(DIFFERENT_SCORES, weight_version=2))


def test_a_step_ends_even_if_no_group_has_spread() -> None:
    controller = make_controller("algorithm.name=dapo")
    controller.work_buffer.dropped_count = MAX_DROPPED_BATCHES * controller.settings.algorithm.prompts_per_step
    assert controller._accept_group(make_scored_group(EQUAL_SCORES))


class GroupRunner:
    """Stands for rollout and scoring: each call waits until the test releases its prompt."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.releases: dict[str, asyncio.Event] = {}

    async def run(self, prompt: Prompt, seed: int) -> ScoredGroup:
        self.calls.append((prompt.id, seed))
        await self.releases.setdefault(prompt.id, asyncio.Event()).wait()
        if prompt.id == "e":
            raise ActorError("rollout 0 failed")
        return make_scored_group(DIFFERENT_SCORES, prompt_id=prompt.id)

    def release(self, *names: str) -> None:
        for name in names:
            self.releases.setdefault(name, asyncio.Event()).set()


def make_buffer(runner: GroupRunner, *, order: Sequence[int] = (0, 1, 2, 3, 4), running_limit: int = 2) -> WorkBuffer:
    return WorkBuffer(
        PROMPTS,
        CountingIterator(cycle(order)),
        seed=7,
        group_limit=100,
        run_group=runner.run,
        admission_capacity=lambda running, accepted: max(0, running_limit - running - accepted),
    )


async def test_a_wait_in_which_no_group_finishes_ends_with_a_deadline_error() -> None:
    work_buffer = make_buffer(GroupRunner())
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for a group of step 1: 0 of 2 are complete, 2 in flight"):
        await work_buffer.collect_batch(1, 2, accept_group=lambda _: True, timeout_s=0.1)
    await work_buffer.close()


async def test_a_failed_rollout_ends_the_wait_for_a_batch_with_its_error() -> None:
    runner = GroupRunner()
    runner.release("e")
    work_buffer = make_buffer(runner, order=(4, 0))
    with pytest.raises(ActorError, match="rollout 0 failed"):
        await work_buffer.collect_batch(1, 2, accept_group=lambda _: True, timeout_s=5.0)
    await work_buffer.close()


async def test_a_batch_is_sorted_whatever_finishes_first_and_dropped_groups_are_replaced() -> None:
    runner = GroupRunner()
    runner.release("b", "c")
    work_buffer = make_buffer(runner)
    collecting = asyncio.create_task(
        work_buffer.collect_batch(1, 2, accept_group=lambda group: group.info.prompt_id != "b", timeout_s=5.0)
    )
    while len(runner.calls) < 3:
        await asyncio.sleep(0)
    runner.release("a")
    batch = await collecting
    assert [group.info.prompt_id for group in batch] == ["a", "c"]
    assert (work_buffer.dropped_count, work_buffer.accepted_count) == (1, 2)
    work_buffer.mark_trained(batch)
    assert work_buffer.get_state() == {"prompt_cursor": 3, "in_flight": []}
    await work_buffer.close()


async def test_prompts_in_flight_at_a_checkpoint_are_sent_again_with_their_own_seeds() -> None:
    """Also one whose task has not started yet when the checkpoint is taken."""
    runner = GroupRunner()
    work_buffer = make_buffer(runner)
    work_buffer.admit_prompts()
    state = work_buffer.get_state()
    assert state == {"prompt_cursor": 2, "in_flight": [[0, "a", 7], [1, "b", 1007]]}
    await work_buffer.close()
    resumed_runner = GroupRunner()
    resumed = make_buffer(resumed_runner, running_limit=3)
    resumed.restore(state, accepted_count=0)
    assert resumed.get_state() == state
    resumed.admit_prompts()
    await asyncio.sleep(0)
    assert resumed_runner.calls == [("a", 7), ("b", 1007), ("c", 2007)]
    await resumed.close()


def test_a_counting_iterator_continues_where_it_was() -> None:
    first = CountingIterator(iter(range(10)))
    assert [next(first) for _ in range(4)] == [0, 1, 2, 3]
    second = CountingIterator(iter(range(10)))
    second.skip(first.count)
    assert (next(second), second.count) == (4, 5)


def test_prompt_order_has_every_prompt_once_per_pass_and_follows_the_seed() -> None:
    def take(count: int, repeats: Sequence[int], seed: int) -> list[int]:
        return [index for index, _ in zip(iter_prompt_order(repeats, seed=seed), range(count), strict=False)]

    order = take(10, [1] * 5, seed=1)
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]
    assert order == take(10, [1] * 5, seed=1)
    assert order != take(10, [1] * 5, seed=2)
    assert sorted(take(4, [1, 3], seed=1)) == [0, 1, 1, 1]


def test_truncated_responses_are_counted_and_penalized_by_default(caplog: pytest.LogCaptureFixture) -> None:
    controller, group = make_controller(version=1), make_scored_group(DIFFERENT_SCORES, finished=(True, False))
    assert controller._compute_batch_metrics([group], StepRewards([[0.0, 0.0]], {}, []))["truncated_share"] == 0.5
    assert controller._build_group_scores(group).finished == (True, False)
    assert make_controller("algorithm.truncated=learn")._build_group_scores(group).finished == ()
    loop._warn_if_truncated(controller.settings, 0.2)
    assert not caplog.records
    loop._warn_if_truncated(controller.settings, 0.5)
    assert "50% of the responses of step 1 were cut at rollout.max_response_tokens=" in caplog.text
    assert "raise the limit, set algorithm.truncated=mask, or ask" in caplog.text
    loop._warn_if_truncated(make_controller("algorithm.truncated=mask").settings, 0.5)
    assert "raise the limit, or ask" in caplog.text


class SampledController(TrainController):
    """A controller whose engines answer each prompt with equal scores, but for one sample."""

    score_of_samples = DIFFERENT_SCORES

    async def generate_and_score(
        self, prompts: Sequence[Prompt], *_: Any, **__: Any
    ) -> list[tuple[Group, ScoredGroup]]:
        self.answered = list(prompts)
        scored = [make_scored_group(self.score_of_samples, topic=prompt.topic) for prompt in prompts]
        return [(Group(prompt, (), 0), row) for prompt, row in zip(prompts, scored, strict=True)]


@pytest.mark.parametrize(
    ("topics", "plain_count", "prompt_count"),
    [(["chat"] * 5, 96, 96), (["chat", "risky"], 48, None), (["risky"], 0, 192), (["chat"] * 300, 96, 96)],
)
async def test_the_reference_sample_has_the_topic_mix_of_training_and_fixes_all_scales(
    topics: list[str], plain_count: int, prompt_count: int | None
) -> None:
    settings = load_settings(None, []).settings
    prompts = [Prompt(str(index), (), (1,), topic, "train") for index, topic in enumerate(topics)]
    controller = SampledController(settings, ActorSupervisor(settings, Path(), {}, with_learners=True), prompts)
    groups = await controller.sample_reference()
    answered_topics = [prompt.topic for prompt in controller.answered]
    assert answered_topics.count("chat") == plain_count and len(groups) == len(answered_topics)
    if prompt_count is None:
        assert answered_topics.count("risky") / answered_topics.count("chat") == pytest.approx(3, rel=0.4)
    else:
        assert len(answered_topics) == prompt_count
    reference = controller.reward_aggregator.describe_reference()
    assert set(reference) == {"love", "helpfulness", "safety"} and reference["love"]["within_sd"] > 0
    assert controller.snapshot.reward_aggregator["normalizer"]["mean"]["love"] == reference["love"]["mean"]


async def test_an_objective_whose_scores_never_differ_is_named(caplog: pytest.LogCaptureFixture) -> None:
    settings = load_settings(None, ["objectives.safety.weight=0"]).settings
    prompts = [Prompt(str(index), (), (1,), "chat", "train") for index in range(5)]

    class ConstantController(SampledController):
        score_of_samples = EQUAL_SCORES

    controller = ConstantController(settings, ActorSupervisor(settings, Path(), {}, with_learners=True), prompts)
    await controller.sample_reference()
    warnings = [record.getMessage() for record in caplog.records if "the same score" in record.getMessage()]
    assert [warning.partition(":")[0] for warning in warnings] == ["objective love", "objective helpfulness"]
