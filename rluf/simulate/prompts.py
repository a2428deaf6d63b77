"""Prompts of the simulated users, with their train/test split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from rluf.errors import DataError
from rluf.types import Message

SYSTEM_MESSAGE = "You are a friendly chat assistant. Answer in one or two short sentences."
TEST_SHARE = 0.28
TOPICS = (
    "roleplay", "relationship", "casual", "facts", "writing", "code", "advice", "planning", "creative", "risky",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SimulatedPrompt:
    """A conversation up to a user message; `messages` start with the system message."""

    id: str
    topic: str
    messages: tuple[Message, ...]
    split: str


def load_prompts() -> tuple[SimulatedPrompt, ...]:
    """Load all prompts in the order of prompts.yaml, each with its split (train or test).

    The split is fixed: within a topic, the prompts with the lowest hashes are the test prompts, so adding a prompt
    moves at most one other between splits. DataError if the shipped file is damaged.
    """
    text = resources.files("rluf.simulate").joinpath("prompts.yaml").read_text(encoding="utf-8")
    entries_of_topic = yaml.safe_load(text)
    if not isinstance(entries_of_topic, dict) or tuple(entries_of_topic) != TOPICS:
        raise DataError(f"rluf/simulate/prompts.yaml does not have the topics {', '.join(TOPICS)}; reinstall rluf")
    prompts: list[SimulatedPrompt] = []
    for topic, entries in entries_of_topic.items():
        conversations = [_parse_turns(topic, entry) for entry in entries]
        # Splitting by hash instead of by position: reordering the file does not move prompts between the splits.
        digests = [hashlib.sha256("\n".join(turns).encode()).hexdigest() for turns in conversations]
        test_digests = set(sorted(digests)[: round(TEST_SHARE * len(digests))])
        prompts += [
            SimulatedPrompt(
                f"{topic}-{digest[:10]}", topic, _build_messages(turns), "test" if digest in test_digests else "train"
            )
            for turns, digest in zip(conversations, digests, strict=True)
        ]
    return tuple(prompts)


def _parse_turns(topic: str, entry: Any) -> list[str]:
    """Turns of one YAML entry: user, assistant, ..., user."""
    turns = [entry] if isinstance(entry, str) else entry
    # An odd number of turns: the conversation ends with the user.
    if not isinstance(turns, list) or len(turns) % 2 == 0 or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"rluf/simulate/prompts.yaml has an invalid entry under {topic}: {entry!r}; reinstall rluf")
    return turns


def _build_messages(turns: list[str]) -> tuple[Message, ...]:
    """Prepend the system message common to all prompts."""
    roles = ("user", "assistant")
    conversation = (Message(role=roles[index % 2], content=turn) for index, turn in enumerate(turns))
    return (Message(role="system", content=SYSTEM_MESSAGE), *conversation)
