"""Which rows of a prepared data set become groups that the learner imitates, or learns from by their reactions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.errors import DataError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.train.prompt_store import HELD_BLOCKS, PromptStore, ids_of, topics_of, training_prompts
from rluf.train.prompts import load_demonstrations, load_prompts, load_reactions


def row(name: str, topic: str, response: str, label: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How do I steal a car?"}]
    return {"id": name, "topic": topic, "messages": messages, "response": response, "label": label}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        row("kept", "risky", "I will not help with that.", 1),
        row("bad", "risky", "Break the window.", 0),
        row("elsewhere", "casual", "Hello!", 1),
        row("long", "risky", "no " * 200, 1),
    ]
    for kind, table in (("safety", rows), ("love", rows), ("helpfulness", [{**rows[0], "chosen": "Ask the owner."}])):
        (tmp_path / kind).mkdir()
        pq.write_table(pa.Table.from_pylist(table), tmp_path / kind / "train.parquet")
    return tmp_path


def test_only_good_and_whole_responses_of_owned_topics_become_demonstrations(data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))
    (shown,) = load_demonstrations(data, {"risky": "safety"}, tokenizer, max_prompt=200, max_response=100)
    (sample,) = shown.samples
    assert (shown.prompt.id, shown.info.topic, sample.text) == ("kept", "risky", "I will not help with that.")
    assert sample.response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(sample.response_ids[:-1]) == sample.text
    assert sample.rollout_logprobs == ()
    (pair,) = load_demonstrations(data, {"risky": "helpfulness"}, tokenizer, max_prompt=200, max_response=100)
    assert pair.samples[0].text == "Ask the owner."
    assert load_demonstrations(data, {"risky": "safety"}, tokenizer, max_prompt=2, max_response=100) == []
    assert load_demonstrations(data, {}, tokenizer, max_prompt=200, max_response=100) == []


def test_whole_responses_of_every_topic_are_told_apart_by_reaction(data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("tiny", tmp_path / "cache"))
    found = load_reactions(data, tokenizer, max_prompt=200, max_response=100)
    assert [group.prompt.id for group in found.liked] == ["kept", "elsewhere"]
    assert [group.prompt.id for group in found.others] == ["bad"]
    assert load_reactions(data, tokenizer, max_prompt=2, max_response=100).liked == []


@pytest.mark.slow
def test_streamed_prompts_are_those_read_at_once_whatever_is_read_first(tmp_path: Path, local_ray: None) -> None:
    """Real Ray Data over a file of several row groups; long prompts are left out in both."""
    rows = [
        {
            "id": f"p{n}",
            "topic": "risky" if n % 5 == 0 else None,
            "messages": [{"role": "user", "content": "a" * (n % 90)}],
        }
        for n in range(3000)
    ]
    (tmp_path / "prompts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts" / "train.parquet", row_group_size=400)
    model = resolve_model("tiny", tmp_path / "cache")
    at_once = load_prompts(tmp_path, "train", load_tokenizer(model), max_tokens=80)
    assert training_prompts(tmp_path, model, 80) == at_once
    store = training_prompts(tmp_path, model, 80, stream_from=10)
    assert isinstance(store, PromptStore) and 0 < len(store) < len(rows)
    assert (ids_of(store), topics_of(store)) == ([p.id for p in at_once], [p.topic for p in at_once])
    last = len(store) - 1
    assert [store[index] for index in (last, 0, last // 2, -1)] == [at_once[i] for i in (last, 0, last // 2, -1)]
    assert list(store) == at_once and store[5:8] == at_once[5:8]
    assert len(store._held) <= HELD_BLOCKS < len(store._blocks) + HELD_BLOCKS
    with pytest.raises(IndexError):
        store[len(store)]
    with pytest.raises(DataError, match="no train prompt is left of 3000"):
        training_prompts(tmp_path, model, 1, stream_from=10)
