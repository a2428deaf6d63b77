"""Odd but legal values in exports: ids that a spreadsheet rounded, streams that a proxy logged, trees, comments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rluf.prepare.labels import LOVED, NOT_LOVED
from rluf.prepare.readers.chats import RowShapeError
from tests.prepare.product_samples import ProductSample, assistant, user
from tests.prepare.test_log_faults import build, foreign_row, own_row, write_rows
from tests.prepare.test_log_variants import TIME, convert, read_file, read_product
from tests.prepare.test_products_table import read_sample


@pytest.mark.parametrize("value", [1.1579208923731622e17, "1.15792E+17", "1,15792E+17", "1e+18", -9.1e15])
@pytest.mark.parametrize("name", ["id", "u", "c"])
def test_an_id_that_a_spreadsheet_rounded_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RowShapeError, match="whose last digits are lost; export ids as text"):
        convert(foreign_row(1, **{name: value}))


@pytest.mark.parametrize("value", [115792089237316221, "115792089237316221", 12.0, "1e5", "E+17", "5e10-4f", "a1E+17"])
def test_an_id_that_looks_like_a_number_is_an_id(value: Any) -> None:
    assert convert(foreign_row(1, id=value))[0]["id"] == ("12" if value == 12.0 else str(value))


def test_rounded_ids_of_own_rows_are_a_warning(tmp_path: Path) -> None:
    rows = [own_row(i, **({"user_id": "1.15792E+17"} if i < 3 else {})) for i in range(200)]
    card, _ = build(tmp_path, {"feedback": [write_rows(tmp_path / "log.jsonl", rows)]})
    assert [text for text in card["warnings"] if "cut: 3; several users" in text]


@pytest.mark.parametrize("separator", ["", " ", "\r", "\t"])
def test_objects_without_line_breaks_are_rows(tmp_path: Path, separator: str) -> None:
    lines = ['{"a": "}{"}', '{"a": {"b": 1}}', '{"a": "x\\n"}']
    rows, problems = read_file(tmp_path / "firehose.jsonl", separator.join(lines))
    assert ([json.dumps(row) for row in rows], problems) == (lines, [])
    rows, problems = read_file(tmp_path / "lines.jsonl", '{"a": "} {"}\r\n{"a": "}{"}\r\n')
    assert (rows, problems) == ([{"a": "} {"}, {"a": "}{"}], [])
    _, problems = read_file(tmp_path / "cut.jsonl", separator.join(lines)[:-3])
    assert problems == ["broken JSON file"]


@pytest.mark.parametrize(
    ("cell", "value"),
    [(r'"say \"hi\""', None), (r'"\"hi"', None), (r'"C:\dir\"', "C:\\dir\\"), (r'"say \""hi\"""', r'say \"hi\"'),
     (r'say \"hi\"', r'say \"hi\"'), ('"say ""hi"""', 'say "hi"'), (r'"back\slash"', r"back\slash")],
)  # fmt: skip
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_quotes_after_backslashes_are_refused_by_name(
    tmp_path: Path, cell: str, value: str | None, delimiter: str
) -> None:
    content = f"a{delimiter}b\n{cell}{delimiter}1\nx{delimiter}2\n"
    rows, problems = read_file(tmp_path / "log.csv", content)
    assert problems == ([] if value is not None else ['quotes in cells are written \\" and not ""'])
    assert [row["a"] for row in rows] == ([value] if value is not None else []) + ["x"]


@pytest.mark.parametrize(
    ("response", "text", "notes"),
    [([{"type": "refusal", "refusal": "no"}], "no", {}),
     ([{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}], "ab", {}),
     ({"candidates": [{"content": {"parts": [{"text": "hm", "thought": True}, {"text": "a"}]}}]}, "a",
      {"reasoning": 1}),
     ({"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": "a", "thought": False}]}, "a",
      {"reasoning": 1}),
     ("data: [1, 2]", "data: [1, 2]", {}), ('data: {"name": "x"}', 'data: {"name": "x"}', {})],
)  # fmt: skip
def test_parts_that_refuse_or_think(response: Any, text: str, notes: Mapping[str, int]) -> None:
    row, row_notes = convert(foreign_row(1, m="q", r=response), response="r")
    assert (row["response"], row_notes) == (text, notes)


@pytest.mark.parametrize(
    "stream",
    ['data: {"id":"x","choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n', 'data:{"candidates":[]}',
     'event: message_start\ndata: {"type":"message_start"}\n', '\n\ndata: {"object":"chat.completion.chunk"}'],
)  # fmt: skip
def test_a_stream_that_a_proxy_logged_is_no_response(stream: str) -> None:
    with pytest.raises(RowShapeError, match="a stream of events, not its text"):
        convert(foreign_row(1, m="q", r=stream), response="r")


@pytest.mark.parametrize("key", ["system", "system_prompt", "systemPrompt", "instructions"])
def test_a_system_prompt_next_to_the_messages_is_counted(key: str) -> None:
    row, notes = convert(foreign_row(1, m={key: "Be kind.", "messages": [user("q"), assistant("a")]}))
    assert (row["messages"], notes) == ([user("q")], {"system prompts next to their messages": 1})


@pytest.mark.parametrize(("system", "notes"), [("Be kind.", 1), ("", 0), (None, 0)])
def test_a_system_prompt_of_a_data_set_for_training_is_counted(tmp_path: Path, system: str | None, notes: int) -> None:
    pair = {"system": system, "prompt": "q", "chosen": "a", "rejected": "b"}
    result, _, _ = read_sample(ProductSample("x", "preferences", {}, [pair], {}), tmp_path)
    assert result["notes"].get("system prompts next to their messages", 0) == notes


def chatgpt_node(name: str, role: str, parent: str, *parts: Any) -> dict[str, Any]:
    content = {"content_type": "text", "parts": list(parts)}
    message = {"id": name, "author": {"role": role}, "content": content}
    return {"id": name, "message": message, "parent": parent, "children": []}


@pytest.mark.parametrize(("rated", "context"), [("b", ["q"]), ("d", ["q", "a", "q2"])])
def test_the_tree_of_chatgpts_export(rated: str, context: list[str]) -> None:
    nodes = [
        {"id": "root", "message": None, "parent": None, "children": ["a"]}, chatgpt_node("a", "user", "root", "q"),
        chatgpt_node("b", "assistant", "a", "a"),
        chatgpt_node("c", "user", "b", {"content_type": "image_asset_pointer", "asset_pointer": "file"}, "q2"),
        chatgpt_node("e", "assistant", "c", "another"), chatgpt_node("d", "assistant", "c", "a2"),
    ]  # fmt: skip
    row, notes = convert(foreign_row(1, m={node["id"]: node for node in nodes}, k=rated), message="k")
    assert [message["content"] for message in row["messages"]] == context
    assert (row["response"], notes["images and files"]) == ({"b": "a", "d": "a2"}[rated], 1)


def intercom(rating: Mapping[str, Any], *parts: tuple[str, Any, str | None]) -> dict[str, Any]:
    entries = [{"part_type": "comment", "body": body, "author": {"type": kind, "id": i}} for kind, i, body in parts]
    return {
        "id": "1", "created_at": 1767225600, "conversation_rating": rating,
        "source": {"body": "<p>hi</p>", "author": {"type": "user", "id": "u"}},
        "conversation_parts": {"conversation_parts": entries},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("teammate", "response"),
    [({}, "bye"), ({"teammate": {"type": "bot", "id": "7"}}, "of the bot"), ({"teammate": {"id": 9}}, "bye"),
     ({"teammate": {"id": "gone"}}, "bye"), ({"teammate": None}, "bye")],
)  # fmt: skip
def test_the_rating_of_a_teammate_is_of_the_last_reply_of_that_one(
    tmp_path: Path, teammate: dict[str, Any], response: str
) -> None:
    row = intercom(
        {"rating": 5, **teammate}, ("bot", 7, "<p>of the bot</p>"), ("user", "u", "<p>thanks</p>"), ("team", "9", "bye")
    )
    rows, _ = read_product(tmp_path, "intercom", [row], labels={">=4": "loved"})
    assert rows == {"1": (response, LOVED)}


def test_images_in_html_are_counted(tmp_path: Path) -> None:
    row = intercom({"rating": 1}, ("bot", 1, '<p>ok <IMG src="x"></p>'))
    result, _, _ = read_sample(ProductSample("x", "feedback", {"reader": "intercom"}, [row], {}), tmp_path)
    assert result["notes"] == {"images and files": 1}


def test_a_bot_of_slack_without_id_is_a_bot(tmp_path: Path) -> None:
    messages = [
        {"ts": "1767225600.1", "user": "U1", "text": "q"},
        {"ts": "1767225601.1", "user": "B", "subtype": "bot_message", "text": "a", "username": "helper",
         "reactions": [{"name": "heart", "users": ["U1"]}]},
    ]  # fmt: skip
    rows, _ = read_product(tmp_path, "slack", [{"channel": "C", "messages": messages}])
    assert rows == {"C-1767225601.1": ("a", LOVED)}


@pytest.mark.parametrize(
    ("score", "label"),
    [({"stringValue": "great answer, thanks!", "dataType": "TEXT"}, None), ({"stringValue": None}, None),
     ({"stringValue": "False", "dataType": "BOOLEAN"}, NOT_LOVED), ({"stringValue": "True", "dataType": "TEXT"}, LOVED),
     ({"stringValue": "thumbs_up", "dataType": "CATEGORICAL"}, LOVED),
     ({"value": 0, "dataType": "NUMERIC"}, NOT_LOVED)],
)  # fmt: skip
def test_a_comment_is_no_thumb(tmp_path: Path, score: dict[str, Any], label: int | None) -> None:
    scores = [{"name": "user_feedback", "value": None, "source": "API", **score}]
    row = {"id": "t", "timestamp": TIME, "input": "q", "output": "a", "scores": scores}
    assert read_product(tmp_path, "langfuse", [row])[0]["t"] == ("a", label)
