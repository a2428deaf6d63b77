"""Row validation: from raw JSON to a record, or to the reason why the row is rejected.

Rows are validated in bulk: msgspec decodes what is plainly valid, and pydantic validates the rest again to give the
reason. The msgspec types are derived from the pydantic records, as the Arrow schema is, so there is one definition.
msgspec is the stricter of the two on what they share (a property test checks this), so a row that it accepts is valid.

Reasons are short fixed phrases with a field's name at most, so that they can be counted; the golden log in
tests/prepare/test_validation.py lists them.
"""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rluf.prepare.schema import FeedbackRecord, LogRecord, build_arrow_schema

FUTURE_SLACK = timedelta(days=1)
"""How far the clock of the log's writer may be ahead of this machine's."""

EARLIEST_TIME = datetime(2000, 1, 1, tzinfo=UTC)
"""Earlier times come from a broken clock (often zero seconds since 1970)."""

_BOUND_NAMES = ("min_length", "max_length", "ge", "le")


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that cannot be used, and why."""

    reason: str


def validate_json_row(raw: bytes, record_type: type[LogRecord], now: datetime) -> LogRecord | RejectedRow:
    """Validate one JSON object (UTF-8) against its record; times after `now` (plus FUTURE_SLACK) are rejected.

    If several fields are invalid, the first one in the record's order is the reason.
    """
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return RejectedRow("not UTF-8")
    try:
        record = record_type.model_validate_json(raw)
    except ValidationError as error:
        return RejectedRow(_rejection_reason(error.errors(include_url=False, include_input=False)[0], raw))
    if isinstance(record, FeedbackRecord):
        if record.time > now + FUTURE_SLACK:
            return RejectedRow("future time")
        if record.time < EARLIEST_TIME:
            return RejectedRow("time before 2000")
    return record


def _rejection_reason(error: ErrorDetails, raw: bytes) -> str:
    field_name = ".".join(str(key) for key in error["loc"] if isinstance(key, str))
    error_type = error["type"]
    if error_type == "json_invalid":
        return "lone surrogate" if _has_lone_surrogate(raw) else "broken JSON"
    if error_type == "missing":
        return f"missing field: {field_name}"
    if error_type in ("string_too_long", "too_long"):
        return f"too long: {field_name}"
    if error_type == "string_too_short":
        return f"empty {field_name}"
    if error_type == "timezone_aware":
        return "time without zone"
    if error_type in (
        "literal_error",
        "greater_than_equal",
        "less_than_equal",
        "datetime_parsing",
        "datetime_from_date_parsing",
    ):
        return f"bad value: {field_name}"
    if error_type in ("empty", "order", "same"):
        return error["msg"]
    return f"wrong type: {field_name}" if field_name else "not an object"


def _has_lone_surrogate(raw: bytes) -> bool:
    """Whether the JSON is valid except for escapes of half a UTF-16 pair (such as \\ud83d alone)."""
    try:
        # Python's parser accepts such escapes, pydantic's does not.
        text = json.dumps(json.loads(raw), ensure_ascii=False)
    except (ValueError, RecursionError):
        return False
    return any("\ud800" <= char <= "\udfff" for char in text)


def _to_msgspec_type(annotation: Any, metadata: Sequence[Any]) -> Any:
    """The msgspec type of a pydantic field: same type, same bounds."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is AwareDatetime:
        return Annotated[datetime, msgspec.Meta(tz=True)]
    if origin is Annotated:
        return _to_msgspec_type(args[0], [*args[1:], *metadata])
    if origin in (Union, types.UnionType):
        members = tuple(None if arg is type(None) else _to_msgspec_type(arg, []) for arg in args)
        return Union[members]  # noqa: UP007
    if origin is list:
        base_type: Any = list[_to_msgspec_type(args[0], [])]  # type: ignore[misc]
    elif origin is Literal:
        return annotation
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        base_type = _build_struct(annotation)
    else:
        base_type = annotation
    bounds = {
        name: value
        for constraint in metadata
        for name in _BOUND_NAMES
        if (value := getattr(constraint, name, None)) is not None
    }
    return Annotated[base_type, msgspec.Meta(**bounds)] if bounds else base_type


@cache
def _build_struct(record_type: type[BaseModel]) -> type[msgspec.Struct]:
    fields: list[Any] = []
    for name, field in record_type.model_fields.items():
        field_type = _to_msgspec_type(field.annotation, field.metadata)
        fields.append((name, field_type) if field.is_required() else (name, field_type, field.default))
    # The rows hold no cycles; without gc=False the collector would walk millions of small objects.
    return msgspec.defstruct(record_type.__name__, fields, kw_only=True, gc=False)


@cache
def _build_decoder(record_type: type[LogRecord]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_build_struct(record_type))


def _decode_rows(raw_rows: Sequence[bytes], record_type: type[LogRecord]) -> list[Any]:
    """One struct per row [N]; None for a row that msgspec does not accept."""
    decoder = _build_decoder(record_type)
    try:
        rows: list[Any] = decoder.decode_lines(b"\n".join(raw_rows))
    except (ValueError, RecursionError):
        rows = []
    # One call decodes a batch of valid rows. A row with a line break inside would change the number of rows.
    if len(rows) == len(raw_rows):
        return rows
    rows = []
    for raw in raw_rows:
        try:
            rows.append(decoder.decode(raw))
        except (ValueError, RecursionError):
            rows.append(None)
    return rows


def _is_consistent(row: Any, field_names: frozenset[str], now: datetime) -> bool:
    """Whether a decoded row also satisfies the rules that types cannot state (schema.LogRecord and this module)."""
    messages = row.messages if "messages" in field_names else None
    if messages is not None and not (messages and messages[-1].role == "user" and messages[-1].content.strip()):
        return False
    if "response" in field_names and not row.response.strip():
        return False
    if "chosen" in field_names and (not row.chosen.strip() or row.chosen == row.rejected):
        return False
    return "time" not in field_names or EARLIEST_TIME <= row.time <= now + FUTURE_SLACK


def validate_json_rows(raw_rows: Sequence[bytes], record_type: type[LogRecord], now: datetime) -> list[Any]:
    """Validate JSON objects (UTF-8): a row with the record's fields as attributes, or RejectedRow, for each [N]."""
    field_names = frozenset(record_type.model_fields)
    rows = _decode_rows(raw_rows, record_type)
    for index, row in enumerate(rows):
        if row is None or not _is_consistent(row, field_names, now):
            rows[index] = validate_json_row(raw_rows[index], record_type, now)
    return rows


def build_arrow_table(rows: Sequence[Any], record_type: type[LogRecord]) -> pa.Table:
    """Arrow table of rows that `validate_json_rows` accepted."""
    schema = build_arrow_schema(record_type)
    columns = []
    for field in schema:
        values = [getattr(row, field.name) for row in rows]
        if pa.types.is_list(field.type):
            columns.append(_build_messages_array(values, field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _build_messages_array(conversations: Sequence[Sequence[Any]], arrow_type: pa.ListType) -> pa.ListArray:
    # Arrow converts Python objects only from dicts; building the columns directly avoids a dict per message.
    offsets = [0]
    for messages in conversations:
        offsets.append(offsets[-1] + len(messages))
    all_messages = [message for messages in conversations for message in messages]
    fields = list(arrow_type.value_type)
    columns = [pa.array([getattr(message, field.name) for message in all_messages], field.type) for field in fields]
    structs = pa.StructArray.from_arrays(columns, fields=fields)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs, type=arrow_type)
