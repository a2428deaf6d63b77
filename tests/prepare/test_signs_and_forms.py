"""Fields that are true for bad responses, truth values in any spelling, and further forms of chats, rows and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rluf.config.data import DataSource
from rluf.errors import DataError, SettingsError
from rluf.prepare.entry_report import check_entries
from rluf.prepare.labels import LOVED, NOT_LOVED, LabelRules, parse_truth
from rluf.prepare.readers.chats import RowShapeError
from rluf.prepare.readers.columns import NOTES_KEY, build_converter, check_columns, name_reactions
from rluf.prepare.readers.conditions import find_failed_condition
from rluf.prepare.readers.datasets import DATASET_READERS, ReaderOptions, SkippedRow
from rluf.prepare.readers.files import BROKEN_FILE_REASONS
from rluf.prepare.readers.sources import LogSource
from rluf.prepare.readers.times import normalize_time
from tests.prepare.product_samples import ProductSample, assistant, user
from tests.prepare.test_chat_exports import read_rows, slack, trace
from tests.prepare.test_export_oddities import intercom
from tests.prepare.test_log_faults import build_foreign, foreign_row, own_row
from tests.prepare.test_log_variants import STARS, TIME, convert, langsmith_run, read_file
from tests.prepare.test_products_table import read_sample

NO_RULES = LabelRules({})


def convert_labeled(row: dict[str, Any], kind: str = "safety", **columns: str) -> dict[str, Any]:
    converter = build_converter(kind, DataSource(path="x", columns=columns), {}, NO_RULES, "latest", 0.2)
    item = converter.read_row({"prompt": "q", "response": "a"} | row)
    assert not isinstance(item, SkippedRow)
    return item


@pytest.mark.parametrize(
    ("path", "value"),
    [("disliked", True), ("fb.thumbs_down", 1), ("fb.negative.value", "t"), ("liked|disliked", "yes"),
     ("complaint", "1")],
)  # fmt: skip
def test_a_reaction_that_is_true_for_bad_stops_the_job_without_a_sign(tmp_path: Path, path: str, value: Any) -> None:
    def nest(truth: Any) -> dict[str, Any]:
        for step in reversed(path.rpartition("|")[2].split(".")):
            truth = {step: truth}
        return truth  # type: ignore[no-any-return]

    rows = [foreign_row(i, fb={}, liked=True if i % 3 == 0 else None) | nest(value if i % 3 else None)
            for i in range(100)]  # fmt: skip
    with pytest.raises(DataError, match="seems to be true for bad responses; write !"):
        build_foreign(tmp_path, rows, reaction=path)
    signed = "liked|!" + path.rpartition("|")[2]
    _, love_rows = build_foreign(tmp_path, rows, reaction=signed)
    assert [row_id for row_id, row in love_rows.items() if row["label"]] == [
        row_id for row_id in love_rows if int(row_id[1:]) % 3 == 0
    ]
    assert Counter(row["reaction"] for row in love_rows.values())["thumbs_down"] == 66


def test_signs_of_reactions_and_their_limits() -> None:
    assert "reaction" not in convert(foreign_row(0, down=False), reaction="!down")[0]
    assert convert(foreign_row(0, downloaded=True), reaction="downloaded")[0]["reaction"] == "true"
    with pytest.raises(RowShapeError, match="! only turns 0 and 1 round"):
        convert(foreign_row(0, down=4), reaction="!down")
    with pytest.raises(SettingsError, match="write up first"):
        check_columns("feedback", {"reaction": "!down|up"}, "columns")
    rules = LabelRules({"true": "not_loved"})
    entry = DataSource(path="x", columns={"messages": "m", "reaction": "disliked"})
    item = build_converter("feedback", entry, {}, rules, "latest", 0.2).read_row(foreign_row(0, disliked=True))
    assert not isinstance(item, SkippedRow) and not any("bad" in note for note in item[NOTES_KEY])


@pytest.mark.parametrize("name", ["offensive", "is_bad", "spam", "sexual", "harassment", "violence", "blocked",
                                  "incorrect", "toxicity.value", "toxic.label", "x|rejected"])  # fmt: skip
@pytest.mark.parametrize("value", [1, "yes", "t", False])
def test_labels_whose_name_is_bad_need_a_sign(name: str, value: Any) -> None:
    row: Any = value
    for step in reversed(name.rpartition("|")[2].split(".")):
        row = {step: row}
    with pytest.raises(RowShapeError, match="seems to be 1 for bad"):
        convert_labeled(row, label=name)
    signed = "|".join(f"!{path}" for path in name.split("|"))
    assert convert_labeled(row, label=signed)["label"] == int(value is False)


@pytest.mark.parametrize("name", ["not_toxic", "non_harmful", "unharmful", "is_not_bad", "harmless", "badge"])
def test_labels_whose_name_is_good_need_none(name: str) -> None:
    assert convert_labeled({name: "t"}, label=name)["label"] == 1
    assert convert_labeled({name: "unharmful"}, label=name)["label"] == 1


@pytest.mark.parametrize(
    ("value", "names"),
    [({"name": "like", "value": False}, []), ({"name": "thumbs_up", "value": 0}, []), ({"value": 0}, ["0"]),
     ({"name": "thumbs_down", "value": 1}, ["thumbs_down"]), ({"type": "like", "active": False}, []),
     ({"reaction": "love", "deleted_at": TIME}, []), ({"reaction": "love", "deleted_at": None}, ["love"]),
     ({"emoji": "👍", "removed": False}, ["👍"]), ({"type": "like", "retracted": True}, []),
     ([{"reactionType": "heart", "createdDateTime": TIME}], ["heart"]),
     ([{"emoji_name": "+1", "create_at": 1}], ["+1"])],
)  # fmt: skip
def test_objects_of_reactions_that_nobody_has(value: Any, names: list[str]) -> None:
    assert name_reactions(value) == names


@pytest.mark.parametrize("key", ["thumbs_down", "negative_user_feedback", "user_dislike", "user_complaint_feedback"])
def test_scores_of_bad_names_are_never_love(tmp_path: Path, key: str) -> None:
    runs = [langsmith_run(id=f"r{n}", feedback_stats={key: {"n": 1, "avg": float(n)}}) for n in (0, 1)]
    rows, _, _ = read_rows(tmp_path, "langsmith", *runs)
    assert {name: row["code"] for name, row in rows.items()} == {"r0": None, "r1": NOT_LOVED}
    score = {"name": key, "value": 1, "dataType": "BOOLEAN", "source": "API"}
    (tmp_path / "langfuse").mkdir()
    assert read_rows(tmp_path / "langfuse", "langfuse", trace("q", scores=[score]))[0]["t"]["code"] == NOT_LOVED
    events = [{"id": f"f{n}", "run_id": "r", "key": key, "score": n, "created_at": TIME} for n in (0, 1)]
    (tmp_path / "table").mkdir()
    sample = ProductSample("x", "reactions", {"reader": "langsmith_feedback"}, events, {})
    assert read_sample(sample, tmp_path / "table")[0]["reactions"] == {"thumbs_down": 1}


@pytest.mark.parametrize(
    ("metadata", "label"),
    [({"thumbs_up": "true"}, LOVED), ({"liked": "1"}, LOVED), ({"thumbs_down": "true"}, NOT_LOVED),
     ({"disliked": "1"}, NOT_LOVED), ({"negative_feedback": "true"}, NOT_LOVED), ({"downvoted": "false"}, None),
     ({"feedback_value": "up"}, LOVED), ({"liked_by": "u"}, None)],
)  # fmt: skip
def test_flags_in_the_metadata_of_stored_completions(tmp_path: Path, metadata: Any, label: int | None) -> None:
    row = {"id": "c", "created": 1767225600, "model": "m", "messages": [user("q")], "metadata": metadata}
    rows, _, _ = read_rows(tmp_path, "openai", row | {"choices": [{"message": assistant("a")}]})
    assert rows["c"]["code"] == label


def test_questions_of_argilla_that_are_no_rating_are_counted(tmp_path: Path) -> None:
    answers = {name: [{"value": 5, "user_id": "u"}] for name in ("rating", "toxicity_rating", "language")}
    row = {"id": "1", "fields": {"prompt": "q", "response": "a"}, "inserted_at": TIME, "responses": answers}
    rows, notes, _ = read_rows(tmp_path, "argilla", row, labels=STARS)
    assert set(rows) == {"1-u-rating"} and notes["answers to questions that are no rating"] == 2


def test_the_rating_of_intercoms_own_bot(tmp_path: Path) -> None:
    row = intercom({}, ("bot", 7, "<p>of the bot</p>"), ("team", "9", "bye"))
    rows, _, _ = read_rows(tmp_path, "intercom", row | {"ai_agent": {"rating": 5}}, labels=STARS)
    assert (rows["1"]["response"], rows["1"]["code"]) == ("of the bot", LOVED)


def test_messages_of_slack_with_files(tmp_path: Path) -> None:
    messages = [
        slack("00", "what is it?", subtype="file_share", files=[{"id": "F"}]), slack("01", "a cat", bot_id="B"),
        slack("02", "waves", subtype="me_message"), slack("03", "hello", bot_id="B"),
        slack("04", "x has joined", subtype="channel_join"),
    ]  # fmt: skip
    rows, notes, _ = read_rows(tmp_path, "slack", {"channel": "C", "messages": messages})
    assert [len(row["messages"]) for row in rows.values()] == [1, 3] and notes["images and files"] == 1


@pytest.mark.parametrize(("text", "truth"), [("T", True), ("yes", True), (1.0, True), ("n", False), (0, False),
                                             ("", None), (2, None), (None, None), ("on time", None)])  # fmt: skip
def test_truth_values_as_databases_write_them(text: Any, truth: bool | None) -> None:
    assert parse_truth(text) is truth


def test_truth_values_in_rows_and_data_sets() -> None:
    row, _ = convert(foreign_row(0, a="t", b="No"), continued="a", returned="b")
    assert row["continued"] is True and row["returned"] is False
    labels = [{"prompt": "q", "completion": "a", "label": label} for label in ("True", 1, 0, "false", False)]
    converter = build_converter("feedback", DataSource(path="x"), {}, NO_RULES, "latest", 0.2)
    reactions = [converter.read_row(row)["reaction"] for row in labels]  # type: ignore[index]
    assert reactions == ["thumbs_up"] * 2 + ["thumbs_down"] * 3
    row = {"prompt": "q", "response": "a", "is_safe": "t", "category": {}}
    (item,) = DATASET_READERS["beavertails"].read_item(row, ReaderOptions(0.1))  # type: ignore[misc]
    assert isinstance(item, dict) and item["label"] == 1


@pytest.mark.parametrize(
    ("condition", "met", "unmet"),
    [("!=true", [False, "f", 0, "no", None, "x"], [True, "TRUE", "t", 1, "yes"]), (False, ["N", 0, "f"], [None, "y"]),
     ("!=1234567", [7, "1234567.5", None], [1234567, 1234567.0, "1234567.0"]), (5, [5.0, "5", "5.0"], ["05", 50, None]),
     ("!=1.1", ["1.10", "1"], ["1.1", 1.1]), ("!=internal", [["x"], '["x"]', "[x]"], [["internal"], '["internal"]']),
     ("<2026-01-15", [1767225600, "2026-01-01"], [1769904000, "2026-02-01", "soon"]), (None, [None], ["x", 0]),
     ("null", [None], ["x"]), ("!=null", ["x", 0], [None])],
)  # fmt: skip
def test_conditions_on_values_of_any_type(condition: Any, met: list[Any], unmet: list[Any]) -> None:
    for value in met + unmet:
        failed = find_failed_condition({"v": condition}, {"v": value}, {}, Counter())
        assert (failed is None) == any(value is item for item in met), value


@pytest.mark.parametrize(
    "text",
    ["Sun Mar 1 10:00:00 CET 2026", "Sun, 01 Mar 2026 10:00:00 CET", "1 Mar 2026 10:00 BST", "2026-03-01 10:00 CET",
     "Mar 1, 2026 10:00 AM AEST"],
)  # fmt: skip
def test_zones_that_are_not_known_are_not_utc(text: str) -> None:
    assert normalize_time(text) == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [("Mar 1, 2026 10:00 PM PST", "2026-03-01T22:00:00-08:00"),
     ("/Date(1767225600000+0100)/", "2026-01-01T00:00:00+00:00"),
     ("Sun, 01 Mar 2026 10:00:00 EST", "2026-03-01T10:00:00-05:00"),
     ({"iso": "2026-03-01T10:00:00Z"}, "2026-03-01T10:00:00+00:00")],
)  # fmt: skip
def test_zones_and_objects_that_are_known(value: Any, expected: str) -> None:
    assert normalize_time(value) == expected


HH_PROMPT = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"


@pytest.mark.parametrize("prompt", [HH_PROMPT, HH_PROMPT.replace("\n", "\r\n"), HH_PROMPT + " ", HH_PROMPT.strip()])
def test_a_transcript_before_a_reply_is_a_chat(prompt: str) -> None:
    contents = [user("q1"), assistant("a1"), user("q2")]
    assert convert(foreign_row(1, m=prompt, r="a"), response="r")[0]["messages"] == contents
    pair = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    assert convert_labeled(pair, "preferences")["messages"] == contents
    assert convert_labeled({"prompt": prompt}, "prompts")["messages"] == contents


@pytest.mark.parametrize(
    "text", ["User: q\nAssistant: a\nUser: q2", "Human: q\nAI: a", "**Customer:** q\n**Agent:** a"]
)
def test_texts_of_several_messages_are_counted(text: str) -> None:
    row, notes = convert(foreign_row(1, m=text, r="a"), response="r")
    assert row["messages"] == [user(text)] and notes == {"prompts that look like several messages": 1}
    assert not convert(foreign_row(1, m="What does Human: mean?\n\nAssistant: x", r="a"), response="r")[1]


@pytest.mark.parametrize("path", ["answers.rank=1.answer", "answers.best=true.answer"])
def test_items_are_selected_by_numbers_and_truth_values(path: str) -> None:
    answers = [{"answer": "b", "rank": 2.0, "best": False}, {"answer": "a", "rank": 1.0, "best": True}]
    assert convert(foreign_row(1, m="q", answers=answers), response=path)[0]["response"] == "a"


def test_roles_and_texts_deeper_in_a_message() -> None:
    chat = [
        {"author": {"bot": False}, "payload": {"text": "q"}}, {"author": '{"bot": true}', "payload": {"text": "a"}},
        {"author": {"bot": None}, "kind": "event"},
    ]  # fmt: skip
    columns = {"messages": "m", "role": "author.bot", "content": "payload.text"}
    entry = DataSource.model_validate({"path": "x", "columns": columns, "roles": {True: "assistant", False: "user"}})
    converter = build_converter("feedback", entry, {}, NO_RULES, "latest", 0.2)
    row = converter.read_row({"m": chat[:2]})
    assert not isinstance(row, SkippedRow) and (row["messages"], row["response"]) == ([user("q")], "a")
    with pytest.raises(RowShapeError, match="a message has no role"):
        converter.read_row({"m": chat})


@pytest.mark.parametrize(
    "other", [{"event": "action", "name": "listen"}, {"event": "bot", "text": "for colleagues", "public": False},
              {"event": "bot", "text": "for colleagues", "private": True}],
)  # fmt: skip
def test_events_and_internal_notes_are_no_replies(other: dict[str, Any]) -> None:
    chat = [{"event": "user", "text": "q"}, {"event": "bot", "text": "a"}, other]
    entry = DataSource(path="x", columns={"messages": "m", "role": "event"}, roles={"action": "ignored"})
    converter = build_converter("feedback", entry, {}, NO_RULES, "latest", 0.2)
    for messages in (chat, [*chat, {"event": "user", "text": "q2"}, {"event": "bot", "text": "a2"}]):
        row = converter.read_row({"m": messages})
        assert not isinstance(row, SkippedRow) and row[NOTES_KEY]["internal notes and events"] == 1
        assert (row["response"], len(row["messages"])) == (("a", 1) if messages is chat else ("a2", 3))


@pytest.mark.parametrize("key", ["data", "rows", "feedbacks"])
def test_rows_in_the_answer_of_an_api_are_read_with_columns(tmp_path: Path, key: str) -> None:
    rows = [foreign_row(i) for i in range(100)]
    _, love_rows = build_foreign(tmp_path, [{key: rows[:50], "meta": {"page": 1}}, {key: rows[50:]}])
    assert set(love_rows) == {row["id"] for row in rows}


def test_columns_and_roles_with_a_reader_are_refused(tmp_path: Path) -> None:
    for changes in ({"columns": {"topic": "title"}}, {"roles": {"klant": "user"}}):
        source = LogSource("feedback", "x.jsonl", DataSource(path="x.jsonl", reader="vercel", **changes))  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="would have no effect with reader vercel"):
            check_entries([source])
    check_entries([LogSource("feedback", "x", DataSource(path="x", reader="openwebui", columns={"topic": "t"}))])


def test_a_system_prompt_next_to_mapped_messages_is_counted() -> None:
    note = "system prompts next to their messages"
    assert convert(foreign_row(1, system_prompt="Be kind."))[1][note] == 1
    assert note not in convert(foreign_row(1, system="Be kind."), topic="system")[1]


def test_values_that_are_not_a_number_are_missing(tmp_path: Path) -> None:
    nan, mapped = (
        float("nan"),
        {"id": "id", "user_id": "u", "time": "t", "messages": "q", "response": "r", "topic": "c"},
    )
    good = {"q": "q", "r": "a", "u": "u1", "t": TIME, "c": "x"}
    rows = [good | {"id": i, name: nan} for i, name in enumerate(("c", "u", "r", "q"))]
    result, records, _ = read_sample(ProductSample("x", "feedback", {"columns": mapped}, rows, {}), tmp_path)
    assert [(row["id"], row["topic"]) for row in records] == [("0", "other")]
    assert {count.reason for count in result["row_counts"] if count.outcome == "quarantined"} == {
        "missing field: user_id", "missing field: response", "missing field: messages"
    }  # fmt: skip


@pytest.mark.parametrize("path", ["m.1.feedback", "m.-3.rating.value", "m.0.fb"])
def test_a_reaction_to_another_message_than_the_last_needs_its_position(path: str) -> None:
    position = path.split(".")[1]
    with pytest.raises(SettingsError, match=f"add message: ={position}"):
        check_columns("feedback", {"messages": "m", "reaction": path}, "columns")
    check_columns("feedback", {"messages": "m", "reaction": path, "message": f"={position}"}, "columns")
    check_columns("feedback", {"messages": "m", "reaction": "m.-1.feedback"}, "columns")
    chat = [user("q"), assistant("x") | {"feedback": "up"}, user("q2"), assistant("y")]
    row, _ = convert(foreign_row(0, m=chat), reaction="m.1.feedback", message="=1")
    assert (row["response"], row["reaction"]) == ("x", "up")


@pytest.mark.parametrize("suffix", ["jsonl.gz", "csv.gz", "jsonl.zst", "jsonl.bz2", "tsv.zst"])
def test_a_compressed_file_of_no_bytes_is_broken(tmp_path: Path, suffix: str) -> None:
    _, problems = read_file(tmp_path / f"log.{suffix}", b"")
    assert len(problems) == 1 and problems[0] in BROKEN_FILE_REASONS
    assert read_file(tmp_path / "log.jsonl", b"") == read_file(tmp_path / "log.json", "[]\n") == ([], [])


def test_two_rules_for_one_number_are_refused() -> None:
    with pytest.raises(SettingsError, match="has two labels"):
        LabelRules({"4": "loved", "4.0": "not_loved"})


def test_rows_of_own_names_from_a_table_with_nulls(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [own_row(0, turn=None, topic=nan), own_row(1, turn=2.0, response_tokens=12.0), own_row(2, turn=1.5),
            own_row(3, user_id=nan)]  # fmt: skip
    result, records, _ = read_sample(ProductSample("x", "feedback", {}, rows, {}), tmp_path)
    assert {row["id"]: (row["turn"], row["response_tokens"]) for row in records} == {"f0": (0, None), "f1": (2, 12)}
    assert {count.reason for count in result["row_counts"] if count.outcome == "quarantined"} == {
        "wrong type: turn", "wrong type: user_id"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["preferences", "safety", "prompts", "reactions"])
def test_ids_of_other_kinds_in_an_invalid_row_are_no_crash(kind: str) -> None:
    converter = build_converter(kind, DataSource(path="x"), {}, NO_RULES, "latest", 0.2)
    row = {"id": 1, "user_id": 2, "conversation_id": 3, "group": 4, "response_id": 5}
    repaired, _ = converter.repair(json.dumps(row).encode())
    assert repaired is not None and json.loads(repaired)["id"] == "1"
