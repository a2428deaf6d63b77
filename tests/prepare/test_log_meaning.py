"""What rows mean together: repeated replies, changes of mind, contradictory pairs, ids that are personal data."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rluf.errors import DataError
from rluf.prepare.labels import LabelRules, check_reactions, normalize_reaction
from rluf.prepare.readers.chats import RowShapeError
from rluf.prepare.readers.columns import name_reactions
from rluf.prepare.schema import MAX_MESSAGES, PreferenceRecord, RejectedRow, validate_json_rows
from tests.prepare.product_samples import ProductSample, assistant, user
from tests.prepare.test_log_faults import build, foreign_row, own_row, write_rows
from tests.prepare.test_log_variants import TIME, convert
from tests.prepare.test_products_table import read_sample

REPEATED = [user("q1"), assistant("ok"), user("q2"), assistant("ok")]


def with_ids(chat: list[dict[str, Any]], *, parents: bool) -> list[dict[str, Any]]:
    return [
        message | {"id": f"m{i}"} | ({"parentId": f"m{i - 1}"} if parents and i else {})
        for i, message in enumerate(chat)
    ]


@pytest.mark.parametrize("rated", [None, "m3"])
@pytest.mark.parametrize("parents", [False, True])
def test_a_reply_that_occurs_twice_keeps_its_context(parents: bool, rated: str | None) -> None:
    chat = with_ids(REPEATED, parents=parents) if rated or parents else REPEATED
    row, _ = convert(foreign_row(0, m=chat, k=rated or "m3"), **({"message": "k"} if rated else {}))
    assert [message["content"] for message in row["messages"]] == ["q1", "ok", "q2"]


def read_chat_rows(reader: str, row: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    result, rows, _ = read_sample(ProductSample("x", "feedback", {"reader": reader}, [row], {}), folder)
    return rows, {count.reason: count.rows for count in result["row_counts"] if count.outcome == "dropped"}


def test_every_row_of_a_chat_with_equal_replies_has_its_own_context(tmp_path: Path) -> None:
    row = {"conversation_hash": "h", "model": "m", "timestamp": TIME, "conversation": REPEATED}
    rows, _ = read_chat_rows("wildchat", row, tmp_path)
    assert sorted(len(row["messages"]) for row in rows) == [1, 3]


TREE = [("m0", None), ("m1", "m0"), ("m2", "m1"), ("m3", "m2")]
"""Ids and parents of q1, the reply to it, q2 and the reply to it."""
MISSING = {"messages missing above others in their chat": 1}


@pytest.mark.parametrize(
    ("parents", "context", "notes"),
    [({}, ["q1", "ok", "q2"], {}), ({"m0": "root"}, ["q1", "ok", "q2"], {}), ({"m0": "m0"}, ["q1", "ok", "q2"], {}),
     ({"m2": "root"}, ["q2"], {}), ({"m0": "root", "m2": "gone"}, ["q2"], MISSING),
     ({"m0": "root", "m1": "gone"}, ["ok", "q2"], MISSING),
     *((loop, None, {}) for loop in ({"m2": "m3"}, {"m1": "m2"}, {"m0": "m3"}, {"m0": "m1"}, {"m0": "m2"}))],
)  # fmt: skip
def test_trees_with_loops_and_holes(
    tmp_path: Path, parents: dict[str, str], context: list[str] | None, notes: dict[str, int]
) -> None:
    changed = dict(TREE) | parents
    chat = [message | {"id": name, "parentId": changed[name]} for message, name in zip(REPEATED, changed, strict=True)]
    loop = "the parents of the messages form a loop"
    if context is None:
        with pytest.raises(RowShapeError, match=loop):
            convert(foreign_row(0, m=chat, k="m3"), message="k")
    else:
        row, row_notes = convert(foreign_row(0, m=chat, k="m3"), message="k")
        assert [message["content"] for message in row["messages"]] == context and notes.items() <= row_notes.items()
        assert ("missing above" in str(row_notes)) is bool(notes)
    row = {"id": "c", "createdAt": TIME, "userId": "u", "messages": chat}
    other = {
        "id": "d",
        "createdAt": TIME,
        "userId": "u",
        "messages": [user("q") | {"id": "d0"}, chat[3] | {"id": "d1"}],
    }
    sample = ProductSample("x", "feedback", {"reader": "vercel"}, [row, other], {})
    result, rows, _ = read_sample(sample, tmp_path)
    (rejected,) = [count for count in result["row_counts"] if "loop" in count.reason] or [None]
    if context is None:
        assert rejected is not None and rejected.outcome == "quarantined" and [row["id"] for row in rows] == ["d1"]
        assert rejected.example_location.endswith(":1") and loop in rejected.reason
    else:
        assert rejected is None and notes.items() <= result["notes"].items()


@pytest.mark.parametrize("parents", [False, True])
def test_an_endless_chat_costs_rows_and_no_time(tmp_path: Path, parents: bool) -> None:
    chat = [user("q"), assistant("a")] * (MAX_MESSAGES // 2 + 500)
    # Texts of most messages are empty here, so that the test measures the reader and not the writer.
    chat = [
        message | ({"content": None, "tool_calls": [{}]} if 10 < i < 1980 else {}) for i, message in enumerate(chat)
    ]
    row = {"id": "c", "createdAt": TIME, "userId": "u", "messages": with_ids(chat, parents=parents)}
    start = time.process_time()
    rows, dropped = read_chat_rows("vercel", row, tmp_path)
    assert time.process_time() - start < 3
    assert dropped == {f"behind the first {MAX_MESSAGES} messages of its chat": 500} and len(rows) == 15


def event(reaction: str | None, minute: int, **changes: Any) -> dict[str, Any]:
    time_text = f"2026-03-01T10:{minute:02d}:00Z"
    row = {"id": f"e-{reaction}-{minute}", "response_id": "f0", "time": time_text, "reaction": reaction}
    return row | changes


CHANGES_OF_MIND = [
    (None, [event("love", 1), event("thumbs_down", 1)], 0), (None, [event("thumbs_down", 1), event("love", 1)], 1),
    (None, [event("love", 1), event("down", 2), event("❤️", 3)], 1),
    ("love", [event("👎", 2)], 0), ("thumbs_down", [event("love", 2)], 1),
    (None, [event("❤️", 1), event("heart", 2, retracted=True)], 0),
    ("love", [event(":red_heart:", 2, retracted=True)], 0), ("+1", [event("👍", 2, retracted=True)], 0),
    ("👍", [event("love", 2, retracted=True)], 1),
    (None, [event("love", 1), event("down", 2), event("thumbs_down", 3, retracted=True)], 1),
    (None, [event("love", 1), event("none", 2)], 1),
]  # fmt: skip


@pytest.mark.parametrize(("own_reaction", "events", "label"), CHANGES_OF_MIND, ids=range(len(CHANGES_OF_MIND)))
def test_changes_of_mind_in_any_spelling(
    tmp_path: Path, own_reaction: str | None, events: list[dict[str, Any]], label: int
) -> None:
    rows = [own_row(0, reaction=own_reaction), *(own_row(i, reaction="love" if i % 4 else None) for i in range(1, 200))]
    data = {name: write_rows(tmp_path / name, lines) for name, lines in (("f.jsonl", rows), ("r.jsonl", events))}
    card, love_rows = build(tmp_path, {"feedback": data["f.jsonl"], "reactions": data["r.jsonl"]})
    assert love_rows["f0"]["label"] == label
    has_empty_events = any(item["reaction"] == "none" for item in events)
    assert has_empty_events == any("events have no reaction" in text for text in card["warnings"])


def test_names_of_one_reaction() -> None:
    hearts, thumbs = (
        ["love", "❤️", ":heart:", "Red Heart", "<3", "😍", "loved it"],
        ["+1", "👍🏽", "thumbs_up", "likes", "up"],
    )
    assert {*map(normalize_reaction, hearts)} == {"love"} and {*map(normalize_reaction, thumbs)} == {"up"}
    assert {*map(normalize_reaction, ["-1", "👎", "dislike", "downvoted"])} == {"down"}
    assert [normalize_reaction(name) for name in ("helpful", "broken heart", "uplift", "4")] == [
        "helpful", "brokenheart", "uplift", "4"
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["created_at", "updatedAt", "timestamp", "ts"])
def test_reactions_with_times_are_ordered_by_them(key: str) -> None:
    later, earlier = {"name": "down", key: 1767229200}, {"name": "love", key: "2026-01-01T00:00:00+01:00"}
    assert name_reactions([later, earlier]) == name_reactions([earlier, later]) == ["love", "down"]
    assert name_reactions([later, {"name": "love"}]) == ["down", "love"]


def test_a_zero_between_plus_and_minus_needs_a_rule() -> None:
    counts = {"1": 50, "0": 40, "-1": 10}
    with pytest.raises(DataError, match="no rule says"):
        check_reactions(counts, LabelRules({}), "data.reactions", is_rating=False, is_event=True)  # type: ignore[arg-type]
    rules = LabelRules({"1": "loved", "0": "ignored", "-1": "not_loved"})
    check_reactions(counts, rules, "data.reactions", is_rating=False, is_event=True)  # type: ignore[arg-type]


def pair(index: int, chosen: str, rejected: str, question: str) -> dict[str, Any]:
    return {"id": f"p{index}", "messages": [user(question)], "group": question, "chosen": chosen, "rejected": rejected}


def label_row(index: int, response: str, label: int, question: str) -> dict[str, Any]:
    return {"id": f"s{index}", "messages": [user(question)], "group": question, "response": response, "label": label}


@pytest.mark.parametrize("spell", [str, str.upper, " {} \n".format, lambda text: text.replace(" ", "  ")])
def test_contradictions_in_any_spelling_are_counted(tmp_path: Path, spell: Any) -> None:
    questions = [f"question {i}" for i in range(150)]
    pairs = [pair(i, f"good {i}", f"bad {i}", question) for i, question in enumerate(questions)]
    pairs += [pair(200 + i, spell(f"bad {i}"), spell(f"good {i}"), spell(f"question {i}")) for i in range(10)]
    labels = [label_row(i, f"answer {i}", i % 2, question) for i, question in enumerate(questions)]
    labels += [label_row(200 + i, spell(f"answer {i}"), 1 - i % 2, spell(f"question {i}")) for i in range(10)]
    feedback = [own_row(i) for i in range(300)] + [own_row(i, id=f"z{i}", reaction="down") for i in range(0, 40, 4)]
    data = {
        kind: write_rows(tmp_path / kind, rows)
        for kind, rows in (("feedback", feedback), ("preferences", pairs), ("safety", labels))
    }
    data = {kind: {"path": path, "format": "jsonl"} for kind, path in data.items()}  # type: ignore[misc]
    card, _ = build(tmp_path, data)
    assert {kind: counts["contradictory"] for kind, counts in card["duplicates"].items()} == {
        "feedback": 20, "preferences": 20, "safety": 20
    }  # fmt: skip
    assert sum("contradict another one" in text for text in card["warnings"]) == 3
    card, love_rows = build(tmp_path, data, contradictions="ignored")
    assert all(card["counts"][kind]["dropped"] == {"contradicts another row": 20} for kind in data)
    assert len(love_rows) == 290


@pytest.mark.parametrize("rejected", ["same text", " same text", "same  text\n", "same\ttext"])
def test_a_pair_that_differs_in_white_space_is_no_pair(rejected: str) -> None:
    raw = json.dumps(pair(1, "same text", rejected, "q")).encode()
    (row,) = validate_json_rows([raw], PreferenceRecord, datetime.now(UTC))
    assert row == RejectedRow("chosen equals rejected")


@pytest.mark.parametrize(
    ("rated_rows", "event_rows", "is_warned"),
    [(300, 0, True), (285, 0, True), (0, 300, True), (150, 140, True), (60, 60, False)],
)
def test_a_log_of_rated_rows_says_that_it_has_no_base_rate(
    tmp_path: Path, rated_rows: int, event_rows: int, is_warned: bool
) -> None:
    names = ("love", "thumbs_down")
    rows = [own_row(i, reaction=names[i % 2] if i < rated_rows else None) for i in range(300)]
    events = [event(names[i % 2], 1, response_id=f"f{299 - i}", id=f"e{i}") for i in range(event_rows)]
    data = {"feedback": write_rows(tmp_path / "log.jsonl", rows)}
    data |= {"reactions": write_rows(tmp_path / "events.jsonl", events)} if events else {}
    card, _ = build(tmp_path, data)
    assert sum("not a base rate" in text for text in card["warnings"]) == is_warned


@pytest.mark.parametrize("field", ["user_id", "device", "author", "conversation_id", "id"])
@pytest.mark.parametrize(
    ("name", "is_personal"),
    [("bob{}@post.example", True), ("bob{}＠post.example", True), ("bob{}%40post.example", True),
     ("+49 151 123 45{:02d}", True), ("203.0.113.{}", True), ("2001:db8::{:x}", True), ("4915112345{:02d}", False),
     ("u1_{:024x}", False), ("10:45:{}", False), ("v1.2.{}", False),
     ("whatsapp:+491511234{:02d}", True), ("203.0.113.{}:443", True), ("::ffff:203.0.113.{}", True),
     ("(415) 555-26{:02d}", True), ("010-1234-56{:02d}", True), ("06 12 34 56 {:02d}", True),
     ("0049 151 12345{:02d}", True), ("user-203.0.113.{}", True), ("2026-01-{:02d}", False), ("1.2.3.4.{}", False),
     ("00123456{:02d}", False)],
)  # fmt: skip
def test_ids_that_are_personal_data_are_reported(tmp_path: Path, field: str, name: str, is_personal: bool) -> None:
    rows = [own_row(i, **{field: name.format(i)}) for i in range(3)]
    result, _, _ = read_sample(ProductSample("x", "feedback", {}, rows, {}), tmp_path)
    notes = [note for note in result["notes"] if "look like" in note]
    assert bool(notes) == is_personal
    assert not notes or (
        ("users" in notes[0]) == (field in ("user_id", "device", "author")) and result["notes"][notes[0]] == 3
    )
