"""Readers of the exports of products, by their public schemas ({reader: NAME, path: ...} in `data.*`).

A reader is a table of paths where a row of the export is one response, and a function where it is a whole chat with
reactions to some of its messages. Reactions keep the names that the product has; `prepare.labels` says what they mean.
docs/data.md lists the readers and what each leaves out (tests/prepare/test_products_table.py).
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rluf.prepare.labels import BAD_NAME_PATTERN, parse_truth
from rluf.prepare.readers.chats import (
    ChatMessage,
    RowShapeError,
    collect_thread,
    count_user_turns,
    decode_json_text,
    decode_value,
    drop_replies_at_end,
    get_any,
    index_parents,
    read_chat,
    read_text,
    split_at_response,
    strip_html,
    to_records,
)
from rluf.prepare.readers.columns import (
    NOTES_KEY,
    UNKNOWN_TIME,
    get_by_path,
    name_reactions,
)
from rluf.prepare.readers.datasets import LogReader, ReaderItems, ReaderOptions, ReaderRow, SkippedRow, index_readers
from rluf.prepare.readers.times import normalize_time
from rluf.prepare.schema import MAX_MESSAGES
from rluf.prepare.splits import assign_split
from rluf.utils.hashing import hash_parts

_LOCALE_BY_LANGUAGE = {
    "english": "en", "chinese": "zh", "spanish": "es", "french": "fr", "german": "de", "russian": "ru",
    "portuguese": "pt", "italian": "it", "japanese": "ja", "korean": "ko",
}  # fmt: skip


def _expand_chat(
    raw_messages: Any,
    base: Mapping[str, Any],
    read_turn: Callable[[Mapping[str, Any], int], Mapping[str, Any]],
) -> ReaderItems:
    """A row for each assistant message of a chat, with the thread before it as context.

    `read_turn` returns the fields that the raw message and its position determine. A message that stands for an error
    is no reply, and one that was cut off only if somebody rated it.
    """
    decoded = decode_json_text(raw_messages) if isinstance(raw_messages, str) else raw_messages
    notes: Counter[str] = Counter()
    items: list[ReaderRow | SkippedRow] = []
    messages = [
        replace(message, content=None) if message.role == "assistant" and _is_error(raw) else message
        for message, raw in zip(read_chat(decoded, notes), decoded, strict=True)
    ]
    parents, records = index_parents(messages, notes), {message: to_records([message]) for message in messages}
    last_user_index = max((index for index, message in enumerate(messages) if message.role == "user"), default=0)
    answered = {parent for message, parent in (parents or {}).items() if message.role == "user"}
    for index, (message, raw_message) in enumerate(zip(messages, decoded, strict=True)):
        if message.role != "assistant":
            continue
        # A row repeats all messages before it: an endless chat would take memory by the square of its length.
        if index > MAX_MESSAGES:
            items.append(SkippedRow(f"behind the first {MAX_MESSAGES} messages of its chat"))
            continue
        thread = collect_thread(messages, message, parents)[:-1]
        fields = dict(read_turn(raw_message, index))
        fields["time"] = normalize_time(fields["time"], notes)
        context = drop_replies_at_end(thread, notes)
        flaw = _find_flaw(message, raw_message, context, is_rated=bool(name_reactions(fields.get("reaction"))))
        if flaw is not None:
            items += [SkippedRow(flaw)] if flaw else []
            continue
        items.append({
            "turn": max(0, count_user_turns(context) - 1), "response": message.content,
            "messages": [record for earlier in context for record in records[earlier]],
            "continued": index < last_user_index if parents is None else message in answered,
            NOTES_KEY: dict(+notes), **base, **fields,
        })  # fmt: skip
        notes.clear()  # what was left out counts once per chat
    return items or [SkippedRow("no assistant message")]


def _is_error(raw_message: object) -> bool:
    return isinstance(raw_message, Mapping) and bool(raw_message.get("error"))


def _find_flaw(
    message: ChatMessage, raw_message: object, context: Sequence[ChatMessage], *, is_rated: bool
) -> str | None:
    """Reason for which an assistant's message is no row; empty if it is no reply at all (a tool call), None if it is
    one."""
    if _is_error(raw_message):
        return "error in place of a reply"
    if message.content is None:
        return ""
    if not message.content.strip():
        return "reply without text"
    if not any(earlier.role == "user" for earlier in context):
        return "reply without a message of the user before it"
    if not context[-1].content:
        return "reply to a message without text"
    is_cut = isinstance(raw_message, Mapping) and (
        raw_message.get("unfinished") is True or raw_message.get("done") is False
    )
    return "unfinished reply" if is_cut and not is_rated else None


def _read_wildchat(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    conversation_id = str(row.get("conversation_hash") or row["conversation_id"])
    base = {
        "conversation_id": conversation_id, "model_version": row["model"], "locale": _find_locale(row.get("language")),
    }  # fmt: skip

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        user_key = str(row.get("hashed_ip") or message.get("hashed_ip") or conversation_id)
        return {
            "id": f"{conversation_id}-{index}", "user_id": hash_parts("wildchat", user_key),
            "time": message.get("timestamp") or row["timestamp"], "reaction": message.get("reaction"),
        }  # fmt: skip

    items = _expand_chat(row["conversation"], base, read_turn)
    # WildChat's turns count from 1, as in the rows that earlier releases wrote.
    return [item if isinstance(item, SkippedRow) else item | {"turn": item["turn"] + 1} for item in items]


def _find_locale(language: object) -> str:
    return _LOCALE_BY_LANGUAGE.get(str(language).lower(), "und")


def _read_lmsys(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    notes: Counter[str] = Counter()
    if "winner" in row:
        winner = re.sub(r"\W+", "_", str(row["winner"]).strip().lower())
    else:
        # Arena 55k: a column for each outcome.
        winners = [name for name in ("model_a", "model_b", "tie") if parse_truth(row[f"winner_{name}"])]
        winner = winners[0] if len(winners) == 1 else "none"
    if winner.startswith(("tie", "both")):
        return [SkippedRow("tie")]
    winner = {"a": "model_a", "b": "model_b"}.get(winner, winner)
    if winner not in ("model_a", "model_b"):
        raise RowShapeError("winner must be model_a, model_b, tie or both_bad")
    if "conversation_a" in row:
        raw_chats = [row["conversation_a"], row["conversation_b"]]
    else:
        raw_chats = [_join_turns(row["prompt"], row[f"response_{name}"]) for name in "ab"]
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
        "id": f"lmsys-{get_any(row, 'question_id', 'id')}",
        "group": hash_parts("lmsys", *(message["content"] for message in context)),
        "topic": "arena", "messages": context, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"],
        NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _join_turns(prompts: Any, responses: Any) -> list[dict[str, Any]]:
    """A chat of the user's texts and the replies: lists (as JSON in Arena 55k), or one text each."""
    decoded = _decode_turns(prompts)
    texts, replies = ([prompts], [responses]) if decoded is None else (decoded, _decode_turns(responses))
    if replies is None or len(texts) != len(replies):
        raise RowShapeError("as many replies as prompts are needed")
    pairs = zip(texts, replies, strict=True)
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _decode_turns(value: Any) -> list[Any] | None:
    """The texts of a list, or of JSON of one; None for a plain text."""
    try:
        value = decode_value(value)
    except RowShapeError:
        return None
    is_list = isinstance(value, list) and all(isinstance(text, str | None) for text in value)
    return value if is_list else None


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


def _read_librechat(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A conversation as exported: messages with parents, and feedback {rating: thumbsUp or thumbsDown} on some."""
    if "messageId" in row and "messages" not in row:
        raise RowShapeError("a row is one message of LibreChat; write reader: librechat_messages")
    conversation_id = get_any(row, "conversationId", "_id")
    if isinstance(conversation_id, Mapping):  # grouped by several fields
        conversation_id = get_any(conversation_id, "conversationId", "$oid") or json.dumps(conversation_id)
    messages = list(row["messagesTree"] if "messagesTree" in row else row["messages"])
    # An export with branches has each reply among the children of its message.
    for message in messages:
        parent_id = get_any(message, "messageId", "id")
        messages += [{"parentMessageId": parent_id, **child} for child in message.get("children") or ()]

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        return {
            "id": str(get_any(message, "messageId", "id", "_id")),
            "time": get_any(message, "createdAt", "updatedAt") or get_any(row, "createdAt", "exportAt"),
            "model_version": str(get_any(message, "model") or get_any(row.get("options") or row, "model") or "unknown"),
            "reaction": name_reactions(get_by_path(message, "feedback.rating|feedback")) or None,
        }

    user_id = get_any(row, "user", "userId") or next((m["user"] for m in messages if m.get("user")), conversation_id)
    return _expand_chat(messages, {"conversation_id": str(conversation_id), "user_id": str(user_id)}, read_turn)


_THUMBS = {True: "thumbs_up", False: "thumbs_down"}


def _read_vercel(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A chat of UIMessages (Vercel AI SDK); votes of the template's table come from data.reactions (vercel_votes)."""
    chat_id = str(get_any(row, "id", "chatId"))
    votes = {str(vote["messageId"]): vote["isUpvoted"] for vote in row.get("votes") or []}

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        message_id = str(message["id"])
        own_vote = get_by_path(message, "isUpvoted|vote|votes.-1.isUpvoted")
        vote = votes.get(message_id, own_vote)
        time = get_any(message, "createdAt") or get_by_path(message, "metadata.createdAt") or row.get("createdAt")
        return {
            "id": message_id, "time": time,
            "model_version": str(get_by_path(message, "metadata.model|model") or row.get("model") or "unknown"),
            "reaction": vote if (is_upvoted := parse_truth(vote)) is None else _THUMBS[is_upvoted],
        }  # fmt: skip

    base = {"conversation_id": chat_id, "user_id": str(get_any(row, "userId", "user_id") or chat_id)}
    return _expand_chat(row["messages"], base, read_turn)


def _read_vercel_vote(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    message_id, is_upvoted = str(get_any(row, "messageId", "message_id")), get_any(row, "isUpvoted", "is_upvoted")
    if (truth := parse_truth(is_upvoted)) is None:
        raise RowShapeError("isUpvoted is no truth value")
    # The template's table of votes has no time.
    notes = Counter[str]()
    time = normalize_time(get_any(row, "createdAt", "created_at", "time") or UNKNOWN_TIME, notes)
    reaction = _THUMBS[truth]
    return [{"id": hash_parts("vote", message_id, reaction, str(time)), "response_id": message_id, "time": time,
             "reaction": reaction, NOTES_KEY: dict(notes)}]  # fmt: skip


def _read_argilla(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A row for each submitted answer to the record's rating question; the record's fields are prompt and response."""
    notes = Counter[str]()
    # The Hub's form of a data set has a column for each field, question and metadata.
    fields = row.get("fields", row)
    answer_fields = {name: value for name, value in row.items() if name.partition(".")[2].startswith("responses")}
    responses = (
        row.get("responses") if "responses" in row or not answer_fields else _join_argilla_columns(answer_fields)
    )
    prompt = get_any(fields, "prompt", "instruction", "chat", "messages", "question", "input")
    chat = read_chat(prompt, notes)
    response = get_any(fields, "response", "answer", "completion", "output", "generation")
    context, response_text, _ = (
        split_at_response(chat, notes) if response is None else (chat, read_text(response, notes), False)
    )
    if response_text is None:
        return [SkippedRow("no assistant message")]
    answers = [
        (answer.get("user_id"), question, answer["value"])
        for question, answers_of_question in _list_argilla_answers(responses or {}, notes)
        for answer in answers_of_question
        if answer.get("status", "submitted") == "submitted" and not isinstance(answer["value"], list | Mapping)
    ]
    record_id, metadata = str(row["id"]), row.get("metadata") or {}
    time = get_any(metadata, "time", "timestamp", "created_at") or get_any(row, "inserted_at", "updated_at")
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


def _list_argilla_answers(responses: Any, notes: Counter[str]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
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
    ratings = [item for item in by_question if is_rating.search(item[0]) and not BAD_NAME_PATTERN.search(item[0])]
    notes["answers to questions that are no rating"] += sum(len(answers) for _, answers in by_question)
    notes["answers to questions that are no rating"] -= sum(len(answers) for _, answers in ratings)
    return ratings


def _read_intercom(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """The last reply to the customer, of the bot or teammate whom the rating names, and the rating from 1 to 5."""
    source = row["source"]
    entries = [
        {"body": source.get("body"), "author": source["author"]},
        *row["conversation_parts"]["conversation_parts"],
    ]
    notes: Counter[str] = Counter()
    rating, messages = row.get("conversation_rating") or {}, list[ChatMessage]()
    rated_author, author_key = str(get_by_path(rating, "teammate.id")), "id"
    if rating.get("rating") is None and isinstance(row.get("ai_agent"), Mapping):
        # The rating of Intercom's own bot, where customers did not rate a teammate.
        rating, rated_author, author_key = row["ai_agent"], "bot", "type"
    is_rated = [
        str(entry["author"].get(author_key)) == rated_author
        and bool(entry.get("body"))
        and entry.get("part_type") != "note"
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
        "turn": max(0, count_user_turns(context) - 1), "time": normalize_time(row["created_at"], notes),
        "model_version": str(get_by_path(row, "ai_agent.source_title|ai_agent_participated") or "unknown"),
        "messages": to_records(drop_replies_at_end(context, notes)), "response": response,
        "reaction": rating.get("rating"),
        NOTES_KEY: dict(+notes),
    }]  # fmt: skip


def _read_slack(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A thread (conversations.replies): each bot message is a row, its emoji are the reactions."""
    if "messages" not in row:
        raise RowShapeError("a row is one message of Slack, not a thread; write reader: slack_messages")
    notes: Counter[str] = Counter()
    texts = [_read_slack_text(m) for m in row["messages"]]
    raw_messages = [
        {**m, "text": text}
        for m, text in zip(row["messages"], texts, strict=True)
        if text and m.get("subtype") in (None, "bot_message", "thread_broadcast", "file_share", "me_message")
    ]
    notes["messages without text"] += len(row["messages"]) - len(raw_messages)
    notes["images and files"] += sum(len(m.get("files") or ()) for m in raw_messages)
    channel = str(get_any(row, "channel", "channel_id") or "")
    thread_id = f"{channel}-{get_any(row, 'thread_ts', 'ts') or row['messages'][0]['ts']}"
    is_bot = [bool(m.get("bot_id") or m.get("bot_profile")) or m.get("subtype") == "bot_message" for m in raw_messages]
    users = [str(m["user"]) for m, is_reply in zip(raw_messages, is_bot, strict=True) if m.get("user") and not is_reply]
    chat = [
        {"id": m["ts"], "role": "assistant" if is_reply else "user", "content": m["text"]}
        for m, is_reply in zip(raw_messages, is_bot, strict=True)
    ]

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        raw_message = raw_messages[index]
        # Bots put emoji to click under their own messages.
        reacting = [
            (entry["name"], user) for entry in raw_message.get("reactions") or [] for user in _list_users(entry)
        ]
        names = [name for name, user in reacting if user is None or user != raw_message.get("user")]
        notes["reactions of bots to their own messages"] += len(reacting) - len(names)
        return {
            "id": f"{channel}-{message['id']}", "time": message["id"], "reaction": names or None,
            "model_version": str(get_by_path(raw_message, "bot_profile.name") or raw_message.get("bot_id")),
        }  # fmt: skip

    items = _expand_chat(chat, {"conversation_id": thread_id, "user_id": users[0] if users else thread_id}, read_turn)
    for item in items:
        if isinstance(item, dict):
            item[NOTES_KEY] = Counter(item[NOTES_KEY]) + notes
            break
    return items


def _list_users(reaction: Mapping[str, Any]) -> list[str | None]:
    """Users of a reaction of Slack; unknown ones where it has only their number."""
    return list(reaction.get("users") or [None] * int(reaction.get("count") or 1))


_SLACK_LINK = re.compile(r"<((?:https?:|mailto:)[^<>|]+)(?:\|([^<>]*))?>")


def _read_slack_text(message: Mapping[str, Any]) -> str:
    """Text of a message without Slack's marks: links become their labels, &lt; becomes <; of blocks if it has none."""
    text = str(message.get("text") or "")
    if not text:
        blocks = message.get("blocks") or ()
        text = "\n".join(filter(None, (_read_slack_block(block) for block in blocks)))
    return html.unescape(_SLACK_LINK.sub(lambda match: match[2] or match[1], text))


def _read_slack_block(block: Mapping[str, Any]) -> str:
    inner = block.get("text")
    own_text = inner if isinstance(inner, str) else str(inner.get("text", "")) if isinstance(inner, Mapping) else ""
    return own_text + "".join(map(_read_slack_block, block.get("elements") or ()))


def _read_openwebui_chats(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A chat of Open WebUI's export of chats: a tree of messages with an annotation on those that are rated."""
    chat = row["chat"]
    chat_id = str(get_any(row, "id") or chat["id"])
    messages = list((get_by_path(chat, "history.messages") or {}).values()) or chat["messages"]

    def read_turn(message: Mapping[str, Any], index: int) -> ReaderRow:
        time = get_any(message, "timestamp") or get_any(row, "updated_at", "created_at") or chat.get("timestamp")
        return {
            "id": f"{chat_id}-{message['id']}", "time": time,
            "model_version": str(get_any(message, "model", "modelName") or "unknown"),
            "reaction": name_reactions(get_by_path(message, "annotation.rating")) or None,
        }  # fmt: skip

    base = {"conversation_id": chat_id, "user_id": str(row.get("user_id") or chat_id)}
    return _expand_chat(messages, base, read_turn)


_OPENWEBUI_COLUMNS = {
    "id": "id", "conversation_id": "meta.chat_id|snapshot.chat.id", "user_id": "user_id|user.id", "time": "created_at",
    "model_version": "data.model_id|meta.model_id|=unknown", "messages": "snapshot.chat.chat|snapshot.chat",
    "message": "meta.message_id", "reaction": "data.rating", "topic": "data.tags.0|=other",
}  # fmt: skip


def _read_grouped(
    read_chat_row: Callable[[Mapping[str, Any], ReaderOptions], ReaderItems],
    time_keys: Sequence[str],
    id_key: str,
    row: Mapping[str, Any],
    options: ReaderOptions,
) -> ReaderItems:
    """A chat whose messages were rows of their own: in the order of their times, with the chat's id."""
    messages = row["messages"]
    if get_any(messages[0], id_key) is None:
        raise RowShapeError(f"a message has no {id_key}")
    times = [str(normalize_time(get_any(message, *time_keys))) for message in messages]
    ordered = [messages[index] for index in sorted(range(len(messages)), key=times.__getitem__)]
    return read_chat_row({id_key: ordered[0][id_key], "messages": ordered}, options)


_CREATED_KEYS = ("createdAt", "created_at")

PRODUCT_READERS = index_readers(
    LogReader("openwebui", "feedback", None, _OPENWEBUI_COLUMNS),
    LogReader("openwebui_chats", "feedback", _read_openwebui_chats),
    LogReader("librechat", "feedback", _read_librechat),
    LogReader(
        "librechat_messages",
        "feedback",
        partial(_read_grouped, _read_librechat, _CREATED_KEYS, "conversationId"),
        group_by="conversationId",
    ),
    LogReader("vercel", "feedback", _read_vercel),
    LogReader(
        "vercel_messages", "feedback", partial(_read_grouped, _read_vercel, _CREATED_KEYS, "chatId"), group_by="chatId"
    ),
    LogReader("vercel_votes", "reactions", _read_vercel_vote),
    LogReader("argilla", "feedback", _read_argilla, has_ratings=True),
    LogReader("intercom", "feedback", _read_intercom, has_ratings=True),
    LogReader("slack", "feedback", _read_slack),
    LogReader(
        "slack_messages",
        "feedback",
        partial(_read_grouped, _read_slack, ("ts",), "ts"),
        group_by="thread_ts|ts",
    ),
    LogReader("wildchat", "feedback", _read_wildchat),
    LogReader("lmsys", "preferences", _read_lmsys),
    LogReader("lmsys_prompts", "prompts", _read_lmsys_prompts),
)
"""Readers by name."""
