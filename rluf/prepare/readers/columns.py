"""Rows of any schema become rows of rluf: paths into nested rows, `columns` for every kind of data, row filters.

A path such as `choices.0.message` steps through objects, arrays and JSON in texts. Keys may have dots themselves.
`*` is every item of an array, `name=user-feedback` the last item whose name is that, `a|b` the first of two paths that
leads to a value, `=text` the text itself, and `#` the hash of the whole row. The path of a time may end in its format:
`created as %m/%d/%Y`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, get_args

from rluf.config.data import DataSource
from rluf.config.objectives import LABELS_KEY_PREFIX
from rluf.errors import SettingsError
from rluf.prepare.labels import BAD_NAME_PATTERN, MISSING_TEXTS, LabelRules, choose_reaction, parse_truth
from rluf.prepare.readers.chats import (
    SYSTEM_PROMPT_KEYS,
    ChatMessage,
    ChatShape,
    RowShapeError,
    count_user_turns,
    decode_json_text,
    drop_replies_at_end,
    format_id,
    parse_transcript,
    read_chat,
    read_text,
    split_at_response,
    to_records,
)
from rluf.prepare.readers.datasets import ReaderRow, SkippedRow
from rluf.prepare.readers.times import NUMERIC_DATE_PATTERN, is_time, normalize_time, parse_time
from rluf.prepare.schema import LogRecord, find_data_kind
from rluf.prepare.splits import assign_split
from rluf.utils.hashing import hash_parts

NOTES_KEY = "_notes"
"""Key of a reader's row under which it counts what it left out or assumed; it is no field of a record."""

RATINGS_NOTE = "ratings of unknown scale"
"""Note on reactions that may be the lowest of five stars or a thumb up."""

BAD_REACTIONS_NOTE = "reactions that seem to be true for bad responses"
"""Note on true values at a path such as disliked, for which there is no rule."""

_CHAT_COLUMNS = {"message": "id or position of the rated message", "role": "key of a message's role",
                 "content": "key of a message's text"}  # fmt: skip
"""Columns that are no field: they say how to read `messages`."""

_PROMPT_COLUMNS = ("prompt", "completion")
"""Columns of data sets for training: a prompt in place of messages, and a completion in place of a response."""

_LABEL_WORDS = dict.fromkeys(("safe", "harmless", "unharmful", "good"), 1) | dict.fromkeys(
    ("unsafe", "harmful", "toxic", "bad"), 0
)
_UNNAMED_STEPS = re.compile(r"(?:\.(?:\*|-?\d+|value|score|label|result|avg|mean))+$")
"""Last steps of a path that do not say what the value is: toxicity.value is a toxicity."""
FINISH_REASONS = {"stop": "stop", "end_turn": "stop", "eos": "stop", "length": "length", "max_tokens": "length"}

ROUNDED_ID_PATTERN = r"\d([.,]\d+)?[eE]\+\d{2}"
"""An id as spreadsheets and pandas write a large number: several ids become one."""

_ID_FIELDS = {"id", "conversation_id", "user_id", "group", "response_id"}

UNKNOWN_TIME = "2000-01-01T00:00:00+00:00"
"""Time of rows of data sets that have none."""


def get_row_kind(kind_name: str) -> str:
    """Kind whose rows these are: labels.<objective> has the rows of the safety data."""
    return "safety" if kind_name.startswith(LABELS_KEY_PREFIX) else kind_name


def get_by_path(row: Any, path: str) -> Any:
    """Value at a path; None if it leads nowhere."""
    if path.startswith("="):
        return path[1:]
    for alternative in path.split("|"):
        value = alternative[1:] if alternative.startswith("=") else _get_by_steps(row, alternative.split("."))
        if value is not None:
            return value
    return None


def _get_by_steps(value: Any, steps: Sequence[str]) -> Any:
    if not steps:
        return value
    if isinstance(value, str):
        value = decode_json_text(value)
    # Arrow maps and other exports write an object as a list of pairs.
    if (
        isinstance(value, list)
        and value
        and all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in value)
    ):
        value = dict(value)
    if isinstance(value, Mapping):
        for end in range(1, len(steps) + 1):
            key = ".".join(steps[:end])
            if key in value and (result := _get_by_steps(value[key], steps[end:])) is not None:
                return result
        return None
    if not isinstance(value, list):
        return None
    step, rest = steps[0], steps[1:]
    if step == "*":
        return [result for item in value if (result := _get_by_steps(item, rest)) is not None] or None
    if "=" in step:
        # The name may have dots itself: attributes.key=user.id.value
        for end in range(1, len(steps) + 1):
            key, _, wanted = ".".join(steps[:end]).partition("=")
            matches = [item for item in value if isinstance(item, Mapping) and format_scalar(item.get(key)) == wanted]
            if matches and (result := _get_by_steps(matches[-1], steps[end:])) is not None:
                return result
        return None
    if re.fullmatch(r"-?\d+", step) and -len(value) <= int(step) < len(value):
        return _get_by_steps(value[int(step)], rest)
    return None


_PAGE_KEYS = ("data", "conversations", "results", "items", "runs", "traces")
"""Keys of the list in a page of an API's answer."""


def find_page(row: Mapping[str, Any], columns: Mapping[str, str] | None) -> list[Any] | None:
    """Rows in an object that is the answer of an API, or a whole file; None for a row.

    With columns, any list of objects is one where no path leads to a value of the object itself.
    """
    if columns is None:
        pages = [row[key] for key in _PAGE_KEYS if isinstance(row.get(key), list) and "id" not in row][:1]
    else:
        pages = [value for value in row.values() if isinstance(value, list) and value]
        paths = [path.removeprefix("!") for path in columns.values() if path[:1] not in ("=", "#")]
        if len(pages) != 1 or not paths or any(get_by_path(row, path) is not None for path in paths):
            return None
    return pages[0] if pages and all(isinstance(entry, dict) for entry in pages[0]) else None


def format_scalar(value: Any) -> str:
    """A value as a config writes it: 4.0 is 4, also as a text, and a truth value is true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else re.sub(r"^(-?\d+)\.0+$", r"\1", str(value))


_REACTION_KEYS = (
    "name", "rating", "value", "score", "emoji", "emoji_name", "reaction", "reactionType", "reaction_type", "type",
)  # fmt: skip
_WITHDRAWN_KEYS = ("removed", "deleted", "retracted", "removed_at", "deleted_at", "retracted_at")
"""Keys that are true, or a time, in a reaction that no longer exists."""


def name_reactions(value: object) -> list[str]:
    """Names of a reaction, or of a list of them: numbers and truth values as text, nothing for missing ones."""
    if isinstance(value, str):
        text = value.strip()
        if text[:1] in ("[", "{") and not isinstance(decoded := decode_json_text(text), str):
            return name_reactions(decoded)
        return [] if text.lower() in MISSING_TEXTS else [_format_number(text)]
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, int | float):
        return [] if math.isnan(value) else [f"{value:.15g}"]
    if isinstance(value, list):
        return [name for item in order_by_time(value) for name in name_reactions(item)]
    if isinstance(value, Mapping):
        if not value or _is_withdrawn(value):
            return []
        if any(key in value for key in _REACTION_KEYS):
            return name_reactions(next((value[key] for key in _REACTION_KEYS if value.get(key) is not None), None))
        # GitHub, Discord and others count users, or list them, by reaction: {"+1": 2, "heart": 0}.
        counts = {name: users for name, users in value.items() if name not in ("url", "total_count")}
        if all(isinstance(users, int | list | None) for users in counts.values()):
            return [name for name, users in counts.items() if users]
        raise RowShapeError("a reaction has none of " + ", ".join(_REACTION_KEYS))
    if value is None:
        return []
    raise RowShapeError(f"expected a reaction, got {type(value).__name__}")


def _is_withdrawn(reaction: Mapping[str, Any]) -> bool:
    """Whether an object says that there is no such reaction: none counted, not active, taken back, or a name that is
    false."""
    flags = ("count", "active", *(("value", "score") if reaction.get("name") is not None else ()))
    if any(parse_truth(reaction.get(key)) is False for key in flags):
        return True
    return any(reaction.get(key) and parse_truth(reaction[key]) is not False for key in _WITHDRAWN_KEYS)


_EVENT_TIME_KEYS = (
    "updated_at", "updatedAt", "created_at", "createdAt", "createdDateTime", "create_at", "timestamp", "time", "date",
    "ts",
)  # fmt: skip


def order_by_time(items: Sequence[Any]) -> list[Any]:
    """Reactions with times, the earliest first; as they are if one has none."""
    times = [
        next((normalize_time(item[key]) for key in _EVENT_TIME_KEYS if item.get(key) is not None), None)
        if isinstance(item, Mapping)
        else None
        for item in items
    ]
    try:
        parsed_times = [datetime.fromisoformat(str(time)) for time in times]
        return [items[index] for index in sorted(range(len(items)), key=parsed_times.__getitem__)]
    except (ValueError, TypeError):
        return list(items)


def _format_number(text: str) -> str:
    """4.0 and 4 are the same rating; other texts as they are."""
    return f"{float(text):.15g}" if re.fullmatch(r"-?\d+\.\d+", text) else text


def hash_row(row: Mapping[str, Any]) -> str:
    """Id of a row that has none: a hash of all of its values."""
    return "row-" + hash_parts("row", json.dumps(row, sort_keys=True, default=str))


def normalize_value(name: str, value: Any, record_type: type[LogRecord], notes: Counter[str]) -> Any:
    """A value in the type of a record's field, where the conversion is plain (12.0 is the id "12")."""
    annotation = str(record_type.model_fields[name].annotation)
    if name == "time":
        time = normalize_time(value, notes)
        if isinstance(time, str) and not is_time(time):
            question = "is day or month first?" if NUMERIC_DATE_PATTERN.match(time) else "a time of unknown format."
            raise RowShapeError(f"time: {question} Say so in columns, such as time: created as %d/%m/%Y %H:%M")
        return time
    if name == "finish_reason" or name.endswith("_finish_reason"):
        return FINISH_REASONS.get(str(value).lower())
    if "bool" in annotation:
        return value if (truth := parse_truth(value)) is None else truth
    if name == "label":
        truth = parse_truth(value)
        return _LABEL_WORDS.get(str(value).strip().lower(), value) if truth is None else int(truth)
    if record_type.model_fields[name].annotation is int:
        is_whole = isinstance(value, str | float) and re.fullmatch(r"\d+(\.0)?", str(value))
        return int(float(value)) if is_whole else value
    if name in ("messages", "response", "chosen", "rejected"):
        return value
    if isinstance(value, str) and name != "reaction" and value.strip().lower() in MISSING_TEXTS:
        return None  # all rows of unknown users would be those of one user, "nan"
    is_float_id = isinstance(value, float) and abs(value) >= 2**53
    if name in _ID_FIELDS and (is_float_id or re.fullmatch(ROUNDED_ID_PATTERN, str(value))):
        raise RowShapeError(f"{name}: a number whose last digits are lost; export ids as text")
    if name in _ID_FIELDS and isinstance(value, str) and re.fullmatch(r"\d+\.0", value):
        return value[:-2]
    return value if isinstance(value, str) or (formatted := format_id(value)) is None else formatted


def _find_value(row: Mapping[str, Any], path: str) -> tuple[Any, str]:
    """Value of the first alternative of a path that leads to one, and that alternative with its ! for bad."""
    if path == "#":
        return hash_row(row), path
    for alternative in [path] if path.startswith("=") else path.split("|"):
        value = get_by_path(row, alternative.removeprefix("!"))
        if value is not None:
            return value, alternative
    return None, path


def _is_bad_name(path: str) -> bool:
    """Whether a path leads to a field whose name says that it is true for a bad response."""
    return BAD_NAME_PATTERN.search(_UNNAMED_STEPS.sub("", path).rpartition(".")[2]) is not None


def _normalize_label(value: object, path: str) -> object:
    """A label that is 1 for good: a path that begins with ! leads to numbers or truth values that are 1 for bad."""
    truth = parse_truth(value)
    if not path.startswith("!"):
        if (truth is not None or isinstance(value, int | float)) and _is_bad_name(path):
            raise RowShapeError(f"label: {path} seems to be 1 for bad, but a label is 1 for good; write !{path}"[:110])
        return value
    if truth is None:
        raise RowShapeError(f"label: {path} leads to no truth value, and ! only turns 0 and 1 round"[:110])
    return int(not truth)


def _normalize_reaction(value: object, path: str, rules: LabelRules, notes: Counter[str]) -> object:
    """A reaction; that of a path that begins with ! is a thumb down where the value is true, and none where it is
    false."""
    truth = parse_truth(value)
    if path.startswith("!"):
        if truth is None:
            raise RowShapeError(f"reaction: {path} leads to no truth value, and ! only turns 0 and 1 round"[:110])
        return "thumbs_down" if truth else None
    if truth and _is_bad_name(path):
        notes[BAD_REACTIONS_NOTE] += not any(map(rules.has_rule, name_reactions(value)))
    return value


@dataclass(frozen=True)
class RowConverter:
    """Converts rows of one entry to rows of one kind, and counts how often each of its paths led to a value."""

    kind_name: str
    columns: Mapping[str, str]
    shape: ChatShape
    rules: LabelRules
    contradictions: str
    test_share: float
    path_counts: Counter[str]

    @property
    def record_type(self) -> type[LogRecord]:
        """Record of the kind."""
        return find_data_kind(self.kind_name).record_type

    @cached_property
    def _system_prompt_keys(self) -> list[str]:
        """Keys of a system prompt next to the messages that no path reads."""
        steps = {step.partition(".")[0] for path in self.columns.values() for step in path.split("|")}
        return [key for key in SYSTEM_PROMPT_KEYS if key not in steps]

    def read_row(self, row: Mapping[str, Any]) -> ReaderRow | SkippedRow:
        """The row in rluf's schema; what it lacks stays absent. Raises RowShapeError."""
        notes: Counter[str] = Counter()
        field_names = (*self.record_type.model_fields, *_PROMPT_COLUMNS, *_CHAT_COLUMNS)
        fields = {name: row[name] for name in field_names if row.get(name) is not None and name not in _CHAT_COLUMNS}
        for name, path in self.columns.items():
            path, _, time_format = path.partition(" as ") if name == "time" else (path, "", "")
            value, path = _find_value(row, path)
            if time_format and value is not None:
                try:
                    value = parse_time(str(value), time_format)
                except ValueError as error:
                    raise RowShapeError(f"time: a time is not in the format {time_format.strip()}"[:110]) from error
            self.path_counts[name] += value is not None
            if name == "label" and value is not None:
                value = _normalize_label(value, path)
            if name == "reaction" and value is not None:
                value = _normalize_reaction(value, path, self.rules, notes)
            fields.pop(name, None)
            if value is not None:
                fields[name] = value
        self.path_counts[""] += 1
        others = [row.get(key) for key in self._system_prompt_keys]
        notes["system prompts next to their messages"] += any(isinstance(text, str) and text for text in others)
        # A row without reaction has no rated message; its response is the last one.
        is_missing_message = "message" in self.columns and "message" not in fields
        if is_missing_message and name_reactions(fields.get("reaction")):
            raise RowShapeError("missing field: message")
        result = getattr(self, f"_read_{get_row_kind(self.kind_name)}")(fields, row, notes)
        if isinstance(result, SkippedRow):
            return result
        typed = {
            name: normalize_value(name, value, self.record_type, notes)
            for name, value in result.items()
            if name in self.record_type.model_fields
        }
        return {name: value for name, value in typed.items() if value is not None} | {NOTES_KEY: dict(+notes)}

    def repair(self, row_json: bytes) -> tuple[bytes | None, Counter[str]]:
        """A rejected row of rluf's own names with its nulls, numbers and training shapes converted; None if none.

        Raises RowShapeError for a row in a training shape that has no meaning.

        Everything else in such a row must have the right type: only writers that know rluf's names write them.
        """
        notes: Counter[str] = Counter()
        try:
            row = json.loads(row_json, parse_constant=lambda _: None)
            if not isinstance(row, dict):
                return None, notes
            is_pair_of_chats = any(isinstance(row.get(name), list) for name in ("chosen", "rejected"))
            is_bare_chat = self.kind_name == "prompts" and "messages" in row and not row.keys() & {"id", "split"}
            if ("messages" not in row and ("prompt" in row or "chosen" in row)) or is_pair_of_chats or is_bare_chat:
                converted = self.read_row(row)
                if isinstance(converted, SkippedRow):
                    raise RowShapeError(converted.reason)
                return json.dumps(converted).encode(), Counter(converted.pop(NOTES_KEY))
        except RowShapeError:
            raise
        except (ValueError, RecursionError, KeyError, TypeError):
            return None, notes
        model_fields = self.record_type.model_fields
        repaired = {
            name: value for name, value in row.items()
            if value is not None or name not in model_fields or model_fields[name].is_required()
        }  # fmt: skip
        if repaired.get("turn", 0) is None:
            del repaired["turn"]
        for name in model_fields.keys() & repaired.keys():
            is_number = isinstance(value := repaired[name], int | float) and not isinstance(value, bool)
            annotation = model_fields[name].annotation
            is_count = int in (annotation, *get_args(annotation)) and isinstance(value, float) and value.is_integer()
            if is_number and (name in _ID_FIELDS or is_count):
                repaired[name] = int(value) if is_count else normalize_value(name, value, self.record_type, notes)
        messages = repaired.get("messages")
        if "turn" in model_fields and "turn" not in repaired and isinstance(messages, list):
            roles = [message.get("role") for message in messages if isinstance(message, dict)]
            self._derive(repaired, {"turn": lambda: max(0, roles.count("user") - 1)}, notes)
        return (json.dumps(repaired).encode() if repaired != row else None), notes

    def choose_reaction(self, value: object) -> str | None:
        """Name of the reaction that counts of a number, a truth value, a name or a list of them."""
        names = name_reactions(value)
        return choose_reaction(names, self.rules, self.contradictions) if names else None

    def _read_feedback(self, fields: ReaderRow, row: Mapping[str, Any], notes: Counter[str]) -> ReaderRow | SkippedRow:
        if "prompt" in fields and "messages" not in fields:
            # A row of TRL's KTO data: a prompt, a completion and a label; without user, each row is a user of its own.
            row_id = hash_row(row)
            defaults: ReaderRow = {"id": row_id, "user_id": row_id, "time": UNKNOWN_TIME, "conversation_id": row_id}
            if "label" in row and "reaction" not in fields:
                truth = parse_truth(row["label"])
                defaults["reaction"] = row["label"] if truth is None else "thumbs_up" if truth else "thumbs_down"
            fields = defaults | fields
        chat = self._read_context(fields, notes)
        if "message" in fields or ("response" not in fields and "completion" not in fields):
            message = fields.get("message")
            rated_message = None if message is None else format_id(message) or str(message)
            thread, response, is_continued = split_at_response(chat, notes, rated_message)
            context = thread if response is None else drop_replies_at_end(thread, notes)
            fields["response"] = response
            if is_continued and fields.get("continued") is None:
                fields["continued"] = True
        else:
            fields["response"] = read_text(fields.get("response", fields.get("completion")), notes, self.shape)
            is_repeated = bool(chat) and chat[-1].role == "assistant" and chat[-1].content == fields["response"]
            notes["responses that end their messages, too"] += is_repeated
            context = chat[:-1] if is_repeated else chat
        fields["messages"] = to_records(context)
        names = name_reactions(fields.pop("reaction", None))
        if len(names) > 1:
            notes["several reactions in one row"] += 1
        fields["reaction"] = choose_reaction(names, self.rules, self.contradictions) if names else None
        opening = str(fields["messages"][0]["content"]) if fields["messages"] else ""
        derived = {
            "id": lambda: hash_row(row),
            "conversation_id": lambda: "thread-" + hash_parts("thread", str(fields.get("user_id")), opening),
            "turn": lambda: max(0, count_user_turns(context) - 1),
            "model_version": lambda: "unknown",
        }
        self._derive(fields, derived, notes)
        return {"reaction": None} | fields

    def _read_reactions(self, fields: ReaderRow, row: Mapping[str, Any], notes: Counter[str]) -> ReaderRow | SkippedRow:
        names = name_reactions(fields.pop("reaction", None))
        if not names:
            return SkippedRow("no reaction")
        fields["reaction"] = choose_reaction(names, self.rules, self.contradictions)
        self._derive(fields, {"id": lambda: hash_row(row), "time": lambda: UNKNOWN_TIME}, notes)
        return fields

    def _read_preferences(
        self, fields: ReaderRow, row: Mapping[str, Any], notes: Counter[str]
    ) -> ReaderRow | SkippedRow:
        chats = {name: self._read_reply(fields.get(name), notes) for name in ("chosen", "rejected")}
        (chosen_context, chosen), (rejected_context, rejected) = chats["chosen"], chats["rejected"]
        if chosen_context or rejected_context:
            if to_records(chosen_context) != to_records(rejected_context):
                return SkippedRow("the two conversations differ before their end")
            context = chosen_context
        else:
            context = self._read_context(fields, notes)
        fields |= {"messages": to_records(context), "chosen": chosen, "rejected": rejected}
        self._derive_text_fields(fields, (chosen, rejected), notes)
        return fields

    def _read_safety(self, fields: ReaderRow, row: Mapping[str, Any], notes: Counter[str]) -> ReaderRow | SkippedRow:
        context = self._read_context(fields, notes)
        response = fields.get("response", fields.get("completion"))
        if response is None:
            context, fields["response"], _ = split_at_response(context, notes)
        else:
            fields["response"] = read_text(response, notes, self.shape)
        fields["messages"] = to_records(context)
        self._derive_text_fields(fields, (fields["response"], str(fields.get("label"))), notes)
        return fields

    def _read_prompts(self, fields: ReaderRow, row: Mapping[str, Any], notes: Counter[str]) -> ReaderRow | SkippedRow:
        context, response, _ = split_at_response(self._read_context(fields, notes), notes)
        if response is not None:
            notes["last responses of prompts"] += 1
        fields["messages"] = to_records(context)
        text_hash = self._hash_context(fields)
        split = lambda: assign_split(text_hash, dev_share=0.0, test_share=self.test_share)  # noqa: E731
        self._derive(fields, {"id": lambda: f"prompt-{text_hash}", "split": split}, notes)
        return fields

    def _read_context(self, fields: ReaderRow, notes: Counter[str]) -> list[ChatMessage]:
        value = fields.get("messages", fields.get("prompt"))
        if value is None:
            raise RowShapeError("missing field: messages")
        return read_chat(value, notes, self.shape)

    def _read_reply(self, value: object, notes: Counter[str]) -> tuple[list[ChatMessage], str | None]:
        """Context and response of one side of a pair: a text, a message, or a whole chat."""
        decoded = decode_json_text(value) if isinstance(value, str) else value
        if isinstance(value, str) and re.match(r"\s*(Human|Assistant):", value):
            chat = parse_transcript(value.replace("\r\n", "\n"))
        elif isinstance(decoded, list) and len(decoded) > 1:
            chat = read_chat(decoded, notes, self.shape)
        else:
            return [], read_text(value, notes, self.shape)
        return chat[:-1], chat[-1].content if chat[-1].role == "assistant" else None

    def _hash_context(self, fields: ReaderRow) -> str:
        return hash_parts("prompt", *(message["content"] for message in fields["messages"]))

    def _derive_text_fields(self, fields: ReaderRow, texts: Sequence[str | None], notes: Counter[str]) -> None:
        text_hash = self._hash_context(fields)
        row_id = lambda: "row-" + hash_parts(text_hash, *map(str, texts))  # noqa: E731
        self._derive(fields, {"id": row_id, "group": lambda: text_hash}, notes)

    def _derive(self, fields: ReaderRow, derived: Mapping[str, Callable[[], Any]], notes: Counter[str]) -> None:
        for name, derive in derived.items():
            # A path that led nowhere in this row is a missing value, not a reason to derive one.
            if fields.get(name) is None and name not in self.columns:
                fields[name] = derive()
                notes[f"derived field: {name}"] += 1


def check_columns(kind_name: str, columns: Mapping[str, str], setting: str) -> None:
    """Raise SettingsError for a column that is no field of the kind."""
    known = [*find_data_kind(kind_name).record_type.model_fields, *_CHAT_COLUMNS, *_PROMPT_COLUMNS]
    messages_path = columns.get("messages", "messages")
    if columns.get("reaction", "").startswith(f"{messages_path}.*"):
        raise SettingsError(
            f"{setting}.reaction: {columns['reaction']!r} reads the reactions to all messages of a chat, but a row is "
            "one response; write a row for each rated message, or a reader (package.module:function) that returns them"
        )
    position = re.match(re.escape(messages_path) + r"\.(?!-1\.)(-?\d+)\.", columns.get("reaction", ""))
    if position and "message" not in columns:
        raise SettingsError(
            f"{setting}.reaction: {columns['reaction']!r} reads the reaction to message {position[1]} of a chat, but "
            f"the response is the last one; add message: ={position[1]}"
        )
    for name, path in columns.items():
        if name not in known:
            close_names = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close_names[0]}?" if close_names else f"fields: {', '.join(known)}"
            raise SettingsError(f"{setting}.{name}: a row of data.{kind_name} has no field {name}; {hint}")
        others = [step for step in path.split("|")[1:] if not step.startswith(("!", "="))]
        if path.startswith("!") and others:
            raise SettingsError(f"{setting}.{name}: {path!r} turns only its first path round; write {others[0]} first")
        if not path:
            raise SettingsError(f"{setting}.{name}: empty path; write a path such as {name}: fields.{name}")


def build_converter(
    kind_name: str,
    entry: DataSource,
    reader_columns: Mapping[str, str],
    rules: LabelRules,
    contradictions: str,
    test_share: float,
) -> RowConverter:
    """Converter of an entry's rows, by its columns and, where it has none, those of its reader."""
    paths = {**reader_columns, **entry.columns}
    columns = {name: path for name, path in paths.items() if name not in ("role", "content")}
    shape = ChatShape(entry.columns.get("role"), entry.columns.get("content"), entry.roles)
    return RowConverter(kind_name, columns, shape, rules, contradictions, test_share, Counter())
