"""Data types that actors exchange: prompts, samples, groups and scores.

Frozen dataclasses of numbers and strings, so that Ray's object store transfers them without torch. Token ids go in and
out; text is derived and never re-encoded for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict


class Message(TypedDict):
    """One chat message: `role` is system, user or assistant."""

    role: str
    content: str


class ScoringItem(NamedTuple):
    """A conversation that ends with a user message, and one response to it."""

    messages: Sequence[Message]
    response: str
    is_truncated: bool = False
    """The response was cut at the token limit. False if it ended by itself, and if the log does not say."""
    prompt_id: str = ""
    topic: str = ""
    fields: Mapping[str, Any] | None = None
    """Further fields of the prompt's row, for reward functions."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Start of a rollout: a conversation and its token ids.

    `messages` end with a user message; `token_ids` [P] are the policy tokenizer's ids of the rendered chat template,
    including the generation prompt. `split` is train, dev or test.
    """

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    topic: str
    split: str
    fields: Mapping[str, Any] | None = None
    """Further fields of its row in data.prompts, for reward functions."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response of the policy to a prompt, or a demonstration from the log.

    `response_ids` [R] include the end-of-turn token if the model emitted it. `rollout_logprobs` [R] (nats) are under
    the distribution that the response was sampled from; a demonstration has none. `version_spans` are (first response
    token, weight version) pairs in order: several when weights were synced during generation. `finish_reason` is stop
    or length.
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
    """Summary of a group for the driver, which holds no text and no token ids: lengths in tokens, flags per sample."""

    prompt_id: str
    topic: str
    weight_version: int
    prompt_token_count: int
    response_token_counts: tuple[int, ...]
    finished: tuple[bool, ...]
    passed_judges: tuple[bool, ...] = ()
    """Whether each sample passed all judges of aggregation.gate_judges; empty without gate judges."""


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt. `weight_version` is the oldest version that any of them was sampled with."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    weight_version: int

    @property
    def info(self) -> GroupInfo:
        """Summary of this group."""
        return GroupInfo(
            prompt_id=self.prompt.id,
            topic=self.prompt.topic,
            weight_version=self.weight_version,
            prompt_token_count=len(self.prompt.token_ids),
            response_token_counts=tuple(len(sample.response_ids) for sample in self.samples),
            finished=tuple(sample.finish_reason == "stop" for sample in self.samples),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """One objective's score of one sample.

    `value` is calibrated (a probability for a reward model, 0 or 1 for a judge, any number for a reward function),
    `raw_logit` the uncalibrated logit, `spread` the standard deviation over an ensemble's values and `logit_spread`
    that over its members' calibrated logits (0.0 for one member). `is_probability`: whether rewards are computed from
    the logit of `value`; else from `value` as is.
    """

    objective: str
    value: float
    raw_logit: float
    spread: float = 0.0
    is_probability: bool = True
    logit_spread: float = 0.0
    exact_logit: float | None = None
    """Logit that rewards use in place of that of `value`: without a calibration `value` may round to 0 or 1."""
    is_cut: bool = False
    """Whether the model did not read the whole text, since it exceeds the model's maximum of tokens."""


ANSWERS_FILE = "answers.jsonl"
"""Responses of every arm to the test prompts, in the run folder; a resumed run reads those of the base policy."""
BASE_ARM, REPEAT_ARM, CONTROL_ARM, ALIGNED_ARM = "base", "base_repeat", "control", "aligned"
"""Arms of an evaluation: the base policy, another draw of it (A/A), the base at the entropy of aligned, the policy."""


@dataclass(frozen=True, slots=True)
class PolicyAnswer:
    """One response of an arm to a test prompt: a row of answers.jsonl.

    `tokens` is its length, `logprob` the mean log-probability per token (nats) under the distribution that it was
    sampled from, at `temperature`. `scores` are calibrated, by objective.
    """

    arm: str
    prompt_id: str
    topic: str
    messages: tuple[Message, ...]
    text: str
    finish_reason: str
    tokens: int
    scores: Mapping[str, float]
    logprob: float | None = None
    temperature: float | None = None


def compute_mean_token_entropy(answers: Sequence[PolicyAnswer]) -> float | None:
    """Entropy in nats per token: the mean negative log-probability of the sampled tokens; None if not recorded."""
    logprobs = [answer.logprob for answer in answers if answer.logprob is not None]
    token_count = sum(answer.tokens for answer in answers)
    if len(logprobs) < len(answers) or not token_count:
        return None
    return -sum(logprob * answer.tokens for logprob, answer in zip(logprobs, answers, strict=True)) / token_count


@dataclass(slots=True)
class TrainResult:
    """Result of a training run: responses of every arm to the same prompts, metrics by step, seconds by phase.

    `reference_statistics` by objective are those of RewardAggregator.describe_reference.
    """

    answers: list[PolicyAnswer] = field(default_factory=list)
    step_metrics: list[dict[str, float]] = field(default_factory=list)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    reference_statistics: dict[str, dict[str, float]] = field(default_factory=dict)
