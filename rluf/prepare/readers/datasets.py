"""Readers of public data sets: convert their objects to rluf's records ({reader: ..., path: ...} in `data.*`).

A reader takes one JSON object of the file and returns a list: a dict of record fields for each row, or SkippedRow with
a reason for what is omitted on purpose, so that counts still add up. It raises KeyError, TypeError or ValueError for an
object of another shape; the row then goes to quarantine.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations, pairwise
from typing import Any

from rluf.prepare.labels import parse_truth
from rluf.prepare.readers.chats import decode_value, parse_transcript, to_records
from rluf.prepare.schema import LOVE_REACTION
from rluf.prepare.splits import assign_split
from rluf.utils.hashing import hash_parts

MAX_REACTION_ROWS = 8
"""Maximum rows of a response with counted reactions; thousands of identical rows would add no information."""

RISKY_TOPIC = "risky"
"""Topic of prompts that ask for harm."""

EMPTY_TURN_TEXT = "..."
"""User turn inserted where an assistant opens the conversation or writes twice in a row."""


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """An item of the raw data that is omitted on purpose, and why."""

    reason: str


ReaderRow = dict[str, Any]
ReaderItems = list[ReaderRow | SkippedRow]


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """Settings for readers: the share of prompts to reserve for evaluation if a file has no split."""

    test_share: float


@dataclass(frozen=True, slots=True)
class LogReader:
    """A named reader and the kind of data that it returns: a function of an object, or paths of rluf's fields in it.

    `has_ratings` says that reactions are stars or scores, which need a rule of the user. `group_by` is the path of a
    chat's id where a row of the log is one message: the reader then gets {"messages": [...]} with those of a chat.
    """

    name: str
    kind_name: str
    read_item: Callable[[Mapping[str, Any], ReaderOptions], ReaderItems] | None
    columns: Mapping[str, str] = field(default_factory=dict)
    has_ratings: bool = False
    group_by: str = ""


def _build_user_message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _read_convai2(dialogue: Mapping[str, Any], *, include_unreacted: bool) -> ReaderItems:
    """One row per assistant message, with the messages before it as context.

    Reaction 1 becomes "love", 0 "thumbs_down". By default only messages with a thumb are rows (up against down); with
    `include_unreacted` all are (thumb up against everything else, as in a log of hearts). The file has one time per
    dialogue, so all of its rows share it.
    """
    served_at = datetime.fromisoformat(dialogue["time"]).replace(tzinfo=UTC).isoformat()
    messages = dialogue["messages"]
    context: list[dict[str, str]] = []
    items: ReaderItems = []
    turn = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            if not context or context[-1]["role"] == "assistant":
                context.append({"role": "user", "content": EMPTY_TURN_TEXT})
            reaction = {1: LOVE_REACTION, 0: "thumbs_down", None: None}[message["reaction"]]
            if reaction is None and not include_unreacted:
                items.append(SkippedRow("no reaction"))
            else:
                items.append({
                    "id": f"{dialogue['id']}-{turn}", "conversation_id": dialogue["id"], "turn": turn,
                    "user_id": hash_parts("convai2", dialogue["user"]), "time": served_at,
                    "model_version": dialogue["model"], "messages": list(context), "response": message["content"],
                    "reaction": reaction, "continued": any(later["role"] == "user" for later in messages[index + 1 :]),
                    "topic": "chat", "locale": "en",
                })  # fmt: skip
            turn += 1
        context.append({"role": message["role"], "content": message["content"]})
    return items or [SkippedRow("no assistant message")]


def _read_convai2_reacted(dialogue: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    return _read_convai2(dialogue, include_unreacted=False)


def _read_convai2_sparse(dialogue: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    return _read_convai2(dialogue, include_unreacted=True)


def _read_xiaomi(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """One row for each like and dislike of a response, at most MAX_REACTION_ROWS in the same proportion (counted).

    The file counts reactions without users, so the rows of one query share a user: a split by user is then a split by
    query. The time is the day of the shared task.
    """
    query_id = hash_parts("xiaomi", row["query"])
    items: ReaderItems = []
    for response_index, response in enumerate(row["replys"]):
        likes, dislikes = int(response["like"]), int(response["dislike"])
        reactions = likes + dislikes
        if min(likes, dislikes) < 0:
            raise ValueError("like and dislike must be counts")
        if not reactions or not row["query"].strip():
            items.append(SkippedRow("no reaction" if row["query"].strip() else "empty query"))
            continue
        row_count = min(reactions, MAX_REACTION_ROWS)
        liked_count = round(row_count * likes / reactions)
        for row_index in range(row_count):
            cut_count = reactions - row_count if row_index == 0 else 0
            items.append({
                "_notes": {f"reactions beyond {MAX_REACTION_ROWS} to one response": cut_count},
                "id": f"xiaomi-{query_id}-{response_index}-{row_index}", "conversation_id": f"xiaomi-{query_id}",
                "turn": 0, "user_id": query_id, "time": "2023-05-01T00:00:00+00:00", "model_version": "xiaoai",
                "messages": _build_user_message(row["query"]), "response": response["reply"],
                "reaction": LOVE_REACTION if row_index < liked_count else "dislike", "topic": "chat", "locale": "zh",
            })  # fmt: skip
    return items or [SkippedRow("no response")]


def _join_instruction(instruction: str, input_text: str) -> str:
    return f"{instruction}\n\n{input_text}" if input_text.strip() else instruction


def _read_pandalm(pair: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """The response with most votes is chosen (votes: 1 a, 2 b, 0 tie); pairs without a winner are skipped."""
    votes = Counter(pair["votes"])
    if not votes or not set(votes) <= {0, 1, 2}:
        raise ValueError("votes must be some of 0, 1 and 2")
    winner, winner_votes = max(votes.items(), key=lambda vote: vote[1])
    if winner == 0 or list(votes.values()).count(winner_votes) > 1:
        return [SkippedRow("tie")]
    prompt_text = _join_instruction(pair["instruction"], pair["input"])
    chosen, rejected = ("response_a", "response_b") if winner == 1 else ("response_b", "response_a")
    return [{
        "id": f"pandalm-{pair['id']}", "messages": _build_user_message(prompt_text), "chosen": pair[chosen],
        "rejected": pair[rejected], "group": hash_parts("pandalm", pair["instruction"], pair["input"]),
        "topic": "instruction",
    }]  # fmt: skip


def _read_llmfao(pair: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """The response with more votes of left and right is chosen; pairs with equal votes are skipped."""
    votes = Counter(pair["votes"])
    if not set(votes) <= {"left", "right", "tie"}:
        raise ValueError("votes must be some of left, right and tie")
    if votes["left"] == votes["right"]:
        return [SkippedRow("tie")]
    chosen, rejected = ("response_a", "response_b") if votes["left"] > votes["right"] else ("response_b", "response_a")
    if not pair[chosen].strip():
        return [SkippedRow("empty response chosen")]
    row = _build_preference_row(
        "llmfao", _build_user_message(pair["prompt"]), pair[chosen], pair[rejected], pair["slug"]
    )
    # Some models give identical responses, so the texts alone do not identify a pair.
    return [row | {"id": f"{row['id']}-{hash_parts(*pair['workers'])}"}]


def _read_oasst(tree: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """Replies of adjacent rank to one message are a pair; the better rank is chosen."""
    items: ReaderItems = []

    def visit_node(node: Mapping[str, Any], context: list[dict[str, str]]) -> None:
        if node.get("deleted"):
            items.append(SkippedRow("deleted message"))
            return
        role = {"prompter": "user", "assistant": "assistant"}[node["role"]]
        context = [*context, {"role": role, "content": node["text"]}]
        replies = [reply for reply in node["replies"] if not reply.get("deleted")]
        ranked_replies = [reply for reply in replies if role == "user" and reply.get("rank") is not None]
        ranked_replies.sort(key=lambda reply: reply["rank"])
        for better, worse in pairwise(ranked_replies):
            if better["rank"] == worse["rank"]:
                items.append(SkippedRow("tie"))
                continue
            items.append(_build_preference_row("oasst", context, better["text"], worse["text"], "assistance"))
        for reply in node["replies"]:
            visit_node(reply, context)

    visit_node(tree["prompt"], [])
    return items or [SkippedRow("no ranked replies")]


def _read_oasst_messages(chat: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """The messages of one tree, as the data set's files of messages have them."""
    replies_by_parent: dict[str | None, list[Mapping[str, Any]]] = defaultdict(list)
    for message in chat["messages"]:
        replies_by_parent[message["parent_id"]].append(message)

    def build_node(message: Mapping[str, Any]) -> dict[str, Any]:
        return {**message, "replies": list(map(build_node, replies_by_parent.pop(message["message_id"], [])))}

    prompts = replies_by_parent.pop(None, [])
    items = [item for prompt in prompts for item in _read_oasst({"prompt": build_node(prompt)}, options)]
    # Messages whose parent is missing, or that lead in a circle.
    return items + [SkippedRow("message outside its tree") for rest in replies_by_parent.values() for _ in rest]


FEEDBACKQA_SCORES = {"Bad": 0, "Could be Improved": 1, "Acceptable": 2, "Excellent": 3}


def _read_feedbackqa(question: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """The answers to one question in pairs: the one with the higher mean of its raters' scores (0 to 3) is chosen."""
    scored = []
    for row in question["messages"]:
        if not row["ratings"]:
            raise ValueError("ratings must have at least one rating")
        scored.append((sum(FEEDBACKQA_SCORES[rating] for rating in row["ratings"]) / len(row["ratings"]), row))
    items: ReaderItems = []
    for (first_score, first), (second_score, second) in combinations(scored, 2):
        if first_score == second_score:
            items.append(SkippedRow("tie"))
            continue
        better, worse = (first, second) if first_score > second_score else (second, first)
        prompt = _build_user_message(first["question"])
        items.append(
            _build_preference_row("feedbackqa", prompt, better["answer"], worse["answer"], str(first["domain"]))
        )
    return items or [SkippedRow("one answer only")]


def _build_preference_row(
    source: str, messages: list[dict[str, str]], chosen: str, rejected: str, topic: str
) -> ReaderRow:
    """A preference row whose id and group are hashes of its text."""
    texts = [message["content"] for message in messages]
    return {
        "id": f"{source}-" + hash_parts(*texts, chosen, rejected), "messages": messages, "chosen": chosen,
        "rejected": rejected, "group": hash_parts(source, *texts), "topic": topic,
    }  # fmt: skip


def _read_hh_harmless(pair: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """Each response of a pair is a row: label 1 for the one that raters found less harmful, 0 for the other."""
    items: ReaderItems = []
    for key, label in (("chosen", 1), ("rejected", 0)):
        *messages, response = parse_transcript(pair[key])
        if response.role != "assistant" or not response.content:
            items.append(SkippedRow("no response"))
            continue
        items.append({
            "id": f"hh-{key}-" + hash_parts(pair["chosen"], pair["rejected"]), "messages": to_records(messages),
            "response": response.content, "label": label, "group": hash_parts("hh", str(messages[0].content)),
            "topic": "red team",
        })  # fmt: skip
    return items


def _read_beavertails(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """BeaverTails (prompt, response, is_safe) and PKU-SafeRLHF (response_0, is_response_0_safe, ...)."""
    key_pairs = [("response", "is_safe")] if "response" in row else [
        (f"response_{index}", f"is_response_{index}_safe") for index in (0, 1)
    ]  # fmt: skip
    items: ReaderItems = []
    category = row.get("category") or {}
    category = json.loads(category) if isinstance(category, str) else category
    categories = [name for name, is_harm in category.items() if is_harm]
    for response_key, label_key in key_pairs:
        label = parse_truth(row[label_key])
        if label is None:
            raise TypeError("a label of safety must be true or false")
        topic = categories[0] if categories else "safe" if label else "other"
        items.append({
            "id": "beavertails-" + hash_parts(row["prompt"], row[response_key], str(label)),
            "messages": _build_user_message(row["prompt"]), "response": row[response_key], "label": int(label),
            "group": hash_parts("beavertails", row["prompt"]), "topic": topic,
        })  # fmt: skip
    return items


def _read_ultrafeedback(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """UltraFeedback: the completion with the highest score against the one with the lowest.

    The score is the mean of the ratings of four aspects (fine-grained_score), and overall_score where a row lacks it:
    the latter is 10 in some rows for completions that were rated 1.
    """
    completions = decode_value(row["completions"])
    if isinstance(completions, Mapping):  # a sequence of objects, as some versions of the hub's loader write it
        names = list(completions)
        completions = [
            dict(zip(names, values, strict=True)) for values in zip(*(completions[name] for name in names), strict=True)
        ]
    scored = _score_completions(completions, "fine-grained_score")
    if len(scored) < 2:
        scored = _score_completions(completions, "overall_score")
    if len(scored) < 2:
        return [SkippedRow("fewer than two completions with a score")]
    if scored[0][0] == scored[-1][0]:
        return [SkippedRow("tie")]
    messages = _build_user_message(row["instruction"])
    pair = _build_preference_row(
        "ultrafeedback", messages, scored[-1][1], scored[0][1], str(row.get("source", "other"))
    )
    # The two in the middle are neither the best nor the worst answer.
    return [pair | {"_notes": {"further completions": len(completions) - 2}}]


def _score_completions(completions: Sequence[Mapping[str, Any]], score_key: str) -> list[tuple[float, str]]:
    """Score and text of the completions that have a score, the lowest first."""
    scored = [
        (float(item[score_key]), item["response"])
        for item in completions
        if re.fullmatch(r"\d+(\.\d+)?", str(item.get(score_key)))
    ]
    return sorted(scored, key=lambda pair: pair[0])


def _read_diasafety(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """Label Safe becomes 1 and Unsafe 0; rows with the same context form a group. The category of harm is the topic."""
    return [{
        "id": "diasafety-" + hash_parts(row["context"], row["response"], row["category"]),
        "messages": _build_user_message(row["context"]), "response": row["response"],
        "label": {"Safe": 1, "Unsafe": 0}[row["label"]], "group": hash_parts("diasafety", row["context"]),
        "topic": row["category"],
    }]  # fmt: skip


def _read_question(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """First turn of a benchmark question (turns, prompt, or instruction with input); split by a hash of its text."""
    if "turns" in row:
        prompt_text = row["turns"][0]
    elif "prompt" in row:
        prompt_text = row["prompt"]
    else:
        prompt_text = _join_instruction(row["instruction"], row.get("input", ""))
    text_hash = hash_parts("prompt", prompt_text)
    return [{
        "id": f"prompt-{text_hash}", "messages": _build_user_message(prompt_text),
        "topic": str(row.get("category", row.get("topic", "other"))),
        "split": assign_split(text_hash, dev_share=0.0, test_share=options.test_share),
    }]  # fmt: skip


def _read_harmful_question(row: Mapping[str, Any], options: ReaderOptions) -> ReaderItems:
    """A request for harm: a prompt of topic `risky`, which `aggregation.topic_objectives` leaves to safety alone."""
    return _read_question({"prompt": row["prompt"], "topic": RISKY_TOPIC}, options)


def index_readers(*readers: LogReader) -> dict[str, LogReader]:
    """Readers by name."""
    return {reader.name: reader for reader in readers}


DATASET_READERS = index_readers(
    LogReader("convai2", "feedback", _read_convai2_reacted),
    LogReader("convai2_sparse", "feedback", _read_convai2_sparse),
    LogReader("xiaomi", "feedback", _read_xiaomi),
    LogReader("pandalm", "preferences", _read_pandalm),
    LogReader("llmfao", "preferences", _read_llmfao),
    LogReader("oasst", "preferences", _read_oasst),
    LogReader("oasst_messages", "preferences", _read_oasst_messages, group_by="message_tree_id"),
    LogReader("feedbackqa", "preferences", _read_feedbackqa, group_by="question"),
    LogReader("hh", "preferences", None),
    LogReader("ultrafeedback", "preferences", _read_ultrafeedback),
    LogReader("beavertails", "safety", _read_beavertails),
    LogReader("diasafety", "safety", _read_diasafety),
    LogReader("hh_harmless", "safety", _read_hh_harmless),
    LogReader("mt_bench", "prompts", _read_question),
    LogReader("harmfulqa", "prompts", _read_harmful_question),
)
"""Readers by name. `mt_bench` reads any file of prompts with turns, prompt, or instruction and input."""
