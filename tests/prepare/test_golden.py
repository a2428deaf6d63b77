"""The golden log: forty kinds of invalid rows and files, each with the outcome that the table in docs/data.md states.

The passes run in this process, one task after another; tests/prepare/test_pipeline.py runs them on Ray.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.prepare import pipeline
from rluf.prepare.schema import DATA_KINDS, MAX_TEXT_CHARS, SPLIT_NAMES

Row = dict[str, Any]
RowFactory = Callable[..., Row]
ROOT = Path(__file__).parents[2]


def run_in_process(task_rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [result for task_row in task_rows for result in pipeline.run_task(task_row)]


def user_message(content: Any) -> list[Row]:
    return [{"role": "user", "content": content}]


def encode_row(row: Row) -> bytes:
    return json.dumps(row).encode()


INVALID_CHANGES: list[tuple[str, Row, str]] = [
    ("empty response", {"response": ""}, "empty response"),
    ("blank response", {"response": " \n\t"}, "empty response"),
    ("response is null", {"response": None}, "wrong type: response"),
    ("response of 10 MB", {"response": "x" * 10_000_000}, "too long: response"),
    ("message too long", {"messages": user_message("x" * (MAX_TEXT_CHARS + 1))}, "too long: messages.content"),
    ("lone surrogate", {"response": "half a smile \ud83d"}, "lone surrogate"),
    ("no messages", {"messages": []}, "empty messages"),
    ("messages are text", {"messages": "hello"}, "wrong type: messages"),
    ("too many messages", {"messages": user_message("hi") * 2001}, "too long: messages"),
    ("message is a number", {"messages": user_message(7)}, "wrong type: messages.content"),
    ("blank last message", {"messages": user_message("  ")}, "empty last message"),
    ("unknown role", {"messages": [{"role": "robot", "content": "x"}]}, "bad value: messages.role"),
    ("message without content", {"messages": [{"role": "user"}]}, "missing field: messages.content"),
    ("assistant last", {"messages": [*user_message("x"), {"role": "assistant", "content": "y"}]},
     "messages do not end with the user"),
    ("future time", {"time": "2999-01-01T00:00:00Z"}, "future time"),
    ("clock at zero", {"time": "1970-01-01T00:00:00Z"}, "time before 2000"),
    ("time without zone", {"time": "2025-01-01T00:00:00"}, "time without zone"),
    ("time in words", {"time": "yesterday"}, "bad value: time"),
    ("time as number", {"time": 1735689600}, "wrong type: time"),
    ("NaN time", {"time": float("nan")}, "wrong type: time"),
    ("turn below zero", {"turn": -1}, "bad value: turn"),
    ("turn as text", {"turn": "3"}, "wrong type: turn"),
    ("turn with a fraction", {"turn": 1.5}, "wrong type: turn"),
    ("huge turn", {"turn": 10**30}, "bad value: turn"),
    ("reaction is true", {"reaction": True}, "wrong type: reaction"),
    ("empty reaction", {"reaction": ""}, "empty reaction"),
    ("reaction too long", {"reaction": "x" * 33}, "too long: reaction"),
    ("continued in words", {"continued": "yes"}, "wrong type: continued"),
    ("empty user", {"user_id": ""}, "empty user_id"),
    ("user is a list", {"user_id": [7]}, "wrong type: user_id"),
    ("id is null", {"id": None}, "wrong type: id"),
    ("id too long", {"id": "x" * 201}, "too long: id"),
]  # fmt: skip

INVALID_LINES: list[tuple[str, bytes, str]] = [
    ("broken JSON", b'{"id": "cut", ', "broken JSON"),
    ("two objects on a line", b'{"id": "x"} {"id": "y"}', "broken JSON"),
    ("control character", b'{"id": "x\x00"}', "broken JSON"),
    ("deep nesting", b"[" * 100_000, "broken JSON"),
    ("an array", b"[1, 2]", "not an object"),
    ("null", b"null", "not an object"),
    ("Latin-1", "{'id': 'ü'}".encode("latin-1"), "not UTF-8"),
    ("UTF-16", '{"id": "x"}'.encode("utf-16-le").replace(b"\n", b""), "broken JSON"),
    (
        "missing field",
        b'{"id": "x"}',
        "missing fields: conversation_id, turn, user_id, time, model_version, messages, response",
    ),
]  # fmt: skip


def build(
    tmp_path: Path, quarantine_budget: float = 0.5, broken_files: str = "stop", **data: list[str]
) -> tuple[dict[str, Any], list[Row], list[Row]]:
    """Card, quarantined rows and feedback rows of the data set."""
    entries = {kind: data.get(kind, []) for kind in DATA_KINDS}
    settings = Settings.model_validate(
        {"data": entries, "prepare": {"quarantine_budget": quarantine_budget, "broken_files": broken_files}}
    )
    card = pipeline.build_data_set(settings, tmp_path / "data", run_in_process)
    love_rows = [
        row
        for split in SPLIT_NAMES
        for row in pq.read_table(tmp_path / "data" / "love" / f"{split}.parquet").to_pylist()
    ]
    return card, pq.read_table(tmp_path / "data" / "quarantine.parquet").to_pylist(), love_rows


def counts_add_up(counts: dict[str, Any]) -> bool:
    outcomes = counts["kept"] + sum(counts["dropped"].values()) + sum(counts["quarantined"].values())
    return bool(counts["in"] == outcomes)


def test_forty_kinds_of_invalid_rows_are_quarantined(
    tmp_path: Path, rows: dict[str, RowFactory], jsonl: Callable[..., Path]
) -> None:
    make = rows["feedback"]
    valid_rows = [make(n, reaction="love" if n % 3 == 0 else None) for n in range(400)]
    invalid_lines = [encode_row(make(9000 + n, **change)) for n, (_, change, _) in enumerate(INVALID_CHANGES)] + [
        raw for _, raw, _ in INVALID_LINES
    ]
    duplicate = encode_row(make(7, response="another text"))
    log = jsonl(tmp_path / "log.jsonl", [*valid_rows, *invalid_lines, duplicate])
    card, quarantined, love_rows = build(tmp_path, feedback=[str(log)])
    counts = card["counts"]["feedback"]
    assert len(invalid_lines) + 1 >= 40
    assert counts["in"] == 400 + len(invalid_lines) + 1 and counts_add_up(counts)
    expected = (
        [reason for _, _, reason in INVALID_CHANGES] + [reason for _, _, reason in INVALID_LINES] + ["duplicate id"]
    )
    quarantined.sort(key=lambda row: row["line"])
    assert [row["reason"] for row in quarantined] == expected
    assert [row["line"] for row in quarantined] == list(range(401, 401 + len(expected)))
    assert [row["raw"] for row in quarantined] == [raw[: 2**20] for raw in [*invalid_lines, duplicate]]
    assert Counter(row["reason"] for row in quarantined) == counts["quarantined"]
    assert {row["id"] for row in love_rows} <= {row["id"] for row in valid_rows}


def test_broken_files_yield_their_readable_rows_and_one_reason(
    tmp_path: Path, rows: dict[str, RowFactory], jsonl: Callable[..., Path]
) -> None:
    make = rows["feedback"]
    valid_rows = [make(n, reaction="love" if n % 3 == 0 else None) for n in range(600)]
    complete_file = jsonl(tmp_path / "a.jsonl", valid_rows[:400])
    truncated_gzip = tmp_path / "b.jsonl.gz"
    gzip_bytes = gzip.compress(b"".join(encode_row(row) + b"\n" for row in valid_rows[400:]))
    truncated_gzip.write_bytes(gzip_bytes[: len(gzip_bytes) // 2])
    truncated_zstd = tmp_path / "c.jsonl.zst"
    zstd_rows = b"".join(encode_row(make(n)) + b"\n" for n in range(700, 720))
    truncated_zstd.write_bytes(pa.compress(zstd_rows, "zstd", asbytes=True)[:-20])
    broken_parquet = tmp_path / "d.parquet"
    broken_parquet.write_bytes(b"PAR1 and then nothing")
    broken_csv = tmp_path / "e.csv"
    broken_csv.write_bytes(b"id,turn,response\na,1\n")
    empty_file = tmp_path / "f.jsonl"
    empty_file.write_bytes(b"\n  \n")
    files = [complete_file, truncated_gzip, truncated_zstd, broken_parquet, broken_csv, empty_file]
    with pytest.raises(DataError, match=r"3 files end early or cannot be read \(broken gzip file at .*b\.jsonl\.gz"):
        build(tmp_path, feedback=[str(file) for file in files])
    with pytest.raises(DataError, match=r"about \d+ rows of broken files are lost"):
        build(tmp_path, 0.05, "count", feedback=[str(file) for file in files])
    card, quarantined, _ = build(tmp_path, 0.7, "count", feedback=[str(file) for file in files])
    counts = card["counts"]["feedback"]
    assert counts_add_up(counts)
    reasons = {Path(row["source"]).name: row["reason"] for row in quarantined}
    assert reasons == {
        "b.jsonl.gz": "broken gzip file", "c.jsonl.zst": "broken zstd file", "d.parquet": "broken Parquet file",
        "e.csv": "wrong number of cells",
    }  # fmt: skip
    rows_by_file = {Path(source["file"]).name: source["rows"] for source in card["sources"]}
    assert rows_by_file["f.jsonl"] == 0 and rows_by_file["a.jsonl"] == 400 and 20 < rows_by_file["b.jsonl.gz"] < 200
    assert card["counts"]["feedback"]["in"] == sum(rows_by_file.values())


def test_reaction_events_have_the_documented_outcomes(
    tmp_path: Path, rows: dict[str, RowFactory], jsonl: Callable[..., Path]
) -> None:
    make, make_event = rows["feedback"], rows["reactions"]
    log = jsonl(tmp_path / "log.jsonl", [make(n, reaction="love" if n % 2 else None) for n in range(400)])
    events: list[Row | bytes] = [
        make_event(0),
        make_event(0),  # sent twice
        make_event(1, response_id="f1", retracted=True),  # withdraws the love that the row itself has
        make_event(2),
        make_event(3, id="e2b", response_id="f2", time="2025-03-03T11:00:00Z", retracted=True),
        make_event(4, time="2025-03-31T10:00:00Z"),  # too late
        make_event(6, time="2025-03-01T10:00:00Z"),  # before its response
        make_event(8, response_id="nowhere"),
        make_event(10, reaction="thumbs_down", time="2025-03-11T12:00:00Z"),
        make_event(12, time=7),
        b"{",
    ]
    event_log = jsonl(tmp_path / "events.jsonl", events)
    card, _, love_rows = build(tmp_path, feedback=[str(log)], reactions=[str(event_log)])
    counts = card["counts"]["reactions"]
    assert counts_add_up(counts) and counts["in"] == len(events)
    assert counts["kept"] == 2
    assert counts["dropped"] == {
        "duplicate event": 1, "retracted": 2, "superseded by a later event": 1, "outside the attribution window": 2,
        "no such response": 1,
    }  # fmt: skip
    assert counts["quarantined"] == {"wrong type: time": 1, "broken JSON": 1}
    reaction = {row["id"]: row["reaction"] for row in love_rows}
    expected = {"f0": "love", "f1": None, "f2": None, "f4": None, "f10": "thumbs_down"}
    assert {name: reaction[name] for name in expected if name in reaction} == {
        name: value for name, value in expected.items() if name in reaction
    }
    assert len(expected.keys() & reaction.keys()) >= 4


def test_the_docs_list_every_reason() -> None:
    docs_text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    reasons = {reason.partition(":")[0] for _, _, reason in [*INVALID_CHANGES, *INVALID_LINES]} - {
        "empty reaction",
        "empty user_id",
    }
    reasons |= {"duplicate id", "line too long", "broken gzip file", "broken zstd file", "broken Parquet file",
                "wrong number of cells", "no such response", "retracted", "outside the attribution window",
                "superseded by a later event", "duplicate event", "sampled out of train", "context is a test prompt",
                "above prepare.max_rows", "replaced by a later row of the same id", "reaction is ignored",
                "excluded by where", "broken bzip2 file", "broken CSV file", "broken JSON file",
                "near-duplicate prompt is in another split", "after the time split", "user asked to be forgotten",
                "test row before the time split", "conversation is in another split"}  # fmt: skip
    assert [reason for reason in sorted(reasons) if reason.lower() not in docs_text.lower()] == []
