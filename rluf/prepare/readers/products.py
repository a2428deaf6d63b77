"""Readers of the exports of products, by their public schemas ({reader: NAME, path: ...} in `data.*`).

A reader is a table of paths where a row of the export is one response, and a function where it is a whole chat with
reactions to some of its messages. Reactions keep the names that the product has; `prepare.labels` says what they mean.
docs/data.md lists the readers and what each leaves out (tests/prepare/test_products_table.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rluf.prepare.readers.chats import (
    ChatMessage,
    RowShapeError,
    collect_thread,
    count_user_turns,
    decode_json_text,
    index_parents,
    read_chat,
    read_choices,
    read_text,
    split_at_response,
    strip_html,
    to_records,
)
from rluf.prepare.readers.columns import (
    NOTES_KEY,
    RATINGS_NOTE,
    UNKNOWN_TIME,
    get_by_path,
    name_reactions,
    normalize_time,
    order_by_time,
)
from rluf.prepare.readers.datasets import LogReader, ReaderItems, ReaderOptions, ReaderRow, SkippedRow, index_readers
from rluf.prepare.schema import MAX_MESSAGES
from rluf.prepare.splits import assign_split
from rluf.utils.hashing import hash_parts

_LOCALE_BY_LANGUAGE = {
    "english": "en", "chinese": "zh", "spanish": "es", "french": "fr", "german": "de", "russian": "ru",
    "portuguese": "pt", "italian": "it", "japanese": "ja", "korean": "ko",
}  # fmt: skip

_USER_SCORE_NAMES = re.compile(
    r".*(feedback|rating|thumb|reaction|love|heart|vote|csat|nps|stars?$)|(negative|positive|user)*(score|(dis)?like)s?$"
)
"""Scores of Langfuse and LangSmith that are reactions of users, without separators; others are evaluations."""

_PROMPT_KEYS = ("input", "question", "query", "prompt", "user_message", "message", "text")
_RESPONSE_KEYS = ("output", "answer", "response", "result", "content", "text", "message")
"""Keys under which functions that are traced have a text."""


def _expand_chat(
    raw_messages: Any,
    base: Mapping[str, Any],
    read_turn: Callable[[Mapping[str, Any], int], Mapping[str, Any]],
) -> ReaderItems:
    """A row for each assistant message of a chat, with the thread before it as context.

    `read_turn` returns the fields that the raw message and its position determine.
    """
    decoded = decode_json_text(raw_messages) if isinstance(raw_messages, str) else raw_messages
    notes: Counter[str] = Counter()
    items: list[ReaderRow | SkippedRow] = []
    messages = read_chat(decoded, notes)
    parents, records = index_parents(messages, notes), {message: to_records([message]) for message in messages}
    last_user_index = max((index for index, message in enumerate(messages) if message.role == "user"), default=0)
    for index, (message, raw_message) in enumerate(zip(messages, decoded, strict=True)):
        if message.role != "assistant" or message.content is None:
            continue
        # A row repeats all messages before it: an endless chat would take memory by the square of its length.
        if index > MAX_MESSAGES:
            items.append(SkippedRow(f"behind the first {MAX_MESSAGES} messages of its chat"))
            continue
        context = collect_thread(messages, message, parents)[:-1]
        items.append({
            "turn": max(0, count_user_turns(context) - 1), "response": message.content,
            "messages": [record for earlier in context for record in records[earlier]],
            "continued": index < last_user_index, NOTES_KEY: dict(+notes), **base, **read_turn(raw_message, index),
        })  # fmt: skip
        notes.clear()  # what was left out counts once per chat
    return items or [SkippedRow("no assistant message")]


def _read_openai(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    notes: Counter[str] = Counter()
    request, response = row.get("request", row), row.get("response", row)
    # The Responses API has input and output in place of messages and choices.
    messages = read_chat(request["messages" if "messages" in request else "input"], notes)
    if isinstance(instructions := request.get("instructions"), str):
        messages = [ChatMessage("system", instructions), *messages]
    metadata = row.get("metadata") or {}
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
        "time": normalize_time(response.get("created", row.get("created", row.get("created_at")))),
        "model_version": response.get("model") or request["model"], "messages": to_records(messages),
        "response": response_text, "reaction": row.get("feedback", metadata.get("reaction")),
        "topic": metadata.get("topic", "other"), "locale": metadata.get("locale", "und"), NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _read_wildchat(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    conversation_id = str(row.get("conversation_hash") or row["conversation_id"])
    base = {
        "conversation_id": conversation_id, "model_version": row["model"], "locale": _find_locale(row.get("language")),
    }  # fmt: skip

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        user_key = str(row.get("hashed_ip") or message.get("hashed_ip") or conversation_id)
        return {
            "id": f"{conversation_id}-{index}", "user_id": hash_parts("wildchat", user_key),
            "time": normalize_time(message.get("timestamp") or row["timestamp"]), "reaction": message.get("reaction"),
        }  # fmt: skip

    items = _expand_chat(row["conversation"], base, read_turn)
    # WildChat's turns count from 1, as in the rows that earlier releases wrote.
    return [item if isinstance(item, SkippedRow) else item | {"turn": item["turn"] + 1} for item in items]


def _find_locale(language: object) -> str:
    return _LOCALE_BY_LANGUAGE.get(str(language).lower(), "und")


def _read_lmsys(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    notes: Counter[str] = Counter()
    if "winner" in row:
        winner, raw_chats = str(row["winner"]).lower(), [row["conversation_a"], row["conversation_b"]]
    else:
        # Arena 55k: a column for each outcome, and JSON lists of texts in place of chats.
        winners = [name for name in ("model_a", "model_b", "tie") if str(row[f"winner_{name}"]) in ("1", "1.0", "True")]
        winner, raw_chats = winners[0], [_join_turns(row["prompt"], row[f"response_{name}"]) for name in "ab"]
    if winner.startswith(("tie", "both")):
        return [SkippedRow("tie")]
    if winner not in ("model_a", "model_b"):
        raise ValueError(f"winner must be model_a, model_b, tie or both_bad, got {row['winner']!r}")
    battle = [read_chat(chat, notes) for chat in raw_chats]
    if not all(chat and chat[-1].role == "assistant" and chat[-1].content for chat in battle):
        return [SkippedRow("no response")]
    chats = [to_records(chat) for chat in battle]
    chosen, rejected = chats if winner == "model_a" else chats[::-1]
    # In longer battles the models answered different contexts, so the responses are not comparable.
    if chosen[:-1] != rejected[:-1]:
        return [SkippedRow("the two conversations differ before their end")]
    context = chosen[:-1]
    return [{
        "id": f"lmsys-{_get_any(row, 'question_id', 'id')}",
        "group": hash_parts("lmsys", *(message["content"] for message in context)),
        "topic": "arena", "messages": context, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"],
        NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _join_turns(prompts: Any, responses: Any) -> list[dict[str, Any]]:
    """A chat of a list of the user's texts and one of the replies."""
    pairs = zip(_decode(prompts), _decode(responses), strict=True)
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _read_lmsys_prompts(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    chat = row["conversation"]
    notes: Counter[str] = Counter()
    messages = to_records(read_chat(chat, notes))[:1]
    if not messages or messages[0]["role"] != "user":
        return [SkippedRow("no user message")]
    notes["later messages of a chat"] += len(chat) - 1
    text_hash = hash_parts("prompt", messages[0]["content"])
    split = assign_split(text_hash, dev_share=0.0, test_share=options.test_share)
    topic = _find_locale(row.get("language"))
    return [{
        "id": f"prompt-{text_hash}", "messages": messages, "topic": topic, "split": split, NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _get_any(row: Mapping[str, Any], *names: str) -> Any:
    """First value that is present, of the names that versions of an export give a field."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _decode(value: Any) -> Any:
    return decode_json_text(value) if isinstance(value, str) else value


def _is_user_score(score: Mapping[str, Any]) -> bool:
    """Whether a Langfuse score is a reaction of a user, by its name and source; a judge model's has the source EVAL."""
    return score.get("source") != "EVAL" and _is_user_score_name(score.get("name"))


def _is_user_score_name(name: object) -> bool:
    return _USER_SCORE_NAMES.match(re.sub(r"[\W_]+", "", str(name).lower())) is not None


def _get_chat(inputs: Any) -> Any:
    """Chat of what a traced function was called with: its messages, or its only text."""
    if isinstance(inputs, Mapping) and isinstance(kwargs := inputs.get("kwargs"), Mapping) and "args" in inputs:
        inputs = kwargs or (inputs["args"] or [None])[0]
    if not isinstance(inputs, Mapping) or "messages" in inputs or "role" in inputs:
        return inputs["messages"] if isinstance(inputs, Mapping) and "messages" in inputs else inputs
    chat = _get_any(inputs, *_PROMPT_KEYS)
    return inputs if chat is None else chat


def _get_reply(outputs: Any) -> Any:
    """Reply of what a traced function returned."""
    if not isinstance(outputs, Mapping) or outputs.keys() & {"choices", "candidates", "messages", "role"}:
        return outputs
    return _get_any(outputs, *_RESPONSE_KEYS) or outputs


def _read_score(score: Mapping[str, Any]) -> str | float | None:
    """Reaction of a Langfuse score: the category, else thumbs for a truth value or 0, else the number.

    A score of 0 is a thumb down, except for one that counts hearts, where it is no reaction.
    """
    value, text = score.get("value"), _get_any(score, "stringValue", "string_value")
    name, data_type = str(score.get("name")).lower(), _get_any(score, "dataType", "data_type")
    if text is not None and str(text).lower() not in ("true", "false") and data_type in ("CATEGORICAL", None):
        return str(text)
    if value is None and str(text).lower() not in ("true", "false"):
        return None  # also a comment, of the type TEXT
    number = float(value) if value is not None else float(str(text).lower() == "true")
    if re.search(r"negative|down|dislike", name):
        return "thumbs_down" if number else None
    if number == 0 and any(word in name for word in ("love", "heart", "like")):
        return None
    is_thumb = number == 0 or data_type == "BOOLEAN"
    return {0.0: "thumbs_down", 1.0: "thumbs_up"}.get(number, number) if is_thumb else number


def _read_langfuse(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A trace, or a generation of the observations, of the API or of the blob export.

    Scores that are only ids, or in a file of their own, come from data.reactions (langfuse_scores).
    """
    if row.get("type", "GENERATION") != "GENERATION":
        return [SkippedRow("observation is not a generation")]
    output = row.get("output")
    if output is None:
        return [SkippedRow("no assistant message")]
    notes: Counter[str] = Counter()
    messages = read_chat(_get_chat(_decode(row["input"])), notes)
    response = read_text(_get_reply(_decode(output)), notes)
    scores = row.get("scores") or []
    scores = decode_json_text(scores) if isinstance(scores, str) else scores
    user_scores = order_by_time([score for score in scores if isinstance(score, Mapping) and _is_user_score(score)])
    notes["scores that are not a user's"] += sum(isinstance(score, Mapping) for score in scores) - len(user_scores)
    notes[RATINGS_NOTE] += sum("rating" in str(score["name"]).lower() for score in user_scores)
    notes["scores given by id"] += sum(not isinstance(score, Mapping) for score in scores)
    reactions = [reaction for score in user_scores if (reaction := _read_score(score)) is not None]
    metadata = row.get("metadata") or {}
    metadata = decode_json_text(metadata) if isinstance(metadata, str) else metadata
    metadata = metadata if isinstance(metadata, Mapping) else {}
    trace_id = str(row["id"])
    session_id = _get_any(row, "sessionId", "session_id", "traceId", "trace_id")
    return [{
        "id": trace_id, "conversation_id": str(session_id or trace_id), "turn": count_user_turns(messages),
        "user_id": str(_get_any(row, "userId", "user_id") or session_id or trace_id),
        "time": normalize_time(_get_any(row, "timestamp", "startTime", "start_time"), notes),
        "model_version": str(
            _get_any(row, "model", "providedModelName", "provided_model_name", "release", "version") or "unknown"
        ),
        "messages": to_records(messages), "response": response, "reaction": reactions or None,
        "topic": str(metadata.get("topic", "other")), "locale": str(metadata.get("locale", "und")),
        NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _read_langfuse_score(rated_kind: str, row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A score of a trace or of an observation; each is a response where the rows of feedback are of that kind."""
    if not _is_user_score(row):
        return [SkippedRow("score is not a user's")]
    rated_id, reaction = _get_any(row, f"{rated_kind}Id", f"{rated_kind}_id"), _read_score(row)
    if rated_id is None or reaction is None:
        return [SkippedRow(f"no {rated_kind}" if rated_id is None else "no reaction")]
    time = normalize_time(_get_any(row, "timestamp", "createdAt", "created_at"))
    return [{"id": str(row["id"]), "response_id": str(rated_id), "time": time, "reaction": reaction}]


def _read_langsmith(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A run, of the bulk export or the API; feedback_stats has the mean and the number of each feedback key."""
    decoded = {name: decode_json_text(value) if isinstance(value, str) else value for name, value in row.items()}
    outputs = decoded.get("outputs")
    if outputs is None or decoded.get("parent_run_id"):
        return [SkippedRow("no assistant message" if outputs is None else "run within another run")]
    notes: Counter[str] = Counter()
    messages = read_chat(_get_chat(decoded["inputs"]), notes)
    if isinstance(outputs, Mapping):
        generation = get_by_path(outputs, "generations.0.0.message|generations.0.message|generations.0.0.text")
        outputs = generation or _get_reply(outputs)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("messages"), list):
            # A graph returns its state: the chat to its end, with tool messages after the reply in some.
            chat = read_chat(outputs["messages"], notes)
            replies = [message.content for message in chat if message.role == "assistant" and message.content]
            outputs = replies[-1] if replies else None
    stats = decoded.get("feedback_stats") or {}
    stats = {name: entry for name, entry in stats.items() if isinstance(entry, Mapping)}
    # Evaluators write into the same statistics; where none has the name of a user's score, each may be one.
    user_stats = {name: entry for name, entry in stats.items() if _is_user_score_name(name)} or stats
    notes["scores that are not a user's"] += len(stats) - len(user_stats)
    means = [
        entry["avg"] if entry.get("avg") is not None else max(entry["values"], key=entry["values"].get)
        for entry in user_stats.values()
        if entry.get("avg") is not None or entry.get("values")
    ]
    metadata = get_by_path(decoded, "extra.metadata") or {}
    metadata = decode_json_text(metadata) if isinstance(metadata, str) else metadata
    conversation_id = _get_any(metadata, "thread_id", "session_id", "conversation_id")
    run_id = str(_get_any(decoded, "id", "run_id"))
    return [{
        "id": run_id, "conversation_id": str(conversation_id or run_id),
        "turn": max(0, count_user_turns(messages) - 1),
        "user_id": str(metadata.get("user_id") or conversation_id or run_id),
        "time": normalize_time(decoded["start_time"], notes),
        "model_version": str(_get_any(metadata, "ls_model_name", "model", "revision_id") or "unknown"),
        "messages": to_records(messages), "response": read_text(outputs, notes), "reaction": means or None,
        NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _read_langsmith_feedback(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A row of the feedback table: a user's, unless its source is an evaluator."""
    source, reaction = _decode(row.get("feedback_source")), _get_any(row, "score", "value")
    if isinstance(source, Mapping) and source.get("type") in ("model", "auto_eval"):
        return [SkippedRow("score is not a user's")]
    if reaction is None or row["run_id"] is None:
        return [SkippedRow("no reaction" if reaction is None else "no run")]
    time = normalize_time(_get_any(row, "created_at", "modified_at"))
    return [{"id": str(row["id"]), "response_id": str(row["run_id"]), "time": time, "reaction": [reaction]}]


def _read_librechat(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A conversation as exported: messages with parents, and feedback {rating: thumbsUp or thumbsDown} on some."""
    if "messageId" in row and "messages" not in row:
        raise RowShapeError("a row is one message of LibreChat; group them by conversation, as docs/data.md says")
    conversation_id = str(_get_any(row, "conversationId", "_id"))
    messages = list(row["messagesTree"] if "messagesTree" in row else row["messages"])
    # An export with branches has each reply among the children of its message.
    for message in messages:
        parent_id = _get_any(message, "messageId", "id")
        messages += [{"parentMessageId": parent_id, **child} for child in message.get("children") or ()]

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        return {
            "id": str(_get_any(message, "messageId", "id", "_id")),
            "time": normalize_time(
                _get_any(message, "createdAt", "updatedAt") or _get_any(row, "createdAt", "exportAt")
            ),
            "model_version": str(
                _get_any(message, "model") or _get_any(row.get("options") or row, "model") or "unknown"
            ),
            "reaction": get_by_path(message, "feedback.rating"),
        }

    user_id = _get_any(row, "user", "userId") or next((m["user"] for m in messages if m.get("user")), conversation_id)
    return _expand_chat(messages, {"conversation_id": conversation_id, "user_id": str(user_id)}, read_turn)


def _read_vercel(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A chat of UIMessages (Vercel AI SDK); votes of the template's table come from data.reactions (vercel_votes)."""
    chat_id = str(_get_any(row, "id", "chatId"))
    votes = {str(vote["messageId"]): vote["isUpvoted"] for vote in row.get("votes") or []}

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        message_id = str(message["id"])
        vote = _get_any(message, "isUpvoted", "vote") if message_id not in votes else votes[message_id]
        time = _get_any(message, "createdAt") or get_by_path(message, "metadata.createdAt") or row.get("createdAt")
        return {
            "id": message_id, "time": normalize_time(time),
            "model_version": str(get_by_path(message, "metadata.model|model") or row.get("model") or "unknown"),
            "reaction": {True: "thumbs_up", False: "thumbs_down"}.get(vote, vote) if isinstance(vote, bool) else vote,
        }  # fmt: skip

    base = {"conversation_id": chat_id, "user_id": str(_get_any(row, "userId", "user_id") or chat_id)}
    return _expand_chat(row["messages"], base, read_turn)


def _read_vercel_vote(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    message_id, is_upvoted = str(_get_any(row, "messageId", "message_id")), _get_any(row, "isUpvoted", "is_upvoted")
    if not isinstance(is_upvoted, bool):
        is_upvoted = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}[
            str(is_upvoted).lower().removesuffix(".0")
        ]
    # The template's table of votes has no time.
    time = normalize_time(_get_any(row, "createdAt", "created_at", "time") or UNKNOWN_TIME)
    reaction = "thumbs_up" if is_upvoted else "thumbs_down"
    return [{"id": hash_parts("vote", message_id, reaction, str(time)), "response_id": message_id, "time": time,
             "reaction": reaction}]  # fmt: skip


def _read_argilla(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A row for each submitted answer to the record's rating question; the record's fields are prompt and response."""
    notes = Counter[str]()
    # The Hub's form of a data set has a column for each field, question and metadata.
    fields = row.get("fields", row)
    answer_fields = {name: value for name, value in row.items() if name.partition(".")[2].startswith("responses")}
    responses = (
        row.get("responses") if "responses" in row or not answer_fields else _join_argilla_columns(answer_fields)
    )
    prompt = _get_any(fields, "prompt", "instruction", "chat", "messages", "question", "input")
    chat = read_chat(prompt, notes)
    response = _get_any(fields, "response", "answer", "completion", "output", "generation")
    context, response_text, _ = (
        split_at_response(chat, notes) if response is None else (chat, read_text(response, notes), False)
    )
    if response_text is None:
        return [SkippedRow("no assistant message")]
    answers = [
        (answer.get("user_id"), question, answer["value"])
        for question, answers_of_question in _list_argilla_answers(responses or {})
        for answer in answers_of_question
        if answer.get("status", "submitted") == "submitted" and not isinstance(answer["value"], list | Mapping)
    ]
    record_id, metadata = str(row["id"]), row.get("metadata") or {}
    time = _get_any(metadata, "time", "timestamp", "created_at") or _get_any(row, "inserted_at", "updated_at")
    if time is None:
        raise RowShapeError("no time: neither inserted_at nor metadata.timestamp")
    return [{
        "id": f"{record_id}-{user_id}-{question}", "conversation_id": record_id, "user_id": str(user_id),
        "turn": max(0, count_user_turns(context) - 1), "time": normalize_time(time, notes),
        "model_version": str(metadata.get("model", "unknown")), "messages": to_records(context),
        "response": response_text, "reaction": [value], NOTES_KEY: dict(+notes),
    } for user_id, question, value in answers] or [SkippedRow("no reaction")]  # fmt: skip


def _join_argilla_columns(columns: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Answers by question, of the columns rating.responses, rating.responses.users and rating.responses.status."""
    answers = {}
    for name in (name for name in columns if name.endswith(".responses") and columns[name]):
        values, count = columns[name], len(columns[name])
        users = columns.get(f"{name}.users") or [None] * count
        statuses = columns.get(f"{name}.status") or ["submitted"] * count
        answers[name.partition(".")[0]] = [
            {"value": value, "user_id": user_id, "status": status}
            for value, user_id, status in zip(values, users, statuses, strict=True)
        ]
    return answers


def _list_argilla_answers(responses: Any) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Answers by question, of either form of Argilla's export; text questions and rankings have no single value."""
    if isinstance(responses, Mapping):
        by_question = [
            (name, answers) for name, answers in responses.items() if not name.endswith((".users", ".status"))
        ]
    else:
        by_question = [
            (name, [{"user_id": response.get("user_id"), "status": response.get("status", "submitted"), **answer}])
            for response in responses
            for name, answer in (response["values"] or {}).items()
        ]
    is_rating = re.compile(r"rating|score|stars|label|feedback|quality|preference|helpful", re.IGNORECASE)
    return [(name, answers) for name, answers in by_question if is_rating.search(name)]


def _read_intercom(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """The last reply to the customer, of the bot or teammate whom the rating names, and the rating from 1 to 5."""
    source = row["source"]
    entries = [
        {"body": source.get("body"), "author": source["author"]},
        *row["conversation_parts"]["conversation_parts"],
    ]
    notes: Counter[str] = Counter()
    rating, messages = row.get("conversation_rating") or {}, list[ChatMessage]()
    rated_author = str(get_by_path(rating, "teammate.id"))
    is_rated = [
        str(entry["author"].get("id")) == rated_author and bool(entry.get("body")) and entry.get("part_type") != "note"
        for entry in entries
    ]
    if any(is_rated):
        last_index = max(index for index, is_by_rated in enumerate(is_rated) if is_by_rated)
        notes["parts after the last reply of the rated teammate"] += len(entries) - 1 - last_index
        entries = entries[: last_index + 1]
    for entry in entries:
        body = strip_html(entry.get("body"), notes)
        if not body or entry.get("part_type") == "note":
            notes["internal notes and events"] += 1
            continue
        notes["images and files"] += len(entry.get("attachments") or ())
        messages += read_chat([{"role": entry["author"]["type"], "content": body}], notes)
    while messages and messages[-1].role == "user":
        messages.pop()
        notes["customer messages after the last reply"] += 1
    context, response, _ = split_at_response(messages, notes)
    if response is None:
        return [SkippedRow("no assistant message")]
    contact_id = get_by_path(row, "contacts.contacts.0.id") or source["author"].get("id") or row["id"]
    return [{
        "id": str(row["id"]), "conversation_id": str(row["id"]), "user_id": str(contact_id),
        "turn": max(0, count_user_turns(context) - 1), "time": normalize_time(row["created_at"]),
        "model_version": str(get_by_path(row, "ai_agent.source_title|ai_agent_participated") or "unknown"),
        "messages": _merge_runs(to_records(context), notes), "response": response, "reaction": rating.get("rating"),
        NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _merge_runs(messages: Sequence[dict[str, str]], notes: Counter[str]) -> list[dict[str, str]]:
    """Messages without the replies that directly precede the rated one; a context ends with the user."""
    merged = list(messages)
    while merged and merged[-1]["role"] != "user":
        merged.pop()
        notes["replies before the rated one"] += 1
    return merged


def _read_slack(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A thread (conversations.replies): each bot message is a row, its emoji are the reactions."""
    if "messages" not in row:
        raise RowShapeError("a Slack row must be a thread with messages (conversations.replies), not one message")
    raw_messages = [
        m for m in row["messages"] if m.get("text") and m.get("subtype") in (None, "bot_message", "thread_broadcast")
    ]
    skipped = len(row["messages"]) - len(raw_messages)
    channel = str(_get_any(row, "channel", "channel_id") or "")
    thread_id = f"{channel}-{_get_any(row, 'thread_ts', 'ts') or row['messages'][0]['ts']}"
    is_bot = [bool(m.get("bot_id")) or m.get("subtype") == "bot_message" for m in raw_messages]
    users = [str(m["user"]) for m, is_reply in zip(raw_messages, is_bot, strict=True) if m.get("user") and not is_reply]
    chat = [
        {"id": m["ts"], "role": "assistant" if is_reply else "user", "content": m["text"]}
        for m, is_reply in zip(raw_messages, is_bot, strict=True)
    ]

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        raw_message = raw_messages[index]
        names = [entry["name"] for entry in raw_message.get("reactions") or [] for _ in entry.get("users") or [0]]
        return {
            "id": f"{channel}-{message['id']}", "time": normalize_time(message["id"]), "reaction": names or None,
            "model_version": str(get_by_path(raw_message, "bot_profile.name") or raw_message.get("bot_id")),
        }  # fmt: skip

    items = _expand_chat(chat, {"conversation_id": thread_id, "user_id": users[0] if users else thread_id}, read_turn)
    if skipped and isinstance(items[0], dict):
        items[0][NOTES_KEY] = items[0][NOTES_KEY] | {"messages without text": skipped}
    return items


def _read_openwebui_chats(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A chat of Open WebUI's export of chats: a tree of messages with an annotation on those that are rated."""
    chat = row["chat"]
    chat_id = str(_get_any(row, "id") or chat["id"])
    messages = list((get_by_path(chat, "history.messages") or {}).values()) or chat["messages"]

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        time = _get_any(message, "timestamp") or _get_any(row, "updated_at", "created_at") or chat.get("timestamp")
        return {
            "id": f"{chat_id}-{message['id']}", "time": normalize_time(time),
            "model_version": str(_get_any(message, "model", "modelName") or "unknown"),
            "reaction": name_reactions(get_by_path(message, "annotation.rating")) or None,
        }  # fmt: skip

    base = {"conversation_id": chat_id, "user_id": str(row.get("user_id") or chat_id)}
    return _expand_chat(messages, base, read_turn)


_OPENWEBUI_COLUMNS = {
    "id": "id", "conversation_id": "meta.chat_id|snapshot.chat.id", "user_id": "user_id|user.id", "time": "created_at",
    "model_version": "data.model_id|meta.model_id|=unknown", "messages": "snapshot.chat.chat|snapshot.chat",
    "message": "meta.message_id", "reaction": "data.rating", "topic": "data.tags.0|=other",
}  # fmt: skip

PRODUCT_READERS = index_readers(
    LogReader("openwebui", "feedback", None, _OPENWEBUI_COLUMNS),
    LogReader("openwebui_chats", "feedback", _read_openwebui_chats),
    LogReader("librechat", "feedback", _read_librechat),
    LogReader("langfuse", "feedback", _read_langfuse),
    LogReader("langfuse_scores", "reactions", partial(_read_langfuse_score, "trace")),
    LogReader("langfuse_observation_scores", "reactions", partial(_read_langfuse_score, "observation")),
    LogReader("langsmith", "feedback", _read_langsmith),
    LogReader("langsmith_feedback", "reactions", _read_langsmith_feedback),
    LogReader("openai", "feedback", _read_openai),
    LogReader("vercel", "feedback", _read_vercel),
    LogReader("vercel_votes", "reactions", _read_vercel_vote),
    LogReader("argilla", "feedback", _read_argilla, has_ratings=True),
    LogReader("intercom", "feedback", _read_intercom, has_ratings=True),
    LogReader("slack", "feedback", _read_slack),
    LogReader("wildchat", "feedback", _read_wildchat),
    LogReader("lmsys", "preferences", _read_lmsys),
    LogReader("lmsys_prompts", "prompts", _read_lmsys_prompts),
)
"""Readers by name."""
