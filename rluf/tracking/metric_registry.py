"""Registry of the metrics of a training step: the source for the report, W&B, Prometheus, Grafana and the docs.

The keys are those of a row of metrics.jsonl. Objectives come from the settings, see `build_objective_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rluf.config.objectives import BUILTIN_OBJECTIVES, find_objective_spec

MetricAxis = Literal["step", "samples", "tokens", "version"]
AXIS_TITLES: dict[MetricAxis, str] = {
    "step": "optimizer steps",
    "samples": "responses sampled so far",
    "tokens": "response tokens sampled so far",
    "version": "weight version of the engines",
}
"""Possible x axes of a curve; samples and tokens are running sums."""

MetricGroup = Literal["objectives", "learning", "mismatch", "weight_sync", "throughput"]
GROUP_TITLES: dict[MetricGroup, str] = {
    "objectives": "Objectives",
    "learning": "Learning and constraints",
    "mismatch": "Learner-engine mismatch",
    "weight_sync": "Weight sync",
    "throughput": "Throughput and phases",
}


MetricUnit = Literal["number", "share", "seconds", "nats", "tokens", "tokens/s"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric of a step: its key in metrics.jsonl, its title, its meaning with unit, its group and its x axis.

    `summary_statistic` is what the run's W&B summary shows. A `unit` of share is displayed as a percentage.
    """

    key: str
    title: str
    description: str
    group: MetricGroup
    axis: MetricAxis = "step"
    summary_statistic: Literal["last", "max", "min", "mean"] = "last"
    unit: MetricUnit = "number"

    @property
    def is_percent(self) -> bool:
        """Whether it is displayed as a percentage."""
        return self.unit == "share"

    @property
    def wandb_name(self) -> str:
        """Name in W&B, where the prefix makes a section: learning/kl."""
        return f"{self.group}/{self.key}"


STEP_METRICS = (
    MetricSpec("reward", "Combined reward", "weighted, normalized on the base policy", "objectives", "samples"),
    MetricSpec("kl", "KL to the base policy", "nats per token", "learning", unit="nats"),
    MetricSpec("kl_sequence", "KL per response", "nats per response, to the base policy", "learning", unit="nats"),
    MetricSpec("entropy", "Entropy", "nats per token", "learning", unit="nats"),
    MetricSpec("loss", "Loss", "policy loss and KL penalty", "learning"),
    MetricSpec("policy_loss", "Policy loss", "without the KL penalty", "learning"),
    MetricSpec("kl_loss", "KL penalty", "as in the loss", "learning"),
    MetricSpec("clip_share", "Clipped tokens", "share of tokens whose gradient the clip removes", "learning",
               unit="share"),
    MetricSpec("demonstration_nll", "Demonstrations", "mean -logprob of demonstration tokens, nats", "learning",
               unit="nats"),
    MetricSpec("grad_norm", "Gradient norm", "before clipping", "learning", summary_statistic="max"),
    MetricSpec("value_loss", "Value loss", "of PPO's critic, before the update", "learning"),
    MetricSpec("explained_variance", "Explained variance", "of returns by PPO's critic: 1 perfect, 0 as their mean",
               "learning", summary_statistic="min"),
    MetricSpec("critic_skipped", "Skipped updates of the critic", "share of the step's updates, because of non-finite "
               "gradients", "learning", summary_statistic="max", unit="share"),
    MetricSpec("learning_rate", "Learning rate", "of the step", "learning"),
    MetricSpec("skipped", "Skipped updates", "so far, because of non-finite gradients", "learning",
               summary_statistic="max"),
    MetricSpec("response_length", "Response length", "mean tokens", "learning", unit="tokens"),
    MetricSpec("truncated_share", "Truncated responses", "share of responses cut at the token limit", "learning",
               unit="share"),
    MetricSpec("ratio_mean", "Importance ratio", "learner over engine, mean per token; 1 is no mismatch", "mismatch",
               summary_statistic="mean"),
    MetricSpec("ratio_max", "Largest ratio", "learner over engine, before truncation", "mismatch",
               summary_statistic="max"),
    MetricSpec("effective_sample_size", "Effective samples", "share left after importance weighting", "mismatch",
               summary_statistic="min", unit="share"),
    MetricSpec("mismatch_kl", "Mismatch", "KL between engine and learner, nats per token", "mismatch",
               summary_statistic="max", unit="nats"),
    MetricSpec("ratio_capped_fraction", "Capped tokens", "share of tokens with a truncated importance ratio",
               "mismatch", unit="share"),
    MetricSpec("sync_logprob_gap", "Weight sync check", "mean logprob gap between learner and engine, nats per token",
               "weight_sync", "version", summary_statistic="max", unit="nats"),
    MetricSpec("staleness", "Staleness", "maximum weight versions between sampling and update", "weight_sync",
               "version", summary_statistic="max"),
    MetricSpec("weight_sync_s", "Weight sync time", "seconds until all engines have the new weights", "weight_sync",
               "version", summary_statistic="mean", unit="seconds"),
    MetricSpec("sync_check_s", "Sync check time", "seconds of the weight sync spent on its check", "weight_sync",
               "version", summary_statistic="mean", unit="seconds"),
    MetricSpec("generate_s", "Generation", "seconds of the step until the last response", "throughput", "tokens",
               summary_statistic="mean", unit="seconds"),
    MetricSpec("score_s", "Scoring", "seconds from the last response to the last score", "throughput", "tokens",
               summary_statistic="mean", unit="seconds"),
    MetricSpec("learn_s", "Learning", "seconds for advantages, gradients and the update", "throughput", "tokens",
               summary_statistic="mean", unit="seconds"),
    MetricSpec("step_s", "Step", "seconds of the whole step", "throughput", "tokens", summary_statistic="mean",
               unit="seconds"),
    MetricSpec("reference_s", "Reference", "learner seconds for the reference policy's logprobs", "throughput",
               "tokens", summary_statistic="mean", unit="seconds"),
    MetricSpec("backward_s", "Forward and backward", "learner seconds", "throughput", "tokens",
               summary_statistic="mean", unit="seconds"),
    MetricSpec("optimizer_s", "Optimizer", "learner seconds", "throughput", "tokens", summary_statistic="mean",
               unit="seconds"),
    MetricSpec("tokens_per_s", "Response tokens per second", "over the whole step", "throughput", "tokens",
               summary_statistic="mean", unit="tokens/s"),
    MetricSpec("learner_tokens_per_s", "Learner tokens per second", "over the learner's part of the step",
               "throughput", "tokens", summary_statistic="mean", unit="tokens/s"),
    MetricSpec("learner_mfu", "Learner MFU", "share of the GPUs' peak FLOPs in the learner's part of a step; only on "
               "GPUs", "throughput", "tokens", summary_statistic="mean", unit="share"),
    MetricSpec("gpu_peak_gib", "Learner GPU memory", "peak GiB allocated on the GPU of rank 0 since the start; only on "
               "GPUs", "throughput", "tokens", summary_statistic="max"),
    MetricSpec("response_tokens", "Response tokens of the step", "sum", "throughput", "tokens",
               summary_statistic="mean", unit="tokens"),
    MetricSpec("prompt_tokens", "Prompt tokens of the step", "sum", "throughput", "tokens", summary_statistic="mean",
               unit="tokens"),
    MetricSpec("dropped_groups", "Dropped groups", "per step: too stale, or no variance in the scores (DAPO)",
               "throughput", "tokens", summary_statistic="mean"),
    MetricSpec("micro_batches", "Micro-batches", "per learner rank and step", "throughput", "tokens",
               summary_statistic="mean"),
)  # fmt: skip
"""Metrics of every run. A step may have more; W&B and metrics.jsonl record those over the step."""

PHASE_KEYS = ("generate_s", "score_s", "learn_s", "weight_sync_s")
"""Phases that add up to a step, in order, in seconds."""
RENAMED_METRICS = {
    "probe": "sync_logprob_gap", "probe_s": "sync_check_s", "publish_s": "weight_sync_s",
    "cap_share": "ratio_capped_fraction", "passed": "gate_pass_rate",
}  # fmt: skip
"""Keys of the previous release -> present keys, so that reports of older run folders stay complete for one release."""


def format_objective_title(objective: str) -> str:
    """Display name of an objective."""
    return find_objective_spec(objective).title


def build_objective_metrics(objective_names: Iterable[str]) -> tuple[MetricSpec, ...]:
    """Build the metric of each objective: the mean calibrated score."""
    description = "mean calibrated score of the step's samples"
    return tuple(
        MetricSpec(name, format_objective_title(name), description, "objectives", "samples", unit="share")
        for name in objective_names
    )


def list_metric_specs(objective_names: Iterable[str]) -> tuple[MetricSpec, ...]:
    """All metrics of a run with these objectives."""
    return (*build_objective_metrics(objective_names), *STEP_METRICS)


def find_row_objectives(row: Mapping[str, Any]) -> list[str]:
    """Objectives of a row of metrics.jsonl: keys with a raw score next to the calibrated one, and the built-in ones."""
    return [key for key in row if f"{key}_raw" in row or key in BUILTIN_OBJECTIVES]


def rename_old_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of metrics.jsonl with the keys of the previous release replaced."""
    return {RENAMED_METRICS.get(key, key): value for key, value in row.items()}


def add_token_rate(row: Mapping[str, float]) -> dict[str, float]:
    """Return a step's row with its response tokens per second."""
    seconds = row.get("step_s", 0.0)
    return {**row, "tokens_per_s": row.get("response_tokens", 0.0) / seconds} if seconds else dict(row)
