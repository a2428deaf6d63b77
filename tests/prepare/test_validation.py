"""Every kind of invalid row gets its reason, from pydantic and from the bulk path."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare.schema import (
    DATA_KINDS,
    MAX_TEXT_CHARS,
    FeedbackRecord,
    RejectedRow,
    build_arrow_table,
    build_records_table,
    validate_json_row,
    validate_json_rows,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RowFactory = Callable[..., dict[str, Any]]


ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.0, 1.5, 10**30, "", " ", "x", "7", "x" * 33, "x" * 201, "\ud83d", "\x00", [], [1],
    {},
    [{"role": "user", "content": "x"}], [{"role": "user"}], [{"role": "bot", "content": "x"}],
    [{"role": "assistant", "content": "x"}], [{"role": "user", "content": ""}], "2025-01-01T00:00:00Z", "2025-01-01",
    "2025-01-01T00:00:00", "2025-13-01T00:00:00Z", "2999-01-01T00:00:00Z", "1970-01-01T00:00:00Z", 1735689600,
    "2025-01-01 00:00:00+02:00", "love", "train", "dev", float("nan"), float("inf"),
]  # fmt: skip


def user_message(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


INVALID_CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("feedback", {"response": ""}, "empty response"),
    ("feedback", {"response": " \n\t"}, "empty response"),
    ("feedback", {"response": None}, "wrong type: response"),
    ("feedback", {"response": "x" * (MAX_TEXT_CHARS + 1)}, "too long: response"),
    ("feedback", {"response": "half a smile \ud83d"}, "lone surrogate"),
    ("feedback", {"messages": []}, "empty messages"),
    ("feedback", {"messages": "hello"}, "wrong type: messages"),
    ("feedback", {"messages": user_message("x" * (MAX_TEXT_CHARS + 1))}, "too long: messages.content"),
    ("feedback", {"messages": user_message("hi") * 2001}, "too long: messages"),
    ("feedback", {"messages": user_message(7)}, "wrong type: messages.content"),
    ("feedback", {"messages": user_message("  ")}, "empty last message"),
    ("feedback", {"messages": [{"role": "robot", "content": "x"}]}, "bad value: messages.role"),
    ("feedback", {"messages": [{"role": "user"}]}, "missing field: messages.content"),
    (
        "feedback",
        {"messages": [*user_message("x"), {"role": "system", "content": "y"}]},
        "messages do not end with the user",
    ),
    ("feedback", {"time": "2031-01-01T00:00:00Z"}, "future time"),
    ("feedback", {"time": "1970-01-01T00:00:00Z"}, "time before 2000"),
    ("feedback", {"time": "2025-01-01T00:00:00"}, "time without zone"),
    ("feedback", {"time": "yesterday"}, "bad value: time"),
    ("feedback", {"time": 1735689600}, "wrong type: time"),
    ("feedback", {"time": float("nan")}, "wrong type: time"),
    ("feedback", {"turn": -1}, "bad value: turn"),
    ("feedback", {"turn": "3"}, "wrong type: turn"),
    ("feedback", {"turn": 10**30}, "bad value: turn"),
    ("feedback", {"response_tokens": 10**30}, "bad value: response_tokens"),
    ("feedback", {"response_tokens": -1}, "bad value: response_tokens"),
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


@pytest.mark.parametrize(("kind", "change", "reason"), INVALID_CHANGES, ids=range(len(INVALID_CHANGES)))
def test_invalid_rows_get_their_reason(
    kind: str, change: dict[str, Any], reason: str, rows: dict[str, RowFactory]
) -> None:
    raw = json.dumps(rows[kind](1, **change)).encode()
    assert validate_json_row(raw, DATA_KINDS[kind].record_type, NOW) == RejectedRow(reason)


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
def test_invalid_bytes_get_their_reason(raw: bytes, reason: str) -> None:
    assert validate_json_row(raw, FeedbackRecord, NOW) == RejectedRow(reason)


@pytest.mark.parametrize("kind", list(DATA_KINDS))
def test_a_missing_required_field_is_named(kind: str, rows: dict[str, RowFactory]) -> None:
    record_type = DATA_KINDS[kind].record_type
    required_names = [name for name, field in record_type.model_fields.items() if field.is_required()]
    for name in required_names:
        row = rows[kind](1)
        del row[name]
        assert validate_json_row(json.dumps(row).encode(), record_type, NOW) == RejectedRow(f"missing field: {name}")


@pytest.mark.parametrize("kind", list(DATA_KINDS))
def test_valid_rows_are_accepted(kind: str, rows: dict[str, RowFactory]) -> None:
    row = rows[kind](1)
    record = validate_json_row(json.dumps(row).encode(), DATA_KINDS[kind].record_type, NOW)
    assert isinstance(record, DATA_KINDS[kind].record_type)
    assert record.model_dump(mode="json", exclude_unset=True) == row


def test_emoji_and_other_time_zones_are_accepted(rows: dict[str, RowFactory]) -> None:
    row = rows["feedback"](1, response="a smile \U0001f600", time="2025-06-01T02:00:00+02:00")
    record = validate_json_row(json.dumps(row).encode(), FeedbackRecord, NOW)
    assert isinstance(record, FeedbackRecord)
    assert record.time == datetime(2025, 6, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "change", [{"response_tokens": -1}, {"response_tokens": 2_000_000_000}, {"author": "x" * 2_000}]
)
def test_bounds_of_optional_fields_hold_in_bulk(rows: dict[str, RowFactory], change: dict[str, Any]) -> None:
    raw = json.dumps(rows["feedback"](1, **change)).encode()
    (result,) = validate_json_rows([raw], FeedbackRecord, NOW)
    assert isinstance(result, RejectedRow) and next(iter(change)) in result.reason
    assert result == validate_json_row(raw, FeedbackRecord, NOW)


@pytest.mark.parametrize("kind", list(DATA_KINDS))
def test_bulk_validation_agrees_with_pydantic(kind: str, rows: dict[str, RowFactory]) -> None:
    record_type = DATA_KINDS[kind].record_type
    changes = st.dictionaries(
        st.sampled_from([*record_type.model_fields, "unknown"]), st.sampled_from(ODD_VALUES), max_size=2
    )

    @settings(max_examples=60)
    @given(st.lists(changes, min_size=1, max_size=4))
    def compare(row_changes: list[dict[str, Any]]) -> None:
        raw_rows = [json.dumps(rows[kind](n, **change)).encode() for n, change in enumerate(row_changes)]
        results = validate_json_rows(raw_rows, record_type, NOW)
        for raw, result in zip(raw_rows, results, strict=True):
            expected = validate_json_row(raw, record_type, NOW)
            if isinstance(expected, RejectedRow):
                assert result == expected
            else:
                table = build_arrow_table([result], record_type)
                assert table.equals(build_records_table([expected], record_type))

    compare()


@settings(max_examples=100)
@given(st.lists(st.binary(min_size=1, max_size=30).filter(lambda raw: b"\n" not in raw and raw.strip()), max_size=5))
def test_invalid_bytes_do_not_affect_their_neighbors(noise: list[bytes]) -> None:
    valid_row = b'{"id": "a", "response_id": "b", "time": "2025-01-01T00:00:00Z", "reaction": "love"}'
    record_type = DATA_KINDS["reactions"].record_type
    results = validate_json_rows([valid_row, *noise, valid_row], record_type, NOW)
    assert len(results) == len(noise) + 2
    assert not isinstance(results[0], RejectedRow) and not isinstance(results[-1], RejectedRow)
    assert results[1:-1] == [validate_json_row(raw, record_type, NOW) for raw in noise]


def test_messages_of_conversations_stay_in_their_rows(rows: dict[str, RowFactory]) -> None:
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"m{n}"} for n in range(7)]
    raw_rows = [json.dumps(rows["feedback"](n, messages=messages[: 1 + 2 * n])).encode() for n in range(4)]
    record_type = DATA_KINDS["feedback"].record_type
    table = build_arrow_table(validate_json_rows(raw_rows, record_type, NOW), record_type)
    assert [len(row_messages) for row_messages in table["messages"].to_pylist()] == [1, 3, 5, 7]
    assert table["messages"].to_pylist()[3] == messages
