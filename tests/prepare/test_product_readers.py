"""Logs of other schemas become rows of rluf, by the column map or by a product reader."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from rluf.errors import SettingsError
from rluf.prepare.readers.datasets import ReaderOptions, SkippedRow
from rluf.prepare.readers.products import (
    PRODUCT_READERS,
    build_column_reader,
    get_by_path,
    normalize_reaction,
    normalize_time,
)
from rluf.prepare.schema import DATA_KINDS, LogRecord, validate_json_row

NOW = datetime(2026, 6, 1, tzinfo=UTC)
OPTIONS = ReaderOptions(test_share=0.2)


def read_items(reader_name: str, row: dict[str, Any]) -> list[Any]:
    """Items that a reader returns for a row; every row among them must be valid."""
    reader = PRODUCT_READERS[reader_name]
    items = reader.read_item(row, OPTIONS)
    record_type = DATA_KINDS[reader.kind_name].record_type
    for item in items:
        if not isinstance(item, SkippedRow):
            assert isinstance(validate_json_row(json.dumps(item).encode(), record_type, NOW), LogRecord)
    return list(items)


def test_the_column_map_reads_nested_fields() -> None:
    log = {
        "uuid": 7, "chat": {"id": "c", "owner": {"id": "bob"}, "n": "2"}, "at": 1735689600,
        "turns": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "hearts": [0, 1],
    }  # fmt: skip
    columns = {
        "id": "uuid", "conversation_id": "chat.id", "user_id": "chat.owner.id", "turn": "chat.n", "time": "at",
        "messages": "turns", "reaction": "hearts.-1", "model_version": "=v7", "topic": "chat.nothing",
    }  # fmt: skip
    row = build_column_reader(columns)(log)
    assert row == {
        "id": "7", "conversation_id": "c", "user_id": "bob", "turn": 2, "time": "2025-01-01T00:00:00+00:00",
        "messages": [{"role": "user", "content": "hi"}], "response": "hello", "reaction": "love", "model_version": "v7",
    }  # fmt: skip
    assert isinstance(validate_json_row(json.dumps(row).encode(), DATA_KINDS["feedback"].record_type, NOW), LogRecord)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(SettingsError, match=r"prepare\.columns\.respons: .* did you mean response"):
        build_column_reader({"respons": "text"})


@pytest.mark.parametrize(
    ("value", "name"),
    [(True, "love"), (False, None), (None, None), (1, "love"), (0, None), (-1, "thumbs_down"), ("like", "love"),
     ("Thumbs_Up", "love"), ("dislike", "thumbs_down"), ("haha", "haha"), ("", None), (0.5, "love")],
)  # fmt: skip
def test_reactions_are_normalized(value: object, name: str | None) -> None:
    assert normalize_reaction(value) == name


def test_times_are_normalized() -> None:
    expected = "2025-01-01T00:00:00+00:00"
    assert [
        normalize_time(value) for value in (1735689600, 1735689600000, "2025-01-01 00:00:00", "2025-01-01 00:00:00 UTC")
    ] == [expected] * 4
    assert normalize_time("soon") == "soon" and normalize_time(None) is None
    assert get_by_path({"a": [1]}, "a.5") is None and get_by_path({"a": 1}, "a.b") is None


def test_openai_completions() -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    choice = {"message": {"role": "assistant", "content": "hello"}}
    stored_completion = {
        "id": "chatcmpl-1", "created": 1735689600, "model": "m-1", "messages": messages, "choices": [choice],
        "user": "bob", "metadata": {"conversation_id": "c9", "reaction": "up"},
    }  # fmt: skip
    (row,) = read_items("openai", stored_completion)
    assert (row["response"], row["reaction"], row["turn"], row["conversation_id"]) == ("hello", "love", 1, "c9")
    assert row["messages"][1] == {"role": "user", "content": "hi"}
    flat_row = {
        "id": "x",
        "created_at": "2025-01-01T00:00:00Z",
        "model": "m",
        "messages": [*messages, choice["message"]],
    }
    (row,) = read_items("openai", flat_row)
    assert row["response"] == "hello" and row["user_id"] == "x" and row["reaction"] is None
    assert read_items("openai", {"messages": messages, "id": "x"}) == [SkippedRow("no assistant message")]
    tool_call = {"id": "x", "messages": messages, "model": "m", "choices": [{"message": {"content": None}}]}
    assert read_items("openai", tool_call) == [SkippedRow("tool call without text")]


def test_wildchat_conversations() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {
        "conversation_hash": "h", "model": "m", "timestamp": "2025-01-01 00:00:00", "language": "German",
        "hashed_ip": "ip",
        "conversation": [{"role": role, "content": text, "timestamp": None} for role, text in turns],
    }  # fmt: skip
    first, second = read_items("wildchat", row)
    assert (first["response"], first["continued"], first["turn"]) == ("b", True, 1)
    assert (second["response"], second["continued"], second["turn"], len(second["messages"])) == ("d", False, 2, 3)
    assert first["user_id"] == second["user_id"] != "ip" and first["locale"] == "de"
    assert read_items("wildchat", row | {"conversation": []}) == [SkippedRow("no assistant message")]


def test_arena_votes_and_prompts() -> None:
    context = [{"role": "user", "content": "q"}]
    vote = {
        "question_id": "1", "winner": "model_b", "conversation_a": [*context, {"role": "assistant", "content": "x"}],
        "conversation_b": [*context, {"role": "assistant", "content": "y"}],
    }  # fmt: skip
    (row,) = read_items("lmsys", vote)
    assert (row["chosen"], row["rejected"]) == ("y", "x")
    assert read_items("lmsys", vote | {"winner": "tie (bothbad)"}) == [SkippedRow("tie")]
    other_context = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "y"}]
    assert isinstance(read_items("lmsys", vote | {"conversation_b": other_context})[0], SkippedRow)
    (prompt,) = read_items("lmsys_prompts", {"conversation": vote["conversation_a"], "language": "English"})
    assert prompt["messages"] == context and prompt["topic"] == "en"


def test_langfuse_traces() -> None:
    trace = {
        "id": "t", "timestamp": "2025-01-01T00:00:00.000Z", "userId": "bob", "sessionId": "s", "release": "r2",
        "input": {"messages": [{"role": "user", "content": "hi"}]}, "output": {"role": "assistant", "content": "hello"},
        "scores": [{"name": "user-feedback", "value": 1}, {"name": "latency", "value": 0}],
    }  # fmt: skip
    (row,) = read_items("langfuse", trace)
    assert (row["response"], row["reaction"], row["conversation_id"], row["model_version"]) == (
        "hello",
        "love",
        "s",
        "r2",
    )
    (thumbs_down,) = read_items("langfuse", trace | {"scores": [{"name": "user-feedback", "value": 0}]})
    assert thumbs_down["reaction"] == "thumbs_down"
    (unrated,) = read_items("langfuse", trace | {"scores": [], "input": "hi", "output": "hello"})
    assert unrated["reaction"] is None and unrated["messages"] == [{"role": "user", "content": "hi"}]
    assert read_items("langfuse", trace | {"output": None}) == [SkippedRow("no assistant message")]
