"""Readers of traced calls of models: OpenAI's stored completions, Langfuse and LangSmith.

What a traced function takes and returns has no fixed shape. The readers know the names that frameworks and their
examples give to a prompt, the messages before it, and a reply.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from rluf.prepare.labels import BAD_NAME_PATTERN, parse_number, parse_truth
from rluf.prepare.readers.chats import (
    ChatMessage,
    count_user_turns,
    decode_json_text,
    decode_value,
    get_any,
    read_chat,
    read_choices,
    read_text,
    split_at_response,
    to_records,
)
from rluf.prepare.readers.columns import (
    FINISH_REASONS,
    NOTES_KEY,
    RATINGS_NOTE,
    get_by_path,
    name_reactions,
    order_by_time,
)
from rluf.prepare.readers.datasets import LogReader, ReaderItems, ReaderOptions, SkippedRow, index_readers
from rluf.prepare.readers.times import normalize_time

_USER_SCORE_NAMES = re.compile(
    r".*(feedback|rating|thumb|reaction|love|heart|vote|csat|nps|stars?$)|"
    r"(negative|positive|user|is)*(score|(dis)?like)[sd]?$"
)
"""Scores of Langfuse and LangSmith that are reactions of users, without separators; others are evaluations."""

_REACTION_METADATA = re.compile(
    r"(is|user|customer|human|positive|negative)*(feedback|rating|thumbs?|reaction|(up|down)?voted?|csat|nps|stars?|"
    r"(dis)?liked?|loved?|heart(ed)?)(up|down|score|value|rating)?"
)
"""Names of metadata that are a reaction, without separators; feedback_id is none."""

_PROMPT_KEYS = (
    "input", "question", "query", "prompt", "user_message", "user_input", "user_prompt", "user_query", "message",
    "instruction", "prompts", "text",
)  # fmt: skip
_HISTORY_KEYS = ("chat_history", "history", "conversation_history", "message_history", "previous_messages")
_SYSTEM_KEYS = ("system", "system_prompt", "systemPrompt", "system_message", "system_instruction", "instructions")
_RESPONSE_KEYS = (
    "output", "answer", "response", "result", "content", "text", "message", "completion", "reply", "final_output",
    "final_answer", "generated_text", "output_text", "generation",
)  # fmt: skip
"""Keys under which functions that are traced have a text."""

_NO_TEXT = "reply without text"


def _read_openai(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    notes: Counter[str] = Counter()
    request, response = row.get("request", row), row.get("response", row)
    # The Responses API has input and output in place of messages and choices.
    messages = read_chat(request["messages" if "messages" in request else "input"], notes)
    if isinstance(instructions := request.get("instructions"), str):
        messages = [ChatMessage("system", instructions), *messages]
    metadata = decode_value(row.get("metadata")) or {}
    reactions = _list_reactions(row, metadata, notes)
    if response.get("choices") or response.get("output"):
        response_text = read_choices(response, notes) if response.get("choices") else read_text(response, notes)
        if response_text is None:
            return [SkippedRow("tool call without text")]
    else:
        messages, response_text, _ = split_at_response(messages, notes)
        if response_text is None:
            return [SkippedRow("no assistant message")]
    response_id = str(row.get("id") or response["id"])
    return [{
        "id": response_id, "conversation_id": str(metadata.get("conversation_id", response_id)),
        "turn": count_user_turns(messages),
        "user_id": str(request.get("user") or metadata.get("user_id") or response_id),
        "time": normalize_time(response.get("created", row.get("created", row.get("created_at"))), notes),
        "model_version": response.get("model") or request["model"], "messages": to_records(messages),
        "response": response_text, "reaction": reactions or None,
        "finish_reason": FINISH_REASONS.get(str(get_by_path(response, "choices.0.finish_reason"))),
        "topic": metadata.get("topic", "other"), "locale": metadata.get("locale", "und"), NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _list_reactions(row: Mapping[str, Any], metadata: Mapping[str, Any], notes: Counter[str]) -> list[str]:
    """Reactions to a stored completion: under their usual names in the row, or in its metadata under any such name."""
    value_by_name = {name: row[name] for name in ("feedback", "reaction", "rating") if row.get(name) is not None}
    value_by_name |= {
        name: value for name, value in metadata.items() if _REACTION_METADATA.fullmatch(_normalize_key(name))
    }
    names = {name: name_reactions(_normalize_score(name, value)) for name, value in value_by_name.items()}
    notes[RATINGS_NOTE] += any("rating" in name.lower() and names[name] for name in names)
    notes["several reactions in one row"] += sum(map(len, names.values())) > 1
    return [reaction for reactions in names.values() for reaction in reactions]


def _is_user_score(score: Mapping[str, Any]) -> bool:
    """Whether a Langfuse score is a reaction of a user, by its name and source; a judge model's has the source EVAL."""
    return score.get("source") != "EVAL" and _is_user_score_name(score.get("name"))


def _is_user_score_name(name: object) -> bool:
    return _USER_SCORE_NAMES.match(_normalize_key(name)) is not None


def _normalize_key(name: object) -> str:
    return re.sub(r"[\W_]+", "", str(name).lower())


def _normalize_score(name: object, value: Any) -> Any:
    """A reaction, where the name of a score may say that it is true or above 0 for a bad response."""
    number = parse_number(str(value).strip())
    is_positive = parse_truth(value) if number is None else number > 0
    if is_positive is None or not BAD_NAME_PATTERN.search(str(name)):
        return value
    return "thumbs_down" if is_positive else None


def _read_inputs(inputs: Any, notes: Counter[str]) -> list[ChatMessage]:
    """Chat of what a traced function was called with: its messages, or its only text and the messages before it."""
    if isinstance(inputs, Mapping) and isinstance(kwargs := inputs.get("kwargs"), Mapping) and "args" in inputs:
        is_called_by_name = bool(kwargs.keys() & {*_PROMPT_KEYS, "messages", "contents"}) or not inputs["args"]
        inputs = kwargs if is_called_by_name else inputs["args"][0]
    if not isinstance(inputs, Mapping) or "messages" in inputs or "role" in inputs:
        return read_chat(inputs, notes)
    if isinstance(inputs.get("contents"), list):  # Gemini
        notes["system prompts next to their messages"] += bool(inputs.get("system_instruction"))
        return read_chat(inputs["contents"], notes)
    question = get_any(inputs, *_PROMPT_KEYS)
    if isinstance(question, list) and len(question) == 1 and isinstance(question[0], str):
        question = question[0]
    messages = read_chat(inputs if question is None else question, notes)
    history = decode_value(get_any(inputs, *_HISTORY_KEYS))
    if isinstance(history, list):
        earlier = read_chat(history, notes) if history else []
        is_repeated = bool(earlier) and to_records(earlier[-1:]) == to_records(messages[:1])
        messages = [*earlier[: len(earlier) - is_repeated], *messages]
    else:
        notes["earlier messages in one text"] += bool(history)
    notes["system prompts next to their messages"] += any(inputs.get(key) for key in _SYSTEM_KEYS)
    others = inputs.keys() - {*_PROMPT_KEYS, *_HISTORY_KEYS, *_SYSTEM_KEYS}
    # Documents that were looked up, for example; settings are numbers and truth values.
    notes["inputs next to the question"] += any(isinstance(inputs[key], list | Mapping) for key in others)
    return messages


def _get_reply(outputs: Any) -> Any:
    """Reply of what a traced function returned; None for none."""
    while isinstance(outputs, Mapping) and not outputs.keys() & {"choices", "candidates", "messages", "role"}:
        generation = get_by_path(outputs, "generations.0.0.message|generations.0.message|generations.0.0.text")
        inner = generation or get_any(outputs, *_RESPONSE_KEYS)
        if inner is None:
            return outputs
        outputs = inner
        if generation is not None:
            break
    return outputs


def _list_scores(scores: Any) -> list[Any]:
    """Scores of a trace: a list, or an object of values by name."""
    scores = decode_value(scores)
    if isinstance(scores, Mapping):
        return [scores] if "name" in scores else [{"name": name, "value": value} for name, value in scores.items()]
    return list(scores or ())


def _read_score(score: Mapping[str, Any]) -> str | float | None:
    """Reaction of a Langfuse score: the category, else thumbs for a truth value or 0, else the number.

    A score of 0 is a thumb down, except for one that counts hearts, where it is no reaction.
    """
    value, text = score.get("value"), get_any(score, "stringValue", "string_value")
    if isinstance(value, str) and parse_number(value.strip()) is None:
        value, text = None, text or value
    name, data_type = str(score.get("name")).lower(), get_any(score, "dataType", "data_type")
    if text is not None and str(text).lower() not in ("true", "false") and data_type in ("CATEGORICAL", None):
        return str(text)
    if value is None and str(text).lower() not in ("true", "false"):
        return None  # also a comment, of the type TEXT
    number = float(value) if value is not None else float(str(text).lower() == "true")
    if BAD_NAME_PATTERN.search(name):
        return "thumbs_down" if number else None
    if number == 0 and any(word in name for word in ("love", "heart", "like")):
        return None
    is_thumb = number == 0 or data_type == "BOOLEAN"
    return {0.0: "thumbs_down", 1.0: "thumbs_up"}.get(number, number) if is_thumb else number


def _read_langfuse(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A trace, or a generation of the observations, of the API or of the blob export.

    Scores that are only ids, or in a file of their own, come from data.reactions (langfuse_scores).
    """
    if str(row.get("type") or "GENERATION").upper() != "GENERATION":
        return [SkippedRow("observation is not a generation")]
    notes: Counter[str] = Counter()
    if row.get("output") is None:
        generations = [item for item in decode_value(row.get("observations")) or () if _is_generation(item)]
        if not generations:
            return [SkippedRow("no assistant message")]
        # The API returns a trace with its observations; many integrations leave its own input and output empty.
        last = max(generations, key=lambda item: str(get_any(item, "startTime", "start_time")))
        row = {**row, **{key: last.get(key) for key in ("input", "output", "model")}}
        notes["texts of traces taken from their last generation"] += 1
    inputs = decode_value(row.get("input"))
    if not inputs:
        return [SkippedRow("no prompt")]
    messages = _read_inputs(inputs, notes)
    response = read_text(_get_reply(decode_value(row["output"])), notes)
    if not response:
        return [SkippedRow("tool call without text" if notes["tool calls"] or notes["tool parts"] else _NO_TEXT)]
    scores = _list_scores(row.get("scores"))
    user_scores = order_by_time([score for score in scores if isinstance(score, Mapping) and _is_user_score(score)])
    notes["scores that are not a user's"] += sum(isinstance(score, Mapping) for score in scores) - len(user_scores)
    notes[RATINGS_NOTE] += sum("rating" in str(score["name"]).lower() for score in user_scores)
    notes["scores given by id"] += sum(not isinstance(score, Mapping) for score in scores)
    reactions = [reaction for score in user_scores if (reaction := _read_score(score)) is not None]
    metadata = row.get("metadata") or {}
    metadata = decode_json_text(metadata) if isinstance(metadata, str) else metadata
    metadata = metadata if isinstance(metadata, Mapping) else {}
    trace_id = str(row["id"])
    session_id = get_any(row, "sessionId", "session_id", "traceId", "trace_id")
    return [{
        "id": trace_id, "conversation_id": str(session_id or trace_id), "turn": count_user_turns(messages),
        "user_id": str(get_any(row, "userId", "user_id") or session_id or trace_id),
        "time": normalize_time(get_any(row, "timestamp", "startTime", "start_time"), notes),
        "model_version": str(
            get_any(row, "model", "providedModelName", "provided_model_name", "release", "version") or "unknown"
        ),
        "messages": to_records(messages), "response": response, "reaction": reactions or None,
        "topic": str(metadata.get("topic", "other")), "locale": str(metadata.get("locale", "und")),
        NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _is_generation(observation: object) -> bool:
    is_generation = isinstance(observation, Mapping) and observation.get("type") == "GENERATION"
    return is_generation and observation.get("output") is not None  # type: ignore[attr-defined]


def _read_langfuse_score(rated_kind: str, row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A score of a trace or of an observation; each is a response where the rows of feedback are of that kind."""
    if not _is_user_score(row):
        return [SkippedRow("score is not a user's")]
    rated_id, reaction = get_any(row, f"{rated_kind}Id", f"{rated_kind}_id"), _read_score(row)
    if rated_id is None or reaction is None:
        return [SkippedRow(f"no {rated_kind}" if rated_id is None else "no reaction")]
    notes = Counter[str]()
    time = normalize_time(get_any(row, "timestamp", "createdAt", "created_at"), notes)
    fields = {"id": str(row["id"]), "response_id": str(rated_id), "time": time, "reaction": reaction}
    return [fields | {NOTES_KEY: dict(notes)}]


def _read_langsmith(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A run, of the bulk export or the API; feedback_stats has the mean and the number of each feedback key."""
    decoded = {name: decode_json_text(value) if isinstance(value, str) else value for name, value in row.items()}
    outputs = decoded.get("outputs")
    if decoded.get("parent_run_id"):
        return [SkippedRow("run within another run")]
    if outputs is None or decoded.get("error"):
        return [SkippedRow("no assistant message" if outputs is None else "run with an error")]
    notes: Counter[str] = Counter()
    messages = _read_inputs(decoded["inputs"], notes)
    if isinstance(outputs, Mapping):
        outputs = _get_reply(outputs)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("messages"), list):
            # A graph returns its state: the chat to its end, with tool messages after the reply in some.
            chat = read_chat(outputs["messages"], notes)
            replies = [message.content for message in chat if message.role == "assistant" and message.content]
            outputs = replies[-1] if replies else None
    stats = decoded.get("feedback_stats") or {}
    stats = {name: entry for name, entry in stats.items() if isinstance(entry, Mapping)}
    # Evaluators write into the same statistics, and 1 is bad in some of them (harmful).
    user_stats = {name: entry for name, entry in stats.items() if _is_user_score_name(name)}
    notes["scores that are not a user's"] += len(stats) - len(user_stats)
    means = [
        _normalize_score(
            name, entry["avg"] if entry.get("avg") is not None else max(entry["values"], key=entry["values"].get)
        )
        for name, entry in user_stats.items()
        if entry.get("avg") is not None or entry.get("values")
    ]
    notes["several reactions in one row"] += len(means) > 1
    response = read_text(outputs, notes)
    if not response:
        return [SkippedRow("tool call without text" if notes["tool calls"] or notes["tool parts"] else _NO_TEXT)]
    metadata = get_by_path(decoded, "extra.metadata") or {}
    metadata = decode_json_text(metadata) if isinstance(metadata, str) else metadata
    conversation_id = get_any(metadata, "thread_id", "session_id", "conversation_id")
    run_id = str(get_any(decoded, "id", "run_id"))
    return [{
        "id": run_id, "conversation_id": str(conversation_id or run_id),
        "turn": max(0, count_user_turns(messages) - 1),
        "user_id": str(metadata.get("user_id") or conversation_id or run_id),
        "time": normalize_time(decoded["start_time"], notes),
        "model_version": str(get_any(metadata, "ls_model_name", "model", "revision_id") or "unknown"),
        "messages": to_records(messages), "response": response, "reaction": means or None,
        NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _read_langsmith_feedback(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A row of the feedback table: a user's, unless its source is an evaluator."""
    source = decode_value(row.get("feedback_source"))
    reaction = _normalize_score(row.get("key"), get_any(row, "score", "value"))
    if isinstance(source, Mapping) and source.get("type") in ("model", "auto_eval"):
        return [SkippedRow("score is not a user's")]
    if reaction is None or row["run_id"] is None:
        return [SkippedRow("no reaction" if reaction is None else "no run")]
    notes = Counter[str]()
    time = normalize_time(get_any(row, "created_at", "modified_at"), notes)
    fields = {"id": str(row["id"]), "response_id": str(row["run_id"]), "time": time, "reaction": [reaction]}
    return [fields | {NOTES_KEY: dict(notes)}]


TRACE_READERS = index_readers(
    LogReader("langfuse", "feedback", _read_langfuse),
    LogReader("langfuse_scores", "reactions", partial(_read_langfuse_score, "trace")),
    LogReader("langfuse_observation_scores", "reactions", partial(_read_langfuse_score, "observation")),
    LogReader("langsmith", "feedback", _read_langsmith),
    LogReader("langsmith_feedback", "reactions", _read_langsmith_feedback),
    LogReader("openai", "feedback", _read_openai),
)
"""Readers by name."""
