"""Logs as products really write them: what would be lost or mislabeled is read, counted or refused."""

from __future__ import annotations

import bz2
import csv
import json
import os
import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.prepare import pipeline
from rluf.prepare.card import format_card_lines
from rluf.prepare.readers.files import read_line_batches
from rluf.prepare.readers.sources import resolve_sources
from rluf.prepare.row_samples import sample_training_rows
from rluf.prepare.schema import DATA_KINDS, SPLIT_NAMES

Row = dict[str, Any]


def own_row(index: int, **changes: Any) -> Row:
    """A row in rluf's shape."""
    return {
        "id": f"f{index}", "conversation_id": f"c{index}", "turn": 0, "user_id": f"u{index % 60}",
        "time": "2026-03-01T10:00:00Z", "model_version": "v1", "messages": [{"role": "user", "content": f"q{index}"}],
        "response": f"a{index}", "reaction": "love" if index % 4 == 0 else None,
    } | changes  # fmt: skip


def foreign_row(index: int, **changes: Any) -> Row:
    """A row in another shape, for COLUMNS."""
    chat = [{"role": "user", "content": f"q{index}"}, {"role": "assistant", "content": f"a{index}"}]
    return {
        "id": f"i{index}", "c": f"c{index}", "u": f"u{index % 60}", "t": 1767225600 + 60 * index,
        "fb": "love" if index % 4 == 0 else None, "m": chat,
    } | changes  # fmt: skip


COLUMNS = {
    "id": "id", "conversation_id": "c", "user_id": "u", "time": "t", "model_version": "=v1", "messages": "m",
    "reaction": "fb", "turn": "=0",
}  # fmt: skip


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(tmp_path: Path, data: Mapping[str, Any], **prepare: Any) -> tuple[Row, dict[str, Row]]:
    """Card, and feedback rows of the data set by id."""
    entries = {kind: data.get(kind, []) for kind in DATA_KINDS}
    settings = Settings.model_validate({"data": entries, "prepare": {"positive_share": 0.01} | prepare})
    execute = lambda tasks: [result for task in tasks for result in pipeline.run_task(task)]  # noqa: E731
    card = pipeline.build_data_set(settings, tmp_path / "data", execute)
    tables = [pq.read_table(tmp_path / "data" / "love" / f"{split}.parquet") for split in SPLIT_NAMES]
    return card, {row["id"]: row for table in tables for row in table.to_pylist()}


def build_foreign(
    tmp_path: Path, rows: Sequence[Row], entry: Row | None = None, **columns: str
) -> tuple[Row, dict[str, Row]]:
    path = write_rows(tmp_path / "log.jsonl", rows)
    return build(tmp_path, {"feedback": [{"path": path, "columns": COLUMNS | columns} | (entry or {})]})


def test_an_updated_row_replaces_the_earlier_one(tmp_path: Path) -> None:
    rows = [own_row(i, reaction=None) for i in range(300)] + [own_row(i) for i in range(0, 300, 4)]
    rows += [own_row(1, response="another answer")]
    card, love_rows = build(tmp_path, {"feedback": write_rows(tmp_path / "log.jsonl", rows)})
    counts = card["counts"]["feedback"]
    assert counts["dropped"] == {"replaced by a later row of the same id": 75}
    assert counts["quarantined"] == {"duplicate id": 1} and card["love"]["base_rate"]["hits"] == 75
    assert love_rows["f1"]["response"] == "a1" and love_rows["f4"]["label"] == 1


@pytest.mark.parametrize("conversation_id", [lambda i: str(i // 60 + 1), lambda i: "default"])
def test_conversation_ids_that_users_share_do_not_cost_rows(tmp_path: Path, conversation_id: Any) -> None:
    rows = [own_row(i, conversation_id=conversation_id(i)) for i in range(1800)]
    card, love_rows = build(tmp_path, {"feedback": write_rows(tmp_path / "log.jsonl", rows)})
    assert len(love_rows) == 1800 and card["counts"]["feedback"]["dropped"] == {}
    assert any("conversation id that users share" in text for text in card["warnings"])


def test_a_chat_that_users_really_share_stays_in_one_split(tmp_path: Path) -> None:
    opening = {"role": "user", "content": "hello all"}
    rows = [
        own_row(i, conversation_id=f"c{i // 3}", messages=[opening, {"role": "user", "content": f"q{i}"}])
        for i in range(900)
    ]
    card, love_rows = build(tmp_path, {"feedback": write_rows(tmp_path / "log.jsonl", rows)})
    assert card["counts"]["feedback"]["dropped"]["conversation is in another split"] == 900 - len(love_rows) > 50


def test_max_rows_says_what_it_left_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "log.jsonl", [own_row(i) for i in range(600)])
    card, _ = build(tmp_path, {"feedback": path}, max_rows=100, positive_share=0.9)
    dropped = card["counts"]["feedback"]["dropped"]
    loved = card["love"]["sampling"]["loved"]
    assert dropped["above prepare.max_rows"] > 0 and dropped["sampled out of train"] > 0
    (warning,) = [text for text in card["warnings"] if "max_rows" in text]
    assert f"prepare.max_rows=100 left out {dropped['above prepare.max_rows']} rows" in warning
    assert f"{loved['rows'] - loved['kept']} of them loved" in warning
    assert "above prepare.max_rows" not in build(tmp_path, {"feedback": path})[0]["counts"]["feedback"]["dropped"]


@pytest.mark.parametrize(
    "make_chat",
    [json.dumps, lambda chat: json.dumps({"messages": chat}), lambda chat: {"messages": json.dumps(chat)},
     lambda chat: [json.dumps(message) for message in chat], lambda chat: json.dumps(chat, indent=1)],
)  # fmt: skip
def test_a_chat_in_a_text_is_a_chat(tmp_path: Path, make_chat: Any) -> None:
    rows = [foreign_row(i, m=make_chat(foreign_row(i)["m"])) for i in range(300)]
    _, love_rows = build_foreign(tmp_path, rows)
    assert love_rows["i7"]["messages"] == [{"role": "user", "content": "q7"}] and love_rows["i7"]["response"] == "a7"


def test_a_python_repr_is_refused_by_name(tmp_path: Path) -> None:
    rows = [foreign_row(i, m=str(foreign_row(i)["m"])) for i in range(60)]
    with pytest.raises(DataError, match="repr of a Python object"):
        build_foreign(tmp_path, rows)


def test_clients_that_name_love_differently(tmp_path: Path) -> None:
    names = ["love", "heart", "❤️", ":thumbsup:"]
    rows = [foreign_row(i, fb=names[i // 4 % 4] if i % 4 == 0 else None) for i in range(300)]
    card, love_rows = build_foreign(tmp_path, rows)
    assert card["love"]["base_rate"]["hits"] == 75 and {row["reaction"] for row in love_rows.values()} == {None, "love"}
    reactions = {item["name"]: (item["rows"], item["label"]) for item in card["entries"][0]["reactions"]}
    assert reactions == {"love": (19, "loved"), "heart": (19, "loved"), "❤️": (19, "loved"), ":thumbsup:": (18, "loved")}
    assert any("heart 19 loved" in line for line in format_card_lines(card))


@pytest.mark.parametrize("values", [(1, 2, 3, 4, 5), (0.2, 0.4, 1.0), (0, 5, 10), (1,), ("1", "3"), (1.0, 2.5)])
def test_ratings_need_a_rule(tmp_path: Path, values: Sequence[Any]) -> None:
    rows = [foreign_row(i, rating=values[i % len(values)] if i % 2 else None) for i in range(300)]
    with pytest.raises(DataError, match=r"the reactions are numbers .*prepare\.labels"):
        build_foreign(tmp_path, rows, reaction="rating")
    top = max(map(float, values))
    _, love_rows = build_foreign(tmp_path, rows, {"labels": {f">={top:g}": "loved"}}, reaction="rating")
    loved = {f"i{i}" for i in range(300) if i % 2 and float(values[i % len(values)]) == top}
    assert {row_id for row_id, row in love_rows.items() if row["label"]} == loved


def test_ignored_reactions_are_no_training_rows(tmp_path: Path) -> None:
    rows = [foreign_row(i, fb=1 + i % 5) for i in range(300)]
    labels = {">=4": "loved", "<=2": "not_loved", "3": "ignored"}
    card, love_rows = build_foreign(tmp_path, rows, {"labels": labels})
    assert card["counts"]["feedback"]["dropped"] == {"reaction is ignored": 60}
    assert (
        all(row["label"] == (int(row_id[1:]) % 5 >= 3) for row_id, row in love_rows.items()) and len(love_rows) == 240
    )
    assert any("no base rate" in text or "not a base rate" in text for text in card["warnings"])


def test_a_path_that_never_leads_anywhere_stops_the_job(tmp_path: Path) -> None:
    rows = [foreign_row(i) for i in range(100)]
    with pytest.raises(
        DataError, match=r"columns\.device: the path 'client\.devcie' led to no value in any of 100 rows"
    ):
        build_foreign(tmp_path, rows, device="client.devcie")


def test_a_field_that_is_renamed_midway_is_reported(tmp_path: Path) -> None:
    renamed = [
        foreign_row(i, fb={"value" if i >= 150 else "rating": "love" if i % 4 == 0 else "no"}) for i in range(300)
    ]
    for name, rows in (("a.jsonl", renamed[:150]), ("b.jsonl", renamed[150:])):
        write_rows(tmp_path / name, rows)
    entry = {"path": f"{tmp_path}/*.jsonl", "columns": COLUMNS | {"reaction": "fb.rating"}}
    card, _ = build(tmp_path, {"feedback": [entry]})
    assert card["entries"][0]["paths"]["reaction"]["share"] == 0.5
    assert any("columns.reaction" in text and "renamed" in text for text in card["warnings"])
    entry["columns"] = COLUMNS | {"reaction": "fb.rating|fb.value"}
    assert build(tmp_path, {"feedback": [entry]})[0]["love"]["base_rate"]["hits"] == 75


def test_rows_are_filtered_by_conditions(tmp_path: Path) -> None:
    rows = [foreign_row(i, staff=i % 7 == 0, v=f"m{i % 5}") for i in range(600)]
    where = {
        "staff": False, "v": ["m0", "m1", "m2", "m3", "m7"], "user_id": ["!=u4", "!=u2*"],
        "time": ">=2026-01-01T01:00:00",
    }  # fmt: skip
    card, love_rows = build_foreign(tmp_path, rows, {"where": where})
    is_wanted_user = [i != 4 and not str(i).startswith("2") for i in range(60)]
    expected = {f"i{i}" for i in range(60, 600) if i % 7 and i % 5 != 4 and is_wanted_user[i % 60]}
    assert set(love_rows) == expected
    dropped = card["counts"]["feedback"]["dropped"]
    assert sum(dropped.values()) == 600 - len(expected) and dropped["excluded by where: staff"] == 86


def test_entries_of_different_shapes_and_a_list_of_reactions(tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", [own_row(i) for i in range(200)])
    foreign = write_rows(tmp_path / "foreign.jsonl", [foreign_row(i, fb=[]) for i in range(200)])
    events = [{"run": f"i{i}", "when": 1767225600 + 60 * i + 5, "score": i % 2} for i in range(0, 200, 4)]
    events += [{"run": f"i{i}", "when": 1767225600 + 60 * i + 9, "score": 1} for i in range(1, 200, 4)]
    reactions = {
        "path": write_rows(tmp_path / "events.jsonl", events),
        "columns": {"response_id": "run", "time": "when", "reaction": "score"},
    }  # fmt: skip
    data = {"feedback": [own, {"path": foreign, "columns": COLUMNS | {"reaction": "fb|=no"}}], "reactions": reactions}
    with pytest.raises(DataError, match="no value"):
        data["feedback"][1]["columns"]["reaction"] = "fb.none"
        build(tmp_path, data)
    data["feedback"][1]["columns"].pop("reaction")
    card, love_rows = build(tmp_path, data)
    assert love_rows["i1"]["label"] == 1 and love_rows["i4"]["label"] == 0 and love_rows["f4"]["label"] == 1
    assert card["love"]["base_rate"]["hits"] == 50 + 50 and card["counts"]["reactions"]["kept"] == 100


@pytest.mark.parametrize(
    ("contradictions", "label"), [("latest", 0), ("loved", 1), ("not_loved", 0), ("ignored", None)]
)
def test_a_change_of_mind(tmp_path: Path, contradictions: str, label: int | None) -> None:
    feedback = write_rows(tmp_path / "log.jsonl", [own_row(i) for i in range(400)])
    events = [
        {"id": f"e{i}-{name}", "response_id": f"f{i}", "time": f"2026-03-01T10:0{minute}:00Z", "reaction": name}
        for i in range(0, 400, 7)
        for minute, name in ((1, "love"), (2, "thumbs_down"))
    ]
    data = {"feedback": feedback, "reactions": write_rows(tmp_path / "events.jsonl", events)}
    card, love_rows = build(tmp_path, data, contradictions=contradictions)
    assert [love_rows[f"f{i}"]["label"] if f"f{i}" in love_rows else None for i in range(0, 400, 7)] == [label] * 58
    assert any("58 responses have loved and not loved" in text for text in card["warnings"])


def test_a_long_cell_costs_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"

    def write_csv(long_text: str, delimiter: str = ",") -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["id", "response"])
            writer.writerows([f"f{i}", long_text if i == 200 else '42, "x"\n{}'] for i in range(300))

    for delimiter in ",;\t":
        write_csv("x" * 150_000, delimiter)
        lines = [line for batch in read_line_batches(str(path)) for line in batch]
        assert len(lines) == 300 and not any(line.problem for line in lines)
        assert json.loads(lines[7].raw) == {"id": "f7", "response": '42, "x"\n{}'}
    monkeypatch.setattr("rluf.prepare.readers.files.MAX_LINE_BYTES", 100_000)
    write_csv("x" * 150_000)
    lines = [line for batch in read_line_batches(str(path)) for line in batch]
    assert [line.problem for line in lines if line.problem] == ["line too long"] and len(lines) == 300


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_that_is_one_array(tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [own_row(i, response="[{\n" * 3) for i in range(50)]
    (tmp_path / "log.json").write_text(json.dumps(rows, indent=indent))
    (tmp_path / "log.json.bz2").write_bytes(bz2.compress(json.dumps(rows, indent=indent).encode()))
    monkeypatch.setattr("rluf.prepare.readers.files._CHUNK_BYTES", 100)
    for name in ("log.json", "log.json.bz2"):
        lines = [line for batch in read_line_batches(str(tmp_path / name)) for line in batch]
        assert [json.loads(line.raw) for line in lines] == rows and [line.line_number for line in lines[:2]] == [1, 2]
    (tmp_path / "cut.json").write_text(json.dumps(rows)[:-300])
    lines = [line for batch in read_line_batches(str(tmp_path / "cut.json")) for line in batch]
    assert lines[-1].problem == "broken JSON file" and len(lines) < 51


@pytest.mark.parametrize("marker", ["_delta_log/00.json", "metadata/v1.metadata.json", ".hoodie/x"])
@pytest.mark.parametrize("entry", ["", "/data", "/*/*.parquet", "/data/a.parquet", "/data/dt=1"])
def test_tables_are_refused(tmp_path: Path, marker: str, entry: str) -> None:
    for name in (marker, "data/a.parquet", "data/dt=1/b.parquet"):
        (tmp_path / "table" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": ["a"]}), tmp_path / "table" / name)
    for prefix in ("", "file://"):
        with pytest.raises(DataError, match=r"is an? (Delta|Iceberg|Hudi) table"):
            resolve_sources([f"{prefix}{tmp_path}/table{entry}"], "feedback")


def test_files_of_a_folder_are_read_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "D.JSONL", "part-0003", ".tmp.jsonl", "_SUCCESS", "e.tsv", "notes.txt"):
        (tmp_path / name).write_text("{}\n")
    names = [source.local_path.name for source in resolve_sources([str(tmp_path)], "feedback")]
    assert names == ["D.JSONL", "a.jsonl", "e.tsv"]
    assert "count=2" in caplog.text and "part-0003" in caplog.text
    from rluf.config.data import DataSource

    entry = DataSource(path=f"{tmp_path}/part-*", format="jsonl")
    assert [source.local_path.name for source in resolve_sources([entry], "feedback")] == ["part-0003"]


def test_many_files_and_buckets_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        write_rows(tmp_path / f"{number:03d}.jsonl", [own_row(10 * number + i) for i in range(10)])
    monkeypatch.setattr(pipeline, "_count_buckets", lambda sources: 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Other tests of this process may have left files open.
    limit = len(os.listdir("/proc/self/fd")) + 150
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, limit), hard))
    try:
        card, love_rows = build(tmp_path, {"feedback": f"{tmp_path}/*.jsonl"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(love_rows) == 400 and len(card["sources"]) == 40
    assert {source["rows"] for source in card["sources"]} == {10}


def test_nulls_and_numeric_ids_of_warehouses(tmp_path: Path) -> None:
    rows = [
        own_row(i, topic=None, locale=None, user_id=float(i % 60), id=i, conversation_id=12.0 + i) for i in range(300)
    ]
    rows = [{name: value for name, value in row.items() if name != "turn" and value is not None} for row in rows]
    card, love_rows = build(tmp_path, {"feedback": write_rows(tmp_path / "log.jsonl", rows)})
    assert card["counts"]["feedback"]["quarantined"] == {} and len(love_rows) == 300
    assert (love_rows["7"]["user_id"], love_rows["7"]["conversation_id"], love_rows["7"]["topic"]) == (
        "7",
        "19",
        "other",
    )


def test_a_log_of_invalid_rows_alone_is_refused_at_any_budget(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "log.jsonl", [{"id": "x"}] * 30)
    with pytest.raises(DataError, match="missing fields: conversation_id, turn, user_id, time"):
        build(tmp_path, {"feedback": path}, quarantine_budget=1)


def test_e_mail_addresses_as_users_are_reported(tmp_path: Path) -> None:
    rows = [own_row(i, user_id=f"u{i % 60}@post.example") for i in range(300)]
    card, _ = build(tmp_path, {"feedback": write_rows(tmp_path / "log.jsonl", rows)})
    assert any("e-mail" in text and "RLUF_USER_SALT" in text for text in card["warnings"])


def test_rows_that_repeat_or_contradict_others_are_counted_and_dropped_on_request(tmp_path: Path) -> None:
    def pair(index: int, chosen: str, rejected: str) -> Row:
        messages, group = [{"role": "user", "content": f"q{index % 100}"}], f"g{index % 100}"
        return {"id": f"p{index}", "messages": messages, "group": group, "chosen": chosen, "rejected": rejected}

    pairs = [pair(i, "A", "B") for i in range(200)] + [pair(200 + i, "B", "A") for i in range(10)]
    feedback = [own_row(i) for i in range(300)] + [own_row(i, id=f"again{i}") for i in range(50)]
    data = {
        "feedback": write_rows(tmp_path / "log.jsonl", feedback), "preferences": write_rows(tmp_path / "p.jsonl", pairs)
    }  # fmt: skip
    card, love_rows = build(tmp_path, data)
    assert card["duplicates"] == {
        "feedback": {"exact": 50, "near": 0, "contradictory": 0, "rows": 350},
        "preferences": {"exact": 100, "near": 0, "contradictory": 30, "rows": 210},
    }  # fmt: skip
    assert len(love_rows) == 350 and sum("drop_duplicates" in text for text in card["warnings"]) == 2
    card, love_rows = build(tmp_path, data, drop_duplicates=True, contradictions="ignored")
    assert len(love_rows) == 300 and card["counts"]["feedback"]["dropped"] == {"repeats another row": 50}
    assert card["counts"]["preferences"]["dropped"] == {"repeats another row": 90, "contradicts another row": 30}


def test_the_page_lists_rows_of_each_label_and_the_card_the_drift_of_paths(tmp_path: Path) -> None:
    rows = [
        foreign_row(i, m=[{"role": "user", "content": f"q{i}"}], r=f"a{i}" + "x" * 7000 * (i % 2)) for i in range(400)
    ]
    columns = COLUMNS | {"response": "r"}
    entry = {"path": write_rows(tmp_path / "log.jsonl", rows), "columns": columns}
    card, _ = build(tmp_path, {"feedback": [entry]})
    samples = sample_training_rows(tmp_path / "data", card)
    assert Counter(sample.label for sample in samples) == {"loved": 20, "not loved": 20}
    assert all(int(sample.prompt[1:]) % 4 == 0 for sample in samples if sample.label == "loved")
    assert any("[... 50" in sample.response for sample in samples)
    page = (tmp_path / "data" / "data_card.html").read_text()
    assert samples[0].prompt in page and "Rows to look at" in page
    write_rows(tmp_path / "log.jsonl", [row | {"fb": row["fb"] if i < 100 else None} for i, row in enumerate(rows)])
    card, _ = build(tmp_path, {"feedback": [entry]})
    assert any("columns.reaction 25% before, 6% now" in text for text in card["warnings"])


def test_rows_that_a_reward_model_would_cut_are_reported(tmp_path: Path) -> None:
    rows = [own_row(i, response=f"a{i}" + " word" * (800 if i % 5 == 0 else 1)) for i in range(300)]
    card, _ = build(tmp_path, {"feedback": write_rows(tmp_path / "log.jsonl", rows)})
    length = card["lengths"]["feedback"]
    assert length["cut_share"] == 0.2 and 1000 <= length["tokens_p95"] <= 1024
    assert any("about 20% of the rows are longer than max_tokens" in text for text in card["warnings"])
