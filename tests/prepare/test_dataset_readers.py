"""Adapters: what becomes of each kind of foreign row, and the counts on the real files where they are at hand."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rluf.prepare.readers.datasets import READERS, SILENCE, Drop, Options
from rluf.prepare.schema import KINDS, FeedbackRecord
from rluf.prepare.validation import validate

OPTIONS = Options(test_share=0.2)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DATA = Path(os.environ.get("RLUF_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
real = pytest.mark.skipif(
    not (DATA / "convai2_reactions").is_dir(), reason=f"real reaction data is not here ({DATA}); set RLUF_DATA"
)

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


def test_convai2_keeps_thumbs_with_their_context() -> None:
    first, silent, last = READERS["convai2"].read(DIALOGUE, OPTIONS)
    assert isinstance(first, dict) and isinstance(last, dict)
    assert silent == Drop("no reaction")
    assert (first["reaction"], last["reaction"]) == ("love", "thumbs_down")
    assert first["messages"] == [{"role": "user", "content": SILENCE}]
    assert [m["content"] for m in last["messages"]] == [SILENCE, "Hello!", "Hi", "Who are you?", SILENCE]
    assert (first["continued"], last["continued"]) == (True, False)
    assert "User 7" not in json.dumps(first) and first["user_id"] == last["user_id"]
    record = validate(json.dumps(last).encode(), FeedbackRecord, NOW)
    assert isinstance(record, FeedbackRecord) and record.time == datetime(2018, 7, 9, 4, 29, 15, tzinfo=UTC)


def test_convai2_sparse_keeps_all_messages() -> None:
    rows = READERS["convai2_sparse"].read(DIALOGUE, OPTIONS)
    assert [row["reaction"] for row in rows if isinstance(row, dict)] == ["love", None, "thumbs_down"]
    empty = READERS["convai2_sparse"].read({**DIALOGUE, "messages": []}, OPTIONS)
    assert empty == [Drop("no assistant message")]


@pytest.mark.parametrize(
    ("votes", "chosen"),
    [([1, 1, 1], "a"), ([2, 0, 2], "b"), ([1, 1, 2], "a"), ([0, 0, 1], None), ([0, 1, 2], None), ([1, 2], None)],
)
def test_pandalm_goes_by_the_majority(votes: list[int], chosen: str | None) -> None:
    pair = {"id": 3, "instruction": "Do", "input": "this", "response_a": "a", "response_b": "b", "votes": votes}
    (row,) = READERS["pandalm"].read(pair, OPTIONS)
    if chosen is None:
        assert row == Drop("tie")
    else:
        assert isinstance(row, dict) and row["chosen"] == chosen
        assert row["messages"] == [{"role": "user", "content": "Do\n\nthis"}]


@pytest.mark.parametrize(
    ("row", "text", "topic"),
    [
        ({"question_id": 81, "category": "writing", "turns": ["first", "second"]}, "first", "writing"),
        ({"topic": "Law", "prompt": "how"}, "how", "Law"),
        ({"id": "t", "instruction": "Sort", "input": ""}, "Sort", "other"),
    ],
)
def test_prompt_files_of_three_shapes(row: dict[str, Any], text: str, topic: str) -> None:
    (prompt,) = READERS["mt_bench"].read(row, OPTIONS)
    assert isinstance(prompt, dict)
    assert prompt["messages"] == [{"role": "user", "content": text}]
    assert prompt["topic"] == topic and prompt["split"] in ("train", "test")


def _items(reader: str, file: str) -> Counter[str]:
    """Rows and drops of a real file; every row must pass validation."""
    counts: Counter[str] = Counter()
    record = KINDS[READERS[reader].kind].record
    with gzip.open(DATA / file, "rt", encoding="utf-8") as lines:
        for line in lines:
            for item in READERS[reader].read(json.loads(line), OPTIONS):
                if isinstance(item, Drop):
                    counts[item.reason] += 1
                    continue
                checked = validate(json.dumps(item).encode(), record, NOW)
                counts["rows" if isinstance(checked, record) else str(checked)] += 1
                counts[str(item.get("reaction", item.get("label", "")))] += 1
    return counts


def test_xiaomi_counts_become_at_most_eight_rows_of_one_user_a_query() -> None:
    replies = [{"reply": "嗯", "like": 30, "dislike": 10}, {"reply": "不", "like": 0, "dislike": 5}]
    rows = READERS["xiaomi"].read({"query": "在吗", "replys": replies}, OPTIONS)
    assert [(row["response"], row["reaction"]) for row in rows] == [
        *[("嗯", "love")] * 6,
        *[("嗯", "dislike")] * 2,
        *[("不", "dislike")] * 5,
    ]
    assert len({row["user_id"] for row in rows}) == 1
    assert len({row["id"] for row in rows}) == 13
    none = {"query": "在吗", "replys": [{"reply": "嗯", "like": 0, "dislike": 0}]}
    assert READERS["xiaomi"].read(none, OPTIONS) == [Drop("no reaction")]
    with pytest.raises(ValueError, match="counts"):
        READERS["xiaomi"].read({"query": "在吗", "replys": [{"reply": "嗯", "like": -1, "dislike": 4}]}, OPTIONS)


@real
def test_convai2_real_counts() -> None:
    found = _items("convai2", "convai2_reactions/dialogs.jsonl.gz")
    assert found == {"rows": 1149, "love": 716, "thumbs_down": 433, "no reaction": 5466, "no assistant message": 276}


@real
def test_other_real_files_pass_validation() -> None:
    assert _items("pandalm", "pandalm_test/pairs.jsonl.gz")["tie"] == 34
    safety = _items("diasafety", "diasafety/val.jsonl.gz")
    assert safety["rows"] == safety["1"] + safety["0"] > 1000
    for name, rows in (
        ("mt_bench", 80),
        ("arena_hard_v01", 500),
        ("self_instruct_seed_tasks", 175),
        ("harmfulqa", 1162),
    ):
        assert _items("mt_bench", f"prompts/{name}.jsonl.gz")["rows"] == rows
