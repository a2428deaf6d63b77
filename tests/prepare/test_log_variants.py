"""Further ways in which products, warehouses and spreadsheets write a log: read rightly, or refused by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rluf.config.data import DataSource
from rluf.errors import DataError, SettingsError
from rluf.prepare.erasure import erase_users
from rluf.prepare.labels import IGNORED, LOVED, NOT_LOVED, LabelRules, check_reactions
from rluf.prepare.readers.chats import RowShapeError
from rluf.prepare.readers.columns import NOTES_KEY, build_converter, check_columns, name_reactions
from rluf.prepare.readers.datasets import DATASET_READERS, ReaderOptions, SkippedRow
from rluf.prepare.readers.files import read_line_batches
from rluf.prepare.readers.sources import resolve_sources
from rluf.prepare.readers.times import normalize_time
from rluf.prepare.redact import redact_text
from tests.prepare.product_samples import ProductSample
from tests.prepare.test_log_faults import COLUMNS, build, build_foreign, foreign_row, write_rows
from tests.prepare.test_products_table import read_sample

NO_RULES = LabelRules({})
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def convert(row: dict[str, Any], **columns: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A foreign row in rluf's schema, and its notes."""
    entry = DataSource(path="log.jsonl", columns=COLUMNS | columns)
    item = build_converter("feedback", entry, {}, NO_RULES, "latest", 0.2).read_row(row)
    assert not isinstance(item, SkippedRow)
    return item, item.pop(NOTES_KEY)


@pytest.mark.parametrize(
    "name",
    [":two_hearts:", "sparkling_heart", ":blue_heart:", ":heart_eyes_cat:", ":heartpulse:", "thumbs_up_sign", "+1",
     "thumbs up: medium skin tone", ":thumbsup::skin-tone-4:", "👍\u200d", "ＬＯＶＥ", "＋１", "t", "Y", "upvotes"],
)  # fmt: skip
def test_more_spellings_of_love(name: str) -> None:
    assert NO_RULES.find_code(name) == LOVED


@pytest.mark.parametrize("name", ["thumbs_down_sign", "downvotes", "dislikes", "F", "n", "\u22121", "-1.0"])
def test_more_spellings_of_no_love(name: str) -> None:
    assert NO_RULES.find_code(name) == NOT_LOVED


@pytest.mark.parametrize("name", ["False", "0.0", "-0", "None", "\\N", "(none)", "no_reaction", "Unrated", "f"])
def test_values_that_say_that_there_is_no_reaction(name: str) -> None:
    assert NO_RULES.is_no_reaction(name) and not LabelRules({name: "ignored"}).is_no_reaction(name)


def test_rows_without_reaction_do_not_hide_a_name_of_love() -> None:
    counts = Counter({"False": 10_000, "love": 10, "superlike": 75})
    with pytest.raises(DataError, match="75 of 85 reactions have a name without a label"):
        check_reactions(counts, NO_RULES, "data.feedback", is_rating=False)


@pytest.mark.parametrize("rule", ["4+", "4-5", "4,5", "4 to 5", "> =4"])
def test_a_rule_that_looks_like_numbers_is_no_name(rule: str) -> None:
    with pytest.raises(SettingsError, match="not a range of numbers"):
        LabelRules({rule: "loved"})
    assert LabelRules({"\u22654": "loved", "<3": "ignored"}).find_code("5") == LOVED
    assert LabelRules({"100": "loved", "+1": "ignored"}).find_code("+1") == IGNORED


@pytest.mark.parametrize(
    ("value", "names"),
    [({"name": "heart", "count": 0}, []), ({"rating": None}, []), ({}, []), ({"type": "like"}, ["like"]),
     ({"+1": 2, "-1": 0, "heart": 1, "total_count": 3}, ["+1", "heart"]), ({"love": ["u1"], "haha": []}, ["love"]),
     ('{"rating": null}', []), ({"value": {"name": "up"}}, ["up"]), ("NaT", [])],
)  # fmt: skip
def test_objects_of_reactions(value: Any, names: list[str]) -> None:
    assert name_reactions(value) == names


@pytest.mark.parametrize("path", ["rating.value", "fb.stars|fb.rating", "reviews.-1.score", "csat.avg"])
def test_a_rating_in_an_object_is_a_rating(tmp_path: Path, path: str) -> None:
    value = 1
    for step in reversed(path.split("|")[-1].split(".")):
        value = [value] if step == "-1" else {step: value}  # type: ignore[assignment]
    rows = [foreign_row(i, **value) if i % 4 == 0 else foreign_row(i) for i in range(100)]  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no rule says which of them is love"):
        build_foreign(tmp_path, rows, reaction=path)


@pytest.mark.parametrize(
    "chat",
    [json.dumps(json.dumps(CHAT)), "\ufeff " + json.dumps(CHAT), [json.dumps(CHAT)], "\n".join(map(json.dumps, CHAT)),
     {"role": ["user", "assistant"], "content": ["q", "a"]}, [["q", "a"]], json.dumps([["q", "a"]])],
)  # fmt: skip
def test_other_ways_to_write_a_chat(chat: Any) -> None:
    row, _ = convert(foreign_row(1, m=chat))
    assert (row["messages"], row["response"]) == (CHAT[:1], "a")


@pytest.mark.parametrize(
    "chat",
    ["[{'role': 'user', 'content': 'q', 'time': datetime.datetime(2026, 1, 1)}]", json.dumps(CHAT)[:-9],
     "array([{'content': 'q', 'role': 'user'}], dtype=object)", "[{'role': 'user'}\n {'role': 'assistant'}]",
     '[{"role"=>"user", "content"=>"q"}]', '{"{\\"role\\":\\"user\\",\\"content\\":\\"q\\"}"}',
     json.dumps(CHAT).replace('"', "&quot;"), "[{'role': 'user', 'content': ObjectId('5f')}]"],
)  # fmt: skip
@pytest.mark.parametrize("field", ["messages", "response"])
def test_messages_in_a_text_that_is_no_json_are_refused(field: str, chat: str) -> None:
    with pytest.raises(RowShapeError, match=r"repr of a Python object|not valid JSON"):
        convert(foreign_row(1, **{"m": "q", "r": "a", {"messages": "m", "response": "r"}[field]: chat}), response="r")


@pytest.mark.parametrize("text", ["{ content: 'x' } is what?", "['a', 'b']", '[{"type": "object"}]', "[INST]", '"hi"'])
def test_texts_with_brackets_stay_texts(text: str) -> None:
    chat = [{"role": "user", "content": text}]
    row, _ = convert(foreign_row(1, m=chat, r=text), response="r")
    assert (row["messages"], row["response"]) == (chat, text)


def test_template_marks_and_json_responses_are_counted() -> None:
    _, notes = convert(foreign_row(1, m="<|im_start|>user\nq<|im_end|>", r='{"answer": 1}'), response="r")
    assert notes == {"prompts with the marks of a chat template": 1, "responses in JSON": 1}


@pytest.mark.parametrize(
    ("response", "text", "note"),
    [(42, "42", ""), ([{"message": {"role": "assistant", "content": "a"}}], "a", ""),
     ({"candidates": [{"content": {"parts": [{"text": "a"}]}}, {"content": {}}]}, "a", "further choices"),
     ({"output": [{"type": "reasoning", "summary": []}, {"type": "message", "role": "assistant", "content": "a"}]}, "a",
      "reasoning"),
     ({"role": "assistant", "content": None, "refusal": "no"}, "no", ""),
     ({"role": "assistant", "content": "<think>hm</think>a"}, "a", "reasoning"),
     ({"role": "assistant", "content": '<details type="reasoning" done="true">hm</details>\na'}, "a", "reasoning"),
     (json.dumps(json.dumps(CHAT[1])), "a", "")],
)  # fmt: skip
def test_other_ways_to_write_a_response(response: Any, text: str, note: str) -> None:
    row, notes = convert(foreign_row(1, m="q", r=response), response="r")
    assert row["response"] == text and list(notes) == [note] * bool(note)


def test_several_texts_are_no_response() -> None:
    with pytest.raises(RowShapeError, match="a list of texts"):
        convert(foreign_row(1, m="q", r=["a", "b"]), response="r")


@pytest.mark.parametrize(
    "steps",
    [[{"role": "assistant", "content": "let me", "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "42"}],
     [{"role": "assistant", "content": [{"type": "text", "text": "let me"}, {"type": "tool_use", "name": "f"}]},
      {"role": "user", "content": [{"type": "tool_result", "content": "42"}]}]],
)  # fmt: skip
def test_what_precedes_a_tool_call_is_no_reply(steps: list[Any]) -> None:
    row, notes = convert(foreign_row(1, m=[CHAT[0], *steps, CHAT[1]]))
    assert (row["messages"], row["response"]) == (CHAT[:1], "a")
    assert notes["texts before tool calls"] == notes["tool messages"] == 1


@pytest.mark.parametrize(
    ("ids", "rated"),
    [(["a", "b", "c"], "b"), ([11, 12, 13], 12.0), ([11.0, 12.0, 13.0], "12"), ([None] * 3, 1.0), ([None] * 3, "-2"),
     ([{"$oid": "a"}, {"$oid": "b"}, {"$oid": "c"}], {"$oid": "b"})],
)  # fmt: skip
def test_the_rated_message_by_any_id(ids: list[Any], rated: Any) -> None:
    chat = [*CHAT, {"role": "user", "content": "more"}]
    chat = [
        message | ({} if message_id is None else {"id": message_id})
        for message, message_id in zip(chat, ids, strict=True)
    ]
    assert convert(foreign_row(0, m=chat, k=rated), message="k")[0]["response"] == "a"


def test_a_rated_message_that_is_not_certain_is_refused() -> None:
    numbered = [message | {"id": number} for number, message in enumerate(CHAT * 2, 1)]
    doubled = [message | {"id": "x"} for message in CHAT]
    for chat, rated in ((numbered, 0), (numbered, 9), (doubled, "x"), (CHAT, -9)):
        with pytest.raises(RowShapeError, match="rated message"):
            convert(foreign_row(0, m=chat, k=rated), message="k")
    with pytest.raises(RowShapeError, match="missing field: message"):
        convert(foreign_row(0, m=CHAT), message="k")
    assert convert(foreign_row(1, m=CHAT), message="k")[0]["response"] == "a"
    with pytest.raises(SettingsError, match="the reactions to all messages"):
        check_columns("feedback", {"messages": "m", "reaction": "m.*.feedback"}, "columns")


def test_a_response_that_its_messages_repeat() -> None:
    row, notes = convert(foreign_row(1, m=CHAT, r="a"), response="r")
    assert (row["messages"], row["response"]) == (CHAT[:1], "a") and "responses that end their messages, too" in notes


@pytest.mark.parametrize(
    ("value", "expected"),
    [("Sun Mar 01 2026 10:00:00 GMT+0100 (Central European Standard Time)", "2026-03-01T10:00:00+01:00"),
     ("Mar 1, 2026, 3:00:00 PM", "2026-03-01T15:00:00+00:00"), ("2026-03-01 12:05 am", "2026-03-01T00:05:00+00:00"),
     ("2026-03-01T10:00:00+01:00[Europe/Berlin]", "2026-03-01T10:00:00+01:00"),
     ("2026-03-01 10:00:00 +0530 IST", "2026-03-01T10:00:00+05:30"),
     ("2026-03-01 10:00:00 GMT", "2026-03-01T10:00:00+00:00"),
     ({"$date": {"$numberLong": "1767225600000"}}, "2026-01-01T00:00:00+00:00"),
     ({"_seconds": 1767225600, "_nanoseconds": 0}, "2026-01-01T00:00:00+00:00"),
     ('{"$date": "2026-01-01T00:00:00Z"}', "2026-01-01T00:00:00+00:00"), ("1.7672256e9", "2026-01-01T00:00:00+00:00")],
)  # fmt: skip
def test_more_ways_to_write_a_time(value: Any, expected: str) -> None:
    notes: Counter[str] = Counter()
    assert normalize_time(value, notes) == expected
    assert bool(notes) == (isinstance(value, str) and value[-2:] in ("PM", "am"))


@pytest.mark.parametrize(
    ("value", "time_format", "expected"),
    [("03/04/2025", "%m/%d/%Y", "2025-03-04T00:00:00+00:00"), ("03/04/2025", "%d/%m/%Y", "2025-04-03T00:00:00+00:00"),
     ("3/4/25 1:05 PM", "%m/%d/%y %I:%M %p", "2025-03-04T13:05:00+00:00"),
     ("03.04.2025 10:00 +0200", "%d.%m.%Y %H:%M %z", "2025-04-03T10:00:00+02:00"),
     ("20250304 100000", "%Y%m%d %H%M%S", "2025-03-04T10:00:00+00:00")],
)  # fmt: skip
def test_dates_with_a_format(value: str, time_format: str, expected: str) -> None:
    row, notes = convert(foreign_row(1, t=value), time=f"t as {time_format}")
    assert row["time"] == expected and ("times without zone, read as UTC" in notes) == ("%z" not in time_format)


@pytest.mark.parametrize(
    "value", ["03/04/2025", "3/4/25, 1:05 PM", "25/12/2025 10:00", "03-04-2025T10:00Z", "3.4.2025"]
)
def test_dates_of_uncertain_order_say_what_to_write(value: str) -> None:
    with pytest.raises(RowShapeError, match=r"day or month first\?.* as %d/%m/%Y"):
        convert(foreign_row(1, t=value))
    with pytest.raises(RowShapeError, match="not in the format %Y"):
        convert(foreign_row(1, t=value), time="t as %Y")


@pytest.mark.parametrize("value", ["2026-03-01T10:00[Europe/Berlin]", "03/01/2026 10:00", "1/3/2026, 3:00 PM", 1e30])
def test_times_that_are_not_certain_are_not_read(value: Any) -> None:
    assert normalize_time(value) in (value, str(value))


def test_missing_ids_are_no_users() -> None:
    for text in ("nan", "None", "\\N", " NULL "):
        assert "user_id" not in convert(foreign_row(1, u=text))[0]
    assert convert(foreign_row(1, u="12.0", c=12.0))[0]["user_id"] == "12"
    assert "topic" not in convert(foreign_row(1, tp="NULL"), topic="tp")[0]


def read_file(path: Path, content: str | bytes, encoding: str = "utf-8") -> tuple[list[Any], list[str]]:
    """Rows of a file, and the problems of the others."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    lines = [line for batch in read_line_batches(str(path)) for line in batch]
    return [json.loads(line.raw) for line in lines if not line.problem], [
        line.problem for line in lines if line.problem
    ]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [("id,x\n1,a\n2,b\n", "utf-16"), ("sep=;\nid;x\n1;a\n2;b", "utf-8"), ("id|x\r\n1|a\r\n2|b\r\n", "utf-8"),
     (" id , x\n1,a\n2,b\n", "utf-8"), ('\ufeff"id","x"\r1,a\r2,b\r', "utf-8")],
)  # fmt: skip
def test_dialects_of_spreadsheets(tmp_path: Path, content: str, encoding: str) -> None:
    assert read_file(tmp_path / "a.csv", content, encoding) == ([{"id": "1", "x": "a"}, {"id": "2", "x": "b"}], [])


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [("a.csv", 'id,x\n1,a\n2,"cut off', ["broken CSV file"]), ("a.csv", "id,x,y\n1,a,b\n2,", ["broken CSV file"]),
     ("a.csv", 'id,x\n1,a\n"2,b\n3,c\n4,d', ["broken CSV file"]),
     ("a.csv", 'id,x,y\n1,a,b\n"2,b,c\n3,c,d\n4",d\n5,e\n', ["wrong number of cells"] * 4),
     ("a.csv", "id,x,x\n1,a,b\n", ["two columns have one name"]),
     ("a.jsonl", '{"id": 1}\n{"id": 2, "x', ["broken JSON file"]),
     ("a.jsonl", '{"id": 1}\n{"id": 2, "x": 5', ["broken JSON file"]), ("a.jsonl", '{"id": 1}\n{"id": }', []),
     ("a.json", '{\n "id": 1\n}\n{\n "id": 2', ["broken JSON file"])],
)  # fmt: skip
def test_a_plain_file_that_is_cut_says_so(tmp_path: Path, name: str, content: str, problems: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    lines = [line for batch in read_line_batches(str(path)) for line in batch]
    assert [line.problem for line in lines if line.problem] == problems


@pytest.mark.parametrize("separator", ["\n", ",\n"])
def test_objects_over_several_lines(tmp_path: Path, separator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": i, "x": [{"y": "}\n{"}]} for i in range(20)]
    monkeypatch.setattr("rluf.prepare.readers.files._CHUNK_BYTES", 100)
    text = separator.join(json.dumps(row, indent=1) for row in rows)
    assert read_file(tmp_path / "a.json", text) == (rows, [])
    assert read_file(tmp_path / "b.jsonl", "".join(json.dumps(row) + ",\n" for row in rows)) == (rows, [])


def test_emphasis_and_brackets_hide_no_secret() -> None:
    for text in ("_wang@post.example_", "_4111111111111111_", "(00491601234567)", "_203.0.113.77_"):
        assert "<" in redact_text(text, ("email", "card", "phone", "ip"))[0]


TIME = "2026-01-05T10:00:00Z"
STARS = {">=4": "loved", "<4": "not_loved"}


def read_product(tmp_path: Path, reader: str, rows: Sequence[Any], kind: str = "feedback", **entry: Any) -> Any:
    """Rows of a product's export by id, with their labels; and counts by outcome and reason."""
    sample = ProductSample("x", kind, {"reader": reader, **entry}, list(rows), {})
    result, records, labels = read_sample(sample, tmp_path)
    counts = {(count.outcome, count.reason): count.rows for count in result["row_counts"]}
    return {row["id"]: (row["response"], label) for row, label in zip(records, labels, strict=True)}, counts


def librechat_chat(**changes: Any) -> dict[str, Any]:
    replies = [
        {
            "messageId": "m2",
            "text": "a",
            "isCreatedByUser": False,
            "createdAt": TIME,
            "feedback": {"rating": "thumbsUp"},
        },
        {"messageId": "m3", "text": "b", "isCreatedByUser": False, "createdAt": TIME},
    ]
    question = {"messageId": "m1", "text": "q", "isCreatedByUser": True, "createdAt": TIME, "children": replies}
    return {"conversationId": "c", "messages": [question]} | changes


@pytest.mark.parametrize("key", ["messages", "messagesTree"])
def test_librechat_branches(tmp_path: Path, key: str) -> None:
    chat = librechat_chat()
    row = {"conversationId": "c", "recursive": True, key: chat["messages"]}
    assert read_product(tmp_path, "librechat", [row])[0] == {"m2": ("a", LOVED), "m3": ("b", None)}


def test_a_message_of_librechat_alone_says_what_to_do(tmp_path: Path) -> None:
    row = librechat_chat()["messages"][0] | {"conversationId": "c"}
    with pytest.raises(DataError, match="one message of LibreChat; write reader: librechat_messages"):
        build(tmp_path, {"feedback": [{"path": write_rows(tmp_path / "m.jsonl", [row] * 40), "reader": "librechat"}]})


def langfuse_trace(**changes: Any) -> dict[str, Any]:
    score = {"name": "user-feedback", "value": 1, "dataType": "BOOLEAN", "source": "API"}
    return {"id": "t", "timestamp": TIME, "input": "q", "output": "a", "userId": "u", "scores": [score]} | changes


@pytest.mark.parametrize(
    "changes",
    [{"input": {"question": "q"}, "output": {"answer": "a"}},
     {"input": json.dumps({"query": "q"}), "output": '{"output": "a"}'},
     {"input": {"args": [], "kwargs": {"messages": CHAT[:1]}}}, {"input": {"args": ["q"], "kwargs": {}}},
     {"output": {"choices": [{"message": CHAT[1]}]}}],
)  # fmt: skip
def test_what_traced_functions_take_and_return(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read_product(tmp_path, "langfuse", [langfuse_trace(**changes)])[0] == {"t": ("a", LOVED)}


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [("user_explicit_feedback", 1, LOVED), ("thumbs-down", 1, NOT_LOVED), ("dislike", 1, NOT_LOVED),
     ("votes", 1, LOVED),
     ("faithfulness", 1, None), ("likelihood", 1, None), ("user_frustration", 1, None), ("dislike", 0, None)],
)  # fmt: skip
def test_names_of_scores(tmp_path: Path, name: str, value: int, label: int | None) -> None:
    score = {"name": name, "value": value, "dataType": "NUMERIC", "source": "API"}
    assert read_product(tmp_path, "langfuse", [langfuse_trace(scores=[score])])[0]["t"][1] == label


@pytest.mark.parametrize("key", ["data", "traces"])
def test_pages_of_an_api(tmp_path: Path, key: str) -> None:
    page = {key: [langfuse_trace(id="t1"), langfuse_trace(id="t2")], "meta": {"page": 1}}
    rows, counts = read_product(tmp_path, "langfuse", [page])
    assert set(rows) == {"t1", "t2"} and counts == {("in", ""): 2}


def langsmith_run(**changes: Any) -> dict[str, Any]:
    return {
        "id": "r", "start_time": TIME, "inputs": {"messages": CHAT[:1]}, "outputs": {"output": "a"},
        "feedback_stats": {"user_score": {"n": 1, "avg": 1.0}, "correctness": {"n": 1, "avg": 0.0}},
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"outputs": {"messages": [{"type": "human", "content": "q"}, {"type": "ai", "content": "a"}]}},
     {"outputs": {"messages": [*CHAT, {"type": "tool", "content": "x"}]}},
     {"feedback_stats": {"user_score": {"n": 1, "avg": None, "values": {"up": 1}}}}],
)  # fmt: skip
def test_langsmith_graphs_and_scores(tmp_path: Path, changes: dict[str, Any]) -> None:
    rows, _ = read_product(tmp_path, "langsmith", [langsmith_run(**changes)], labels={"1": "loved", "<1": "not_loved"})
    assert rows == {"r": ("a", LOVED)}


def test_langsmith_feedback_of_evaluators_is_no_reaction(tmp_path: Path) -> None:
    rows = [
        {"id": f"f{i}", "run_id": "r", "key": "k", "created_at": TIME} | changes
        for i, changes in enumerate((
            {"score": 1}, {"score": None, "value": "up"}, {"score": 1, "feedback_source": {"type": "model"}},
            {"score": 1, "feedback_source": '{"type": "auto_eval"}'}, {"score": None},
        ))
    ]  # fmt: skip
    sample = ProductSample("x", "reactions", {"reader": "langsmith_feedback"}, rows, {})
    result, _, _ = read_sample(sample, tmp_path)
    assert result["reactions"] == {"1": 1, "up": 1}
    assert {count.reason: count.rows for count in result["row_counts"] if count.outcome == "dropped"} == {
        "score is not a user's": 2, "no reaction": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"responses": {"rating": [{"value": 5, "user_id": "u"}]}},
     {"responses": [{"values": {"rating": {"value": 5}}, "user_id": "u", "status": "submitted"}, {"values": None}]},
     {"rating.responses": [5, 1], "rating.responses.users": ["u", "v"],
      "rating.responses.status": ["submitted", "discarded"], "fields": None}],
)  # fmt: skip
def test_forms_of_argilla(tmp_path: Path, changes: dict[str, Any]) -> None:
    row = {"id": "1", "fields": {"prompt": "q", "response": "a"}, "inserted_at": TIME} | changes
    if row["fields"] is None:
        row = {"prompt": "q", "response": "a"} | {name: value for name, value in row.items() if name != "fields"}
    without_answers = {"id": "2", "fields": {"prompt": "q", "response": "a"}, "inserted_at": TIME, "responses": None}
    rows, counts = read_product(tmp_path, "argilla", [row, without_answers], labels=STARS)
    assert rows == {"1-u-rating": ("a", LOVED)} and counts["dropped", "no reaction"] == 1


def test_a_link_into_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table" / "_delta_log").mkdir(parents=True)
    (tmp_path / "table" / "a.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "table" / "a.jsonl")
    with pytest.raises(DataError, match="is a Delta table"):
        resolve_sources([str(tmp_path / "link.jsonl")], "feedback")


def test_a_blank_id_is_no_user(tmp_path: Path) -> None:
    (tmp_path / "data_card.json").touch()
    with pytest.raises(DataError, match="expected ids of users, got ' '"):
        erase_users(tmp_path, ["u1", " "])


def test_conditions_whose_path_leads_nowhere_are_reported(tmp_path: Path) -> None:
    rows = [foreign_row(i, staff="True" if i % 7 == 0 else "False") for i in range(300)]
    card, love_rows = build_foreign(tmp_path, rows, {"where": {"staff": False, "stafff": "!=true", "gone": None}})
    assert len(love_rows) == 300 - 43
    (warning, other) = [text for text in card["warnings"] if "led to no value" in text]
    assert "where.stafff" in warning and "where.gone" in other


def test_names_with_dots_in_a_list_of_attributes(tmp_path: Path) -> None:
    attributes = [{"key": "user.id", "value": {"stringValue": "u9"}}, {"key": "user", "value": {"stringValue": "x"}}]
    row, _ = convert(foreign_row(1, attributes=attributes), user_id="attributes.key=user.id.value.stringValue")
    assert row["user_id"] == "u9"


def test_a_log_whose_rows_are_all_dropped_is_refused(tmp_path: Path) -> None:
    rows = [foreign_row(i) for i in range(40)]
    with pytest.raises(DataError, match=r"none of 40 rows is left \(excluded by where: c: 40\)"):
        build_foreign(tmp_path, rows, {"where": {"c": "nowhere"}})


@pytest.mark.parametrize(
    ("path", "value", "label"),
    [("!toxicity", 1, 0), ("!flags.toxic", False, 1), ("is_safe", True, 1), ("toxicity", "toxic", 0),
     ("!bad", "0.0", 1),
     ("harmless", 1, 1), ("toxicity", 1, None), ("scores.is_harmful", False, None), ("unsafe", "true", None),
     ("!toxicity", "toxic", None)],
)  # fmt: skip
def test_labels_that_are_one_for_bad(path: str, value: Any, label: int | None) -> None:
    row: Any = value
    for step in reversed(path.removeprefix("!").split(".")):
        row = {step: row}
    columns = {"messages": "=q", "response": "=a", "label": path}
    converter = build_converter("safety", DataSource(path="x", columns=columns), {}, NO_RULES, "latest", 0.2)
    if label is None:
        with pytest.raises(RowShapeError, match="label: "):
            converter.read_row(row)
    else:
        item = converter.read_row(row)
        assert not isinstance(item, SkippedRow) and item["label"] == label


@pytest.mark.parametrize(
    ("reader", "kind", "row", "expected"),
    [("openai", "feedback",
      {"id": "r", "created_at": 1767225600, "model": "m", "instructions": "be kind", "input": "q", "output": [CHAT[1]]},
      {"r": ("a", None)}),
     ("vercel", "feedback",
      {"id": "c", "createdAt": TIME, "votes": [{"messageId": "m", "isUpvoted": True}], "messages": [
          {"id": "n", "role": "user", "content": "q"},
          {"id": "m", "role": "assistant", "parts": '[{"type": "step-start"}, {"type": "text", "text": "a"}]'}]},
      {"m": ("a", LOVED)})],
)  # fmt: skip
def test_more_forms_of_products(tmp_path: Path, reader: str, kind: str, row: Any, expected: Any) -> None:
    assert read_product(tmp_path, reader, [row], kind)[0] == expected


def test_votes_without_a_time_count_as_those_of_their_response(tmp_path: Path) -> None:
    votes = [{"chatId": "c", "messageId": f"i{i}", "isUpvoted": i % 8 == 0} for i in range(0, 100, 4)]
    table = [{"run": f"i{i}", "vote": "love"} for i in range(1, 100, 4)]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in votes))
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    feedback = tmp_path / "log.jsonl"
    feedback.write_text("".join(json.dumps(foreign_row(i, fb=None)) + "\n" for i in range(100)))
    data = {
        "feedback": [{"path": str(feedback), "columns": {k: v for k, v in COLUMNS.items() if k != "reaction"}}],
        "reactions": [{"path": str(tmp_path / "votes.jsonl"), "reader": "vercel_votes"},
                      {"path": str(tmp_path / "table.jsonl"), "columns": {"response_id": "run", "reaction": "vote"}}],
    }  # fmt: skip
    card, rows = build(tmp_path, data)
    assert card["counts"]["reactions"]["kept"] == 50
    assert {row_id for row_id, row in rows.items() if row["label"]} == {
        f"i{i}" for i in range(100) if i % 8 == 0 or i % 4 == 1
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"},
      "the two conversations differ"),
     ({"chosen": "a", "rejected": "b"}, "missing field: messages")],
)  # fmt: skip
def test_pairs_without_a_common_prompt_say_so(row: dict[str, str], reason: str) -> None:
    converter = build_converter("preferences", DataSource(path="x"), {}, NO_RULES, "latest", 0.2)
    with pytest.raises(RowShapeError, match=reason):
        converter.repair(json.dumps(row).encode())
    crlf = {"chosen": "\r\n\r\nHuman: q\r\n\r\nAssistant: a", "rejected": "\r\n\r\nHuman: q\r\n\r\nAssistant: b"}
    repaired, _ = converter.repair(json.dumps(crlf).encode())
    assert repaired is not None and json.loads(repaired)["chosen"] == "a"


def test_data_sets_with_ties_and_missing_scores() -> None:
    options = ReaderOptions(0.1)
    replies = [{"text": text, "role": "assistant", "rank": rank, "replies": []} for text, rank in (("a", 0), ("b", 0))]
    tree = {"prompt": {"text": "q", "role": "prompter", "replies": replies}}
    assert DATASET_READERS["oasst"].read_item(tree, options) == [SkippedRow("tie")]  # type: ignore[misc]
    completions = [{"response": text, "overall_score": score} for text, score in (("a", 1), ("b", None), ("c", "9.0"))]
    row = {"instruction": "q", "completions": completions}
    (pair,) = DATASET_READERS["ultrafeedback"].read_item(row, options)  # type: ignore[misc]
    assert isinstance(pair, dict) and (pair["chosen"], pair["rejected"]) == ("c", "a")
    labeled = {"prompt": "q", "response": "a", "is_safe": "False", "category": '{"fraud": true}'}
    (row,) = DATASET_READERS["beavertails"].read_item(labeled, options)  # type: ignore[misc,assignment]
    assert isinstance(row, dict) and (row["label"], row["topic"]) == (0, "fraud")
