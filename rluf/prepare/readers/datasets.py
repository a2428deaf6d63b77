"""Adapters from public or foreign logs to our records: `<reader>:<path>` in a `data.*` entry.

A reader takes one JSON object of the file and gives a list: a dict of record fields for each row, or Drop with a reason
for what is left out on purpose, so that counts still add up. It raises KeyError, TypeError or ValueError on an object
of another shape; the row then goes to quarantine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from rluf.prepare.schema import LOVE
from rluf.prepare.splits import short_hash, side

REACTIONS = 8
"""Rows that a reply with thousands of counted reactions becomes; ten thousand rows alike would teach nothing more."""
SILENCE = "..."
"""Stands for the user's turn where an assistant opens the conversation or writes twice in a row."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Something of the raw data that is left out on purpose, and why."""

    reason: str


Row = dict[str, Any]
Items = list[Row | Drop]


@dataclass(frozen=True, slots=True)
class Options:
    """What a reader may need of the settings: the share of prompts kept for evaluation where a file has no split."""

    test_share: float


@dataclass(frozen=True, slots=True)
class Reader:
    """A named adapter and the kind of data that it gives."""

    name: str
    kind: str
    read: Callable[[Mapping[str, Any], Options], Items]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _convai2(dialogue: Mapping[str, Any], *, sparse: bool) -> Items:
    """Each assistant message with what came before it is a row.

    reaction 1 becomes "love", 0 "thumbs_down". Without `sparse` only messages that got a thumb are rows (up against
    down); with it all are (a thumb up against everything else, as in a log of hearts). The file has one time for a
    dialogue, so all of its rows share it.
    """
    when = datetime.fromisoformat(dialogue["time"]).replace(tzinfo=UTC).isoformat()
    messages = dialogue["messages"]
    context: list[dict[str, str]] = []
    items: Items = []
    turn = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            if not context or context[-1]["role"] == "assistant":
                context.append({"role": "user", "content": SILENCE})
            reaction = {1: LOVE, 0: "thumbs_down", None: None}[message["reaction"]]
            if reaction is None and not sparse:
                items.append(Drop("no reaction"))
            else:
                items.append(
                    {
                        "id": f"{dialogue['id']}-{turn}",
                        "conversation_id": dialogue["id"],
                        "turn": turn,
                        "user_id": short_hash("convai2", dialogue["user"]),
                        "time": when,
                        "model_version": dialogue["model"],
                        "messages": list(context),
                        "response": message["content"],
                        "reaction": reaction,
                        "continued": any(m["role"] == "user" for m in messages[index + 1 :]),
                        "topic": "chat",
                        "locale": "en",
                    }
                )
            turn += 1
        context.append({"role": message["role"], "content": message["content"]})
    return items or [Drop("no assistant message")]


def _convai2_reacted(dialogue: Mapping[str, Any], options: Options) -> Items:
    return _convai2(dialogue, sparse=False)


def _convai2_sparse(dialogue: Mapping[str, Any], options: Options) -> Items:
    return _convai2(dialogue, sparse=True)


def _xiaomi(row: Mapping[str, Any], options: Options) -> Items:
    """Each reply becomes as many rows as it has likes and dislikes, at most REACTIONS in the same proportion.

    The file counts reactions and names no user, so the rows of one query share a user: a split by user then is one by
    query. Its time is the day of the shared task.
    """
    user = short_hash("xiaomi", row["query"])
    items: Items = []
    for place, reply in enumerate(row["replys"]):
        likes, all_of_them = int(reply["like"]), int(reply["like"]) + int(reply["dislike"])
        if min(likes, all_of_them - likes) < 0:
            raise ValueError("like and dislike must be counts")
        if not all_of_them or not row["query"].strip():
            items.append(Drop("no reaction" if row["query"].strip() else "empty query"))
            continue
        rows = min(all_of_them, REACTIONS)
        liked = round(rows * likes / all_of_them)
        for number in range(rows):
            items.append(
                {
                    "id": f"xiaomi-{user}-{place}-{number}",
                    "conversation_id": f"xiaomi-{user}",
                    "turn": 0,
                    "user_id": user,
                    "time": "2023-05-01T00:00:00+00:00",
                    "model_version": "xiaoai",
                    "messages": _user(row["query"]),
                    "response": reply["reply"],
                    "reaction": LOVE if number < liked else "dislike",
                    "topic": "chat",
                    "locale": "zh",
                }
            )
    return items or [Drop("no reply")]


def _task(instruction: str, extra: str) -> str:
    return f"{instruction}\n\n{extra}" if extra.strip() else instruction


def _pandalm(pair: Mapping[str, Any], options: Options) -> Items:
    """The response that most raters preferred is chosen (votes: 1 a, 2 b, 0 tie); pairs without one are left out."""
    votes = Counter(pair["votes"])
    if not votes or not set(votes) <= {0, 1, 2}:
        raise ValueError("votes must be some of 0, 1 and 2")
    winner, most = max(votes.items(), key=lambda vote: vote[1])
    if winner == 0 or list(votes.values()).count(most) > 1:
        return [Drop("tie")]
    text = _task(pair["instruction"], pair["input"])
    chosen, rejected = ("response_a", "response_b") if winner == 1 else ("response_b", "response_a")
    return [
        {
            "id": f"pandalm-{pair['id']}",
            "messages": _user(text),
            "chosen": pair[chosen],
            "rejected": pair[rejected],
            "group": short_hash("pandalm", pair["instruction"], pair["input"]),
            "topic": "instruction",
        }
    ]


def _llmfao(pair: Mapping[str, Any], options: Options) -> Items:
    """The response with more of the left and right votes is chosen; pairs without such a one are left out."""
    votes = Counter(pair["votes"])
    if not set(votes) <= {"left", "right", "tie"}:
        raise ValueError("votes must be some of left, right and tie")
    if votes["left"] == votes["right"]:
        return [Drop("tie")]
    chosen, rejected = ("response_a", "response_b") if votes["left"] > votes["right"] else ("response_b", "response_a")
    if not pair[chosen].strip():
        return [Drop("empty response chosen")]
    row = _pair("llmfao", _user(pair["prompt"]), pair[chosen], pair[rejected], pair["slug"])
    return [row | {"id": f"{row['id']}-{short_hash(*pair['workers'])}"}]  # some models answer alike


def _oasst(tree: Mapping[str, Any], options: Options) -> Items:
    """Each two neighbours in the ranks of a message's replies are a pair, the better rank chosen."""
    items: Items = []

    def walk(node: Mapping[str, Any], context: list[dict[str, str]]) -> None:
        role = {"prompter": "user", "assistant": "assistant"}[node["role"]]
        context = [*context, {"role": role, "content": node["text"]}]
        ranked = [reply for reply in node["replies"] if role == "user" and reply.get("rank") is not None]
        ranked.sort(key=lambda reply: reply["rank"])
        for better, worse in pairwise(ranked):
            items.append(_pair("oasst", context, better["text"], worse["text"], "assistance"))
        for reply in node["replies"]:
            walk(reply, context)

    walk(tree["prompt"], [])
    return items or [Drop("no ranked replies")]


def _pair(source: str, messages: list[dict[str, str]], chosen: str, rejected: str, topic: str) -> Row:
    """A preference row whose id and group come from its text."""
    texts = [message["content"] for message in messages]
    return {
        "id": f"{source}-" + short_hash(*texts, chosen, rejected),
        "messages": messages,
        "chosen": chosen,
        "rejected": rejected,
        "group": short_hash(source, *texts),
        "topic": topic,
    }


def _hh_harmless(pair: Mapping[str, Any], options: Options) -> Items:
    """Each side of a pair is a row: label 1 for the response that raters found less harmful, 0 for the other."""
    items: Items = []
    for key, label in (("chosen", 1), ("rejected", 0)):
        turns = _transcript(pair[key])
        messages, last = turns[:-1], turns[-1]
        if last["role"] != "assistant" or not last["content"]:
            items.append(Drop("no response"))
            continue
        items.append(
            {
                "id": f"hh-{key}-" + short_hash(pair["chosen"], pair["rejected"]),
                "messages": messages,
                "response": last["content"],
                "label": label,
                "group": short_hash("hh", messages[0]["content"]),
                "topic": "red team",
            }
        )
    return items


def _transcript(text: str) -> list[dict[str, str]]:
    """Messages of a text in which "Human:" and "Assistant:" after an empty line begin a turn."""
    parts = re.split(r"(?:^|\n)\n(Human|Assistant):", text.strip("\n").join(("\n\n", "")))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[role], "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if len(turns) < 2:
        raise ValueError("fewer than two turns")
    return turns


def _diasafety(row: Mapping[str, Any], options: Options) -> Items:
    """label Safe becomes 1 and Unsafe 0; rows with one context form a group. The category of harm is the topic."""
    return [
        {
            "id": "diasafety-" + short_hash(row["context"], row["response"], row["category"]),
            "messages": _user(row["context"]),
            "response": row["response"],
            "label": {"Safe": 1, "Unsafe": 0}[row["label"]],
            "group": short_hash("diasafety", row["context"]),
            "topic": row["category"],
        }
    ]


def _questions(row: Mapping[str, Any], options: Options) -> Items:
    """First turn of a benchmark question (turns, prompt, or instruction with input); test by a hash of its text."""
    if "turns" in row:
        text = row["turns"][0]
    elif "prompt" in row:
        text = row["prompt"]
    else:
        text = _task(row["instruction"], row.get("input", ""))
    key = short_hash("prompt", text)
    return [
        {
            "id": f"prompt-{key}",
            "messages": _user(text),
            "topic": str(row.get("category", row.get("topic", "other"))),
            "split": "test" if side(key, dev_share=0.0, test_share=options.test_share) == "test" else "train",
        }
    ]


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("convai2", "feedback", _convai2_reacted),
        Reader("convai2_sparse", "feedback", _convai2_sparse),
        Reader("xiaomi", "feedback", _xiaomi),
        Reader("pandalm", "preferences", _pandalm),
        Reader("llmfao", "preferences", _llmfao),
        Reader("oasst", "preferences", _oasst),
        Reader("diasafety", "safety", _diasafety),
        Reader("hh_harmless", "safety", _hh_harmless),
        Reader("mt_bench", "prompts", _questions),
    )
}
"""The adapters by name. `mt_bench` reads any file of prompts with turns, prompt, or instruction and input."""
