"""Chats of any product become rluf's messages: lists, trees, JSON in text, parts, and the roles of other products.

What a chat has and rluf's records have not (images, tool calls, reasoning) is left out and counted in the row's notes,
which the data card adds up.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MAX_ROLE_CHARS = 24
"""Characters of an unknown role that an error repeats: reasons are counted, so they must not hold whole texts."""


class RowShapeError(ValueError):
    """An object of another shape than a reader expects; its message is a reason without users' text."""


# Without eq: a chat may have the same short reply several times, and each is a message of its own.
@dataclass(frozen=True, slots=True, eq=False)
class ChatMessage:
    """One message: rluf's role, `tool` or `ignored`, its text (None: only images or tool calls), and its ids.

    `parent` is the id of the message before it. Messages without text stay in a chat, so that positions and parents
    lead to the right one; `to_records` leaves them out. Messages are equal if they are the same object.
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
        "assistant": "assistant gpt bot chatbot model ai agent admin operator chatgpt team teammate",
        "system": "system developer",
        "tool": "tool function ipython toolresult toolcall observation data",
    }.items()
    for name in names.split()
}
_ROLE_KEYS = ("role", "from", "author", "sender", "sender_type", "speaker", "type")
_CONTENT_KEYS = ("content", "text", "value", "parts", "body", "message", "refusal")
_ID_KEYS = ("id", "message_id", "messageId", "uuid", "_id", "ts")
_PARENT_KEYS = ("parentId", "parentMessageId", "parent_id", "parent_message_id", "parent")
_FILE_KEYS = ("images", "files", "attachments", "experimental_attachments", "image")

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "markdown", "refusal"})
_REASONING_PARTS = frozenset({"reasoning", "think", "thinking", "redacted_thinking", "reasoning_content", "thoughts"})
_FILE_PARTS = ("image", "file", "audio", "video", "document", "media", "source")
_PYTHON_REPR = re.compile(r"\s*[\[({]\s*[{(]?\s*'")
_QUOTE = r"\\?(?:[\"']|&quot;|&#34;)"
_MESSAGE_KEY = re.compile(
    rf"\s*(?:array\()?[\s\[{{(\"'\\]{{0,10}}{_QUOTE}(?:role|content|from|author|sender|speaker){_QUOTE}\s?[:=]"
)
"""How a list of messages begins that is written in another way than as JSON."""
SYSTEM_PROMPT_KEYS = ("system", "system_prompt", "systemPrompt", "instructions")
_EVENT_STREAM = re.compile(r'\s*(?:event: ?\w+\s+)?data: ?\{"(?:id|object|type|choices|candidates|delta)"')
"""How a logged stream of server-sent events begins."""
_TEMPLATE_MARKS = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|user\|>")


_HH_TRANSCRIPT = re.compile(r"\s*Human:(?s:.*?)(?:\r?\n){2}Assistant:")
"""How a chat begins that is one text as Anthropic wrote them (parse_transcript)."""
_TRANSCRIPT = re.compile(
    r"\s*\W{0,4}(?:User|Human|Customer|Me|Q)\W{0,2}:(?s:.*)\n\W{0,4}(?:Assistant|AI|Bot|Agent|GPT|A)\W{0,2}:", re.I
)


def decode_json_text(text: str) -> Any:
    """Value of a text that is a JSON object or array, or JSON of such a text; the text itself if it is none.

    Raises RowShapeError for the repr of a Python list or dict, which is no JSON, and for messages that JSON cannot
    read: cut off, escaped for HTML, or written by another language.
    """
    stripped = text.strip().lstrip("\ufeff").lstrip()
    if stripped[:1] not in ("[", "{", '"') and not stripped.startswith("array("):
        return text
    try:
        value = json.loads(stripped)
        # A warehouse that stringifies a text column stringifies the JSON in it a second time.
        if isinstance(value, str):
            return decode_json_text(value) if value.lstrip()[:1] in ("[", "{") else text
        return value
    except (ValueError, RecursionError):
        pass
    lines = stripped.splitlines()
    if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines):
        try:
            return [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            pass
    is_repr = bool(_PYTHON_REPR.match(stripped))
    if is_repr and not _MESSAGE_KEY.match(stripped):
        try:
            ast.literal_eval(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
    elif not _MESSAGE_KEY.match(stripped):
        return text
    kind = "the repr of a Python object, not JSON" if is_repr else "a text that is not valid JSON"
    raise RowShapeError(f"a chat or object is {kind}")


def decode_value(value: Any) -> Any:
    """A value, decoded where it is JSON in a text (decode_json_text)."""
    return decode_json_text(value) if isinstance(value, str) else value


def get_any(row: Mapping[str, Any], *names: str) -> Any:
    """First value that is present, of the names that versions of an export give a field."""
    return next((row[name] for name in names if row.get(name) is not None), None)


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
        if _EVENT_STREAM.match(value):
            raise RowShapeError("a response is a stream of events, not its text; join the chunks first")
        try:
            decoded = decode_json_text(value)
        except RowShapeError:
            if _MESSAGE_KEY.match(value):
                raise
            return value  # an answer that is a Python list
        items = decoded if isinstance(decoded, list) else [decoded]
        has_messages = bool(items) and all(_is_assistant_message(item) for item in items)
        if has_messages or _is_completion(decoded):
            return read_text(decoded, notes, shape)
        notes["responses in JSON"] += not isinstance(decoded, str)
        return _drop_blocks(value, notes, is_reply=True)
    if isinstance(value, int | float):
        return json.dumps(value)  # an exporter with types of its own wrote the answer 42 as a number
    if isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value):
        raise RowShapeError("a response is a list of texts; name one of them, such as response: answers.0")
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "message" in item for item in value):
        return read_choices({"choices": value}, notes, shape)
    if isinstance(value, list) and any(isinstance(item, Mapping) and "role" in item for item in value):
        # The Responses API lists reasoning and tool calls next to messages.
        others = [item for item in value if not (isinstance(item, Mapping) and "role" in item)]
        notes["tool parts"] += sum(str(item.get("type")) not in _REASONING_PARTS for item in others)
        notes["reasoning"] += sum(str(item.get("type")) in _REASONING_PARTS for item in others)
        return read_chat([item for item in value if item not in others], notes, shape)[-1].content
    if isinstance(value, Mapping) and _is_completion(value):
        return read_choices(value, notes, shape)
    if isinstance(value, Mapping) and (
        inner := next((v for k in ("messages", "output") if isinstance(v := value.get(k), list)), None)
    ):
        return read_text(inner, notes, shape)
    if isinstance(value, Mapping | list):
        item = {"content": value} if isinstance(value, list) else value
        # LangChain's classes and tool calls are those of a message.
        message = _read_message({"role": "assistant", **item}, notes, shape)
        return message.content
    return None


def _is_completion(value: object) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(choices := value.get(key), list) and choices for key in ("choices", "candidates")
    )


def read_choices(value: Mapping[str, Any], notes: Counter[str], shape: ChatShape = DEFAULT_SHAPE) -> str | None:
    """Text of the first of a completion's choices (Gemini: candidates); the others are counted as left out."""
    choices = value.get("choices") or value["candidates"]
    notes["further choices"] += len(choices) - 1
    message = choices[0].get("message") or choices[0].get("content")
    return _read_content(message, notes, shape) if isinstance(message, Mapping) else choices[0].get("text")


def read_chat(value: object, notes: Counter[str], shape: ChatShape = DEFAULT_SHAPE) -> list[ChatMessage]:
    """Messages of a chat, whatever holds them: a list, an object with `messages`, a tree by id, JSON or plain text.

    What has no text (tool calls, images) is counted in `notes`. Raises RowShapeError.
    """
    if isinstance(value, str):
        decoded = decode_json_text(value)
        if isinstance(decoded, str) or not _is_chat_like(decoded):
            if _HH_TRANSCRIPT.match(value):
                chat = parse_transcript(value.replace("\r\n", "\n"))
                return chat if chat[-1].content or chat[-1].role == "user" else chat[:-1]
            notes["prompts with the marks of a chat template"] += bool(_TEMPLATE_MARKS.search(value))
            notes["prompts that look like several messages"] += bool(_TRANSCRIPT.match(value))
            return [ChatMessage("user", value)]
        value = decoded
    if isinstance(value, Mapping):
        if isinstance(history := value.get("history"), Mapping) and history.get("messages"):
            value = history
        if "messages" in value:
            notes["system prompts next to their messages"] += any(value.get(key) for key in SYSTEM_PROMPT_KEYS)
            return read_chat(value["messages"], notes, shape)
        if isinstance(roles := value.get("role"), list):
            # Hugging Face stores a list of messages as an object of lists.
            keys = [key for key in value if isinstance(value[key], list) and len(value[key]) == len(roles)]
            value = [{key: value[key][i] for key in keys} for i in range(len(roles))]
        elif _is_message_like(value):
            value = [value]
        elif value and all(isinstance(item, Mapping) for item in value.values()):
            # ChatGPT's export has the message in its node of the tree; the root has none.
            nodes = [(key, item, item.get("message")) for key, item in value.items()]
            is_nested = all(isinstance(message, Mapping | None) and "children" in item for _, item, message in nodes)
            value = [
                {"id": key, "parent": item.get("parent"), **message} if is_nested else {"id": key, **item}
                for key, item, message in nodes
                if not is_nested or message
            ]
    if not isinstance(value, Sequence):
        raise RowShapeError(f"expected a list of messages, got {type(value).__name__}")
    if value and all(_is_exchange(item, shape) for item in value):
        value = [[role, text] for item in value for role, text in zip(("user", "assistant"), item, strict=True) if text]
    if len(value) == 1 and isinstance(value[0], list | str):
        value = decode_json_text(value[0]) if isinstance(value[0], str) else value[0]
        if isinstance(value, str):
            raise RowShapeError("expected a message, got str")
        value = [value] if isinstance(value, Mapping) else value
    messages = [_read_message(item, notes, shape) for item in value]
    replies = [index for index, message in enumerate(messages) if message.role == "assistant" and message.content]
    for index in replies[:-1]:
        # "Let me look" before a tool call is no reply, and a context ends with the user.
        message = messages[index]
        if messages[index + 1].role == "tool":
            notes["texts before tool calls"] += 1
            messages[index] = replace(message, content=None)
    return messages


def _is_exchange(item: object, shape: ChatShape) -> bool:
    """Whether an item is a pair of a user's text and the reply to it (Gradio), and not a role and a text."""
    if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
        return False
    return isinstance(item[1], str | None) and _find_role(item[0], shape) is None


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
    ids = tuple(message_id for key in _ID_KEYS if (message_id := format_id(item.get(key))) is not None)
    parent = next((format_id(item[key]) for key in _PARENT_KEYS if item.get(key) is not None), None)
    parts = item.get("content")
    is_tool_result = (
        isinstance(parts, list)
        and bool(parts)
        and all(isinstance(item_part, Mapping) and item_part.get("type") == "tool_result" for item_part in parts)
    )
    # Help desks mark what colleagues write to each other.
    if role == "ignored" or item.get("public") is False or item.get("private") is True:
        notes["internal notes and events"] += 1
        return ChatMessage("ignored", None, ids, parent)
    if role == "tool" or is_tool_result:
        notes["tool messages"] += 1
        return ChatMessage("tool", None, ids, parent)
    for key in _FILE_KEYS:
        if isinstance(files := item.get(key), list):
            notes["images and files"] += len(files)
    notes["tool calls"] += len(item.get("tool_calls") or item.get("toolInvocations") or ())
    notes["tool calls"] += bool(item.get("function_call"))
    notes["reasoning"] += any(isinstance(text := item.get(key), str) and bool(text) for key in _REASONING_PARTS)
    return ChatMessage(role, _read_content(item, notes, shape, is_reply=role == "assistant"), ids, parent)


def _get_at(item: Mapping[str, Any], key: str) -> Any:
    """Value of a key, or of a path of keys such as author.bot; None for none."""
    first, _, rest = key.partition(".")
    if key in item or not rest:
        return item.get(key)
    inner = decode_value(item.get(first))
    return _get_at(inner, rest) if isinstance(inner, Mapping) else None


def _read_role(item: Mapping[str, Any], shape: ChatShape) -> str:
    # LibreChat writes the model's name as sender, and who wrote the message in a flag.
    if isinstance(by_user := item.get("isCreatedByUser"), bool) and shape.role_key is None:
        return "user" if by_user else "assistant"
    keys = (shape.role_key,) if shape.role_key else _ROLE_KEYS
    value = next((value for key in keys if (value := _get_at(item, key)) is not None), None)
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("role", "type", "name") if isinstance(value.get(key), str)), None)
    if value is None:
        raise RowShapeError("a message has no role")
    role = _find_role(value, shape)
    if role is None:
        raise RowShapeError(f"unknown role {str(value)[:MAX_ROLE_CHARS]!r}")
    return role


def _find_role(value: object, shape: ChatShape) -> str | None:
    # A flag such as author.bot is true or false in a config.
    return shape.roles.get(str(value).lower() if isinstance(value, bool) else str(value)) or _ROLE_ALIASES.get(
        re.sub(r"[\W_]+", "", str(value).casefold())
    )


def format_id(value: object) -> str | None:
    """An id as text: 12.0 is 12, and an ObjectId its digits; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("$oid")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read_content(
    item: Mapping[str, Any], notes: Counter[str], shape: ChatShape, *, is_reply: bool = True
) -> str | None:
    """Text of a message; None if it has none (only images or tool calls)."""
    keys = (shape.content_key,) if shape.content_key else _CONTENT_KEYS
    present = [_get_at(item, key) for key in keys if key in item or _get_at(item, key) is not None]
    if not present and not (item.get("tool_calls") or item.get("toolInvocations") or item.get("function_call")):
        raise RowShapeError("a message has none of " + ", ".join(keys))
    # LibreChat leaves `text` empty where the parts are in `content`, and the other way round.
    texts = [text for value in present if (text := _read_value(value, notes)) is not None]
    text = next((text for text in texts if text), texts[0] if texts else None)
    return text if text is None else _drop_blocks(text, notes, is_reply=is_reply)


_BLOCKS = (
    ("<think>", "</think>", "reasoning"), ('<details type="reasoning"', "</details>", "reasoning"),
    ('<details type="tool_calls"', "</details>", "tool calls"),
    ('<details type="code_interpreter"', "</details>", "tool calls"),
)  # fmt: skip
"""Start and end of what models (R1) and Open WebUI write into a text that is no part of the reply."""


def _drop_blocks(text: str, notes: Counter[str], *, is_reply: bool) -> str:
    """The text without what the model thought and called before it."""
    if is_reply and "<think>" not in text and "</think>" in text:
        text = "<think>" + text  # templates of R1 and others end with the start of the thoughts
    for start, end, note in _BLOCKS:
        if start not in text:
            continue
        if end not in text:
            is_cut = is_reply and start == "<think>" and text.lstrip().startswith(start)
            notes[note] += is_cut
            text = "" if is_cut else text
            continue
        # From the end of one block to the start of the next, in linear time.
        segments = text.split(end)
        cut = [segment.partition(start)[0] if start in segment else segment + end for segment in segments[:-1]]
        notes[note] += sum(start in segment for segment in segments[:-1])
        text = ("".join(cut) + segments[-1]).strip()
    return text


def _read_value(value: object, notes: Counter[str]) -> str | None:
    if isinstance(value, str):
        # A warehouse that stringifies a column stringifies the parts in it, too.
        decoded = decode_json_text(value) if value.startswith(("[{", "{")) and '"type"' in value[:200] else value
        items = decoded if isinstance(decoded, list) else [decoded]
        # A user's message may be JSON with a type, too; the parts of a message have a text, or a kind that is known.
        is_parts = all(isinstance(item, Mapping) and "type" in item for item in items) and any(map(_is_part, items))
        return _read_value(items, notes) if is_parts else value
    if isinstance(value, list):
        texts = [text for item in value if (text := _read_part(item, notes)) is not None]
        return "".join(texts) if texts else None
    if isinstance(value, Mapping):
        inner = next((value[key] for key in ("parts", "text", "value", "content") if value.get(key) is not None), None)
        return _read_value(inner, notes) if inner is not None else None
    return None


def _is_part(item: Mapping[str, Any]) -> bool:
    kind = str(item.get("type"))
    return (kind in _TEXT_PARTS and "text" in item) or kind in ("image_url", "input_image", "tool_use", "tool_result")


def _read_part(item: object, notes: Counter[str]) -> str | None:
    """Text of one part of a content; None, counted by kind, for a item that is not text."""
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise RowShapeError(f"expected a part of a message, got {type(item).__name__}")
    kind = str(item.get("type", item.get("content_type", "text" if "text" in item else ""))).lower()
    if kind in _TEXT_PARTS:
        value = next((item[key] for key in ("text", "content", "value", "refusal") if item.get(key) is not None), None)
        # Gemini marks the parts in which it thinks.
        if item.get("thought") is not True:
            return _read_value(value, notes)
        kind = "thoughts"
    if kind in _REASONING_PARTS:
        notes["reasoning"] += 1
    elif "tool" in kind or "function" in kind:
        notes["tool parts"] += 1
    elif any(name in kind for name in _FILE_PARTS):
        notes["images and files"] += 1
    elif not kind.startswith("step"):
        notes["other parts"] += 1
    return None


def index_parents(messages: Sequence[ChatMessage], notes: Counter[str]) -> dict[ChatMessage, ChatMessage] | None:
    """Each message's parent, of those that have one in the chat; None if no message has, as in a plain list.

    Roots name no parent, themselves, or one id that is of no message; more such ids are of messages that are missing.
    """
    by_id = {message_id: message for message in messages for message_id in message.ids}
    parents = {message: by_id[message.parent] for message in messages if message.parent in by_id}
    parents = {message: parent for message, parent in parents.items() if parent is not message}
    if parents:
        unknown_ids = {message.parent for message in messages} - {None, *by_id}
        notes["messages missing above others in their chat"] += max(0, len(unknown_ids) - 1)
    return parents or None


def collect_thread(
    messages: Sequence[ChatMessage], last: ChatMessage, parents: Mapping[ChatMessage, ChatMessage] | None
) -> list[ChatMessage]:
    """Messages that lead to `last`, inclusive: by parent (index_parents), else those before it in the list.

    Raises RowShapeError for parents that lead back to a message: what preceded it is then unknown.
    """
    if parents is None:
        return list(messages[: messages.index(last) + 1])
    thread = {last: None}
    while (parent := parents.get(last)) is not None:
        if parent in thread:
            raise RowShapeError("the parents of the messages form a loop")
        thread[parent] = None
        last = parent
    return list(thread)[::-1]


def drop_replies_at_end(context: Sequence[ChatMessage], notes: Counter[str]) -> list[ChatMessage]:
    """A context to its last message of the user: a model that writes twice in a row answers the same question."""
    end = next((index + 1 for index in range(len(context) - 1, -1, -1) if context[index].role == "user"), 0)
    notes["replies before the rated one"] += len(to_records(context[end:]))
    return list(context[:end])


def split_at_response(
    messages: Sequence[ChatMessage], notes: Counter[str], rated_message: str | None = None
) -> tuple[list[ChatMessage], str | None, bool]:
    """Context, response, and whether a user wrote after it; the response is the rated message, else the last one.

    `rated_message` is an id of a message, or its position in the list from 0. Without it, a chat that does not end with
    an assistant has no response (None). Raises RowShapeError if the rated message is missing or not an assistant's.
    """
    if rated_message is None:
        last = next((message for message in reversed(messages) if message.role != "ignored"), None)
        if last is None or last.role != "assistant":
            return list(messages), None, False
    else:
        by_id = [message for message in messages if rated_message in message.ids]
        # Where ids are numbers, a number that is none of them is no position.
        has_number_ids = any(message_id.isdecimal() for message in messages for message_id in message.ids)
        is_position = re.fullmatch(r"-?\d+", rated_message) is not None and not has_number_ids
        if not by_id and is_position and -len(messages) <= int(rated_message) < len(messages):
            by_id = [messages[int(rated_message)]]
        if not by_id:
            raise RowShapeError("the rated message is not in the chat")
        if len({message.content for message in by_id}) > 1:
            raise RowShapeError("several messages have the id of the rated message")
        last = by_id[0]
        if last.role != "assistant":
            raise RowShapeError("the rated message is not an assistant's")
        if last.content is None:
            raise RowShapeError("the rated message has no text")
    thread = collect_thread(messages, last, index_parents(messages, notes))
    is_continued = any(message.role == "user" for message in messages[messages.index(last) + 1 :])
    return thread[:-1], last.content, is_continued and thread == list(messages[: len(thread)])


def strip_html(text: str | None, notes: Counter[str]) -> str | None:
    """Text of an HTML body; paragraphs and line breaks become line breaks, images are counted."""
    if text is None:
        return None
    notes["images and files"] += len(re.findall(r"(?i)<(?:img|video|audio)\b", text))
    without_breaks = re.sub(r"(?i)<br\s*/?>|</p>\s*", "\n", text)
    return html.unescape(re.sub(r"<[^>]+>", "", without_breaks)).strip()


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
