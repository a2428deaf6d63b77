"""The golden log: every kind of bad row and the reason that it must get."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from rluf.prepare.schema import KINDS, MAX_TEXT, FeedbackRecord
from rluf.prepare.validation import Bad, validate

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("feedback", {"response": ""}, "empty response"),
    ("feedback", {"response": " \n\t"}, "empty response"),
    ("feedback", {"response": None}, "wrong type: response"),
    ("feedback", {"response": "x" * (MAX_TEXT + 1)}, "too long: response"),
    ("feedback", {"response": "half a smile \ud83d"}, "lone surrogate"),
    ("feedback", {"messages": []}, "empty messages"),
    ("feedback", {"messages": "hello"}, "wrong type: messages"),
    ("feedback", {"messages": user("x" * (MAX_TEXT + 1))}, "too long: messages.content"),
    ("feedback", {"messages": user("hi") * 2001}, "too long: messages"),
    ("feedback", {"messages": user(7)}, "wrong type: messages.content"),
    ("feedback", {"messages": user("  ")}, "empty last message"),
    ("feedback", {"messages": [{"role": "robot", "content": "x"}]}, "bad value: messages.role"),
    ("feedback", {"messages": [{"role": "user"}]}, "missing field: messages.content"),
    ("feedback", {"messages": [*user("x"), {"role": "system", "content": "y"}]}, "messages do not end with the user"),
    ("feedback", {"time": "2031-01-01T00:00:00Z"}, "future time"),
    ("feedback", {"time": "1970-01-01T00:00:00Z"}, "time before 2000"),
    ("feedback", {"time": "2025-01-01T00:00:00"}, "time without zone"),
    ("feedback", {"time": "yesterday"}, "bad value: time"),
    ("feedback", {"time": 1735689600}, "wrong type: time"),
    ("feedback", {"time": float("nan")}, "wrong type: time"),
    ("feedback", {"turn": -1}, "bad value: turn"),
    ("feedback", {"turn": "3"}, "wrong type: turn"),
    ("feedback", {"turn": 10**30}, "bad value: turn"),
    ("feedback", {"reaction": True}, "wrong type: reaction"),
    ("feedback", {"continued": "yes"}, "wrong type: continued"),
    ("feedback", {"user_id": ""}, "empty user_id"),
    ("feedback", {"id": None}, "wrong type: id"),
    ("preferences", {"chosen": "same", "rejected": "same"}, "chosen equals rejected"),
    ("preferences", {"chosen": ""}, "empty chosen"),
    ("safety", {"label": 2}, "bad value: label"),
    ("safety", {"label": True}, "wrong type: label"),
    ("safety", {"label": 0.5}, "wrong type: label"),
    ("prompts", {"split": "dev"}, "bad value: split"),
]


@pytest.mark.parametrize(("kind", "change", "reason"), CHANGES, ids=range(len(CHANGES)))
def test_golden_bad_rows(kind: str, change: dict[str, Any], reason: str, rows: dict[str, Callable[..., Any]]) -> None:
    raw = json.dumps(rows[kind](1, **change)).encode()
    assert validate(raw, KINDS[kind].record, NOW) == Bad(reason)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"id": "x", ', "broken JSON"),
        (b"", "broken JSON"),
        (b"not json at all", "broken JSON"),
        (b'{"id": "x"} {"id": "y"}', "broken JSON"),
        (b"[1, 2]", "not an object"),
        (b"null", "not an object"),
        (b"[" * 100_000, "broken JSON"),
        ("{'id': 'ü'}".encode("latin-1"), "not UTF-8"),
        ('{"id": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"id": "x\x00"}', "broken JSON"),
    ],
)
def test_golden_bad_bytes(raw: bytes, reason: str) -> None:
    assert validate(raw, FeedbackRecord, NOW) == Bad(reason)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_required_field_is_missed_by_name(kind: str, rows: dict[str, Callable[..., Any]]) -> None:
    record = KINDS[kind].record
    required = [name for name, field in record.model_fields.items() if field.is_required()]
    for name in required:
        row = rows[kind](1)
        del row[name]
        assert validate(json.dumps(row).encode(), record, NOW) == Bad(f"missing field: {name}")


@pytest.mark.parametrize("kind", list(KINDS))
def test_good_rows_pass(kind: str, rows: dict[str, Callable[..., Any]]) -> None:
    row = rows[kind](1)
    record = validate(json.dumps(row).encode(), KINDS[kind].record, NOW)
    assert isinstance(record, KINDS[kind].record)
    assert record.model_dump(mode="json") == row


def test_emoji_pairs_and_other_zones_pass(rows: dict[str, Callable[..., Any]]) -> None:
    row = rows["feedback"](1, response="a smile \U0001f600", time="2025-06-01T02:00:00+02:00")
    record = validate(json.dumps(row).encode(), FeedbackRecord, NOW)
    assert isinstance(record, FeedbackRecord)
    assert record.time == datetime(2025, 6, 1, tzinfo=UTC)
