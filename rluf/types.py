"""What is passed along between actors: prompts, samples, groups and scores.

Plain frozen dataclasses of numbers and strings, so that they travel through Ray's object store without torch.
Token ids go in and out; text is derived and never re-encoded for training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict


class Message(TypedDict):
    """One chat message: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a rollout starts from.

    `messages` end with a user message; `token_ids` [P] are the policy tokenizer's ids of the rendered chat
    template, generation prompt included. `split` is train, dev or test.
    """

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    topic: str
    split: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One response of the policy to one prompt, or a demonstration taken from the log.

    `response_ids` [R] hold the end-of-turn token when the model emitted it; `rollout_logprobs` [R] (nats) are those of
    the distribution sampled from; a demonstration, which no engine sampled, has none. `version_spans` are (first
    response token, weight version) pairs in order, so that a response which straddles a publish is known as such.
    `finish_reason` is stop or length.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    version_spans: tuple[tuple[int, int], ...]
    finish_reason: str
    text: str


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """The small numbers of a group that the driver may hold: lengths in tokens, no text and no ids."""

    prompt_id: str
    topic: str
    version: int
    prompt_tokens: int
    response_tokens: tuple[int, ...]
    finished: tuple[bool, ...]
    passed: tuple[bool, ...] = ()
    """Whether each sample passed every judge of objectives.judges; empty where there are none."""


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt. `version` is the oldest weight version that any of them was sampled with."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    version: int

    @property
    def info(self) -> GroupInfo:
        """The small numbers of this group."""
        return GroupInfo(
            prompt_id=self.prompt.id,
            topic=self.prompt.topic,
            version=self.version,
            prompt_tokens=len(self.prompt.token_ids),
            response_tokens=tuple(len(sample.response_ids) for sample in self.samples),
            finished=tuple(sample.finish_reason == "stop" for sample in self.samples),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """One objective's opinion of one sample.

    `value` is calibrated (a probability for a reward model, 0 or 1 for a judge), `raw` the uncalibrated logit, `spread`
    the standard deviation over an ensemble (0.0 for one member), `verdict` a judge's yes or no (None for models).
    """

    objective: str
    value: float
    raw: float
    spread: float = 0.0
    verdict: bool | None = None
