"""Readers of data sets: rows from each kind of object, and counts on the real files where they are available."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rluf.config.reward import AggregationSettings
from rluf.prepare.readers.datasets import DATASET_READERS, EMPTY_TURN_TEXT, ReaderOptions, SkippedRow
from rluf.prepare.readers.products import PRODUCT_READERS
from rluf.prepare.schema import DATA_KINDS, FeedbackRecord, validate_json_row

OPTIONS = ReaderOptions(test_share=0.2)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DATA_FOLDER = Path(os.environ.get("RLUF_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
needs_real_data = pytest.mark.skipif(
    not (DATA_FOLDER / "convai2_reactions").is_dir(), reason=f"no real reaction data in {DATA_FOLDER}; set RLUF_DATA"
)

BATTLE = {
    "question_id": "1",
    "conversation_a": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}],
    "conversation_b": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}],
}
DIALOGUE = {
    "id": "d1",
    "user": "User 7",
    "model": "Bot 1",
    "time": "2018-07-09 04:29:15",
    "messages": [
        {"role": "assistant", "content": "Hello!", "reaction": 1},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Who are you?", "reaction": None},
        {"role": "assistant", "content": "Well?", "reaction": 0},
    ],
}


def test_convai2_rows_are_messages_with_a_thumb_and_their_context() -> None:
    first, without_reaction, last = DATASET_READERS["convai2"].read_item(DIALOGUE, OPTIONS)
    assert isinstance(first, dict) and isinstance(last, dict)
    assert without_reaction == SkippedRow("no reaction")
    assert (first["reaction"], last["reaction"]) == ("love", "thumbs_down")
    assert first["messages"] == [{"role": "user", "content": EMPTY_TURN_TEXT}]
    assert [message["content"] for message in last["messages"]] == [
        EMPTY_TURN_TEXT,
        "Hello!",
        "Hi",
        "Who are you?",
        EMPTY_TURN_TEXT,
    ]
    assert (first["continued"], last["continued"]) == (True, False)
    assert "User 7" not in json.dumps(first) and first["user_id"] == last["user_id"]
    record = validate_json_row(json.dumps(last).encode(), FeedbackRecord, NOW)
    assert isinstance(record, FeedbackRecord) and record.time == datetime(2018, 7, 9, 4, 29, 15, tzinfo=UTC)


def test_convai2_sparse_rows_are_all_messages() -> None:
    rows = DATASET_READERS["convai2_sparse"].read_item(DIALOGUE, OPTIONS)
    assert [row["reaction"] for row in rows if isinstance(row, dict)] == ["love", None, "thumbs_down"]
    no_items = DATASET_READERS["convai2_sparse"].read_item({**DIALOGUE, "messages": []}, OPTIONS)
    assert no_items == [SkippedRow("no assistant message")]


@pytest.mark.parametrize(
    ("winner", "chosen"),
    [("model_a", "x"), ("Model_B", "y"), ("tie", None), ("tie (bothbad)", None), ("both_bad", None), ("Tie", None)],
)
def test_ties_of_battles_are_counted(winner: str, chosen: str | None) -> None:
    (row,) = PRODUCT_READERS["lmsys"].read_item({**BATTLE, "winner": winner}, OPTIONS)  # type: ignore[misc]
    assert row == SkippedRow("tie") if chosen is None else isinstance(row, dict) and row["chosen"] == chosen


@pytest.mark.parametrize("winner", ["", None, "gpt-4", "C", 0.5])
def test_a_winner_of_another_form_is_no_tie(winner: object) -> None:
    with pytest.raises(ValueError, match="winner must be model_a, model_b, tie or both_bad"):
        PRODUCT_READERS["lmsys"].read_item({**BATTLE, "winner": winner}, OPTIONS)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("votes", "chosen"),
    [([1, 1, 1], "a"), ([2, 0, 2], "b"), ([1, 1, 2], "a"), ([0, 0, 1], None), ([0, 1, 2], None), ([1, 2], None)],
)
def test_pandalm_chooses_by_majority(votes: list[int], chosen: str | None) -> None:
    pair = {"id": 3, "instruction": "Do", "input": "this", "response_a": "a", "response_b": "b", "votes": votes}
    (row,) = DATASET_READERS["pandalm"].read_item(pair, OPTIONS)
    if chosen is None:
        assert row == SkippedRow("tie")
    else:
        assert isinstance(row, dict) and row["chosen"] == chosen
        assert row["messages"] == [{"role": "user", "content": "Do\n\nthis"}]


def test_feedbackqa_pairs_the_answers_of_a_question_by_their_mean_rating() -> None:
    answers = [
        {"question": "Where?", "domain": "WHO", "answer": text, "ratings": ratings}
        for text, ratings in (
            ("vague", ["Could be Improved", "Acceptable"]), ("right", ["Excellent", "Acceptable"]),
            ("off", ["Bad", "Excellent"]),
        )
    ]  # fmt: skip
    read = DATASET_READERS["feedbackqa"].read_item
    items = read({"messages": answers}, OPTIONS)
    # Means of 1.5, 2.5 and 1.5.
    assert [item if isinstance(item, SkippedRow) else (item["chosen"], item["rejected"]) for item in items] == [
        ("right", "vague"), SkippedRow("tie"), ("right", "off"),
    ]  # fmt: skip
    assert len({item["group"] for item in items if isinstance(item, dict)}) == 1
    assert read({"messages": answers[:1]}, OPTIONS) == [SkippedRow("one answer only")]
    with pytest.raises(ValueError, match="at least one rating"):
        read({"messages": [{**answers[0], "ratings": []}]}, OPTIONS)
    with pytest.raises(KeyError, match="Great"):
        read({"messages": [{**answers[0], "ratings": ["Great"]}]}, OPTIONS)


@pytest.mark.parametrize(
    ("row", "text", "topic"),
    [
        ({"question_id": 81, "category": "writing", "turns": ["first", "second"]}, "first", "writing"),
        ({"topic": "Law", "prompt": "how"}, "how", "Law"),
        ({"id": "t", "instruction": "Sort", "input": ""}, "Sort", "other"),
    ],
)
def test_prompt_files_of_three_schemas(row: dict[str, Any], text: str, topic: str) -> None:
    (prompt,) = DATASET_READERS["mt_bench"].read_item(row, OPTIONS)
    assert isinstance(prompt, dict)
    assert prompt["messages"] == [{"role": "user", "content": text}]
    assert prompt["topic"] == topic and prompt["split"] in ("train", "test")


def test_requests_for_harm_have_the_topic_that_safety_alone_judges() -> None:
    (prompt,) = DATASET_READERS["harmfulqa"].read_item({"topic": "Law", "prompt": "How do I forge a will?"}, OPTIONS)
    (same_text,) = DATASET_READERS["mt_bench"].read_item({"prompt": "How do I forge a will?"}, OPTIONS)
    assert isinstance(prompt, dict) and isinstance(same_text, dict)
    assert prompt["topic"] in AggregationSettings().topic_objectives
    assert (prompt["id"], prompt["split"]) == (same_text["id"], same_text["split"])


def count_items(reader_name: str, file: str) -> Counter[str]:
    """Rows by reaction or label, and skipped items by reason, of a real file; every row must be valid."""
    counts: Counter[str] = Counter()
    reader = DATASET_READERS[reader_name]
    record_type = DATA_KINDS[reader.kind_name].record_type
    with gzip.open(DATA_FOLDER / file, "rt", encoding="utf-8") as lines:
        for line in lines:
            for item in reader.read_item(json.loads(line), OPTIONS):
                if isinstance(item, SkippedRow):
                    counts[item.reason] += 1
                    continue
                result = validate_json_row(json.dumps(item).encode(), record_type, NOW)
                counts["rows" if isinstance(result, record_type) else str(result)] += 1
                counts[str(item.get("reaction", item.get("label", "")))] += 1
    return counts


def test_xiaomi_counts_become_at_most_eight_rows_per_reply_of_one_user_per_query() -> None:
    replies = [{"reply": "嗯", "like": 30, "dislike": 10}, {"reply": "不", "like": 0, "dislike": 5}]
    rows = DATASET_READERS["xiaomi"].read_item({"query": "在吗", "replys": replies}, OPTIONS)
    assert [(row["response"], row["reaction"]) for row in rows] == [
        *[("嗯", "love")] * 6,
        *[("嗯", "dislike")] * 2,
        *[("不", "dislike")] * 5,
    ]
    assert len({row["user_id"] for row in rows}) == 1
    assert len({row["id"] for row in rows}) == 13
    assert sum((Counter(row["_notes"]) for row in rows), Counter()) == {"reactions beyond 8 to one response": 32}
    without_reactions = {"query": "在吗", "replys": [{"reply": "嗯", "like": 0, "dislike": 0}]}
    assert DATASET_READERS["xiaomi"].read_item(without_reactions, OPTIONS) == [SkippedRow("no reaction")]
    with pytest.raises(ValueError, match="counts"):
        DATASET_READERS["xiaomi"].read_item(
            {"query": "在吗", "replys": [{"reply": "嗯", "like": -1, "dislike": 4}]}, OPTIONS
        )


@needs_real_data
def test_counts_of_the_real_convai2_file() -> None:
    counts = count_items("convai2", "convai2_reactions/dialogs.jsonl.gz")
    assert counts == {"rows": 1149, "love": 716, "thumbs_down": 433, "no reaction": 5466, "no assistant message": 276}


@needs_real_data
def test_other_real_files_are_valid() -> None:
    assert count_items("pandalm", "pandalm_test/pairs.jsonl.gz")["tie"] == 34
    safety_counts = count_items("diasafety", "diasafety/val.jsonl.gz")
    assert safety_counts["rows"] == safety_counts["1"] + safety_counts["0"] > 1000
    for name, row_count in (
        ("mt_bench", 80),
        ("arena_hard_v01", 500),
        ("self_instruct_seed_tasks", 175),
        ("harmfulqa", 1162),
    ):
        assert count_items("mt_bench", f"prompts/{name}.jsonl.gz")["rows"] == row_count
