"""The prompts that simulated users send, and their train and test split."""

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
    "roleplay",
    "relationship",
    "casual",
    "facts",
    "writing",
    "code",
    "advice",
    "planning",
    "creative",
    "risky",
)


@dataclass(frozen=True, slots=True)
class SimulatedPrompt:
    """One conversation that waits for a response. `messages` hold the system message and end with the user's."""

    id: str
    topic: str
    messages: tuple[Message, ...]
    split: str


def load_prompts() -> tuple[SimulatedPrompt, ...]:
    """All prompts in the order of prompts.yaml, each with its split (train or test).

    The split is fixed: within a topic, the prompts whose text hashes lowest are the test prompts, so that adding a
    prompt moves at most one other across. Raises DataError if the shipped file is damaged.
    """
    text = resources.files("rluf.simulate").joinpath("prompts.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict) or tuple(tree) != TOPICS:
        raise DataError(f"rluf/simulate/prompts.yaml does not hold the topics {', '.join(TOPICS)}; reinstall rluf")
    prompts: list[SimulatedPrompt] = []
    for topic, entries in tree.items():
        turns = [_turns(topic, entry) for entry in entries]
        digests = [hashlib.sha256("\n".join(turn).encode()).hexdigest() for turn in turns]
        test = set(sorted(digests)[: round(TEST_SHARE * len(digests))])
        prompts += [
            SimulatedPrompt(f"{topic}-{digest[:10]}", topic, _messages(turn), "test" if digest in test else "train")
            for turn, digest in zip(turns, digests, strict=True)
        ]
    return tuple(prompts)


def _turns(topic: str, entry: Any) -> list[str]:
    """The turns of one YAML entry: user, assistant, ..., user."""
    turns = [entry] if isinstance(entry, str) else entry
    if not isinstance(turns, list) or len(turns) % 2 == 0 or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"rluf/simulate/prompts.yaml has a broken entry under {topic}: {entry!r}; reinstall rluf")
    return turns


def _messages(turns: list[str]) -> tuple[Message, ...]:
    """The conversation with the system message that every prompt shares."""
    roles = ("user", "assistant")
    spoken = (Message(role=roles[index % 2], content=turn) for index, turn in enumerate(turns))
    return (Message(role="system", content=SYSTEM_MESSAGE), *spoken)
