"""Which rows of a prepared data set become groups that the learner imitates, or learns from by their reactions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.models import load_tokenizer, resolve_model
from rluf.prompts import load_demonstrations, load_reactions


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
