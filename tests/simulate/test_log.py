"""Simulated log: seeded, at its base rate, written atomically; and the sample shipped with rluf."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rluf.config.data import SimulateSettings
from rluf.errors import DataError
from rluf.prepare.schema import FeedbackRecord, PreferenceRecord, SafetyRecord
from rluf.simulate.log import ServedResponse, build_log, build_prompt_rows, write_log
from rluf.simulate.prompts import load_prompts
from rluf.simulate.styles import MODEL_VERSIONS
from rluf.utils.paths import SAMPLE_LOG_KINDS, find_sample_log

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
SETTINGS = SimulateSettings(log_rows=600)


def read_sample_log(kind: str) -> list[dict[str, Any]]:
    with gzip.open(find_sample_log(kind), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_a_log_is_reproducible_and_near_its_base_rate() -> None:
    log, repeated, other_seed = (build_log(SERVED_RESPONSES, SETTINGS, seed) for seed in (1, 1, 2))
    assert log == repeated
    assert log["feedback"] != other_seed["feedback"]
    assert [len(log[kind]) for kind in ("feedback", "preferences", "safety")] == [600, 120, 90]
    assert 0.02 < sum(row["reaction"] == "love" for row in log["feedback"]) / 600 < 0.11
    times = [row["time"] for row in log["feedback"]]
    assert times == sorted(times)
    assert {row["label"] for row in log["safety"]} == {0, 1}


def test_raters_prefer_the_more_helpful_response() -> None:
    pairs = build_log(SERVED_RESPONSES, SETTINGS, 1)["preferences"]
    prefers_longer = [row["chosen"] != "No." for row in pairs if "No." in (row["chosen"], row["rejected"])]
    assert sum(prefers_longer) > 0.8 * len(prefers_longer) > 0


def test_empty_responses_give_no_log() -> None:
    with pytest.raises(DataError, match="responses with text from the model, got 0"):
        build_log([ServedResponse(PROMPTS[0], "plain", " ", True)], SETTINGS, 1)


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
