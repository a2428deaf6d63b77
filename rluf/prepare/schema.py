"""Record types of the logs: one definition per kind, from which both validation and the Arrow schema are derived.

Validation is strict (a number is not accepted for a string), unknown fields are ignored, and a record that was written
to Parquet reads back equal. It turns raw JSON into a record, or into the reason why the row is rejected: a short fixed
phrase with a field's name at most, so that reasons can be counted (tests/prepare/test_validation.py lists them).

Rows are validated in bulk: msgspec decodes what is plainly valid, and pydantic validates the rest again to give the
reason. The msgspec types are derived from the pydantic records too. msgspec is the stricter of the two on what they
share (a property test checks this), so a row that it accepts is valid.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from rluf.config.objectives import LABELS_KEY_PREFIX, find_spec_by_data_key

SCHEMA_VERSION = 3
"""Version of the record layout, in each Parquet file's metadata. Versions 2 and 3 add fields; older logs load too."""

BYTES_PER_TOKEN = 4
"""Bytes of UTF-8 per token, about: four letters of English, or one and a third of Chinese."""

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
    created the persona that replied. `arm` is the arm of an experiment. `temperature`, `response_tokens` and
    `response_logprob` (nats, of all response tokens under the sampling distribution of the policy that served) describe
    the sampling: off-policy evaluation needs the probability with which a response was chosen. Reward models read a
    response with finish_reason "length" as cut.
    """

    id: NameText
    conversation_id: NameText
    turn: int = Field(ge=0, le=1_000_000)
    user_id: NameText
    time: AwareDatetime
    model_version: NameText
    messages: MessageList
    response: LongText
    reaction: Annotated[str, StringConstraints(min_length=1, max_length=32)] | None = None
    continued: bool | None = None
    returned: bool | None = None
    topic: TopicText = "other"
    locale: ShortText = "und"
    interface: ShortText = "und"
    device: NameText | None = None
    author: NameText | None = None
    finish_reason: FinishReason = None
    arm: NameText | None = None
    temperature: float | None = None
    response_tokens: int | None = Field(default=None, ge=0, le=1_000_000_000)
    response_logprob: float | None = None


class ReactionRecord(LogRecord):
    """A reaction logged separately from its response, in any order; `retracted` withdraws the reaction."""

    id: NameText
    response_id: NameText
    time: AwareDatetime
    reaction: Annotated[str, StringConstraints(min_length=1, max_length=32)]
    retracted: bool = False


def _is_same_text(text: str, other_text: str) -> bool:
    """Whether two texts differ in white space at most."""
    return text == other_text or text.split() == other_text.split()


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
        if _is_same_text(self.chosen, self.rejected):
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
    extra_fields: LongText | None = None
    """Further fields of the row as a JSON object, which reward functions receive; null without any."""


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
_PAIR_COLUMNS = (
    "id", "group", "topic", "messages", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason",
)  # fmt: skip
_SAFETY_COLUMNS = ("id", "group", "topic", "messages", "response", "finish_reason", "label")


def _find_objective(kind_name: str) -> str:
    spec = find_spec_by_data_key(kind_name)
    return "" if spec is None else spec.name


DATA_KINDS: dict[str, DataKind] = {
    kind.name: kind
    for kind in (
        DataKind("feedback", _find_objective("feedback"), FeedbackRecord, "user_id", SPLIT_NAMES, _FEEDBACK_COLUMNS),
        DataKind("preferences", _find_objective("preferences"), PreferenceRecord, "group", SPLIT_NAMES, _PAIR_COLUMNS),
        DataKind("safety", _find_objective("safety"), SafetyRecord, "group", SPLIT_NAMES, _SAFETY_COLUMNS),
        DataKind(
            "prompts", "prompts", PromptRecord, "split", ("train", "test"), ("id", "topic", "messages", "extra_fields")
        ),
        DataKind("reactions", "", ReactionRecord, "response_id", (), ()),
    )
}
"""Built-in kinds by name. Reactions are joined to feedback and have no file of their own."""


def find_data_kind(name: str) -> DataKind:
    """The kind of a name; labels.<objective> has the same rows as the safety data, in a folder of its own."""
    if name.startswith(LABELS_KEY_PREFIX):
        return replace(DATA_KINDS["safety"], name=name, output_name=_find_objective(name))
    return DATA_KINDS[name]


def order_kinds(names: Iterable[str]) -> list[str]:
    """Kinds in the order of DATA_KINDS, then those of labeled rows in theirs."""
    distinct_names = dict.fromkeys(names)
    labeled_kinds = [name for name in distinct_names if name not in DATA_KINDS]
    return [kind for kind in DATA_KINDS if kind in distinct_names] + labeled_kinds


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


def build_records_table(records: Iterable[LogRecord], record_type: type[LogRecord]) -> pa.Table:
    """Arrow table of records of one kind."""
    return pa.Table.from_pylist([row.model_dump() for row in records], schema=build_arrow_schema(record_type))


FUTURE_SLACK = timedelta(days=1)
"""How far the clock of the log's writer may be ahead of this machine's."""

EARLIEST_TIME = datetime(2000, 1, 1, tzinfo=UTC)
"""Earlier times come from a broken clock (often zero seconds since 1970)."""

_BOUND_NAMES = ("min_length", "max_length", "ge", "le")
_BAD_VALUE_ERRORS = {
    "literal_error", "greater_than_equal", "less_than_equal",
    "datetime_parsing", "datetime_from_date_parsing",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that cannot be used, and why."""

    reason: str


def validate_json_row(raw: bytes, record_type: type[LogRecord], now: datetime) -> LogRecord | RejectedRow:
    """Validate one JSON object (UTF-8) against its record; times after `now` (plus FUTURE_SLACK) are rejected.

    If several fields are invalid, the first one in the record's order is the reason; missing fields are all named.
    """
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return RejectedRow("not UTF-8")
    try:
        record = record_type.model_validate_json(raw)
    except ValidationError as error:
        return RejectedRow(_explain_rejection(error.errors(include_url=False, include_input=False), raw))
    if isinstance(record, FeedbackRecord):
        if record.time > now + FUTURE_SLACK:
            return RejectedRow("future time")
        if record.time < EARLIEST_TIME:
            return RejectedRow("time before 2000")
    return record


def _explain_rejection(errors: Sequence[ErrorDetails], raw: bytes) -> str:
    error = errors[0]
    field_name = ".".join(str(key) for key in error["loc"] if isinstance(key, str))
    error_type = error["type"]
    if error_type == "json_invalid":
        return "lone surrogate" if _has_lone_surrogate(raw) else "broken JSON"
    if error_type == "missing":
        names = [str(error["loc"][0]) for error in errors if error["type"] == "missing" and len(error["loc"]) == 1]
        return f"missing fields: {', '.join(names)}" if len(names) > 1 else f"missing field: {field_name}"
    if error_type in ("string_too_long", "too_long"):
        return f"too long: {field_name}"
    if error_type == "string_too_short":
        return f"empty {field_name}"
    if error_type == "timezone_aware":
        return "time without zone"
    if error_type in _BAD_VALUE_ERRORS:
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
        # Bounds of an optional field apply to its value.
        members = tuple(None if arg is type(None) else _to_msgspec_type(arg, metadata) for arg in args)
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
    if "chosen" in field_names and (not row.chosen.strip() or _is_same_text(row.chosen, row.rejected)):
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
