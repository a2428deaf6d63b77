"""Row types of a run folder's JSON lines: samples.jsonl and the comparison of both policies."""

from __future__ import annotations

from typing import TypedDict


class PolicyResponse(TypedDict):
    """One policy's response in a samples.jsonl row: text, calibrated scores by objective, judges that it fails."""

    text: str
    scores: dict[str, float]
    failed: list[str]


class RolloutSample(TypedDict):
    """One response sampled in a training step.

    `reward` is the combined reward, `kl` the KL to the reference policy in nats (None if the step did not measure it),
    `failed` the judges that the response fails.
    """

    step: int
    version: int
    topic: str
    prompt: str
    response: str
    scores: dict[str, float]
    reward: float
    kl: float | None
    failed: list[str]


class PromptComparison(TypedDict):
    """One prompt with the responses of both policies. `prompt` is the last user message."""

    prompt_id: str
    topic: str
    prompt: str
    base: PolicyResponse
    aligned: PolicyResponse
