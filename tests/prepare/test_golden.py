"""The golden log: forty kinds of bad row and file, each of which ends where the table in docs/data.md says.

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

from rluf.config.settings import Settings
from rluf.prepare import pipeline
from rluf.prepare.schema import KINDS, MAX_TEXT

Row = dict[str, Any]
Maker = Callable[..., Row]
ROOT = Path(__file__).parents[2]


def in_this_process(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [found for row in rows for found in pipeline.run_task(row)]


def user(text: Any) -> list[Row]:
    return [{"role": "user", "content": text}]


def line(row: Row) -> bytes:
    return json.dumps(row).encode()


CHANGES: list[tuple[str, Row, str]] = [
    ("empty response", {"response": ""}, "empty response"),
    ("blank response", {"response": " \n\t"}, "empty response"),
    ("response is null", {"response": None}, "wrong type: response"),
    ("response of 10 MB", {"response": "x" * 10_000_000}, "too long: response"),
    ("message too long", {"messages": user("x" * (MAX_TEXT + 1))}, "too long: messages.content"),
    ("lone surrogate", {"response": "half a smile \ud83d"}, "lone surrogate"),
    ("no messages", {"messages": []}, "empty messages"),
    ("messages are text", {"messages": "hello"}, "wrong type: messages"),
    ("too many messages", {"messages": user("hi") * 2001}, "too long: messages"),
    ("message is a number", {"messages": user(7)}, "wrong type: messages.content"),
    ("blank last message", {"messages": user("  ")}, "empty last message"),
    ("unknown role", {"messages": [{"role": "robot", "content": "x"}]}, "bad value: messages.role"),
    ("message without content", {"messages": [{"role": "user"}]}, "missing field: messages.content"),
    ("assistant last", {"messages": [*user("x"), {"role": "assistant", "content": "y"}]},
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
    ("user is a number", {"user_id": 7}, "wrong type: user_id"),
    ("id is null", {"id": None}, "wrong type: id"),
    ("id too long", {"id": "x" * 201}, "too long: id"),
]  # fmt: skip

RAW: list[tuple[str, bytes, str]] = [
    ("broken JSON", b'{"id": "cut", ', "broken JSON"),
    ("two objects on a line", b'{"id": "x"} {"id": "y"}', "broken JSON"),
    ("control character", b'{"id": "x\x00"}', "broken JSON"),
    ("deep nesting", b"[" * 100_000, "broken JSON"),
    ("an array", b"[1, 2]", "not an object"),
    ("null", b"null", "not an object"),
    ("Latin-1", "{'id': 'ü'}".encode("latin-1"), "not UTF-8"),
    ("UTF-16", '{"id": "x"}'.encode("utf-16-le").replace(b"\n", b""), "broken JSON"),
    ("missing field", b'{"id": "x"}', "missing field: conversation_id"),
]


def built(tmp_path: Path, budget: float = 0.5, **data: list[str]) -> tuple[dict[str, Any], list[Row], list[Row]]:
    """Card, quarantined rows and kept feedback rows."""
    every = {kind: data.get(kind, []) for kind in KINDS}
    settings = Settings.model_validate({"data": every, "prepare": {"quarantine_budget": budget}})
    card = pipeline.build(settings, tmp_path / "data", in_this_process)
    kept = [
        row
        for side in ("train", "dev", "test")
        for row in pq.read_table(tmp_path / "data" / "love" / f"{side}.parquet").to_pylist()
    ]
    return card, pq.read_table(tmp_path / "data" / "quarantine.parquet").to_pylist(), kept


def adds_up(count: dict[str, Any]) -> bool:
    return bool(count["in"] == count["kept"] + sum(count["dropped"].values()) + sum(count["quarantined"].values()))


def test_forty_kinds_of_bad_row_end_in_quarantine(
    tmp_path: Path, rows: dict[str, Maker], jsonl: Callable[..., Path]
) -> None:
    make = rows["feedback"]
    good = [make(n, reaction="love" if n % 3 == 0 else None) for n in range(400)]
    bad = [line(make(9000 + n, **change)) for n, (_, change, _) in enumerate(CHANGES)] + [raw for _, raw, _ in RAW]
    twice = line(make(7, response="another text"))
    log = jsonl(tmp_path / "log.jsonl", [*good, *bad, twice])
    card, aside, kept = built(tmp_path, feedback=[str(log)])
    count = card["counts"]["feedback"]
    assert len(bad) + 1 >= 40
    assert count["in"] == 400 + len(bad) + 1 and adds_up(count)
    expected = [reason for _, _, reason in CHANGES] + [reason for _, _, reason in RAW] + ["duplicate id"]
    aside.sort(key=lambda row: row["line"])
    assert [row["reason"] for row in aside] == expected
    assert [row["line"] for row in aside] == list(range(401, 401 + len(expected)))
    assert [row["raw"] for row in aside] == [raw[: 2**20] for raw in [*bad, twice]]
    assert Counter(row["reason"] for row in aside) == count["quarantined"]
    assert {row["id"] for row in kept} <= {row["id"] for row in good}


def test_broken_files_give_what_they_hold_and_one_reason(
    tmp_path: Path, rows: dict[str, Maker], jsonl: Callable[..., Path]
) -> None:
    make = rows["feedback"]
    every = [make(n, reaction="love" if n % 3 == 0 else None) for n in range(600)]
    whole = jsonl(tmp_path / "a.jsonl", every[:400])
    cut = tmp_path / "b.jsonl.gz"
    body = gzip.compress(b"".join(line(row) + b"\n" for row in every[400:]))
    cut.write_bytes(body[: len(body) // 2])
    packed = tmp_path / "c.jsonl.zst"
    packed.write_bytes(
        pa.compress(b"".join(line(make(n)) + b"\n" for n in range(700, 720)), "zstd", asbytes=True)[:-20]
    )
    text = tmp_path / "d.parquet"
    text.write_bytes(b"PAR1 and then nothing")
    table = tmp_path / "e.csv"
    table.write_bytes(b"id,turn,response\na,1\n")
    empty = tmp_path / "f.jsonl"
    empty.write_bytes(b"\n  \n")
    files = [whole, cut, packed, text, table, empty]
    card, aside, _ = built(tmp_path, feedback=[str(file) for file in files])
    count = card["counts"]["feedback"]
    assert adds_up(count)
    reasons = {Path(row["source"]).name: row["reason"] for row in aside}
    assert reasons == {
        "b.jsonl.gz": "broken gzip file", "c.jsonl.zst": "broken zstd file", "d.parquet": "broken Parquet file",
        "e.csv": "wrong number of cells",
    }  # fmt: skip
    by_file = {Path(source["file"]).name: source["rows"] for source in card["sources"]}
    assert by_file["f.jsonl"] == 0 and by_file["a.jsonl"] == 400 and 20 < by_file["b.jsonl.gz"] < 200
    assert card["counts"]["feedback"]["in"] == sum(by_file.values())


def test_events_end_where_the_table_says(tmp_path: Path, rows: dict[str, Maker], jsonl: Callable[..., Path]) -> None:
    make, event = rows["feedback"], rows["reactions"]
    log = jsonl(tmp_path / "log.jsonl", [make(n, reaction="love" if n % 2 else None) for n in range(400)])
    events: list[Row | bytes] = [
        event(0),
        event(0),  # sent twice
        event(1, response_id="f1", retracted=True),  # takes the row's own love back
        event(2),
        event(3, id="e2b", response_id="f2", time="2025-03-03T11:00:00Z", retracted=True),
        event(4, time="2025-03-31T10:00:00Z"),  # too late
        event(6, time="2025-03-01T10:00:00Z"),  # before its response
        event(8, response_id="nowhere"),
        event(10, reaction="thumbs_down", time="2025-03-11T12:00:00Z"),
        event(12, time=7),
        b"{",
    ]
    stream = jsonl(tmp_path / "events.jsonl", events)
    card, _, kept = built(tmp_path, feedback=[str(log)], reactions=[str(stream)])
    count = card["counts"]["reactions"]
    assert adds_up(count) and count["in"] == len(events)
    assert count["kept"] == 2
    assert count["dropped"] == {
        "duplicate event": 1, "retracted": 2, "superseded by a later event": 1, "outside the attribution window": 2,
        "no such response": 1,
    }  # fmt: skip
    assert count["quarantined"] == {"wrong type: time": 1, "broken JSON": 1}
    reaction = {row["id"]: row["reaction"] for row in kept}
    expected = {"f0": "love", "f1": None, "f2": None, "f4": None, "f10": "thumbs_down"}
    assert {name: reaction[name] for name in expected if name in reaction} == {
        name: value for name, value in expected.items() if name in reaction
    }
    assert len(expected.keys() & reaction.keys()) >= 4


def test_every_reason_stands_in_the_table_of_the_docs() -> None:
    table = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    reasons = {reason.partition(":")[0] for _, _, reason in [*CHANGES, *RAW]} - {"empty reaction", "empty user_id"}
    reasons |= {"duplicate id", "line too long", "broken gzip file", "broken zstd file", "broken Parquet file",
                "wrong number of cells", "no such response", "retracted", "outside the attribution window",
                "superseded by a later event", "duplicate event", "sampled out of train", "context is a test prompt",
                "near-duplicate prompt is on another side", "after the time split", "user asked to be forgotten",
                "test row before the time split", "conversation is on another side"}  # fmt: skip
    assert [reason for reason in sorted(reasons) if reason.lower() not in table.lower()] == []
