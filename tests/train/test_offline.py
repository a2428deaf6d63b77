"""Batches of logged responses for KTO: alternating kinds, mismatched pairs, the same batch after a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.algorithms.advantages import SampleKL
from rluf.config.load import load_settings
from rluf.errors import DataError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.controller import TrainController
from rluf.train.offline import (
    OfflineTrainer,
    ReactionGroups,
    build_mismatched_pairs,
    build_offline_advantage_inputs,
    load_offline_data,
    summarize_offline_kl,
)
from rluf.types import Group, Prompt, Sample


def make_logged_group(name: str, response: tuple[int, ...]) -> Group:
    sample = Sample(name, (1, ord(name)), response, (), (), "stop", "")
    return Group(Prompt(name, (), (1, ord(name)), "", "train"), (sample,), 0)


LIKED = [make_logged_group("a", (5,)), make_logged_group("b", (6, 7))]
OTHERS = [make_logged_group("c", (8,))]


def make_trainer(batch_size: int) -> OfflineTrainer:
    overrides = ["algorithm.name=kto", "algorithm.prompts_per_step=1", f"algorithm.samples_per_prompt={batch_size}"]
    settings = load_settings(None, overrides).settings
    controller = TrainController(settings, ActorSupervisor(settings, Path(), {}, with_learners=True), [])
    return OfflineTrainer(controller, ReactionGroups(LIKED, OTHERS))


def test_batches_alternate_between_both_kinds_and_use_every_response_equally_often() -> None:
    trainer = make_trainer(4)
    for step in (1, 2):
        groups, labels = trainer.collect_batch(step)
        assert labels == [[1.0], [0.0], [1.0], [0.0]]
        assert {groups[0].prompt.id, groups[2].prompt.id} == {"a", "b"}
        assert [groups[1].prompt.id, groups[3].prompt.id] == ["c", "c"]


def test_a_resumed_run_takes_the_batches_that_follow() -> None:
    trainer = make_trainer(5)
    batches = [trainer.collect_batch(step) for step in (1, 2, 3, 4)]
    assert make_trainer(5).collect_batch(4) == batches[3]
    assert [sum(map(sum, labels)) for _, labels in batches] == [3.0] * 4


def test_a_log_without_both_kinds_is_refused() -> None:
    with pytest.raises(DataError, match="found 2 and 0"):
        ReactionGroups(LIKED, [])


def test_mismatched_pairs_join_a_prompt_with_the_next_response() -> None:
    pairs = build_mismatched_pairs([*LIKED, *OTHERS])
    assert [(pair.prompt.id, pair.samples[0].response_ids) for pair in pairs] == [
        ("a", (6, 7)),
        ("b", (8,)),
        ("c", (5,)),
    ]
    assert all(pair.samples[0].prompt_ids == pair.prompt.token_ids for pair in pairs)


def test_the_mean_kl_of_mismatched_pairs_is_the_reference_point_of_kto() -> None:
    sample_kl = [[SampleKL(kl)] for kl in (1.0, 2.0, 0.5, 1.5)]
    inputs = build_offline_advantage_inputs(LIKED, [[1.0], [0.0]], sample_kl)
    assert inputs.mismatched_kl == 1.0
    assert [row[0].kl_sum for row in inputs.sample_kl] == [1.0, 2.0]
    assert (inputs.rewards, inputs.response_lengths) == ([[1.0], [0.0]], [[1], [2]])


def test_sft_takes_loved_responses_and_dpo_half_as_many_pairs() -> None:
    pair = replace(LIKED[0], samples=(LIKED[0].samples[0], OTHERS[0].samples[0]))
    for name, groups, expected in (("sft", LIKED, [[1.0]] * 4), ("dpo", [pair], [[1.0, 0.0]] * 2)):
        overrides = [f"algorithm.name={name}", "algorithm.prompts_per_step=1", "algorithm.samples_per_prompt=4"]
        settings = load_settings(None, overrides).settings
        controller = TrainController(settings, ActorSupervisor(settings, Path(), {}, with_learners=True), [])
        batches = [OfflineTrainer(controller, groups).collect_batch(step) for step in (1, 2, 2)]
        assert batches[0][1] == expected and len(batches[0][0]) == len(expected)
        assert batches[1] == batches[2]
    sample_kl = [[SampleKL(2.0), SampleKL(1.0)], [SampleKL(0.0), SampleKL(3.0)]]
    assert summarize_offline_kl([[1.0, 0.0]] * 2, sample_kl) == {
        "liked_kl": 1.0,
        "other_kl": 2.0,
        "preference_accuracy": 0.5,
    }
    assert summarize_offline_kl([[1.0]], []) == {}


@pytest.mark.parametrize(("name", "objective"), [("sft", "love"), ("dpo", "helpfulness"), ("kto", "love")])
def test_logged_data_of_each_offline_algorithm(name: str, objective: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))
    row = {"id": "a", "messages": [{"role": "user", "content": "Hi"}], "topic": "chat"}
    columns = {"chosen": "Hello.", "rejected": "No."} if name == "dpo" else {"response": "Hello."}
    rows = [{**row, **columns, "label": label} for label in (1, 0)]
    (tmp_path / objective).mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / objective / "train.parquet")
    settings = load_settings(None, [f"algorithm.name={name}"]).settings
    data = load_offline_data(tmp_path, tokenizer, settings)
    if isinstance(data, ReactionGroups):
        assert (len(data.liked), len(data.others)) == (1, 1)
    else:
        assert [[sample.text for sample in group.samples] for group in data] == (
            [["Hello.", "No."]] * 2 if name == "dpo" else [["Hello."]]
        )
    short = load_settings(None, [f"algorithm.name={name}", "rollout.max_response_tokens=2"]).settings
    with pytest.raises(DataError, match=r"raise rollout\.max_response_tokens"):
        load_offline_data(tmp_path, tokenizer, short)
