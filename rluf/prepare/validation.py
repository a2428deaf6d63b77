"""From a raw row to a record, or to the reason why it is none.

Reasons are short fixed phrases, at most with a field's name, so that they can be counted; the golden log in
tests/prepare/test_validation.py lists them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rluf.prepare.schema import FeedbackRecord, Record

FUTURE_SLACK = timedelta(days=1)
"""How far ahead of our clock a log's clock may run."""

EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
"""Rows before it carry a broken clock (often zero seconds since 1970)."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that cannot be used, and why."""

    reason: str


def _holds_surrogate(raw: bytes) -> bool:
    """Whether the JSON is whole but for escapes of half a UTF-16 pair (such as \\ud83d alone)."""
    try:
        text = json.dumps(json.loads(raw), ensure_ascii=False)
    except (ValueError, RecursionError):
        return False
    return any("\ud800" <= char <= "\udfff" for char in text)


def _reason(error: ErrorDetails, raw: bytes) -> str:
    field = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    kind = error["type"]
    if kind == "json_invalid":
        return "lone surrogate" if _holds_surrogate(raw) else "broken JSON"
    if kind == "missing":
        return f"missing field: {field}"
    if kind in ("string_too_long", "too_long"):
        return f"too long: {field}"
    if kind == "string_too_short":
        return f"empty {field}"
    if kind == "timezone_aware":
        return "time without zone"
    if kind in (
        "literal_error",
        "greater_than_equal",
        "less_than_equal",
        "datetime_parsing",
        "datetime_from_date_parsing",
    ):
        return f"bad value: {field}"
    if kind in ("empty", "order", "same"):
        return error["msg"]
    return f"wrong type: {field}" if field else "not an object"


def validate(raw: bytes, record: type[Record], now: datetime) -> Record | Bad:
    """Check one JSON object (UTF-8) against its record; `now` is the clock that future times are told by.

    When several things are wrong the first field's in the record's order is the reason.
    """
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return Bad("not UTF-8")
    try:
        row = record.model_validate_json(raw)
    except ValidationError as error:
        return Bad(_reason(error.errors(include_url=False, include_input=False)[0], raw))
    if isinstance(row, FeedbackRecord):
        if row.time > now + FUTURE_SLACK:
            return Bad("future time")
        if row.time < EARLIEST:
            return Bad("time before 2000")
    return row
