"""Readers of product logs: `prepare.columns` maps fields of any log, and ready readers cover common exports.

Readers by name ({reader: ..., path: ...} in `data.*`):

openai     stored chat completions: messages (or request.messages) and choices (or response.choices), one per row
wildchat   WildChat and similar: one conversation per row, hashed_ip as user; reactions come from data.reactions
lmsys      Chatbot Arena votes: conversation_a, conversation_b, winner (data.preferences)
lmsys_prompts  LMSYS-Chat-1M: the first message of each conversation (data.prompts)
langfuse   traces exported from Langfuse: input, output, sessionId, userId, scores
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rluf.errors import SettingsError
from rluf.prepare.readers.datasets import LogReader, ReaderItems, ReaderOptions, SkippedRow, index_readers
from rluf.prepare.schema import LOVE_REACTION, FeedbackRecord
from rluf.prepare.splits import assign_split
from rluf.utils.hashing import hash_parts

_REACTION_ALIASES = {
    "up": LOVE_REACTION, "thumbs_up": LOVE_REACTION, "like": LOVE_REACTION, "positive": LOVE_REACTION,
    "down": "thumbs_down", "dislike": "thumbs_down", "negative": "thumbs_down",
}  # fmt: skip
_LOCALE_BY_LANGUAGE = {
    "english": "en", "chinese": "zh", "spanish": "es", "french": "fr", "german": "de", "russian": "ru",
    "portuguese": "pt", "italian": "it", "japanese": "ja", "korean": "ko",
}  # fmt: skip
_ROLE_ALIASES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system",
}  # fmt: skip

_STRING_FIELDS = ("id", "conversation_id", "user_id", "model_version", "device", "author")
"""Fields that products often write as numbers."""

_SCORE_NAMES = ("love", "heart", "user-feedback", "user_feedback", "feedback", "thumbs", "rating")
"""Langfuse scores that are reactions of users; others are automatic evaluations."""


def normalize_reaction(value: object) -> str | None:
    """Reaction name: love for true, positive numbers and thumbs up; thumbs_down for -1; None for false, 0 and null."""
    if isinstance(value, str):
        return _REACTION_ALIASES.get(value.lower(), value) or None
    if value is None or isinstance(value, bool | int | float):
        return LOVE_REACTION if value and value > 0 else "thumbs_down" if value and value < 0 else None
    raise TypeError(f"expected a reaction name, number or boolean, got {value!r}")


def normalize_time(value: object) -> object:
    """A time as ISO 8601 with zone, from seconds or milliseconds since 1970 or from text (UTC if it has no zone)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        # 1e11 seconds are the year 5138, so larger numbers are milliseconds.
        return datetime.fromtimestamp(value / 1000 if value > 1e11 else value, UTC).isoformat()
    if not isinstance(value, str):
        return value
    try:
        parsed = datetime.fromisoformat(value.removesuffix(" UTC"))
    except ValueError:
        return value
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).isoformat()


def _message_text(content: object) -> object:
    """The text of a message, which in OpenAI's API may be a list of parts."""
    if isinstance(content, list):
        texts = [item["text"] for item in content if item.get("type") in ("text", "input_text", "output_text")]
        return "".join(texts)
    return content


def _parse_messages(value: object) -> list[dict[str, Any]]:
    """Chat messages with rluf's roles, from a text, a list of messages, or an object with `messages`."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = value["messages"]
    if not isinstance(value, Sequence):
        raise TypeError(f"expected a list of messages, got {type(value).__name__}")
    messages = []
    for message in value:
        # OpenAI uses role and content, ShareGPT exports use from and value.
        role = message.get("role", message.get("from"))
        content = _message_text(message["content"] if "content" in message else message["value"])
        messages.append({"role": _ROLE_ALIASES.get(role, role), "content": content})
    return messages


def get_by_path(row: Any, path: str) -> Any:
    """Value at a path such as choices.0.message; None if it does not exist. `=text` is the text itself."""
    if path.startswith("="):
        return path[1:]
    value = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.lstrip("-").isdecimal() and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def build_column_reader(columns: Mapping[str, str]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Function from a row of another schema to one of rluf's. Raises SettingsError for an unknown field.

    Without a path for `response`, the last message of the chat is the response and the messages before it the context.
    Fields without a path are copied if the row has them by rluf's names.
    """
    for field_name in columns:
        if field_name not in FeedbackRecord.model_fields:
            close_names = difflib.get_close_matches(field_name, FeedbackRecord.model_fields, n=1)
            field_list = ", ".join(FeedbackRecord.model_fields)
            hint = f"did you mean {close_names[0]}?" if close_names else f"fields: {field_list}"
            raise SettingsError(f"prepare.columns.{field_name}: a feedback row has no field {field_name}; {hint}")

    def read_row(row: Mapping[str, Any]) -> dict[str, Any]:
        fields = {name: row[name] for name in FeedbackRecord.model_fields if name in row}
        fields |= {name: value for name, path in columns.items() if (value := get_by_path(row, path)) is not None}
        if "messages" in columns and "messages" in fields:
            messages = _parse_messages(fields["messages"])
            if "response" not in fields and messages and messages[-1]["role"] == "assistant":
                fields["response"] = messages.pop()["content"]
            fields["messages"] = messages
        if "time" in columns:
            fields["time"] = normalize_time(fields.get("time"))
        fields["reaction"] = normalize_reaction(fields.get("reaction"))
        if isinstance(turn := fields.get("turn"), str) and turn.isdecimal():
            fields["turn"] = int(turn)
        return fields | {name: str(fields[name]) for name in _STRING_FIELDS if isinstance(fields.get(name), int)}

    return read_row


def _count_user_turns(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(message["role"] == "user" for message in messages)


def _read_openai(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    request, response = row.get("request", row), row.get("response", row)
    messages = _parse_messages(request["messages"])
    metadata = row.get("metadata") or {}
    choices = response.get("choices")
    if choices:
        response_text = _message_text(choices[0]["message"]["content"])
        if response_text is None:
            return [SkippedRow("tool call without text")]
    elif messages and messages[-1]["role"] == "assistant":
        response_text = messages.pop()["content"]
    else:
        return [SkippedRow("no assistant message")]
    # Records have no tool messages, and assistant messages that only call tools have no content.
    messages = [message for message in messages if message["role"] != "tool" and message["content"] is not None]
    response_id = str(row.get("id") or response["id"])
    return [{
        "id": response_id, "conversation_id": str(metadata.get("conversation_id", response_id)),
        "turn": _count_user_turns(messages),
        "user_id": str(request.get("user") or metadata.get("user_id") or response_id),
        "time": normalize_time(response.get("created", row.get("created", row.get("created_at")))),
        "model_version": response.get("model") or request["model"], "messages": messages, "response": response_text,
        "reaction": normalize_reaction(row.get("feedback", metadata.get("reaction"))),
        "topic": metadata.get("topic", "other"), "locale": metadata.get("locale", "und"),
    }]  # fmt: skip


def _read_wildchat(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    conversation_id = str(row.get("conversation_hash") or row["conversation_id"])
    messages, items = _parse_messages(row["conversation"]), []
    for index, (message, raw_message) in enumerate(zip(messages, row["conversation"], strict=True)):
        if message["role"] != "assistant":
            continue
        context = messages[:index]
        user_key = str(row.get("hashed_ip") or raw_message.get("hashed_ip") or conversation_id)
        items.append({
            "id": f"{conversation_id}-{index}", "conversation_id": conversation_id, "turn": _count_user_turns(context),
            "user_id": hash_parts("wildchat", user_key),
            "time": normalize_time(raw_message.get("timestamp") or row["timestamp"]), "model_version": row["model"],
            "messages": context, "response": message["content"],
            "reaction": normalize_reaction(raw_message.get("reaction")),
            "continued": any(later["role"] == "user" for later in messages[index + 1 :]),
            "locale": _locale_of_language(row.get("language")),
        })  # fmt: skip
    return [*items] or [SkippedRow("no assistant message")]


def _locale_of_language(language: object) -> str:
    return _LOCALE_BY_LANGUAGE.get(str(language).lower(), "und")


def _read_lmsys(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    winner = row["winner"]
    if winner not in ("model_a", "model_b"):
        return [SkippedRow("tie")]
    chosen, rejected = _parse_messages(row["conversation_a"]), _parse_messages(row["conversation_b"])
    if winner == "model_b":
        chosen, rejected = rejected, chosen
    # In longer battles the models answered different contexts, so the responses are not comparable.
    if chosen[:-1] != rejected[:-1]:
        return [SkippedRow("the two conversations differ before their end")]
    context = chosen[:-1]
    return [{
        "id": f"lmsys-{row['question_id']}", "group": hash_parts("lmsys", *(message["content"] for message in context)),
        "topic": "arena", "messages": context, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"],
    }]  # fmt: skip


def _read_lmsys_prompts(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    messages = _parse_messages(row["conversation"])[:1]
    if not messages or messages[0]["role"] != "user":
        return [SkippedRow("no user message")]
    text_hash = hash_parts("prompt", messages[0]["content"])
    split = assign_split(text_hash, dev_share=0.0, test_share=options.test_share)
    topic = _locale_of_language(row.get("language"))
    return [{"id": f"prompt-{text_hash}", "messages": messages, "topic": topic, "split": split}]


def _read_langfuse(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    if row.get("output") is None:
        return [SkippedRow("no assistant message")]
    messages, output = _parse_messages(row["input"]), row["output"]
    if isinstance(output, Mapping):
        output = output["choices"][0]["message"]["content"] if "choices" in output else output["content"]
    scores = [score for score in row.get("scores") or [] if str(score.get("name")).lower() in _SCORE_NAMES]
    values = [score.get("stringValue") or score.get("value") for score in scores]
    # A value of 0 is a thumb down, except for scores that only count hearts: there it is no reaction.
    thumb_scores = [score for score in scores if str(score["name"]).lower() not in ("love", "heart")]
    is_thumbs_down = any(score.get("value") == 0 for score in thumb_scores)
    reaction = normalize_reaction(values[-1]) if values else None
    metadata = row.get("metadata") or {}
    return [{
        "id": str(row["id"]), "conversation_id": str(row.get("sessionId") or row["id"]),
        "turn": _count_user_turns(messages), "user_id": str(row.get("userId") or row.get("sessionId") or row["id"]),
        "time": normalize_time(row["timestamp"]),
        "model_version": str(row.get("model") or row.get("release") or row.get("version") or "unknown"),
        "messages": messages, "response": _message_text(output),
        "reaction": "thumbs_down" if is_thumbs_down else reaction, "topic": str(metadata.get("topic", "other")),
        "locale": str(metadata.get("locale", "und")),
    }]  # fmt: skip


PRODUCT_READERS = index_readers(
    LogReader("openai", "feedback", _read_openai),
    LogReader("wildchat", "feedback", _read_wildchat),
    LogReader("lmsys", "preferences", _read_lmsys),
    LogReader("lmsys_prompts", "prompts", _read_lmsys_prompts),
    LogReader("langfuse", "feedback", _read_langfuse),
)
"""Readers by name."""
