"""Rows by the thousand: msgspec decodes what is plainly good, pydantic judges the rest and gives the reason.

The msgspec types are derived from the pydantic records, as the Arrow schema is, so there is one definition. msgspec is
the stricter of the two on what it shares (a test with hypothesis holds it to that), so a row that it takes is good.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import pyarrow as pa
from pydantic import AwareDatetime, BaseModel

from rluf.prepare.schema import Record, arrow_schema
from rluf.prepare.validation import EARLIEST, FUTURE_SLACK, Bad, validate

_BOUNDS = ("min_length", "max_length", "ge", "le")


def _msgspec_type(annotation: Any, metadata: Sequence[Any]) -> Any:
    """The msgspec type of a pydantic field: same type, same bounds."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is AwareDatetime:
        return Annotated[datetime, msgspec.Meta(tz=True)]
    if origin is Annotated:
        return _msgspec_type(args[0], [*args[1:], *metadata])
    if origin in (Union, types.UnionType):
        inner = tuple(None if arg is type(None) else _msgspec_type(arg, []) for arg in args)
        return Union[inner]  # noqa: UP007
    if origin is list:
        made: Any = list[_msgspec_type(args[0], [])]  # type: ignore[misc]
    elif origin is Literal:
        return annotation
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        made = _struct(annotation)
    else:
        made = annotation
    found = {name: value for part in metadata for name in _BOUNDS if (value := getattr(part, name, None)) is not None}
    return Annotated[made, msgspec.Meta(**found)] if found else made


@cache
def _struct(record: type[BaseModel]) -> type[msgspec.Struct]:
    fields: list[Any] = []
    for name, field in record.model_fields.items():
        kind = _msgspec_type(field.annotation, field.metadata)
        fields.append((name, kind) if field.is_required() else (name, kind, field.default))
    return msgspec.defstruct(record.__name__, fields, kw_only=True, gc=False)


@cache
def _decoder(record: type[Record]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_struct(record))


def _decoded(raws: Sequence[bytes], record: type[Record]) -> list[Any]:
    """One struct a row [N], None for what msgspec does not take."""
    decoder = _decoder(record)
    try:
        rows: list[Any] = decoder.decode_lines(b"\n".join(raws))
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == len(raws):
        return rows
    rows = []
    for raw in raws:
        try:
            rows.append(decoder.decode(raw))
        except (ValueError, RecursionError):
            rows.append(None)
    return rows


def _sound(row: Any, has: frozenset[str], now: datetime) -> bool:
    """Whether a decoded row also keeps the rules between fields (those of schema.Record and of validate)."""
    messages = row.messages if "messages" in has else None
    if messages is not None and not (messages and messages[-1].role == "user" and messages[-1].content.strip()):
        return False
    if "response" in has and not row.response.strip():
        return False
    if "chosen" in has and (not row.chosen.strip() or row.chosen == row.rejected):
        return False
    return "time" not in has or EARLIEST <= row.time <= now + FUTURE_SLACK


def check_rows(raws: Sequence[bytes], record: type[Record], now: datetime) -> list[Any]:
    """What each JSON object (UTF-8) is: a row with the record's fields as attributes, or Bad with its reason [N]."""
    has = frozenset(record.model_fields)
    rows = _decoded(raws, record)
    for index, row in enumerate(rows):
        if row is None or not _sound(row, has, now):
            rows[index] = validate(raws[index], record, now)
    return rows


def to_arrow(rows: Sequence[Any], record: type[Record]) -> pa.Table:
    """Arrow table of rows that `check_rows` found good."""
    schema = arrow_schema(record)
    columns = []
    for field in schema:
        values = [getattr(row, field.name) for row in rows]
        if pa.types.is_list(field.type):
            columns.append(_chats(values, field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _chats(chats: Sequence[Sequence[Any]], kind: pa.ListType) -> pa.ListArray:
    ends = [0]
    for chat in chats:
        ends.append(ends[-1] + len(chat))
    flat = [message for chat in chats for message in chat]
    fields = list(kind.value_type)
    parts = [pa.array([getattr(message, field.name) for message in flat], field.type) for field in fields]
    inner = pa.StructArray.from_arrays(parts, fields=fields)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), inner, type=kind)


__all__ = ["Bad", "check_rows", "to_arrow"]
