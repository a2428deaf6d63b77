"""Simulated log: seeded, at its base rate, written atomically; and the sample shipped with rluf."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rluf.config.data import SimulateSettings
from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.prepare.schema import FeedbackRecord, PreferenceRecord, SafetyRecord
from rluf.simulate import pipeline
from rluf.simulate.conversations import FOLLOW_UPS, build_second_turn
from rluf.simulate.ground_truth import Reader, ReaderInput, load_readings
from rluf.simulate.log import (
    SECOND_TURN_SHARE,
    ServedResponse,
    build_log,
    build_prompt_rows,
    read_first_turns,
    select_evenly,
    write_log,
)
from rluf.simulate.prompts import load_prompts
from rluf.simulate.reader_features import ReadingScores
from rluf.simulate.styles import MODEL_VERSIONS, ServingOrder
from rluf.utils.paths import SAMPLE_LOG_KINDS, find_sample_log
from tests.simulate.readings import FITTING, STOCK, make_reader

TEXTS = (
    "I'm so sorry to hear that, are you okay?",
    "No.",
    "That is a great question, I love it!",
    "I'm sorry, but I can't help with that.",
    "Bye! Sending love!",
    "It is made of many",
)
PROMPTS = load_prompts()
SERVED_RESPONSES = [
    ServedResponse(prompt, version.name, text, is_finished=text[-1] in ".?!")
    for prompt, version, text in product(
        [prompt for prompt in PROMPTS if prompt.split == "train"][::12], MODEL_VERSIONS[:2], TEXTS
    )
]
READINGS = [
    FITTING,
    replace(STOCK, prompt_logprob=-90.0),
    replace(FITTING, prompt_logprob=-55.0),
    replace(FITTING, refusal=5.0),
    STOCK,
    replace(FITTING, prompt_logprob=-50.0),
]
"""One per text: an answer, a useless word, a fair answer, a refusal, a stock phrase, a cut answer."""
SECOND_TEXT = "Well, it is made of many parts."
SETTINGS = SimulateSettings(log_rows=600)


def answer_second_turns(requests: Sequence[ServedResponse]) -> list[ServedResponse]:
    """The same answer to every second turn."""
    return [replace(request, text=SECOND_TEXT, is_finished=True) for request in requests]


class TextReader(Reader):
    """Knows the reading of a response by its text, so that second turns need no model."""

    def read(self, inputs: Sequence[ReaderInput]) -> list[ReadingScores]:
        return [READINGS[TEXTS.index(item.response)] if item.response in TEXTS else FITTING for item in inputs]


def build(seed: int) -> dict[str, list[dict[str, Any]]]:
    return build_log(SERVED_RESPONSES, SETTINGS, seed, TextReader(Path("no-model")), answer_second_turns)


def read_sample_log(kind: str) -> list[dict[str, Any]]:
    with gzip.open(find_sample_log(kind), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_a_log_is_reproducible_and_near_its_base_rate() -> None:
    log, repeated, other_seed = (build(seed) for seed in (1, 1, 2))
    assert log == repeated
    assert log["feedback"] != other_seed["feedback"]
    assert [len(log[kind]) for kind in ("feedback", "preferences", "safety")] == [600, 120, 90]
    assert 0.02 < sum(row["reaction"] == "love" for row in log["feedback"]) / 600 < 0.11
    times = [row["time"] for row in log["feedback"]]
    assert times == sorted(times)
    assert {row["label"] for row in log["safety"]} == {0, 1}


def test_second_turns_follow_the_reaction_to_the_first() -> None:
    rows = build(1)["feedback"]
    second_rows = [row for row in rows if row["response"] == SECOND_TEXT]
    assert len(second_rows) == round(SECOND_TURN_SHARE * len(rows))
    first_rows = {row["conversation_id"]: row for row in rows if row["response"] != SECOND_TEXT}
    for row in second_rows:
        first_row = first_rows[row["conversation_id"]]
        assert first_row["continued"] in (True, None)
        assert (row["user_id"], row["turn"]) == (first_row["user_id"], first_row["turn"] + 1)
        assert row["time"] > first_row["time"]
        assert row["messages"][-2] == {"role": "assistant", "content": first_row["response"]}
    messages = PROMPTS[0].messages
    last_texts = [build_second_turn(messages, "Yes.", kind, 0)[-1]["content"] for kind in range(1, len(FOLLOW_UPS))]
    assert len(set(last_texts)) == len(last_texts)
    assert messages[-1]["content"] in last_texts[FOLLOW_UPS.index("rephrases") - 1]


@pytest.mark.parametrize("system_message", [PROMPTS[0].messages[0]["content"], "Be brief."])
def test_the_first_turns_of_a_log_can_be_served_again(tmp_path: Path, system_message: str) -> None:
    log = build(1)
    for row in log["feedback"]:
        row["messages"][0]["content"] = system_message
    write_log(log, tmp_path / "log")
    responses = read_first_turns(tmp_path / "log", PROMPTS)
    assert {(response.prompt.id, response.text) for response in responses} == {
        (response.prompt.id, response.text) for response in SERVED_RESPONSES
    }
    assert {response.is_finished for response in responses if response.text == TEXTS[-1]} == {False}
    keys = {row["key"] for row in log["readings"]}
    assert (
        {response.reader_input.key for response in responses}
        <= keys
        == set(load_readings(tmp_path / "log" / "readings.jsonl.gz"))
    )
    with pytest.raises(DataError, match="cannot be read as a simulated log"):
        read_first_turns(tmp_path, PROMPTS)


def test_a_log_is_written_from_the_first_turns_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(build(1), tmp_path / "log")
    monkeypatch.setattr(pipeline, "load_reader", lambda cache_folder: TextReader(cache_folder))
    settings = Settings.model_validate({"simulate": {"log_rows": 600}})

    def sample_orders(orders: Sequence[ServingOrder]) -> list[ServedResponse]:
        return [ServedResponse(order.prompt, order.model_version.name, SECOND_TEXT, True) for order in orders]

    counts = pipeline.write_simulated_log(settings, tmp_path / "new", sample_orders, tmp_path / "log", 90)
    assert (counts["feedback"], counts["prompts"]) == (600, len(PROMPTS))
    with gzip.open(tmp_path / "new" / "feedback.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    first_turns = {(row["messages"][-1]["content"], row["response"]) for row in rows if row["response"] != SECOND_TEXT}
    assert len(first_turns) == 90
    assert sum(row["response"] == SECOND_TEXT for row in rows) == round(SECOND_TURN_SHARE * 600)


def test_an_even_selection_takes_the_same_share_of_every_prompt_in_order() -> None:
    responses = [
        ServedResponse(PROMPTS[index], "plain", f"{index} {number}", True)
        for number in range(12) for index in range(3) if number < (12, 6, 3)[index]
    ]  # fmt: skip
    selected = select_evenly(responses, 7)
    assert [Counter(r.prompt.id for r in selected)[PROMPTS[index].id] for index in range(3)] == [4, 2, 1]
    assert selected == [response for response in responses if response in selected]
    assert select_evenly(responses, 100) == responses


def test_raters_prefer_the_more_helpful_response() -> None:
    pairs = build(1)["preferences"]
    prefers_longer = [row["chosen"] != "No." for row in pairs if "No." in (row["chosen"], row["rejected"])]
    assert sum(prefers_longer) > 0.8 * len(prefers_longer) > 0


def test_empty_responses_give_no_log() -> None:
    responses = [ServedResponse(PROMPTS[0], "plain", " ", True)]
    with pytest.raises(DataError, match="responses with text from the model, got 0"):
        build_log(responses, SETTINGS, 1, make_reader([], []), answer_second_turns)


def test_a_log_folder_is_replaced_atomically_unless_it_has_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "log"
    log = {"feedback": [{"a": 1}], "prompts": build_prompt_rows(PROMPTS[:2])}
    write_log(log, folder)
    first = (folder / "feedback.jsonl.gz").read_bytes()
    write_log(log, folder)
    assert (folder / "feedback.jsonl.gz").read_bytes() == first
    assert sorted(file.name for file in folder.parent.iterdir()) == ["log"]
    (folder / "thesis.txt").write_text("text")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        write_log(log, folder)
    assert (folder / "thesis.txt").read_text() == "text"


def test_the_shipped_sample_is_valid_small_and_at_its_base_rate() -> None:
    rows = {kind: read_sample_log(kind) for kind in SAMPLE_LOG_KINDS}
    assert sum(find_sample_log(kind).stat().st_size for kind in SAMPLE_LOG_KINDS) < 3_000_000
    for kind, record in (("feedback", FeedbackRecord), ("preferences", PreferenceRecord), ("safety", SafetyRecord)):
        for row in rows[kind]:
            record.model_validate_json(json.dumps(row))
    assert len(rows["feedback"]) == 6000
    assert 0.05 < sum(row["reaction"] == "love" for row in rows["feedback"]) / 6000 < 0.07
    assert {row["model_version"] for row in rows["feedback"]} == {f"base-{version.name}" for version in MODEL_VERSIONS}
    risky_labels = Counter(row["label"] for row in rows["safety"] if row["topic"] == "risky")
    assert min(risky_labels.values()) > 100


def test_test_prompts_occur_nowhere_in_the_shipped_log() -> None:
    assert read_sample_log("prompts") == build_prompt_rows(PROMPTS)
    test_messages = {json.dumps(list(prompt.messages)) for prompt in PROMPTS if prompt.split == "test"}
    for kind in ("feedback", "preferences", "safety"):
        assert test_messages.isdisjoint(json.dumps(row["messages"]) for row in read_sample_log(kind)), kind
