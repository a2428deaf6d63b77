"""Data that the reader is fitted to: human reactions and preferences, and validity pairs made here.

A validity pair has a reply that answers its prompt (`chosen`) and one that any reader would refuse for a known reason
(`kind`). Prompts and replies come from reader_examples.yaml, self-instruct and Topical-Chat, refusals from
reader_refusals.jsonl.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from rluf.simulate.ground_truth import ReaderInput
from rluf.simulate.prompts import load_prompts
from rluf.types import Message

EXAMPLES_PATH = Path(__file__).parents[1] / "reader_examples.yaml"
REFUSALS_PATH = EXAMPLES_PATH.with_name("reader_refusals.jsonl")
MAX_CONTEXT_MESSAGES = 3
MAX_CONTEXT_CHARACTERS = 200
"""Limits of a dialogue's context: most of the cost of reading a short message."""
EXCHANGES_PER_SOURCE = 8
"""Exchanges from self-instruct and from Topical-Chat; reader_examples.yaml is used in full."""
KINDS_PER_EXCHANGE = 4
"""Kinds of rejected reply made from each exchange, sampled; one that misreads the prompt is always among them."""
MISMATCHES_PER_EXCHANGE = 2
SEED = 5


@dataclass(frozen=True, slots=True)
class LabeledSet:
    """N responses with a label 0 or 1 and a group (user, source) each."""

    inputs: list[ReaderInput]
    labels: list[int]
    groups: list[str]


@dataclass(frozen=True, slots=True)
class PairSet:
    """N pairs; `chosen` is the better response. `kinds` says why the other is worse, `groups` names the prompt."""

    chosen: list[ReaderInput]
    rejected: list[ReaderInput]
    groups: list[str]
    kinds: list[str]

    @property
    def inputs(self) -> list[ReaderInput]:
        """Chosen and rejected responses, one list after the other."""
        return [*self.chosen, *self.rejected]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt with a reply that fits it and, for some, one that misreads it."""

    messages: tuple[Message, ...]
    reply: str
    source: str
    wrong: str | None = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def user_message(text: str) -> tuple[Message, ...]:
    """Conversation of one user message."""
    return (Message(role="user", content=text),)


def load_thumbs(data: Path) -> LabeledSet:
    """Messages of chat bots that real users gave a thumbs up (1) or down (0), grouped by user."""
    inputs, labels, groups = [], [], []
    for dialog in read_rows(data / "convai2_reactions/dialogs.jsonl.gz"):
        messages = dialog["messages"]
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("reaction") is not None:
                context = tuple(
                    Message(role=m["role"], content=m["content"][:MAX_CONTEXT_CHARACTERS])
                    for m in messages[max(0, index - MAX_CONTEXT_MESSAGES) : index]
                )
                inputs.append(ReaderInput(context, message["content"], is_finished=True))
                labels.append(message["reaction"])
                groups.append(dialog["user"])
    return LabeledSet(inputs, labels, groups)


def load_preferences(data: Path) -> PairSet:
    """Pairs with a majority among three human votes, grouped by prompt; all responses count as finished."""
    pairs = PairSet([], [], [], [])
    for row in read_rows(data / "pandalm_test/pairs.jsonl.gz"):
        first, second, ties = (row["votes"].count(vote) for vote in (1, 2, 0))
        if first == second or max(first, second) <= ties:
            continue
        prompt_text = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
        texts = (row["response_a"], row["response_b"])
        chosen, rejected = texts if first > second else texts[::-1]
        pairs.chosen.append(ReaderInput(user_message(prompt_text), chosen, is_finished=True))
        pairs.rejected.append(ReaderInput(user_message(prompt_text), rejected, is_finished=True))
        pairs.groups.append(prompt_text)
        pairs.kinds.append("preference")
    return pairs


def load_offenses(data: Path, count: int = 300) -> LabeledSet:
    """Responses that people labeled unsafe (1) or safe (0) in their context."""
    rows = read_rows(data / "diasafety/train.jsonl.gz")
    random.Random(SEED).shuffle(rows)
    limit = MAX_CONTEXT_CHARACTERS
    inputs = [
        ReaderInput(user_message(row["context"][:limit]), row["response"][:limit], is_finished=True)
        for row in rows[:count]
    ]
    labels = [int(row["label"] == "Unsafe") for row in rows[:count]]
    return LabeledSet(inputs, labels, [row["context"][:limit] for row in rows[:count]])


def build_requests(data: Path) -> LabeledSet:
    """Harmful (1) and harmless (0) requests with an empty response."""
    rng = random.Random(SEED)
    examples = load_examples()
    harmful = [row["prompt"] for row in read_rows(data / "prompts/harmfulqa.jsonl.gz")]
    questions = [row["turns"][0][:300] for row in read_rows(data / "prompts/mt_bench.jsonl.gz")]
    tasks = [row["instruction"] for row in read_rows(data / "prompts/self_instruct_seed_tasks.jsonl.gz")]
    is_risky = {
        prompt.messages[-1]["content"]: prompt.topic == "risky" for prompt in load_prompts() if prompt.split == "train"
    }
    project = sorted(is_risky)
    rng.shuffle(harmful)
    rng.shuffle(project)
    labeled = [(text, 1, "harmfulqa") for text in harmful[:150]]
    labeled += [(text, 1, "project") for text in project if is_risky[text]]
    labeled += [(text, 0, "project") for text in [text for text in project if not is_risky[text]][:90]]
    labeled += [(text, 0, "questions") for text in (*questions[::2], *tasks[::2])]
    labeled += [(entry["prompt"], 1, "examples") for entry in examples["refusals"]]
    labeled += [(entry["prompt"], 0, "examples") for entry in examples["exchanges"]]
    texts, labels, _ = zip(*labeled, strict=True)
    inputs = [ReaderInput(user_message(text), "", is_finished=True) for text in texts]
    return LabeledSet(inputs, list(labels), list(texts))


def load_examples() -> dict[str, Any]:
    """Content of reader_examples.yaml."""
    content: dict[str, Any] = yaml.safe_load(EXAMPLES_PATH.read_text("utf-8"))
    return content


def build_validity_pairs(data: Path) -> PairSet:
    """Replies that fit against replies that any reader would refuse, over the prompts of `collect_exchanges`."""
    rng = random.Random(SEED)
    examples = load_examples()
    exchanges = collect_exchanges(data, examples, rng)
    pairs = PairSet([], [], [], [])

    def add(messages: tuple[Message, ...], chosen: str, rejected: str, kind: str) -> None:
        pairs.chosen.append(ReaderInput(messages, chosen, is_finished=True))
        pairs.rejected.append(ReaderInput(messages, rejected, is_finished=kind != "cut"))
        pairs.groups.append(messages[-1]["content"])
        pairs.kinds.append(kind)

    for exchange in exchanges:
        same_source = [other for other in exchanges if other.source == exchange.source and other is not exchange]
        rejected_replies = {
            "mismatch": rng.choice(same_source).reply,
            "generic": rng.choice(examples["generic"]),
            "flattery": rng.choice(examples["flattery"]),
            "signoff": rng.choice(examples["signoff"]),
            "echo": _fill_words(rng.choice(examples["echo"]), exchange.messages[-1]["content"][:160], rng),
            "loop": _loop(exchange.reply, examples, rng),
            "cut": _cut(exchange.reply, rng),
            "contradict": exchange.wrong,
        }
        kinds = [kind for kind, rejected in rejected_replies.items() if rejected is not None]
        rng.shuffle(kinds)
        kinds.sort(key=lambda kind: kind != "contradict")
        for kind in kinds[:KINDS_PER_EXCHANGE]:
            add(exchange.messages, exchange.reply, rejected_replies[kind] or "", kind)
    for entry in examples["refusals"]:
        for kind, rejected in {
            "comply": entry["comply"],
            "generic": rng.choice(examples["generic"]),
            "signoff": rng.choice(examples["signoff"]),
        }.items():
            add(user_message(entry["prompt"]), entry["reply"], rejected, kind)
    for messages, refusal, compliance in _load_refusals():
        add(messages, refusal, compliance, "comply")
    return pairs


def build_mismatch_pairs(data: Path) -> PairSet:
    """Each exchange's reply against replies to other prompts of its source.

    What thumbs reward and what answers a prompt differ most in these; the validity pairs alone have few of them.
    """
    rng = random.Random(SEED)
    exchanges = collect_exchanges(data, load_examples(), rng)
    pairs = PairSet([], [], [], [])
    for exchange in exchanges:
        others = [other.reply for other in exchanges if other.source == exchange.source and other is not exchange]
        for reply in rng.sample(others, MISMATCHES_PER_EXCHANGE):
            pairs.chosen.append(ReaderInput(exchange.messages, exchange.reply, is_finished=True))
            pairs.rejected.append(ReaderInput(exchange.messages, reply, is_finished=True))
            pairs.groups.append(exchange.messages[-1]["content"])
            pairs.kinds.append("mismatch")
    return pairs


def collect_exchanges(data: Path, examples: dict[str, Any], rng: random.Random) -> list[Exchange]:
    """Honest exchanges: all examples, and EXCHANGES_PER_SOURCE of each other source."""
    exchanges = [
        Exchange(user_message(entry["prompt"]), entry["reply"], "examples", entry["wrong"])
        for entry in examples["exchanges"]
    ]
    tasks = read_rows(data / "prompts/self_instruct_seed_tasks.jsonl.gz")
    tasks = [row for row in tasks if 3 <= len(row["output"].split()) <= 60]
    rng.shuffle(tasks)
    for row in tasks[:EXCHANGES_PER_SOURCE]:
        prompt_text = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
        exchanges.append(Exchange(user_message(prompt_text), row["output"], "self_instruct"))
    exchanges += _dialog_exchanges(data, rng)
    return exchanges


def _dialog_exchanges(data: Path, rng: random.Random) -> list[Exchange]:
    """Messages of people that their partner rated excellent."""
    dialogs = read_rows(data / "topical_chat_ratings/valid_rare.jsonl.gz")
    rng.shuffle(dialogs)
    exchanges: list[Exchange] = []
    for dialog in dialogs:
        messages = dialog["messages"]
        index = rng.randrange(2, min(10, len(messages)))
        message, partner = messages[index], messages[index - 1]["speaker"]
        context = tuple(
            Message(role="user" if m["speaker"] == partner else "assistant", content=m["content"])
            for m in messages[max(0, index - MAX_CONTEXT_MESSAGES) : index]
        )
        alternates = all(a["role"] != b["role"] for a, b in itertools.pairwise(context))
        if message["rating"] == "Excellent" and 6 <= len(message["content"].split()) <= 40 and alternates:
            exchanges.append(Exchange(context, message["content"], "topical_chat"))
        if len(exchanges) == EXCHANGES_PER_SOURCE:
            break
    return exchanges


def _load_refusals() -> list[tuple[tuple[Message, ...], str, str]]:
    """Prompt, refusal and compliance: responses of SmolLM2-135M-Instruct to the project's own risky prompts.

    They have a file of their own, since the sample log depends on this fit.
    """
    rows = [json.loads(line) for line in REFUSALS_PATH.read_text("utf-8").splitlines()]
    return [(tuple(row["messages"]), row["refusal"], row["comply"]) for row in rows]


def _content_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[A-Za-z]{3,}", text) if word.lower() not in ENGLISH_STOP_WORDS]


def _fill_words(template: str, prompt_text: str, rng: random.Random) -> str:
    words = _content_words(prompt_text) or ["this", "that"]
    word = rng.choice(words)
    other = rng.choice([candidate for candidate in words if candidate != word] or [word])
    return template.format(word=word, other=other, prompt=prompt_text)


def _loop(reply: str, examples: dict[str, Any], rng: random.Random) -> str:
    """A stock loop, or the first words of the reply over and over."""
    if rng.random() < 0.5:
        return str(rng.choice(examples["loop"]))
    segment = " ".join(reply.split()[: rng.randint(2, 6)]).rstrip(".,!?")
    return ". ".join([segment] * rng.randint(3, 6)) + "."


def _cut(reply: str, rng: random.Random) -> str | None:
    """The first 30% to 75% of the reply without closing punctuation; None for a very short one."""
    words: Sequence[str] = reply.split()
    if len(words) < 5:
        return None
    return " ".join(words[: max(2, int(len(words) * rng.uniform(0.3, 0.75)))]).rstrip(".,!?")
