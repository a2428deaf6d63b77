"""Setting keys of earlier releases and their present names; an old key is refused with the new one in the message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RENAMED_SETTINGS: Mapping[str, str] = {
    "algorithm.alarm_prompts": "algorithm.hacking_baseline_prompts",
    "algorithm.alarms": "algorithm.hacking_alarms",
    "algorithm.importance": "algorithm.importance_correction",
    "algorithm.importance_cap": "algorithm.importance_correction_cap",
    "algorithm.kl_in": "algorithm.kl_placement",
    "algorithm.kl_limit": "algorithm.max_response_kl",
    "algorithm.mix": "algorithm.topic_weights",
    "algorithm.staleness": "algorithm.max_staleness",
    "algorithm.too_old": "algorithm.stale_policy",
    "cluster.grow_deadline_s": "timeouts.autoscale_s",
    "cluster.heartbeat_s": "cluster.health_check_interval_s",
    "cluster.labels": "cluster.node_labels",
    "cluster.restarts_per_hour": "cluster.max_restarts_per_hour",
    "cluster.start_deadline_s": "timeouts.actor_start_s",
    "cluster.threads": "cluster.threads_per_actor",
    "learner.critic_rate": "learner.critic_learning_rate",
    "learner.deadline_s": "timeouts.learner_step_s",
    "learner.grad_clip": "learner.max_grad_norm",
    "learner.ranks": "learner.workers",
    "learner.save_every": "learner.checkpoint_every_steps",
    "objectives.alone": "aggregation.topic_objectives",
    "objectives.batch_tokens": "reward.scoring_batch_tokens",
    "objectives.combine": "aggregation.method",
    "objectives.floors": "aggregation.floors",
    "objectives.judges": "aggregation.gate_judges",
    "objectives.pessimism": "aggregation.uncertainty_penalty",
    "prepare.abuse": "prepare.abuse_rules",
    "prepare.attribution_hours": "prepare.reaction_window_hours",
    "prepare.blocks": "prepare.ray_data_blocks",
    "prepare.previous": "prepare.previous_dataset",
    "prepare.return_days": "prepare.return_window_days",
    "prepare.user_cap": "prepare.user_row_cap",
    "publish.bucket_mib": "weight_sync.bucket_mib",
    "publish.deadline_s": "timeouts.weight_sync_s",
    "publish.engine": "weight_sync.transport",
    "publish.probe_tolerance": "weight_sync.logprob_tolerance",
    "reward.*.fuse": "reward.*.shared_head",
    "reward.*.layers": "reward.*.members",
    "reward.*.next_turn": "reward.*.read_at_next_turn",
    "reward.*.positive_rate": "reward.*.pu_class_prior",
    "reward.*.probe": "reward.*.linear_probe",
    "reward.deadline_s": "timeouts.reward_training_s",
    "reward.heads": "reward.shared_backbone_heads",
    "reward.only": "reward.objectives",
    "rollout.deadline_s": "timeouts.rollout_s",
    "run.upload": "run.checkpoint_upload_url",
    "serve.deadline_s": "serve.request_timeout_s",
    "serve.feedback": "serve.feedback_path",
    "serve.max_waiting": "serve.max_queued_responses",
    "serve.requests_per_s": "serve.client_requests_per_s",
    "serve.rotate_s": "serve.flush_interval_s",
    "serve.settle_s": "serve.reaction_window_s",
    "simulate.events": "simulate.log_rows",
    "tracking.samples": "tracking.sample_table_rows",
}
"""Present key by old key; * stands for any objective."""


def find_renamed_keys(values: Mapping[Any, Any]) -> dict[str, str]:
    """Present key by old key, for every old key in a tree of settings."""
    return {key: new for key in _iter_key_paths(values) if (new := _new_name(key)) is not None}


def _new_name(key: str) -> str | None:
    if key in RENAMED_SETTINGS:
        return RENAMED_SETTINGS[key]
    section, _, rest = key.partition(".")
    objective, _, name = rest.partition(".")
    pattern = f"{section}.*.{name}"
    return RENAMED_SETTINGS[pattern].replace("*", objective) if pattern in RENAMED_SETTINGS else None


def _iter_key_paths(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        dotted_key = f"{prefix}{key}"
        yield dotted_key
        if isinstance(value, Mapping):
            yield from _iter_key_paths(value, f"{dotted_key}.")
