"""Logs of another shape: `prepare.columns` says where our fields lie, and ready maps know some common exports.

A ready map is used as a reader, `<map>:<path>`:

openai     stored chat completions: messages (or request.messages) and choices (or response.choices), a row each
wildchat   WildChat and its like: one conversation a row, hashed_ip as user; reactions come from data.reactions
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
from rluf.prepare.readers.datasets import Drop, Items, Options, Reader
from rluf.prepare.schema import LOVE, FeedbackRecord
from rluf.prepare.splits import short_hash, side

_THUMBS = {"up": LOVE, "thumbs_up": LOVE, "like": LOVE, "positive": LOVE, "down": "thumbs_down",
           "dislike": "thumbs_down", "negative": "thumbs_down"}  # fmt: skip
_LOCALES = {"english": "en", "chinese": "zh", "spanish": "es", "french": "fr", "german": "de", "russian": "ru",
            "portuguese": "pt", "italian": "it", "japanese": "ja", "korean": "ko"}  # fmt: skip


def reaction_name(value: object) -> str | None:
    """Our name of a reaction: true, 1 and thumbs up are love, -1 a thumb down, false, 0 and nothing no reaction."""
    if isinstance(value, str):
        return _THUMBS.get(value.lower(), value) or None
    if value is None or isinstance(value, bool | int | float):
        return LOVE if value and value > 0 else "thumbs_down" if value and value < 0 else None
    raise TypeError(f"no reaction: {value!r}")


def moment(value: object) -> object:
    """A time as ISO 8601 with zone: seconds or milliseconds since 1970, or text (taken as UTC where it has no zone)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return datetime.fromtimestamp(value / 1000 if value > 1e11 else value, UTC).isoformat()
    if not isinstance(value, str):
        return value
    try:
        read = datetime.fromisoformat(value.removesuffix(" UTC"))
    except ValueError:
        return value
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).isoformat()


def _text(content: object) -> object:
    """The text of a message, of which OpenAI's API also knows lists of parts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") in ("text", "input_text", "output_text"))
    return content


def _chat(value: object) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = value["messages"]
    if not isinstance(value, Sequence):
        raise TypeError("no messages")
    roles = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
    chat = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = _text(message["content"] if "content" in message else message["value"])
        chat.append({"role": roles.get(role, role), "content": content})
    return chat


def dig(row: Any, path: str) -> Any:
    """What lies at a path such as choices.0.message; None where the way ends. `=text` is that text."""
    if path.startswith("="):
        return path[1:]
    for part in path.split("."):
        if isinstance(row, Mapping):
            row = row.get(part)
        elif isinstance(row, list) and part.lstrip("-").isdecimal() and -len(row) <= int(part) < len(row):
            row = row[int(part)]
        else:
            return None
    return row


def column_map(columns: Mapping[str, str]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from a foreign row to ours. Raises SettingsError for a field that we do not have.

    Without a path for `response` the chat's last message is the response and what is before it the context. Fields
    without a path that the row has by our own name are taken from there.
    """
    for name in columns:
        if name not in FeedbackRecord.model_fields:
            near = difflib.get_close_matches(name, FeedbackRecord.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"fields: {', '.join(FeedbackRecord.model_fields)}"
            raise SettingsError(f"prepare.columns.{name}: a feedback row has no field {name}; {hint}")

    def read(row: Mapping[str, Any]) -> dict[str, Any]:
        made = {name: row[name] for name in FeedbackRecord.model_fields if name in row}
        made |= {name: value for name, path in columns.items() if (value := dig(row, path)) is not None}
        if "messages" in columns and "messages" in made:
            chat = _chat(made["messages"])
            if "response" not in made and chat and chat[-1]["role"] == "assistant":
                made["response"] = chat.pop()["content"]
            made["messages"] = chat
        if "time" in columns:
            made["time"] = moment(made.get("time"))
        made["reaction"] = reaction_name(made.get("reaction"))
        if isinstance(turn := made.get("turn"), str) and turn.isdecimal():
            made["turn"] = int(turn)
        return made | {name: str(made[name]) for name in _NAMES if isinstance(made.get(name), int)}

    return read


_NAMES = ("id", "conversation_id", "user_id", "model_version", "device", "author")


def _turns(chat: Sequence[Mapping[str, Any]]) -> int:
    return sum(message["role"] == "user" for message in chat)


def _openai(row: Mapping[str, Any], options: Options) -> Items:
    request, response = row.get("request", row), row.get("response", row)
    chat = _chat(request["messages"])
    meta = row.get("metadata") or {}
    choices = response.get("choices")
    if choices:
        answer = _text(choices[0]["message"]["content"])
        if answer is None:
            return [Drop("tool call without text")]
    elif chat and chat[-1]["role"] == "assistant":
        answer = chat.pop()["content"]
    else:
        return [Drop("no assistant message")]
    chat = [message for message in chat if message["role"] != "tool" and message["content"] is not None]
    key = str(row.get("id") or response["id"])
    return [
        {
            "id": key,
            "conversation_id": str(meta.get("conversation_id", key)),
            "turn": _turns(chat),
            "user_id": str(request.get("user") or meta.get("user_id") or key),
            "time": moment(response.get("created", row.get("created", row.get("created_at")))),
            "model_version": response.get("model") or request["model"],
            "messages": chat,
            "response": answer,
            "reaction": reaction_name(row.get("feedback", meta.get("reaction"))),
            "topic": meta.get("topic", "other"),
            "locale": meta.get("locale", "und"),
        }
    ]


def _wildchat(row: Mapping[str, Any], options: Options) -> Items:
    name = str(row.get("conversation_hash") or row["conversation_id"])
    chat, items = _chat(row["conversation"]), []
    for index, (message, raw) in enumerate(zip(chat, row["conversation"], strict=True)):
        if message["role"] != "assistant":
            continue
        before = chat[:index]
        items.append(
            {
                "id": f"{name}-{index}",
                "conversation_id": name,
                "turn": _turns(before),
                "user_id": short_hash("wildchat", str(row.get("hashed_ip") or raw.get("hashed_ip") or name)),
                "time": moment(raw.get("timestamp") or row["timestamp"]),
                "model_version": row["model"],
                "messages": before,
                "response": message["content"],
                "reaction": reaction_name(raw.get("reaction")),
                "continued": any(later["role"] == "user" for later in chat[index + 1 :]),
                "locale": _locale(row.get("language")),
            }
        )
    return [*items] or [Drop("no assistant message")]


def _locale(language: object) -> str:
    return _LOCALES.get(str(language).lower(), "und")


def _lmsys(row: Mapping[str, Any], options: Options) -> Items:
    winner = row["winner"]
    if winner not in ("model_a", "model_b"):
        return [Drop("tie")]
    best, worst = _chat(row["conversation_a"]), _chat(row["conversation_b"])
    if winner == "model_b":
        best, worst = worst, best
    if best[:-1] != worst[:-1]:
        return [Drop("the two conversations differ before their end")]
    key = short_hash("lmsys", *(message["content"] for message in best[:-1]))
    chat = {"messages": best[:-1], "chosen": best[-1]["content"], "rejected": worst[-1]["content"]}
    return [{"id": f"lmsys-{row['question_id']}", "group": key, "topic": "arena", **chat}]


def _lmsys_prompts(row: Mapping[str, Any], options: Options) -> Items:
    first = _chat(row["conversation"])[:1]
    if not first or first[0]["role"] != "user":
        return [Drop("no user message")]
    key = short_hash("prompt", first[0]["content"])
    part = side(key, dev_share=0.0, test_share=options.test_share)
    return [{"id": f"prompt-{key}", "messages": first, "topic": _locale(row.get("language")), "split": part}]


def _langfuse(row: Mapping[str, Any], options: Options) -> Items:
    if row.get("output") is None:
        return [Drop("no assistant message")]
    chat, output = _chat(row["input"]), row["output"]
    if isinstance(output, Mapping):
        output = output["choices"][0]["message"]["content"] if "choices" in output else output["content"]
    scores = [score for score in row.get("scores") or [] if str(score.get("name")).lower() in _SCORES]
    values = [score.get("stringValue") or score.get("value") for score in scores]
    down = any(str(score["name"]).lower() not in ("love", "heart") and score.get("value") == 0 for score in scores)
    meta = row.get("metadata") or {}
    return [
        {
            "id": str(row["id"]),
            "conversation_id": str(row.get("sessionId") or row["id"]),
            "turn": _turns(chat),
            "user_id": str(row.get("userId") or row.get("sessionId") or row["id"]),
            "time": moment(row["timestamp"]),
            "model_version": str(row.get("model") or row.get("release") or row.get("version") or "unknown"),
            "messages": chat,
            "response": _text(output),
            "reaction": "thumbs_down" if down else reaction_name(values[-1]) if values else None,
            "topic": str(meta.get("topic", "other")),
            "locale": str(meta.get("locale", "und")),
        }
    ]


_SCORES = ("love", "heart", "user-feedback", "user_feedback", "feedback", "thumbs", "rating")

MAPS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("openai", "feedback", _openai),
        Reader("wildchat", "feedback", _wildchat),
        Reader("lmsys", "preferences", _lmsys),
        Reader("lmsys_prompts", "prompts", _lmsys_prompts),
        Reader("langfuse", "feedback", _langfuse),
    )
}
"""The ready maps by name."""
