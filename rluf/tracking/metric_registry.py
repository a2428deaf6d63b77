"""Every number that a training step leaves, told once: the report, W&B, Prometheus, Grafana and the docs read it here.

A step's row in metrics.jsonl has these keys; objectives are named in the settings, so theirs are made by `objectives`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Axis = Literal["step", "samples", "tokens", "version"]
AXES: dict[Axis, str] = {
    "step": "optimiser steps",
    "samples": "responses drawn so far",
    "tokens": "response tokens drawn so far",
    "version": "weight version that the engines hold",
}
"""What a curve may be drawn over; samples and tokens are running sums."""

Group = Literal["objectives", "learning", "mismatch", "publishing", "throughput"]
GROUPS: dict[Group, str] = {
    "objectives": "What the policy is moved towards",
    "learning": "Learning and its limits",
    "mismatch": "Learner against engine",
    "publishing": "Publishing weights",
    "throughput": "Throughput and phases",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a step: its key in metrics.jsonl, its meaning with its unit, and what it is drawn over.

    `keep` is what a run's summary keeps of it. `percent` shows it as a share.
    """

    key: str
    title: str
    about: str
    group: Group
    axis: Axis = "step"
    keep: Literal["last", "max", "min", "mean"] = "last"
    percent: bool = False

    @property
    def name(self) -> str:
        """Its name in W&B, where a prefix makes a section: learning/kl."""
        return f"{self.group}/{self.key}"


METRICS = (
    Metric("reward", "Combined reward", "weighted, standardised on the base policy", "objectives", "samples"),
    Metric("kl", "KL to the base policy", "nats per token", "learning"),
    Metric("kl_sequence", "KL of a response", "nats per response, to the base policy", "learning"),
    Metric("entropy", "Entropy", "nats per token", "learning"),
    Metric("loss", "Loss", "policy loss and KL penalty", "learning"),
    Metric("policy_loss", "Policy loss", "without the KL penalty", "learning"),
    Metric("kl_loss", "KL penalty", "as it enters the loss", "learning"),
    Metric("clip_share", "Clipped tokens", "share of tokens held back by the clip", "learning", percent=True),
    Metric("demonstration_nll", "Demonstrations", "mean -logprob of imitated tokens, nats", "learning"),
    Metric("grad_norm", "Gradient norm", "before clipping", "learning", keep="max"),
    Metric("learning_rate", "Learning rate", "of the step", "learning"),
    Metric("skipped", "Skipped updates", "so far, for gradients that were not finite", "learning", keep="max"),
    Metric("response_length", "Response length", "mean tokens", "learning"),
    Metric("ratio_mean", "Importance ratio", "learner over engine, mean per token; 1 is no mismatch", "mismatch",
           keep="mean"),
    Metric("ratio_max", "Largest ratio", "learner over engine, before truncation", "mismatch", keep="max"),
    Metric("effective_sample_size", "Effective samples", "share left after importance weighting", "mismatch",
           keep="min", percent=True),
    Metric("mismatch_kl", "Mismatch", "KL between engine and learner, nats per token", "mismatch", keep="max"),
    Metric("cap_share", "Capped tokens", "share of tokens whose importance ratio was truncated", "mismatch",
           percent=True),
    Metric("probe", "Publish probe", "mean log-probability gap between learner and engine, nats per token",
           "publishing", "version", keep="max"),
    Metric("staleness", "Staleness", "weight versions between drawing and learning, at most", "publishing", "version",
           keep="max"),
    Metric("publish_s", "Publish", "seconds until all engines hold the new weights", "publishing", "version",
           keep="mean"),
    Metric("probe_s", "Probe", "seconds of the publish that its check took", "publishing", "version", keep="mean"),
    Metric("generate_s", "Generate", "seconds of the step until the last response", "throughput", "tokens",
           keep="mean"),
    Metric("score_s", "Score", "seconds of the step after that until the last score", "throughput", "tokens",
           keep="mean"),
    Metric("learn_s", "Learn", "seconds of the step for advantages, gradients and the update", "throughput", "tokens",
           keep="mean"),
    Metric("step_s", "Step", "seconds of the whole step", "throughput", "tokens", keep="mean"),
    Metric("reference_s", "Reference", "seconds of the learner for the frozen policy's logprobs", "throughput",
           "tokens", keep="mean"),
    Metric("backward_s", "Forward and backward", "seconds of the learner", "throughput", "tokens", keep="mean"),
    Metric("optimizer_s", "Optimiser", "seconds of the learner", "throughput", "tokens", keep="mean"),
    Metric("tokens_per_s", "Response tokens", "drawn and learnt a second, over the whole step", "throughput", "tokens",
           keep="mean"),
    Metric("learner_tokens_per_s", "Learner tokens", "a second, over the learner's part of the step", "throughput",
           "tokens", keep="mean"),
    Metric("response_tokens", "Response tokens of the step", "sum", "throughput", "tokens", keep="mean"),
    Metric("prompt_tokens", "Prompt tokens of the step", "sum", "throughput", "tokens", keep="mean"),
    Metric("dropped_groups", "Dropped groups", "of the step: too old, or scores that do not differ (DAPO)",
           "throughput", "tokens", keep="mean"),
    Metric("micro_batches", "Micro-batches", "of a learner rank in the step", "throughput", "tokens", keep="mean"),
)  # fmt: skip
"""What every run has; a step may leave more, which W&B and metrics.jsonl keep over the step."""

PHASES = ("generate_s", "score_s", "learn_s", "publish_s")
"""Seconds that make up a step, in their order."""

OWN = ("love", "helpfulness", "safety")
TITLES = {"love": "P[Love]"}


def title(objective: str) -> str:
    """An objective's name as people read it."""
    return TITLES.get(objective, objective.replace("_", " ").capitalize())


def objectives(names: Iterable[str]) -> tuple[Metric, ...]:
    """The mean calibrated score of each objective."""
    about = "mean calibrated score of the step's samples"
    return tuple(Metric(name, title(name), about, "objectives", "samples", percent=True) for name in names)


def catalogue(names: Iterable[str]) -> tuple[Metric, ...]:
    """All metrics of a run with objectives `names`."""
    return (*objectives(names), *METRICS)


def names_in(row: Mapping[str, Any]) -> list[str]:
    """The objectives of a row of metrics.jsonl: what has a raw score beside its calibrated one, and rluf's own."""
    return [key for key in row if f"{key}_raw" in row or key in OWN]


def with_rates(row: Mapping[str, float]) -> dict[str, float]:
    """A step's row with its tokens a second."""
    seconds = row.get("step_s", 0.0)
    return {**row, "tokens_per_s": row.get("response_tokens", 0.0) / seconds} if seconds else dict(row)
