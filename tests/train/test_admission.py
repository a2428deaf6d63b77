"""What a step learns from: groups young enough, for DAPO with scores that differ, for KTO those of the log."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest

from rluf.algorithms.advantages import Drift
from rluf.config.load import load_settings
from rluf.errors import DataError, StallError
from rluf.train.actor_groups import Crew
from rluf.train.controller import REFILLS, Pipeline, ScoredGroup
from rluf.train.offline_batches import LoggedBatches, mismatched, outcomes_of
from rluf.train.prompts import Reactions
from rluf.types import Group, GroupInfo, Prompt, Sample, Score

INFO = GroupInfo("p", "", 0, 5, (3, 3), (True, True))
ALIKE, APART = (0.5, 0.5), (0.5, 0.6)


def pipeline(*overrides: str, version: int = 0) -> Pipeline:
    made = Pipeline(load_settings(None, list(overrides)).settings, Crew(), [])
    made.version = version
    return made


def group(love: tuple[float, ...], *, topic: str = "", **info: Any) -> ScoredGroup:
    values = {"love": love, "helpfulness": ALIKE, "safety": ALIKE}
    scores = {name: tuple(Score(name, value, 0.0) for value in row) for name, row in values.items()}
    return ScoredGroup(None, replace(INFO, topic=topic, **info), scores)  # type: ignore[arg-type]


def test_grpo_takes_every_group() -> None:
    assert pipeline()._usable(group(ALIKE))
    assert pipeline(version=9)._usable(group(APART))


@pytest.mark.parametrize(
    ("scored", "usable"),
    [
        (group(APART), True),
        (group(ALIKE), False),
        (group(ALIKE, passed=(True, False)), True),
        (group(ALIKE, passed=(True, True)), False),
        (group(APART, topic="risky"), False),  # only safety counts there
    ],
)
def test_dapo_drops_groups_without_spread(scored: ScoredGroup, usable: bool) -> None:
    assert pipeline("algorithm.name=dapo")._usable(scored) is usable


def test_a_straggler_is_dropped_when_it_lags_more_than_staleness() -> None:
    late = pipeline("algorithm.staleness=1", "algorithm.too_old=drop", version=3)
    assert not late._usable(group(APART, version=1))
    assert late._usable(group(APART, version=2))
    assert pipeline("algorithm.staleness=1", version=3)._usable(group(APART, version=1))


def test_a_step_ends_even_if_no_group_has_spread() -> None:
    hopeless = pipeline("algorithm.name=dapo")
    hopeless._dropped = REFILLS * hopeless.settings.algorithm.prompts_per_step
    assert hopeless._usable(group(ALIKE))


async def test_a_loop_that_nothing_comes_out_of_is_a_stall() -> None:
    idle = pipeline("rollout.deadline_s=0.1", "cluster.start_deadline_s=0.1", "algorithm.prompts_per_step=2")
    idle._accepted = 2 * idle.settings.algorithm.steps  # as if every prompt had been sent and none came back
    await idle._ready.put(group(APART))
    with pytest.raises(StallError, match=r"waited 0\.3 s for a group of step 1: 1 of 2 are there, 0 in flight"):
        await idle._batch()


def logged(name: str, response: tuple[int, ...]) -> Group:
    sample = Sample(name, (1, ord(name)), response, (), (), "stop", "")
    return Group(Prompt(name, (), (1, ord(name)), "", "train"), (sample,), 0)


LIKED, OTHERS = [logged("a", (5,)), logged("b", (6, 7))], [logged("c", (8,))]


def test_logged_batches_hold_both_kinds_in_turn() -> None:
    groups, labels = LoggedBatches(Reactions(LIKED, OTHERS), cycle([0, 1]), cycle([0])).next(5)
    assert [group.prompt.id for group in groups] == ["a", "c", "b", "c", "a"]
    assert labels == [1.0, 0.0, 1.0, 0.0, 1.0]
    with pytest.raises(DataError, match="found 2 and 0"):
        LoggedBatches(Reactions(LIKED, []), cycle([0]), cycle([0]))


def test_mismatched_pairs_join_a_prompt_with_the_next_response() -> None:
    pairs = mismatched([*LIKED, *OTHERS])
    assert [(pair.prompt.id, pair.samples[0].response_ids) for pair in pairs] == [
        ("a", (6, 7)),
        ("b", (8,)),
        ("c", (5,)),
    ]
    assert all(pair.samples[0].prompt_ids == pair.prompt.token_ids for pair in pairs)


def test_drifts_of_pairs_become_the_zero_of_kto() -> None:
    found = outcomes_of(LIKED, [1.0, 0.0], [Drift(1.0), Drift(2.0), Drift(0.5), Drift(1.5)])
    assert found.mismatched == 1.0
    assert [row[0].kl for row in found.drifts] == [1.0, 2.0]
    assert (found.rewards, found.lengths) == ([[1.0], [0.0]], [[1], [2]])
