"""Chats, traces and times as products write them: failed replies, histories, marks of a product, further spellings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rluf.prepare.labels import LOVED, NOT_LOVED
from rluf.prepare.readers.chats import RowShapeError
from rluf.prepare.readers.datasets import DATASET_READERS, ReaderOptions, SkippedRow
from rluf.prepare.readers.products import PRODUCT_READERS
from rluf.prepare.readers.times import normalize_time
from tests.prepare.product_samples import ProductSample, assistant, user
from tests.prepare.test_log_faults import foreign_row
from tests.prepare.test_log_variants import TIME, convert
from tests.prepare.test_products_table import read_sample

OPTIONS = ReaderOptions(0.1)


def read_rows(folder: Path, reader: str, *rows: Any, **entry: Any) -> tuple[dict[str, Any], dict[str, int], Any]:
    """Rows of a feedback export by id, with their label in `code`; notes; and dropped rows by reason."""
    sample = ProductSample("x", "feedback", {"reader": reader, **entry}, list(rows), {})
    result, records, labels = read_sample(sample, folder)
    dropped = {count.reason: count.rows for count in result["row_counts"] if count.outcome != "in"}
    by_id = {row["id"]: row | {"code": label} for row, label in zip(records, labels, strict=True)}
    return by_id, result["notes"], dropped


def libre(name: str, parent: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "messageId": name, "parentMessageId": parent, "isCreatedByUser": name[0] == "u", "text": f"text of {name}",
        "createdAt": TIME,
    } | changes  # fmt: skip


def openwebui(*messages: Mapping[str, Any]) -> dict[str, Any]:
    history = {"messages": {message["id"]: message for message in messages}, "currentId": messages[-1]["id"]}
    return {"id": "c", "user_id": "user", "updated_at": 1767225700, "chat": {"history": history, "messages": []}}


def node(name: str, parent: str | None, **changes: Any) -> dict[str, Any]:
    role = "user" if name[0] == "u" else "assistant"
    return {
        "id": name,
        "parentId": parent,
        "role": role,
        "content": f"text of {name}",
        "timestamp": 1767225600,
    } | changes


def test_errors_and_unfinished_messages_are_no_replies(tmp_path: Path) -> None:
    messages = [
        libre("u1", None), libre("a1", "u1", error=True, text="Something went wrong."),
        libre("a2", "u1", unfinished=True), libre("a3", "u1", feedback={"rating": "thumbsUp"}),
        libre("a4", "u1", unfinished=True, feedback={"rating": "thumbsDown"}), libre("u2", "a1"), libre("a5", "u2"),
    ]  # fmt: skip
    rows, _, dropped = read_rows(tmp_path, "librechat", {"conversationId": "c", "messages": messages})
    assert {name: row["code"] for name, row in rows.items()} == {"a3": LOVED, "a4": NOT_LOVED, "a5": None}
    assert dropped == {"error in place of a reply": 1, "unfinished reply": 1}
    assert [message["content"] for message in rows["a5"]["messages"]] == ["text of u1", "text of u2"]
    (tmp_path / "other").mkdir()
    chat = openwebui(
        node("u1", None), node("a1", "u1", content="", error={"content": "no"}), node("a2", "u1", done=False),
        node("a3", "u1", content=" "), node("a4", "u1", annotation={"rating": 1}),
    )  # fmt: skip
    rows, _, dropped = read_rows(tmp_path / "other", "openwebui_chats", chat)
    assert set(rows) == {"c-a4"}
    assert dropped == {"error in place of a reply": 1, "unfinished reply": 1, "reply without text": 1}


def test_a_branch_that_nobody_continued_is_not_continued(tmp_path: Path) -> None:
    chat = openwebui(
        node("u1", None), node("a1", "u1", annotation={"rating": 1}), node("a2", "u1", annotation={"rating": -1}),
        node("u2", "a2"), node("a3", "u2"),
    )  # fmt: skip
    rows, _, _ = read_rows(tmp_path, "openwebui_chats", chat)
    assert {name: row["continued"] for name, row in rows.items()} == {"c-a1": False, "c-a2": True, "c-a3": False}


@pytest.mark.parametrize(
    ("text", "reply", "note"),
    [('<details type="tool_calls" done="true" name="x">\n<summary>Done</summary>\n</details>\nIt is 5', "It is 5",
      "tool calls"),
     ('<details type="code_interpreter">```x```</details>Done', "Done", "tool calls"),
     ("<think>hm</think>\n\nyes", "yes", "reasoning"), ("hm, let me see\n</think>\n\nyes", "yes", "reasoning"),
     ("<details><summary>More</summary>kept</details>", "<details><summary>More</summary>kept</details>", None)],
)  # fmt: skip
def test_what_a_model_thinks_and_calls_is_no_reply(tmp_path: Path, text: str, reply: str, note: str | None) -> None:
    rows, notes, _ = read_rows(tmp_path, "openwebui_chats", openwebui(node("u1", None), node("a1", "u1", content=text)))
    assert rows["c-a1"]["response"] == reply and {name for name in notes if notes[name]} == ({note} if note else set())
    row, row_notes = convert(foreign_row(1, m="q", r=text), response="r")
    assert row["response"] == reply and (note is None or row_notes[note] == 1)
    # A user may ask about the marks themselves.
    row, _ = convert(foreign_row(1, m="what is </think>?", r="a mark"), response="r")
    assert row["messages"] == [user("what is </think>?")]


def test_thoughts_without_an_end_are_no_reply(tmp_path: Path) -> None:
    chat = openwebui(node("u1", None), node("a1", "u1", content="<think>hm, first"), node("a2", "u1"))
    assert read_rows(tmp_path, "openwebui_chats", chat)[2] == {"reply without text": 1}


@pytest.mark.parametrize(
    ("changes", "label"),
    [({"feedback": "thumbsUp"}, LOVED), ({"feedback": '{"rating": "thumbsDown"}'}, NOT_LOVED),
     ({"feedback": {"rating": None}}, None)],
)  # fmt: skip
def test_ratings_of_librechat_and_groups_by_several_fields(tmp_path: Path, changes: Any, label: int | None) -> None:
    row = {"_id": {"conversationId": "c1", "user": {"$oid": "65"}}, "messages": [libre("u1", None), libre("a1", "u1")]}
    row["messages"][1] |= changes  # type: ignore[index]
    rows, _, _ = read_rows(tmp_path, "librechat", row)
    assert (rows["a1"]["code"], rows["a1"]["conversation_id"]) == (label, "c1")


def slack(ts: str, text: str, **changes: Any) -> dict[str, Any]:
    return {"ts": f"17672256{ts}.1", "text": text, "user": "U1"} | changes


BOT = {"bot_id": "B", "user": "UB"}


def test_threads_of_slack(tmp_path: Path) -> None:
    seeds = [{"name": "+1", "users": ["UB", "U1"], "count": 2}, {"name": "-1", "users": ["UB"], "count": 1}]
    section = {"type": "section", "text": {"type": "mrkdwn", "text": "in a &lt;block&gt;"}}
    rows, notes, dropped = read_rows(
        tmp_path, "slack",
        {"channel": "C", "messages": [
            slack("00", "how?"), slack("01", "&lt;x&gt; <https://a.b/c|here> <https://d.e>", **BOT, reactions=seeds),
            slack("02", "second", **BOT), slack("03", "", **BOT, blocks=[section]),
        ]},
        {"channel": "D", "messages": [slack("10", "hello all", **BOT), slack("11", "", **BOT)]},
    )  # fmt: skip
    texts = {name: (row["response"], row["code"], len(row["messages"])) for name, row in rows.items()}
    assert texts == {
        "C-1767225601.1": ("<x> here https://d.e", LOVED, 1), "C-1767225602.1": ("second", None, 1),
        "C-1767225603.1": ("in a <block>", None, 1),
    }  # fmt: skip
    assert notes["reactions of bots to their own messages"] == 2 and notes["replies before the rated one"] == 3
    assert dropped == {"reply without a message of the user before it": 1}


def test_an_answer_to_an_image_is_not_one_to_the_question_before(tmp_path: Path) -> None:
    chat = [user("q"), assistant("a"), user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("a cat")]
    messages = [message | {"id": str(index)} for index, message in enumerate(chat)]
    row = {"id": "c", "createdAt": TIME, "userId": "u", "messages": messages}
    rows, notes, dropped = read_rows(tmp_path, "vercel", row)
    assert set(rows) == {"1"} and dropped == {"reply to a message without text": 1} and notes["images and files"] == 1


def test_several_replies_to_one_question(tmp_path: Path) -> None:
    chat = [user("q"), assistant("") | {"toolInvocations": [{}]}, assistant("a") | {"vote": "up"}]
    chat.append({"role": "data", "content": "x"})
    row = {"id": "c", "createdAt": TIME, "messages": [message | {"id": str(i)} for i, message in enumerate(chat)]}
    rows, _, dropped = read_rows(tmp_path, "vercel", row)
    assert (rows["2"]["code"], rows["2"]["messages"]) == (LOVED, [user("q")]) and dropped == {"reply without text": 1}
    row = foreign_row(1, m=[user("q"), assistant("one moment"), assistant("a")])
    read, notes = convert(row)
    assert (read["messages"], read["response"], notes["replies before the rated one"]) == ([user("q")], "a", 1)


def trace(inputs: Any, output: Any = "a", **changes: Any) -> dict[str, Any]:
    return {"id": "t", "timestamp": TIME, "userId": "u", "input": inputs, "output": output, "scores": []} | changes


EARLIER = [user("q1"), assistant("a1")]


@pytest.mark.parametrize("reader", ["langfuse", "langsmith"])
@pytest.mark.parametrize(
    ("inputs", "contents", "notes"),
    [({"question": "q2", "chat_history": [["human", "q1"], ["ai", "a1"]]}, ["q1", "a1", "q2"], {}),
     ({"input": "q2", "history": EARLIER}, ["q1", "a1", "q2"], {}),
     ({"input": "q2", "chat_history": json.dumps(EARLIER)}, ["q1", "a1", "q2"], {}),
     ({"query": "q2", "chat_history": [*EARLIER, user("q2")]}, ["q1", "a1", "q2"], {}),
     ({"input": "q2", "history": "Human: q1\nAI: a1"}, ["q2"], {"earlier messages in one text": 1}),
     ({"input": "q2", "context": ["a document"]}, ["q2"], {"inputs next to the question": 1}),
     ({"user_prompt": "q2", "system_prompt": "s"}, ["q2"], {"system prompts next to their messages": 1}),
     ({"messages": [user("q2")], "system": "s"}, ["q2"], {"system prompts next to their messages": 1}),
     ({"contents": [{"role": "user", "parts": [{"text": "q2"}]}]}, ["q2"], {}), ({"prompts": ["q2"]}, ["q2"], {}),
     ({"args": [[user("q2")]], "kwargs": {"temperature": 0}}, ["q2"], {})],
)  # fmt: skip
def test_messages_before_the_question_of_a_trace(
    tmp_path: Path, reader: str, inputs: Any, contents: list[str], notes: dict[str, int]
) -> None:
    row = {"id": "t", "start_time": TIME, "inputs": inputs, "outputs": {"output": "a"}}
    row = trace(inputs) if reader == "langfuse" else row
    rows, read_notes, _ = read_rows(tmp_path, reader, row)
    assert [message["content"] for message in rows["t"]["messages"]] == contents
    assert {name: count for name, count in read_notes.items() if count} == notes


@pytest.mark.parametrize(
    ("output", "text"),
    [({"completion": "a"}, "a"), ({"output": {"answer": "a"}}, "a"), ({"generations": [[{"text": "a"}]]}, "a"),
     ({"role": "assistant", "content": None, "tool_calls": [{}]}, "tool call without text"),
     ({"answer": ""}, "reply without text"), (None, "no assistant message")],
)  # fmt: skip
def test_replies_of_traces(tmp_path: Path, output: Any, text: str) -> None:
    rows, _, dropped = read_rows(tmp_path, "langfuse", trace("q", output), trace("q", id="other"))
    assert [row["response"] for name, row in rows.items() if name == "t"] + list(dropped) == [text]


def test_a_trace_whose_texts_are_in_its_observations(tmp_path: Path) -> None:
    generations = [
        {"type": "GENERATION", "startTime": f"2026-01-05T10:00:0{i}Z", "input": [user(f"q{i}")], "output": f"a{i}"}
        for i in (2, 1)
    ]
    observations = [{"type": "SPAN", "startTime": TIME, "output": "x"}, *generations]
    rows, notes, dropped = read_rows(
        tmp_path, "langfuse", trace(None, None, observations=observations, scores={"user-feedback": 1}),
        trace(None, id="no-input"), trace("q", id="none", type=None),
    )  # fmt: skip
    assert (rows["t"]["response"], rows["t"]["messages"], rows["t"]["code"]) == ("a2", [user("q2")], LOVED)
    assert notes["texts of traces taken from their last generation"] == 1
    assert dropped == {"no prompt": 1} and "none" in rows


def test_scores_of_evaluators_of_langsmith_are_never_love(tmp_path: Path) -> None:
    run = {"start_time": TIME, "inputs": {"input": "q"}, "outputs": {"output": "a"}}
    rows, notes, dropped = read_rows(
        tmp_path, "langsmith", {**run, "id": "1", "feedback_stats": {"harmful": {"n": 1, "avg": 1.0}}},
        {**run, "id": "2", "feedback_stats": {"user_thumbs": {"n": 1, "avg": 1.0}, "stars": {"n": 1, "avg": 1.0}}},
        {**run, "id": "3", "error": "TimeoutError"}, labels={"1": "loved"},
    )  # fmt: skip
    assert {name: row["code"] for name, row in rows.items()} == {"1": None, "2": LOVED}
    assert notes["scores that are not a user's"] == 1 and notes["several reactions in one row"] == 1
    assert dropped == {"run with an error": 1}


@pytest.mark.parametrize(
    ("changes", "reaction"),
    [({"metadata": {"feedback": "thumbs_up"}}, "thumbs_up"), ({"metadata": '{"user_feedback": "down"}'}, "down"),
     ({"feedback": {"rating": "up"}}, "up"), ({"metadata": {"rating": "5"}}, "5"),
     ({"metadata": {"feedback_id": "x", "topic": "like"}}, None), ({"metadata": None}, None)],
)  # fmt: skip
def test_reactions_to_stored_completions(tmp_path: Path, changes: Any, reaction: str | None) -> None:
    choice = {"message": assistant("a"), "finish_reason": "length"}
    row = {"id": "c", "created": 1767225600, "model": "m", "messages": [user("q")], "choices": [choice]}
    rows, notes, _ = read_rows(tmp_path, "openai", row | changes)
    assert (rows["c"]["reaction"], rows["c"]["finish_reason"]) == (reaction, "length")
    assert ("ratings of unknown scale" in notes) == (reaction == "5")


def battle(**changes: Any) -> Any:
    row = {"id": 1, "prompt": "p", "response_a": "x", "response_b": '["y"]', "winner": "model_b"} | changes
    (item,) = PRODUCT_READERS["lmsys"].read_item(row, OPTIONS)  # type: ignore[misc]
    return item if isinstance(item, SkippedRow) else (item["chosen"], item["rejected"])


def test_battles_as_texts_and_lists() -> None:
    assert battle() == ('["y"]', "x") and battle(winner="A") == ("x", '["y"]')
    assert battle(winner="Tie (both bad)") == SkippedRow("tie")
    assert battle(prompt='["p"]', response_a='["x"]') == ("y", "x")
    with pytest.raises(RowShapeError, match="as many replies as prompts"):
        battle(prompt='["p", "q"]')
    outcome = {"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 0}
    with pytest.raises(RowShapeError, match="winner must be"):
        PRODUCT_READERS["lmsys"].read_item({"id": 1, "prompt": "p", **outcome}, OPTIONS)  # type: ignore[misc]


def test_completions_of_ultrafeedback() -> None:
    def read(*scores: Any, write: Any = list) -> Any:
        completions = [{"response": f"r{i}", "fine-grained_score": a, "overall_score": b} for i, (a, b) in scores]
        row = {"instruction": "q", "completions": write(completions)}
        (item,) = DATASET_READERS["ultrafeedback"].read_item(row, OPTIONS)  # type: ignore[misc]
        return item if isinstance(item, SkippedRow) else (item["chosen"], item["rejected"])

    scores = list(enumerate([(1.0, 10.0), (3.5, 5.0), (None, 9.0)]))
    assert read(*scores) == read(*scores, write=json.dumps) == ("r1", "r0")
    by_name = lambda items: {name: [item[name] for item in items] for name in items[0]}  # noqa: E731
    assert read(*scores, write=by_name) == ("r1", "r0")
    assert read(*scores[:1]) == read(*scores[1:2]) == SkippedRow("fewer than two completions with a score")
    assert read((0, (float("nan"), 4.0)), (1, ("N/A", 2.0))) == ("r0", "r1")


@pytest.mark.parametrize(
    ("text", "time"),
    [("2025/11/29 9:05", "2025-11-29T09:05:00+00:00"), ("2025年11月9日", "2025-11-09T00:00:00+00:00"),
     ("2025. 11. 29.", "2025-11-29T00:00:00+00:00"), ("2025년 3월 5일 14:30", "2025-03-05T14:30:00+00:00"),
     ("2025-11-29 3:04:05 PM", "2025-11-29T15:04:05+00:00"), ("Nov 29, 2025", "2025-11-29T00:00:00+00:00"),
     ("29 November 2025", "2025-11-29T00:00:00+00:00"), ("Nov 29 2025 12:04AM", "2025-11-29T00:04:00+00:00"),
     ("2025-11-29 10:00:00.000 America/New_York", "2025-11-29T10:00:00-05:00"), ("2025-11", "2025-11"),
     ("29/11/2025", "29/11/2025"),
     ("yesterday at 3 PM", "yesterday at 3 PM"), ("10:00 Some/Where", "10:00 Some/Where")],
)  # fmt: skip
def test_further_spellings_of_times(text: str, time: str) -> None:
    assert normalize_time(text) == time


@pytest.mark.parametrize(("text", "reason"), [("11/29/2026", "day or month first"), ("last week", "unknown format")])
def test_a_time_that_cannot_be_read_says_how_to_name_its_format(text: str, reason: str) -> None:
    with pytest.raises(RowShapeError, match=f"{reason}.*time: created as"):
        convert(foreign_row(1, t=text))
    assert convert(foreign_row(1, t="11/29/2025"), time="t as %m/%d/%Y")[0]["time"] == "2025-11-29T00:00:00+00:00"
