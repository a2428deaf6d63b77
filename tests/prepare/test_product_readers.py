"""Logs of another shape become our rows, by the column map or a ready map."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from rluf.errors import SettingsError
from rluf.prepare.readers.datasets import Drop, Options
from rluf.prepare.readers.products import MAPS, column_map, dig, moment, reaction_name
from rluf.prepare.schema import KINDS, Record
from rluf.prepare.validation import validate

NOW = datetime(2026, 6, 1, tzinfo=UTC)
OPTIONS = Options(test_share=0.2)


def read(name: str, row: dict[str, Any]) -> list[Any]:
    """What a map makes of a row; every row must pass validation."""
    made = MAPS[name].read(row, OPTIONS)
    for item in made:
        if not isinstance(item, Drop):
            assert isinstance(validate(json.dumps(item).encode(), KINDS[MAPS[name].kind].record, NOW), Record)
    return list(made)


def test_the_column_map_digs() -> None:
    log = {
        "uuid": 7, "chat": {"id": "c", "owner": {"id": "bob"}, "n": "2"}, "at": 1735689600,
        "turns": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "hearts": [0, 1],
    }  # fmt: skip
    columns = {
        "id": "uuid", "conversation_id": "chat.id", "user_id": "chat.owner.id", "turn": "chat.n", "time": "at",
        "messages": "turns", "reaction": "hearts.-1", "model_version": "=v7", "topic": "chat.nothing",
    }  # fmt: skip
    row = column_map(columns)(log)
    assert row == {
        "id": "7", "conversation_id": "c", "user_id": "bob", "turn": 2, "time": "2025-01-01T00:00:00+00:00",
        "messages": [{"role": "user", "content": "hi"}], "response": "hello", "reaction": "love", "model_version": "v7",
    }  # fmt: skip
    assert isinstance(validate(json.dumps(row).encode(), KINDS["feedback"].record, NOW), Record)


def test_a_field_that_is_not_ours_is_named() -> None:
    with pytest.raises(SettingsError, match=r"prepare\.columns\.respons: .* did you mean response"):
        column_map({"respons": "text"})


@pytest.mark.parametrize(
    ("value", "name"),
    [(True, "love"), (False, None), (None, None), (1, "love"), (0, None), (-1, "thumbs_down"), ("like", "love"),
     ("Thumbs_Up", "love"), ("dislike", "thumbs_down"), ("haha", "haha"), ("", None), (0.5, "love")],
)  # fmt: skip
def test_reactions(value: object, name: str | None) -> None:
    assert reaction_name(value) == name


def test_times() -> None:
    same = "2025-01-01T00:00:00+00:00"
    assert [moment(v) for v in (1735689600, 1735689600000, "2025-01-01 00:00:00", "2025-01-01 00:00:00 UTC")] == [
        same
    ] * 4
    assert moment("soon") == "soon" and moment(None) is None
    assert dig({"a": [1]}, "a.5") is None and dig({"a": 1}, "a.b") is None


def test_openai_completions() -> None:
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    choice = {"message": {"role": "assistant", "content": "hello"}}
    stored = {
        "id": "chatcmpl-1", "created": 1735689600, "model": "m-1", "messages": chat, "choices": [choice], "user": "bob",
        "metadata": {"conversation_id": "c9", "reaction": "up"},
    }  # fmt: skip
    (row,) = read("openai", stored)
    assert (row["response"], row["reaction"], row["turn"], row["conversation_id"]) == ("hello", "love", 1, "c9")
    assert row["messages"][1] == {"role": "user", "content": "hi"}
    flat = {"id": "x", "created_at": "2025-01-01T00:00:00Z", "model": "m", "messages": [*chat, choice["message"]]}
    (row,) = read("openai", flat)
    assert row["response"] == "hello" and row["user_id"] == "x" and row["reaction"] is None
    assert read("openai", {"messages": chat, "id": "x"}) == [Drop("no assistant message")]
    tool = {"id": "x", "messages": chat, "model": "m", "choices": [{"message": {"content": None}}]}
    assert read("openai", tool) == [Drop("tool call without text")]


def test_wildchat_conversations() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    log = {
        "conversation_hash": "h", "model": "m", "timestamp": "2025-01-01 00:00:00", "language": "German",
        "hashed_ip": "ip",
        "conversation": [{"role": role, "content": text, "timestamp": None} for role, text in turns],
    }  # fmt: skip
    first, second = read("wildchat", log)
    assert (first["response"], first["continued"], first["turn"]) == ("b", True, 1)
    assert (second["response"], second["continued"], second["turn"], len(second["messages"])) == ("d", False, 2, 3)
    assert first["user_id"] == second["user_id"] != "ip" and first["locale"] == "de"
    assert read("wildchat", log | {"conversation": []}) == [Drop("no assistant message")]


def test_arena_votes_and_prompts() -> None:
    talk = [{"role": "user", "content": "q"}]
    vote = {
        "question_id": "1", "winner": "model_b", "conversation_a": [*talk, {"role": "assistant", "content": "x"}],
        "conversation_b": [*talk, {"role": "assistant", "content": "y"}],
    }  # fmt: skip
    (row,) = read("lmsys", vote)
    assert (row["chosen"], row["rejected"]) == ("y", "x")
    assert read("lmsys", vote | {"winner": "tie (bothbad)"}) == [Drop("tie")]
    longer = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "y"}]
    assert isinstance(read("lmsys", vote | {"conversation_b": longer})[0], Drop)
    (prompt,) = read("lmsys_prompts", {"conversation": vote["conversation_a"], "language": "English"})
    assert prompt["messages"] == talk and prompt["topic"] == "en"


def test_langfuse_traces() -> None:
    trace = {
        "id": "t", "timestamp": "2025-01-01T00:00:00.000Z", "userId": "bob", "sessionId": "s", "release": "r2",
        "input": {"messages": [{"role": "user", "content": "hi"}]}, "output": {"role": "assistant", "content": "hello"},
        "scores": [{"name": "user-feedback", "value": 1}, {"name": "latency", "value": 0}],
    }  # fmt: skip
    (row,) = read("langfuse", trace)
    assert (row["response"], row["reaction"], row["conversation_id"], row["model_version"]) == (
        "hello",
        "love",
        "s",
        "r2",
    )
    (down,) = read("langfuse", trace | {"scores": [{"name": "user-feedback", "value": 0}]})
    assert down["reaction"] == "thumbs_down"
    (none,) = read("langfuse", trace | {"scores": [], "input": "hi", "output": "hello"})
    assert none["reaction"] is None and none["messages"] == [{"role": "user", "content": "hi"}]
    assert read("langfuse", trace | {"output": None}) == [Drop("no assistant message")]
