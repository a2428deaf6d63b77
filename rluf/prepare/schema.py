"""What a row of each log is: one definition a kind, from which both the checks and the Arrow schema follow.

Rows are checked strictly (no number passes for a string), fields that rluf does not know are left out, and a record
that was written to Parquet reads back equal.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

SCHEMA_VERSION = 2
"""Version of the record layout, kept in each Parquet file's metadata. Version 2 adds fields; logs of 1 are read too."""

MAX_TEXT = 100_000
"""Longest message or response in characters; longer ones are quarantined."""

MAX_MESSAGES = 2000
"""Most messages of one context."""

LOVE = "love"
"""The reaction that P[Love] predicts."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Topic = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Short = Annotated[str, StringConstraints(min_length=1, max_length=35)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]


class Record(BaseModel):
    """Base of all rows: frozen, strict types, unknown fields left out."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    @model_validator(mode="after")
    def _texts(self) -> Record:
        for field in ("response", "chosen"):
            text = getattr(self, field, None)
            if text is not None and not text.strip():
                raise PydanticCustomError("empty", "empty {field}", {"field": field})
        messages: Sequence[ChatMessage] | None = getattr(self, "messages", None)
        if messages is None:
            return self
        if not messages:
            raise PydanticCustomError("empty", "empty messages")
        if messages[-1].role != "user":
            raise PydanticCustomError("order", "messages do not end with the user")
        if not messages[-1].content.strip():
            raise PydanticCustomError("empty", "empty last message")
        return self


class ChatMessage(Record):
    """One chat message of the context."""

    role: Literal["system", "user", "assistant"]
    content: Text


Messages = Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)]


class FeedbackRecord(Record):
    """One served response and what the user did with it.

    `messages` are the context and end with the user's message; `time` is when the response was served; `reaction` is
    the name of the reaction ("love" is what P[Love] learns; others, such as "thumbs_down", are kept by name; null means
    none); `continued` and `returned` say whether the user wrote on and came back, null when the log does not tell.
    `user_id` must be hashed by whoever writes the log, or is hashed here (see rluf.prepare.redact). `interface` is
    where it was shown (app, web), `device` a hash of the device, `author` the user who made the persona that answered.
    """

    id: Name
    conversation_id: Name
    turn: int = Field(ge=0, le=1_000_000)
    user_id: Name
    time: AwareDatetime
    model_version: Name
    messages: Messages
    response: Text
    reaction: Annotated[str, StringConstraints(min_length=1, max_length=32)] | None
    continued: bool | None = None
    returned: bool | None = None
    topic: Topic = "other"
    locale: Short = "und"
    interface: Short = "und"
    device: Name | None = None
    author: Name | None = None


class ReactionRecord(Record):
    """A reaction that was logged apart from its response, in any order: `retracted` takes the reaction back."""

    id: Name
    response_id: Name
    time: AwareDatetime
    reaction: Annotated[str, StringConstraints(min_length=1, max_length=32)]
    retracted: bool = False


class PreferenceRecord(Record):
    """Two responses to one context, of which raters preferred `chosen`. `group` names the prompt; splits go by it.

    `rejected` may be empty: a model that says nothing has lost against one that answers.
    """

    id: Name
    messages: Messages
    chosen: Text
    rejected: Text
    group: Name
    topic: Topic = "other"

    @model_validator(mode="after")
    def _differ(self) -> PreferenceRecord:
        if self.chosen == self.rejected:
            raise PydanticCustomError("same", "chosen equals rejected")
        return self


class SafetyRecord(Record):
    """A response with a label, 1 safe and 0 unsafe. `group` names the prompt; splits go by it."""

    id: Name
    messages: Messages
    response: Text
    label: int = Field(ge=0, le=1)
    group: Name
    topic: Topic = "other"


class PromptRecord(Record):
    """A conversation for the policy to answer. `split` says whether it may be trained on or is kept for evaluation."""

    id: Name
    messages: Messages
    topic: Topic = "other"
    split: Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of raw data: its name in `data.*`, its folder in the output, its record, and what splits go by."""

    name: str
    output: str
    record: type[Record]
    split_by: str
    splits: tuple[str, ...]
    columns: tuple[str, ...]


_SPLITS = ("train", "dev", "test")

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "feedback",
            "love",
            FeedbackRecord,
            "user_id",
            _SPLITS,
            (
                "id",
                "user_id",
                "conversation_id",
                "turn",
                "time",
                "model_version",
                "topic",
                "locale",
                "interface",
                "messages",
                "response",
                "reaction",
                "continued",
                "returned",
            ),
        ),
        Kind(
            "preferences",
            "helpfulness",
            PreferenceRecord,
            "group",
            _SPLITS,
            ("id", "group", "topic", "messages", "chosen", "rejected"),
        ),
        Kind(
            "safety",
            "safety",
            SafetyRecord,
            "group",
            _SPLITS,
            ("id", "group", "topic", "messages", "response", "label"),
        ),
        Kind("prompts", "prompts", PromptRecord, "split", ("train", "test"), ("id", "topic", "messages")),
        Kind("reactions", "", ReactionRecord, "response_id", (), ()),
    )
}
"""The kinds by name; `columns` are the record's columns in the prepared files. Reactions join feedback: no file."""

_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """Arrow type of a pydantic field annotation, and whether it may be null."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is AwareDatetime:
        return _SCALARS[datetime], False
    if origin is Annotated:
        return _arrow_type(args[0])
    if origin in (Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        if len(inner) == 1:
            return _arrow_type(inner[0])[0], len(inner) < len(args)
    elif origin is Literal:
        return _SCALARS[type(args[0])], False
    elif origin is list:
        return pa.list_(_arrow_type(args[0])[0]), False
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return pa.struct(list(arrow_schema(annotation))), False
    elif annotation in _SCALARS:
        return _SCALARS[annotation], False
    raise TypeError(f"no Arrow type for {annotation!r}")


def arrow_schema(record: type[BaseModel]) -> pa.Schema:
    """Arrow schema of a record: same fields, same order, null only where the record allows None."""
    fields = []
    for name, field in record.model_fields.items():
        kind, nullable = _arrow_type(field.annotation)
        fields.append(pa.field(name, kind, nullable=nullable))
    return pa.schema(fields, metadata={"rluf.schema_version": str(SCHEMA_VERSION)})


def to_table(records: Iterable[Record], record: type[Record]) -> pa.Table:
    """Arrow table of records of one kind; the inverse of `from_table`."""
    return pa.Table.from_pylist([row.model_dump() for row in records], schema=arrow_schema(record))


def from_table(table: pa.Table, record: type[Record]) -> list[Record]:
    """Records of an Arrow table written by `to_table`. Raises pydantic.ValidationError on rows that are none."""
    return [record.model_validate(row) for row in table.to_pylist()]
