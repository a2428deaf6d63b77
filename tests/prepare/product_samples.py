"""Small exports of products and data sets, written after their public schemas, with what each row means.

`expected` is the label of each row by id: loved (1), not loved (0), no reaction (None); of pairs and labeled rows the
chosen text and the label.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]


@dataclass(frozen=True)
class ProductSample:
    """One export: its kind of data, the entry that reads it, and what it means."""

    name: str
    kind: str
    entry: Row
    rows: Sequence[Row]
    expected: Row
    suffix: str = ".jsonl"
    dropped: Row = field(default_factory=dict)
    response: str | None = None
    """A response whose text must be among those read."""

    def write(self, folder: Path) -> Path:
        """Write the export and return its path."""
        path = folder / f"sample{self.suffix}"
        if self.suffix == ".json":
            path.write_text(json.dumps(self.rows, indent=2))
        elif self.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(list(self.rows)), path)
        elif self.suffix == ".csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
            path.write_text(text.getvalue())
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return path


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def _openwebui(number: int, rating: Any, rated: int) -> Row:
    messages = {}
    for turn in range(2):
        for role, parent in (("user", f"a{turn - 1}" if turn else None), ("assistant", f"u{turn}")):
            message_id = f"{role[0]}{turn}"
            messages[message_id] = {"id": message_id, "parentId": parent, "role": role, "content": f"{role} {turn}"}
    return {
        "id": f"fb{number}", "user_id": "user-a", "version": 0, "type": "rating", "created_at": 1767225600 + number,
        "data": {"rating": rating, "model_id": "llama3", "reason": None, "comment": "", "tags": ["chat"]},
        "meta": {"chat_id": "chat-1", "message_id": f"a{rated}", "message_index": 2 * rated + 2},
        "snapshot": {"chat": {"id": "chat-1", "chat": {
            "title": "t", "history": {"messages": messages, "currentId": "a1"}, "messages": list(messages.values()),
        }}},
    }  # fmt: skip


def _openwebui_chat() -> Row:
    """A chat whose first reply was rated down and regenerated; the second was rated up."""

    def message(name: str, parent: str | None, role: str, **changes: Any) -> Row:
        children: list[str] = []
        return {"id": name, "parentId": parent, "childrenIds": children, "role": role, "content": f"text of {name}",
                "timestamp": 1767225600, "model": "llama3"} | changes  # fmt: skip

    messages = [
        message("u1", None, "user"), message("a1", "u1", "assistant", annotation={"rating": -1, "reason": "wrong"}),
        message("a2", "u1", "assistant", annotation={"rating": 1, "tags": ["x"]}), message("u2", "a2", "user"),
        message("a3", "u2", "assistant", content='<details type="reasoning" done="true">hm</details>\nfine'),
    ]  # fmt: skip
    history = {"currentId": "a3", "messages": {item["id"]: item for item in messages}}
    shown = [item for item in messages if item["id"] != "a1"]
    return {"id": "chat-1", "user_id": "user-a", "title": "t", "updated_at": 1767225700, "archived": False, "chat": {
        "id": "", "title": "t", "models": ["llama3"], "history": history, "messages": shown, "tags": [],
        "timestamp": 1767225600000, "files": [],
    }}  # fmt: skip


def _librechat() -> Row:
    def message(name: str, parent: str | None, by_user: bool, **changes: Any) -> Row:
        return {
            "messageId": name, "parentMessageId": parent or "00000000-0000-0000-0000-000000000000",
            "conversationId": "conv-1", "sender": "User" if by_user else "GPT-4o", "isCreatedByUser": by_user,
            "text": f"text of {name}", "createdAt": "2026-01-05T10:00:00.000Z", "model": None if by_user else "gpt-4o",
        } | changes  # fmt: skip

    parts = [{"type": "think", "think": "hm"}, {"type": "text", "text": "text in parts"},
             {"type": "tool_call", "tool_call": {"name": "search"}}]  # fmt: skip
    return {
        "conversationId": "conv-1", "title": "t", "user": "user-a", "endpoint": "openAI",
        "messages": [
            message("m1", None, True),
            message("m2", "m1", False, feedback={"rating": "thumbsDown", "tag": "inaccurate"}),
            message("m2b", "m1", False, feedback={"rating": "thumbsUp"}),
            message("m3", "m2b", True),
            message("m4", "m3", False, text="", content=parts),
        ],
    }  # fmt: skip


def _librechat_collection() -> list[Row]:
    """Messages of LibreChat's collection as mongoexport writes them, those of two chats in any order."""
    messages = [
        message | {"_id": {"$oid": f"65a{index:021d}"}, "user": "user-a", "__v": 0,
                   "createdAt": {"$date": f"2026-01-05T10:0{index}:00.000Z"}}
        for index, message in enumerate(_librechat()["messages"])
    ]  # fmt: skip
    other = [message | {"conversationId": "conv-2", "messageId": f"x{index}", "parentMessageId": f"x{index - 1}"}
             for index, message in enumerate(messages[:2])]  # fmt: skip
    return [*other[::-1], *messages[::-1]]


def _observation(number: int, **changes: Any) -> Row:
    return {
        "id": f"o{number}", "traceId": f"t{number}", "type": "GENERATION", "startTime": "2026-01-05T10:00:00.000Z",
        "endTime": "2026-01-05T10:00:02.000Z", "model": "m", "modelParameters": {}, "usage": {"total": 9},
        "input": [user("hi")], "output": assistant(f"hello {number}"), "level": "DEFAULT", "parentObservationId": None,
    } | changes  # fmt: skip


def _vercel_message(name: str, role: str, *parts: Row) -> Row:
    return {"id": name, "role": role, "parts": [{"type": "step-start"}, *parts], "metadata": {"model": "m"}}


_VERCEL = {
    "id": "chat-1", "userId": "user-a", "createdAt": "2026-01-05T10:00:00Z", "messages": [
        _vercel_message("v1", "user", {"type": "text", "text": "hi"}, {"type": "file", "url": "x.png"}),
        _vercel_message("v2", "assistant", {"type": "reasoning", "text": "hm"}, {"type": "text", "text": "hello"}),
        _vercel_message("v3", "user", {"type": "text", "text": "more"}),
        _vercel_message("v4", "assistant", {"type": "tool-weather", "state": "output-available"},
                        {"type": "text", "text": "sunny"}),
    ],
}  # fmt: skip


def _slack() -> Row:
    def message(ts: str, text: str, **changes: Any) -> Row:
        return {"type": "message", "ts": ts, "thread_ts": "1767225600.000100", "text": text} | changes

    bot = {"bot_id": "B1", "user": "U9", "bot_profile": {"name": "helper"}}
    return {"channel": "C1", "messages": [
        message("1767225600.000100", "how do I reset it?", user="U1"),
        message("1767225601.000100", "hold the button", **bot,
                reactions=[{"name": "heart", "users": ["U1"], "count": 1}]),
        message("1767225602.000100", "and then?", user="U1"),
        message("1767225603.000100", "wait", **bot, reactions=[{"name": "-1", "users": ["U1"], "count": 1}]),
        message("1767225604.000100", "", user="U2", subtype="channel_join"),
    ]}  # fmt: skip


def _langfuse(number: int, scores: list[Any], **changes: Any) -> Row:
    return {
        "id": f"t{number}", "timestamp": "2026-01-05T10:00:00.000Z", "name": "chat", "userId": "user-a",
        "sessionId": "s1", "release": "v3", "tags": [], "metadata": {"topic": "help"},
        "input": {"messages": [user("hi")]}, "output": assistant("hello"), "scores": scores,
    } | changes  # fmt: skip


def _score(value: float | None, text: str | None = None, **changes: Any) -> Row:
    return {"id": "s", "name": "user-feedback", "value": value, "stringValue": text, "source": "API",
            "dataType": "NUMERIC"} | changes  # fmt: skip


_LANGFUSE_BLOB = [
    {"id": f"t{number}", "timestamp": "2026-01-05 10:00:00.000", "user_id": "user-a", "session_id": "s1",
     "release": "v3", "metadata": '{"topic": "help"}', "input": json.dumps([user("hi")]),
     "output": json.dumps(assistant(f"hello {number}"))}
    for number in range(3)
]  # fmt: skip


def _langsmith(number: int, stats: Row | None, **changes: Any) -> Row:
    message = {"id": ["langchain", "schema", "messages", "HumanMessage"], "kwargs": {"content": "hi", "type": "human"}}
    reply = {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "AIMessage"],
             "kwargs": {"content": f"hello {number}"}}  # fmt: skip
    return {
        "id": f"r{number}", "trace_id": f"r{number}", "parent_run_id": None, "run_type": "chain",
        "start_time": "2026-01-05T10:00:00.000000", "inputs": {"messages": [[message]]},
        "outputs": {"generations": [[{"text": f"hello {number}", "message": reply}]]}, "feedback_stats": stats,
        "extra": {"metadata": {"user_id": "user-a", "thread_id": "th1", "ls_model_name": "m"}},
    } | changes  # fmt: skip


def _stats(mean: float, count: int = 1) -> Row:
    return {"user_score": {"n": count, "avg": mean, "values": {}}}


def _argilla(number: int, *ratings: Any) -> Row:
    answers = [{"value": value, "user_id": f"rater-{i}", "status": "submitted"} for i, value in enumerate(ratings)]
    return {
        "id": f"rec{number}", "status": "completed", "fields": {"prompt": "hi", "response": f"hello {number}"},
        "metadata": {"model": "m"}, "suggestions": {}, "inserted_at": "2026-01-05T10:00:00",
        "responses": {"rating": answers} if answers else {}, "vectors": {},
    }  # fmt: skip


def _intercom(number: int, rating: int | None) -> Row:
    def part(kind: str, body: str | None, part_type: str = "comment") -> Row:
        return {"type": "conversation_part", "part_type": part_type, "body": body, "author": {"type": kind, "id": "1"}}

    return {
        "type": "conversation", "id": str(number), "created_at": 1767225600 + number,
        "contacts": {"type": "contact.list", "contacts": [{"type": "contact", "id": "contact-a"}]},
        "source": {"type": "conversation", "body": "<p>It does not start</p>", "author": {"type": "user", "id": "x"}},
        "conversation_parts": {"conversation_parts": [
            part("bot", "<p>Try this:<br>press it</p>"), part("admin", "check logs", "note"), part("user", "<p>ok</p>"),
            part("admin", f"<p>Fixed {number}</p>"), part("bot", None, "close"), part("user", "<p>thanks</p>"),
        ]},
        "conversation_rating": None if rating is None else {"rating": rating, "remark": "", "created_at": 1767229200},
    }  # fmt: skip


_OPENAI = [
    {"id": "c1", "object": "chat.completion", "created": 1767225600, "model": "m", "metadata": {"reaction": "up"},
     "messages": [user([{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "x"}}])],
     "choices": [{"index": 0, "message": assistant("a cat")}, {"index": 1, "message": assistant("a dog")}]},
    {"id": "c2", "created": 1767225601, "model": "m", "metadata": {"reaction": "down"}, "messages": [
        user("weather?"), {"role": "assistant", "content": None, "tool_calls": [{"id": "t"}]},
        {"role": "tool", "content": "sunny", "tool_call_id": "t"}],
     "choices": [{"index": 0, "message": assistant("sunny")}]},
    {"id": "c3", "created": 1767225602, "model": "m", "metadata": {}, "messages": [user("hi")],
     "choices": [{"index": 0, "message": {"role": "assistant", "content": None, "tool_calls": [{"id": "t"}]}}]},
]  # fmt: skip

_WILDCHAT = {
    "conversation_hash": "h", "model": "gpt-4", "timestamp": "2026-01-05T10:00:00", "language": "English",
    "hashed_ip": "ip", "toxic": False, "conversation": [
        {**user("a"), "turn_identifier": 1}, {**assistant("b"), "turn_identifier": 1}, user("c"), assistant("d"),
    ],
}  # fmt: skip

_OASST = {"message_tree_id": "x", "tree_state": "ready_for_export", "prompt": {
    "message_id": "x", "text": "q", "role": "prompter", "replies": [
        {"text": "best", "role": "assistant", "rank": 0, "replies": []},
        {"text": "worst", "role": "assistant", "rank": 2, "replies": []},
        {"text": "spam", "role": "assistant", "rank": 1, "deleted": True, "replies": []},
    ],
}}  # fmt: skip

_BATTLE = {
    "question_id": "1", "model_a": "a", "model_b": "b", "winner": "model_b", "turn": 1, "language": "English",
    "conversation_a": [user("q"), assistant("x")], "conversation_b": [user("q"), assistant("y")],
}  # fmt: skip


def _arena_row(number: int, outcome: str, **changes: Any) -> Row:
    return {
        "id": 30000 + number, "model_a": "a", "model_b": "b", "prompt": json.dumps([f"q{number}"]),
        "response_a": json.dumps([f"x{number}"]), "response_b": json.dumps([f"y{number}"]),
        **{f"winner_{name}": int(name == outcome) for name in ("model_a", "model_b", "tie")},
    } | changes  # fmt: skip


def _aspects(text: str, mean: float, overall: float) -> Row:
    rating = {"Rating": "4", "Rationale": "r"}
    return {"model": text, "response": text, "fine-grained_score": mean, "overall_score": overall, "critique": "c",
            "annotations": {"helpfulness": rating, "honesty": rating}, "principle": "helpfulness"}  # fmt: skip


_HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"

_WAREHOUSE_COLUMNS = {
    "id": "event_id", "user_id": "user.id", "time": "ts", "messages": "payload.chat", "reaction": "payload.fb.stars",
}  # fmt: skip
_STARS = {">=4": "loved", "<=2": "not_loved", "3": "ignored"}


def _warehouse(number: int, stars: int | None) -> Row:
    chat = [user("hi"), assistant(f"hello {number}")]
    payload = {"chat": json.dumps(chat), "fb": {"stars": stars}}
    return {
        "event_id": str(number), "user": json.dumps({"id": "user-a"}), "ts": "2026-01-05 10:00:00 -0800",
        "payload": json.dumps(payload),
    }  # fmt: skip


_STAR_LABELS = {"1": 0, "2": 0, "4": 1, "5": 1, "6": None}
_WAREHOUSE = [_warehouse(number, number if number < 6 else None) for number in (1, 2, 4, 5, 6)]

SAMPLES: tuple[ProductSample, ...] = (
    ProductSample(
        "Open WebUI feedback export", "feedback", {"reader": "openwebui"},
        [_openwebui(1, 1, 0), _openwebui(2, -1, 1), _openwebui(3, "1", 1)], {"fb1": 1, "fb2": 0, "fb3": 1}, ".json",
        response="assistant 0",
    ),
    ProductSample(
        "Open WebUI chat export", "feedback", {"reader": "openwebui_chats"}, [_openwebui_chat()],
        {"chat-1-a1": 0, "chat-1-a2": 1, "chat-1-a3": None}, ".json", response="fine",
    ),
    ProductSample(
        "LibreChat messages (mongoexport)", "feedback", {"reader": "librechat_messages"}, _librechat_collection(),
        {"m2": 0, "m2b": 1, "m4": None, "x1": 0}, response="text in parts",
    ),
    ProductSample(
        "LibreChat conversation export", "feedback", {"reader": "librechat"}, [_librechat()],
        {"m2": 0, "m2b": 1, "m4": None}, response="text in parts",
    ),
    ProductSample(
        "Vercel AI SDK chats (UIMessage)", "feedback", {"reader": "vercel"}, [_VERCEL], {"v2": None, "v4": None},
        response="sunny",
    ),
    ProductSample(
        "Vercel AI SDK messages (table)", "feedback", {"reader": "vercel_messages"},
        [{"id": message["id"], "chatId": "chat-1", "role": message["role"], "parts": json.dumps(message["parts"]),
          "createdAt": f"2026-01-05 10:00:0{index}"} for index, message in enumerate(_VERCEL["messages"])],
        {"v2": None, "v4": None}, ".csv", response="sunny",
    ),
    ProductSample(
        "Vercel AI SDK votes", "reactions", {"reader": "vercel_votes"},
        [{"chatId": "chat-1", "messageId": "v2", "isUpvoted": True, "createdAt": "2026-01-05T10:00:00Z"},
         {"chatId": "chat-1", "messageId": "v4", "isUpvoted": "f", "createdAt": "2026-01-05T10:00:00Z"}],
        {"thumbs_up": 1, "thumbs_down": 1},
    ),
    ProductSample(
        "Slack threads (conversations.replies)", "feedback", {"reader": "slack"}, [_slack()],
        {"C1-1767225601.000100": 1, "C1-1767225603.000100": 0}, response="hold the button",
    ),
    ProductSample(
        "Slack channels (export)", "feedback", {"reader": "slack_messages"},
        [*_slack()["messages"][::-1], {"type": "message", "ts": "1767225700.000100", "user": "U1", "text": "alone"}],
        {"-1767225601.000100": 1, "-1767225603.000100": 0}, ".json", dropped={"no assistant message": 1},
        response="hold the button",
    ),
    ProductSample(
        "Langfuse traces, scores as ids", "feedback", {"reader": "langfuse"}, [_langfuse(1, ["s1"]), _langfuse(2, [])],
        {"t1": None, "t2": None},
    ),
    ProductSample(
        "Langfuse traces with scores", "feedback", {"reader": "langfuse"},
        [_langfuse(1, [_score(1, "True", dataType="BOOLEAN")]), _langfuse(2, [_score(0, "False", dataType="BOOLEAN")]),
         _langfuse(3, [_score(0, "thumbs-up", dataType="CATEGORICAL")]), _langfuse(4, [_score(1)]),
         _langfuse(5, [_score(0)]), _langfuse(6, [_score(0), _score(1, source="EVAL", name="rating")]),
         _langfuse(7, [_score(1, name="negative_user_feedback")]), _langfuse(8, [_score(0.7, name="latency")])],
        {"t1": 1, "t2": 0, "t3": 1, "t4": 1, "t5": 0, "t6": 0, "t7": 0, "t8": None},
    ),
    ProductSample(
        "Langfuse blob export: traces", "feedback", {"reader": "langfuse"}, _LANGFUSE_BLOB,
        {"t0": None, "t1": None, "t2": None}, response="hello 2",
    ),
    ProductSample(
        "Langfuse scores (API, blob export)", "reactions", {"reader": "langfuse_scores"},
        [{"id": "s1", "trace_id": "t0", "name": "user-feedback", "value": 1, "string_value": "True", "source": "API",
          "data_type": "BOOLEAN", "timestamp": "2026-01-05 10:00:01"},
         {"id": "s2", "traceId": "t1", "name": "user-feedback", "value": 0, "source": "API", "dataType": "NUMERIC",
          "timestamp": "2026-01-05T10:00:01Z"},
         {"id": "s3", "traceId": "t2", "name": "helpfulness", "value": 1, "source": "EVAL", "dataType": "NUMERIC",
          "timestamp": "2026-01-05T10:00:01Z"}],
        {"thumbs_up": 1, "thumbs_down": 1}, dropped={"score is not a user's": 1},
    ),
    ProductSample(
        "Langfuse observations", "feedback", {"reader": "langfuse"},
        [_observation(1), _observation(2, model=None, providedModelName="m2"), _observation(3, type="SPAN")],
        {"o1": None, "o2": None}, dropped={"observation is not a generation": 1}, response="hello 2",
    ),
    ProductSample(
        "Langfuse scores of observations", "reactions", {"reader": "langfuse_observation_scores"},
        [{"id": f"s{number}", "traceId": f"t{number}", "observationId": f"o{number}" if number < 3 else None,
          "name": "user-feedback", "value": value, "source": "API", "dataType": "BOOLEAN",
          "timestamp": "2026-01-05T10:01:00Z"} for number, value in ((1, 1), (2, 0), (3, 1))],
        {"thumbs_up": 1, "thumbs_down": 1}, dropped={"no observation": 1},
    ),
    ProductSample(
        "LangSmith runs (JSONL)", "feedback", {"reader": "langsmith", "labels": {"1": "loved", "<1": "not_loved"}},
        [_langsmith(1, _stats(1.0)), _langsmith(2, _stats(0.34, 3)), _langsmith(3, None), _langsmith(4, _stats(0.0)),
         _langsmith(5, None, parent_run_id="r1")],
        {"r1": 1, "r2": 0, "r3": None, "r4": 0}, dropped={"run within another run": 1}, response="hello 2",
    ),
    ProductSample(
        "LangSmith bulk export (Parquet)", "feedback",
        {"reader": "langsmith", "labels": {"1": "loved", "<1": "not_loved"}},
        [{name: json.dumps(value) if isinstance(value, dict) else value
          for name, value in _langsmith(number, _stats(mean)).items()} for number, mean in ((1, 1.0), (2, 0.34))],
        {"r1": 1, "r2": 0}, ".parquet", response="hello 1",
    ),
    ProductSample(
        "Argilla records with ratings", "feedback", {"reader": "argilla", "labels": _STARS},
        [_argilla(1, 5, 1), _argilla(2, 4), _argilla(3)],
        {"rec1-rater-0-rating": 1, "rec1-rater-1-rating": 0, "rec2-rater-0-rating": 1}, dropped={"no reaction": 1},
    ),
    ProductSample(
        "Intercom conversations with ratings", "feedback", {"reader": "intercom", "labels": _STARS},
        [_intercom(1, 1), _intercom(2, 2), _intercom(4, 4), _intercom(5, 5), _intercom(6, None)], _STAR_LABELS,
        response="Fixed 5",
    ),
    ProductSample(
        "OpenAI stored completions", "feedback", {"reader": "openai"}, _OPENAI, {"c1": 1, "c2": 0},
        dropped={"tool call without text": 1}, response="a cat",
    ),
    ProductSample("WildChat", "feedback", {"reader": "wildchat"}, [_WILDCHAT], {"h-1": None, "h-3": None}, ".parquet"),
    ProductSample(
        "OASST trees", "preferences", {"reader": "oasst"}, [_OASST], {"best": "worst"}, dropped={"deleted message": 1}
    ),
    ProductSample(
        "OASST messages", "preferences", {"reader": "oasst_messages"},
        [{"message_id": name, "parent_id": parent, "message_tree_id": "q", "text": f"text {name}", "rank": rank,
          "role": "assistant" if parent else "prompter", "deleted": False}
         for name, parent, rank in (("b", "q", 1), ("q", None, None), ("a", "q", 0), ("lost", "gone", 0))],
        {"text a": "text b"}, ".parquet", dropped={"message outside its tree": 1},
    ),
    ProductSample(
        "LMSYS-Chat-1M", "prompts", {"reader": "lmsys_prompts"},
        [{"conversation_id": "1", "language": "English", "conversation": [user("q"), assistant("x")]}], {"q": None},
    ),
    ProductSample(
        "Arena battles", "preferences", {"reader": "lmsys"}, [_BATTLE, _BATTLE | {"winner": "tie"}], {"y": "x"},
        dropped={"tie": 1},
    ),
    ProductSample(
        "Arena 55k (winner_model_a, ...)", "preferences", {"reader": "lmsys"},
        [_arena_row(1, "model_a"), _arena_row(2, "model_b"), _arena_row(3, "tie"),
         _arena_row(4, "model_a", response_b="[null]"),
         _arena_row(5, "model_b", prompt='["q", "r"]', response_a='["x", "z"]', response_b='["y", "w"]'),
         _arena_row(6, "model_b", winner_model_b="1", prompt='["\\u4f60"]')],
        {"x1": "y1", "y2": "x2", "y6": "x6"}, ".csv",
        dropped={"tie": 1, "no response": 1, "the two conversations differ before their end": 1},
    ),
    ProductSample(
        "KTO (TRL)", "feedback", {},
        [{"prompt": "hi", "completion": " hello", "label": True},
         {"prompt": [user("hi")], "completion": [assistant("no")], "label": False}],
        {" hello": 1, "no": 0},
    ),
    ProductSample(
        "TRL pairs, UltraFeedback binarized", "preferences", {},
        [{"prompt": "q", "chosen": "good", "rejected": "bad"},
         {"prompt": "p", "chosen": [user("p"), assistant("fine")], "rejected": [user("p"), assistant("poor")],
          "messages": [user("p"), assistant("fine")], "score_chosen": 8.5, "score_rejected": 3.0},
         {"prompt": [user("r")], "chosen": [assistant("yes")], "rejected": [assistant("nope")]},
         {"chosen": [user("s"), assistant("ok")], "rejected": [user("s"), assistant("ko")]}],
        {"good": "bad", "fine": "poor", "yes": "nope", "ok": "ko"},
    ),
    ProductSample(
        "UltraFeedback", "preferences", {"reader": "ultrafeedback"},
        [{"source": "evol", "instruction": "q", "completions": [
            {"model": "a", "response": "mid", "overall_score": 6.0}, {"response": "top", "overall_score": 9.0},
            {"model": "c", "response": "low", "overall_score": 2.5}]},
         {"source": "truthful_qa", "instruction": "p", "completions": [
            _aspects("worst", 1.25, 10.0), _aspects("fair", 3.5, 6.0), _aspects("best", 4.75, 8.5)]}],
        {"top": "low", "best": "worst"},
    ),
    ProductSample(
        "Anthropic HH", "preferences", {}, [{"chosen": f"{_HH} see you", "rejected": f"{_HH} go away"}],
        {"see you": "go away"},
    ),
    ProductSample(
        "BeaverTails, PKU-SafeRLHF", "safety", {"reader": "beavertails"},
        [{"prompt": "q", "response": "sure", "category": {"violence": True, "fraud": False}, "is_safe": False},
         {"prompt": "q", "response_0": "no", "response_1": "ok", "is_response_0_safe": True,
          "is_response_1_safe": False}],
        {"sure": 0, "no": 1, "ok": 0},
    ),
    ProductSample("Prompts (TRL)", "prompts", {}, [{"prompt": "q"}, {"prompt": [user("p")]}], {"q": None, "p": None}),
    ProductSample(
        "CSV of BigQuery or Snowflake", "feedback", {"columns": _WAREHOUSE_COLUMNS, "labels": _STARS}, _WAREHOUSE,
        _STAR_LABELS, ".csv", response="hello 5",
    ),
    ProductSample(
        "Parquet with JSON in texts", "feedback", {"columns": _WAREHOUSE_COLUMNS, "labels": _STARS}, _WAREHOUSE,
        _STAR_LABELS, ".parquet", response="hello 5",
    ),
)  # fmt: skip
