"""Record types of the logs: one definition per kind, from which both validation and the Arrow schema are derived.

Validation is strict (a number is not accepted for a string), unknown fields are ignored, and a record that was written
to Parquet reads back equal.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from rluf.config.objectives import LABELS_KEY_PREFIX, find_spec_by_data_key

SCHEMA_VERSION = 2
"""Version of the record layout, in each Parquet file's metadata. Version 2 adds fields; logs of version 1 load too."""

MAX_TEXT_CHARS = 100_000
"""Longest message or response in characters; longer ones are quarantined."""

MAX_MESSAGES = 2000
"""Maximum number of messages of one context."""

LOVE_REACTION = "love"
"""The reaction that P[Love] predicts."""

NameText = Annotated[str, StringConstraints(min_length=1, max_length=200)]
TopicText = Annotated[str, StringConstraints(min_length=1, max_length=100)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=35)]
LongText = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]
FinishReason = Literal["stop", "length"] | None
"""How a response ended: by itself, or cut at the token limit; null if the log does not say."""


class LogRecord(BaseModel):
    """Base of all rows: frozen, strict types, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    @model_validator(mode="after")
    def _check_texts(self) -> LogRecord:
        for field_name in ("response", "chosen"):
            text = getattr(self, field_name, None)
            if text is not None and not text.strip():
                raise PydanticCustomError("empty", "empty {field}", {"field": field_name})
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


class ChatMessage(LogRecord):
    """One chat message of the context."""

    role: Literal["system", "user", "assistant"]
    content: LongText


MessageList = Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES)]


class FeedbackRecord(LogRecord):
    """One served response and what the user did with it.

    `messages` are the context and end with the user's message; `time` is when the response was served; `reaction` is
    the name of the reaction ("love" is what P[Love] predicts; others, such as "thumbs_down", are stored by name; null
    is none). `continued` and `returned` say whether the user sent another message and came back later; null if the log
    does not say. `user_id` must be hashed by the log's writer, or prepare hashes it (see rluf.utils.hashing).
    `interface` is where the response was displayed (app, web), `device` a hash of the device, `author` the user who
    created the persona that replied. Reward models read a response with finish_reason "length" as cut.
    """

    id: NameText
    conversation_id: NameText
    turn: int = Field(ge=0, le=1_000_000)
    user_id: NameText
    time: AwareDatetime
    model_version: NameText
    messages: MessageList
    response: LongText
    reaction: Annotated[str, StringConstraints(min_length=1, max_length=32)] | None
    continued: bool | None = None
    returned: bool | None = None
    topic: TopicText = "other"
    locale: ShortText = "und"
    interface: ShortText = "und"
    device: NameText | None = None
    author: NameText | None = None
    finish_reason: FinishReason = None


class ReactionRecord(LogRecord):
    """A reaction logged separately from its response, in any order; `retracted` withdraws the reaction."""

    id: NameText
    response_id: NameText
    time: AwareDatetime
    reaction: Annotated[str, StringConstraints(min_length=1, max_length=32)]
    retracted: bool = False


class PreferenceRecord(LogRecord):
    """Two responses to one context, of which raters preferred `chosen`. `group` names the prompt; rows split by it.

    `rejected` may be empty: an empty response lost against one with text. The finish reasons are those of the two.
    """

    id: NameText
    messages: MessageList
    chosen: LongText
    rejected: LongText
    group: NameText
    topic: TopicText = "other"
    chosen_finish_reason: FinishReason = None
    rejected_finish_reason: FinishReason = None

    @model_validator(mode="after")
    def _check_responses_differ(self) -> PreferenceRecord:
        if self.chosen == self.rejected:
            raise PydanticCustomError("same", "chosen equals rejected")
        return self


class SafetyRecord(LogRecord):
    """A response with a label, 1 safe and 0 unsafe, or of another objective. `group` names the prompt; rows split by
    it."""

    id: NameText
    messages: MessageList
    response: LongText
    label: int = Field(ge=0, le=1)
    group: NameText
    topic: TopicText = "other"
    finish_reason: FinishReason = None


class PromptRecord(LogRecord):
    """A conversation for the policy to answer; `split` reserves it for training or for evaluation."""

    id: NameText
    messages: MessageList
    topic: TopicText = "other"
    split: Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class DataKind:
    """One kind of raw data.

    `name` is its key in `data.*`, `output_name` its folder in the data set ("" for none), `split_key` the field that
    rows are split by, `output_columns` the record's columns in the prepared files.
    """

    name: str
    output_name: str
    record_type: type[LogRecord]
    split_key: str
    split_names: tuple[str, ...]
    output_columns: tuple[str, ...]


SPLIT_NAMES = ("train", "dev", "test")
"""Names of the splits; a split's position is its code."""

_FEEDBACK_COLUMNS = (
    "id", "user_id", "conversation_id", "turn", "time", "model_version", "topic", "locale", "interface", "messages",
    "response", "finish_reason", "reaction", "continued", "returned",
)  # fmt: skip
_PREFERENCE_COLUMNS = (
    "id", "group", "topic", "messages", "chosen", "rejected", "chosen_finish_reason",
    "rejected_finish_reason",
)  # fmt: skip
_SAFETY_COLUMNS = ("id", "group", "topic", "messages", "response", "finish_reason", "label")


def _objective_trained_on(kind_name: str) -> str:
    spec = find_spec_by_data_key(kind_name)
    return "" if spec is None else spec.name


DATA_KINDS: dict[str, DataKind] = {
    kind.name: kind
    for kind in (
        DataKind(
            "feedback", _objective_trained_on("feedback"), FeedbackRecord, "user_id", SPLIT_NAMES, _FEEDBACK_COLUMNS
        ),
        DataKind(
            "preferences",
            _objective_trained_on("preferences"),
            PreferenceRecord,
            "group",
            SPLIT_NAMES,
            _PREFERENCE_COLUMNS,
        ),
        DataKind("safety", _objective_trained_on("safety"), SafetyRecord, "group", SPLIT_NAMES, _SAFETY_COLUMNS),
        DataKind("prompts", "prompts", PromptRecord, "split", ("train", "test"), ("id", "topic", "messages")),
        DataKind("reactions", "", ReactionRecord, "response_id", (), ()),
    )
}
"""Built-in kinds by name. Reactions are joined to feedback and have no file of their own."""


def find_data_kind(name: str) -> DataKind:
    """The kind of a name; labels.<objective> has the same rows as the safety data, in a folder of its own."""
    if name.startswith(LABELS_KEY_PREFIX):
        return replace(DATA_KINDS["safety"], name=name, output_name=_objective_trained_on(name))
    return DATA_KINDS[name]


def order_kinds(names: Iterable[str]) -> list[str]:
    """Kinds in the order of DATA_KINDS, then those of labeled rows in theirs."""
    distinct_names = dict.fromkeys(names)
    return [kind for kind in DATA_KINDS if kind in distinct_names] + [
        name for name in distinct_names if name not in DATA_KINDS
    ]


_ARROW_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), datetime: pa.timestamp("us", tz="UTC"),
}  # fmt: skip


def _to_arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """Arrow type of a pydantic field annotation, and whether it is nullable."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is AwareDatetime:
        return _ARROW_SCALARS[datetime], False
    if origin is Annotated:
        return _to_arrow_type(args[0])
    if origin in (Union, types.UnionType):
        members = [arg for arg in args if arg is not type(None)]
        if len(members) == 1:
            return _to_arrow_type(members[0])[0], len(members) < len(args)
    elif origin is Literal:
        return _ARROW_SCALARS[type(args[0])], False
    elif origin is list:
        return pa.list_(_to_arrow_type(args[0])[0]), False
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return pa.struct(list(build_arrow_schema(annotation))), False
    elif annotation in _ARROW_SCALARS:
        return _ARROW_SCALARS[annotation], False
    raise TypeError(f"no Arrow type for {annotation!r}")


def build_arrow_schema(record_type: type[BaseModel]) -> pa.Schema:
    """Arrow schema of a record: same fields, same order, nullable only where the record allows None."""
    fields = []
    for name, field in record_type.model_fields.items():
        arrow_type, nullable = _to_arrow_type(field.annotation)
        fields.append(pa.field(name, arrow_type, nullable=nullable))
    return pa.schema(fields, metadata={"rluf.schema_version": str(SCHEMA_VERSION)})


def records_to_table(records: Iterable[LogRecord], record_type: type[LogRecord]) -> pa.Table:
    """Arrow table of records of one kind; the inverse of `table_to_records`."""
    return pa.Table.from_pylist([row.model_dump() for row in records], schema=build_arrow_schema(record_type))


def table_to_records(table: pa.Table, record_type: type[LogRecord]) -> list[LogRecord]:
    """Records of an Arrow table from `records_to_table`. Raises pydantic.ValidationError for invalid rows."""
    return [record_type.model_validate(row) for row in table.to_pylist()]
