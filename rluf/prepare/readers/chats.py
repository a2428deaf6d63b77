"""Chats of any product become rluf's messages: lists, trees, JSON in text, parts, and the roles of other products.

What a chat has and rluf's records have not (images, tool calls, reasoning) is left out and counted in the row's notes,
which the data card adds up.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_ROLE_CHARS = 24
"""Characters of an unknown role that an error repeats: reasons are counted, so they must not hold whole texts."""


class RowShapeError(ValueError):
    """An object of another shape than a reader expects; its message is a reason without users' text."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message: rluf's role or `tool`, its text (None: only images or tool calls), and the ids that refer to it.

    `parent` is the id of the message before it. Messages without text stay in a chat, so that positions and parents
    lead to the right one; `to_records` leaves them out.
    """

    role: str
    content: str | None
    ids: tuple[str, ...] = ()
    parent: str | None = None


def to_records(messages: Iterable[ChatMessage]) -> list[dict[str, str]]:
    """The messages with text, as a row has them."""
    return [
        {"role": message.role, "content": message.content}
        for message in messages
        if message.content is not None and message.role != "tool"
    ]


@dataclass(frozen=True)
class ChatShape:
    """Keys of role and content in a message, where they are not the usual ones, and roles with names of their own."""

    role_key: str | None = None
    content_key: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


DEFAULT_SHAPE = ChatShape()

_ROLE_ALIASES = {
    name: role
    for role, names in {
        "user": "user human prompter customer client lead contact visitor enduser person me",
        "assistant": "assistant gpt bot chatbot model ai agent admin operator chatgpt",
        "system": "system developer",
        "tool": "tool function ipython toolresult toolcall observation",
    }.items()
    for name in names.split()
}
_ROLE_KEYS = ("role", "from", "author", "sender", "sender_type", "speaker", "type")
_CONTENT_KEYS = ("content", "text", "value", "parts", "body", "message")
_ID_KEYS = ("id", "message_id", "messageId", "uuid", "_id", "ts")
_PARENT_KEYS = ("parentId", "parentMessageId", "parent_id", "parent_message_id", "parent")
_FILE_KEYS = ("images", "files", "attachments", "experimental_attachments", "image")

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "markdown"})
_REASONING_PARTS = frozenset({"reasoning", "think", "thinking", "redacted_thinking", "reasoning_content", "thoughts"})
_FILE_PARTS = ("image", "file", "audio", "video", "document", "media", "source")
_PYTHON_REPR = re.compile(r"\s*[\[({]\s*[{(]?\s*'")


def decode_json_text(text: str) -> Any:
    """Value of a text that is a JSON object or array; the text itself if it is none.

    Raises RowShapeError for the repr of a Python list or dict, which is no JSON.
    """
    if text.lstrip()[:1] not in ("[", "{") or not text.strip():
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if _PYTHON_REPR.match(text):
        try:
            ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
        raise RowShapeError("a chat is the repr of a Python object, not JSON")
    return text


def _is_message_like(value: object) -> bool:
    return isinstance(value, Mapping) and bool({"role", "content", "parts", "value", "kwargs", "data"} & value.keys())


def _is_assistant_message(value: object) -> bool:
    """Whether decoded JSON is surely a message, and not a response that happens to be JSON."""
    if not (isinstance(value, Mapping) and ("content" in value or "parts" in value)):
        return False
    return _ROLE_ALIASES.get(str(value.get("role", value.get("type"))).casefold()) is not None


def read_text(value: object, notes: Counter[str], shape: ChatShape = DEFAULT_SHAPE) -> str | None:
    """Text of a response: a text, a message, a list of parts or messages, or either as JSON in a text; None for none.

    A text that is JSON of another shape is a response in JSON and stays as it is.
    """
    if isinstance(value, str):
        decoded = decode_json_text(value)
        items = decoded if isinstance(decoded, list) else [decoded]
        has_messages = bool(items) and all(_is_assistant_message(item) for item in items)
        return read_text(decoded, notes, shape) if has_messages or _is_completion(decoded) else value
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "role" in item for item in value):
        return read_chat(value, notes, shape)[-1].content
    if isinstance(value, Mapping) and "choices" in value:
        return read_choices(value, notes, shape)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        return read_text(value["messages"], notes, shape)
    if isinstance(value, Mapping | list):
        item = {"content": value} if isinstance(value, list) else value
        # LangChain's classes and tool calls are those of a message.
        message = _read_message({"role": "assistant", **item}, notes, shape)
        return message.content
    return None


def _is_completion(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("choices"), list) and bool(value["choices"])


def read_choices(value: Mapping[str, Any], notes: Counter[str], shape: ChatShape = DEFAULT_SHAPE) -> str | None:
    """Text of the first of a completion's choices; the others are counted as left out."""
    choices = value["choices"]
    notes["further choices"] += len(choices) - 1
    first = choices[0]
    return _read_content(first["message"], notes, shape) if "message" in first else first.get("text")


def read_chat(value: object, notes: Counter[str], shape: ChatShape = DEFAULT_SHAPE) -> list[ChatMessage]:
    """Messages of a chat, whatever holds them: a list, an object with `messages`, a tree by id, JSON or plain text.

    What has no text (tool calls, images) is counted in `notes`. Raises RowShapeError.
    """
    if isinstance(value, str):
        decoded = decode_json_text(value)
        if isinstance(decoded, str) or not _is_chat_like(decoded):
            return [ChatMessage("user", value)]
        value = decoded
    if isinstance(value, Mapping):
        if isinstance(history := value.get("history"), Mapping) and history.get("messages"):
            value = history
        if "messages" in value:
            inner = value["messages"]
            return read_chat(inner, notes, shape)
        if _is_message_like(value):
            value = [value]
        elif value and all(isinstance(item, Mapping) for item in value.values()):
            value = [{"id": key, **item} for key, item in value.items()]
    if not isinstance(value, Sequence):
        raise RowShapeError(f"expected a list of messages, got {type(value).__name__}")
    if len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    return [_read_message(item, notes, shape) for item in value]


def _is_chat_like(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_message_like(item) or isinstance(item, list) for item in value)
    return isinstance(value, Mapping) and (isinstance(value.get("messages"), list | Mapping) or "role" in value)


def _read_message(item: object, notes: Counter[str], shape: ChatShape) -> ChatMessage:
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = decode_json_text(item)
    if isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str):
        item = {"role": item[0], "content": item[1]}
    if not isinstance(item, Mapping):
        raise RowShapeError(f"expected a message, got {type(item).__name__}")
    # LangChain writes the message's class and its fields: {"id": [..., "HumanMessage"], "kwargs": {"content": ...}}.
    if isinstance(fields := item.get("kwargs", item.get("data")), Mapping) and "content" in fields:
        class_name = str(item["id"][-1]) if isinstance(item.get("id"), list) else str(item.get("type", ""))
        item = {"role": re.sub(r"Message(Chunk)?$", "", class_name) or fields.get("type"), **fields}
    role = _read_role(item, shape)
    ids = tuple(str(item[key]) for key in _ID_KEYS if isinstance(item.get(key), str | int))
    parent = next((str(item[key]) for key in _PARENT_KEYS if item.get(key) is not None), None)
    if role == "tool":
        notes["tool messages"] += 1
        return ChatMessage(role, None, ids, parent)
    for key in _FILE_KEYS:
        if isinstance(files := item.get(key), list):
            notes["images and files"] += len(files)
    notes["tool calls"] += len(item.get("tool_calls") or item.get("toolInvocations") or ())
    return ChatMessage(role, _read_content(item, notes, shape), ids, parent)


def _read_role(item: Mapping[str, Any], shape: ChatShape) -> str:
    # LibreChat writes the model's name as sender, and who wrote the message in a flag.
    if isinstance(by_user := item.get("isCreatedByUser"), bool) and shape.role_key is None:
        return "user" if by_user else "assistant"
    keys = (shape.role_key,) if shape.role_key else _ROLE_KEYS
    value = next((item[key] for key in keys if item.get(key) is not None), None)
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("role", "type", "name") if isinstance(value.get(key), str)), None)
    if value is None:
        raise RowShapeError("a message has no role")
    role = shape.roles.get(str(value)) or _ROLE_ALIASES.get(re.sub(r"[\W_]+", "", str(value).casefold()))
    if role is None:
        raise RowShapeError(f"unknown role {str(value)[:MAX_ROLE_CHARS]!r}")
    return role


def _read_content(item: Mapping[str, Any], notes: Counter[str], shape: ChatShape) -> str | None:
    """Text of a message; None if it has none (only images or tool calls)."""
    keys = (shape.content_key,) if shape.content_key else _CONTENT_KEYS
    present = [item[key] for key in keys if key in item]
    if not present and not (item.get("tool_calls") or item.get("toolInvocations") or item.get("function_call")):
        raise RowShapeError("a message has none of " + ", ".join(keys))
    # LibreChat leaves `text` empty where the parts are in `content`, and the other way round.
    texts = [text for value in present if (text := _read_value(value, notes)) is not None]
    return next((text for text in texts if text), texts[0] if texts else None)


def _read_value(value: object, notes: Counter[str]) -> str | None:
    if isinstance(value, str):
        # A warehouse that stringifies a column stringifies the parts in it, too.
        decoded = decode_json_text(value) if value.startswith("[{") and '"type"' in value[:200] else value
        is_parts = isinstance(decoded, list) and all(isinstance(item, Mapping) and "type" in item for item in decoded)
        return _read_value(decoded, notes) if is_parts else value
    if isinstance(value, list):
        texts = [text for item in value if (text := _read_part(item, notes)) is not None]
        return "".join(texts) if texts else None
    if isinstance(value, Mapping):
        inner = next((value[key] for key in ("parts", "text", "value", "content") if value.get(key) is not None), None)
        return _read_value(inner, notes) if inner is not None else None
    return None


def _read_part(item: object, notes: Counter[str]) -> str | None:
    """Text of one part of a content; None, counted by kind, for a item that is not text."""
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise RowShapeError(f"expected a part of a message, got {type(item).__name__}")
    kind = str(item.get("type", item.get("content_type", "text" if "text" in item else ""))).lower()
    if kind in _TEXT_PARTS:
        return _read_value(item.get("text", item.get("content", item.get("value"))), notes)
    if kind in _REASONING_PARTS:
        notes["reasoning"] += 1
    elif "tool" in kind or "function" in kind:
        notes["tool parts"] += 1
    elif any(name in kind for name in _FILE_PARTS):
        notes["images and files"] += 1
    elif not kind.startswith("step"):
        notes["other parts"] += 1
    return None


def collect_thread(messages: Sequence[ChatMessage], last: ChatMessage) -> list[ChatMessage]:
    """Messages that lead to `last`, inclusive: by parent where messages name one, else those before it in the list."""
    by_id = {message_id: message for message in messages for message_id in message.ids}
    if not any(message.parent in by_id for message in messages):
        return list(messages[: messages.index(last) + 1])
    thread, current = [last], last
    while current.parent is not None and (parent := by_id.get(current.parent)) is not None and parent not in thread:
        thread.append(parent)
        current = parent
    return thread[::-1]


def split_at_response(
    messages: Sequence[ChatMessage], rated_message: str | None = None
) -> tuple[list[ChatMessage], str | None, bool]:
    """Context, response, and whether a user wrote after it; the response is the rated message, else the last one.

    `rated_message` is an id of a message, or its position in the list from 0. Without it, a chat that does not end with
    an assistant has no response (None). Raises RowShapeError if the rated message is missing or not an assistant's.
    """
    if rated_message is None:
        if not messages or messages[-1].role != "assistant":
            return list(messages), None, False
        last = messages[-1]
    else:
        by_id = [message for message in messages if rated_message in message.ids]
        if not by_id and rated_message.lstrip("-").isdecimal() and int(rated_message) < len(messages):
            by_id = [messages[int(rated_message)]]
        if not by_id:
            raise RowShapeError("the rated message is not in the chat")
        last = by_id[0]
        if last.role != "assistant":
            raise RowShapeError("the rated message is not an assistant's")
        if last.content is None:
            raise RowShapeError("the rated message has no text")
    thread = collect_thread(messages, last)
    is_continued = any(message.role == "user" for message in messages[messages.index(last) + 1 :])
    return thread[:-1], last.content, is_continued and thread == list(messages[: len(thread)])


def parse_transcript(transcript: str) -> list[ChatMessage]:
    """Messages of a text in which "Human:" or "Assistant:" after an empty line begins a turn (Anthropic HH)."""
    parts = re.split(r"(?:^|\n)\n(Human|Assistant):", transcript.strip("\n").join(("\n\n", "")))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [ChatMessage(roles[role], content.strip()) for role, content in zip(parts[1::2], parts[2::2], strict=True)]
    if len(turns) < 2:
        raise RowShapeError("fewer than two turns")
    return turns


def count_user_turns(messages: Iterable[ChatMessage]) -> int:
    """User messages of a context."""
    return sum(message.role == "user" for message in messages)
