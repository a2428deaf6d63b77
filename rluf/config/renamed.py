"""Setting keys of earlier releases; an old key is refused with what replaces it: a new key or a constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SAMPLING_REFUSAL = (
    "refused: training needs the probabilities that tokens were sampled with, and the learner cannot know which tokens "
    "a truncated or penalized distribution left out; use rollout.temperature"
)
REPLACED_SETTINGS: Mapping[str, str] = {
    "algorithm.alarm_prompts": "algorithm.hacking_baseline_prompts",
    "algorithm.alarms": "algorithm.hacking_alarms",
    "algorithm.clip_high": "algorithm.clip",
    "algorithm.clip_low": "algorithm.clip",
    "algorithm.dual_clip": "a constant: DUAL_CLIP = 3 in rluf/algorithms/losses.py",
    "algorithm.gae_lambda": "a constant: GAE_LAMBDA = 0.95 in rluf/algorithms/critic.py",
    "algorithm.hacking_baseline_prompts": "a constant: REFERENCE_PROMPTS = 96 in rluf/train/controller.py",
    "algorithm.importance": "algorithm.importance_correction",
    "algorithm.importance_cap": "algorithm.importance_correction_cap",
    "algorithm.kl_estimator": "algorithm.kl_penalty",
    "algorithm.kl_in": "algorithm.kl_penalty",
    "algorithm.kl_limit": "algorithm.max_response_kl",
    "algorithm.kl_placement": "algorithm.kl_penalty",
    "algorithm.max_response_kl": "derived: MAX_KL_PER_TOKEN = 0.2 in rluf/algorithms/advantages.py",
    "algorithm.mix": "algorithm.topic_weights",
    "algorithm.stale_policy": "always drop: a sample that exceeds algorithm.max_staleness is replaced",
    "algorithm.staleness": "algorithm.max_staleness",
    "algorithm.too_old": "algorithm.stale_policy",
    "cluster.address": "Ray's own variable RAY_ADDRESS",
    "cluster.cpus_per_engine": "derived: one CPU per GPU of an actor, CPUS_PER_GPU in rluf/config/run.py",
    "cluster.cpus_per_learner": "derived: one CPU per GPU of an actor, CPUS_PER_GPU in rluf/config/run.py",
    "cluster.cpus_per_reward": "derived: one CPU per GPU of an actor, CPUS_PER_GPU in rluf/config/run.py",
    "cluster.grow_deadline_s": "timeouts.autoscale_s",
    "cluster.health_check_interval_s": "a constant: HEALTH_CHECK_INTERVAL_S = 30 in rluf/train/actor_supervisor.py",
    "cluster.heartbeat_s": "cluster.health_check_interval_s",
    "cluster.labels": "cluster.node_labels",
    "cluster.restarts_per_hour": "cluster.max_restarts_per_hour",
    "cluster.start_deadline_s": "timeouts.actor_start_s",
    "cluster.threads": "cluster.threads_per_actor",
    "evaluate.responses_per_user": "a constant: RESPONSES_PER_USER = 20 in rluf/evaluate/compare.py",
    "evaluate.users": "evaluate.simulated_users",
    "learner.critic_rate": "learner.critic_learning_rate",
    "learner.deadline_s": "timeouts.call_s",
    "learner.grad_clip": "learner.max_grad_norm",
    "learner.max_grad_norm": "a constant: MAX_GRAD_NORM = 1 in rluf/backends/deepspeed.py",
    "learner.ranks": "learner.workers",
    "learner.save_every": "learner.checkpoint_every_steps",
    "learner.weight_decay": "a constant: no weight decay (init_deepspeed in rluf/backends/deepspeed.py)",
    "objectives.*.judge": "objectives.*.path",
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
    "prepare.previous_dataset": "gone: the data set in prepare.output, which is replaced, is the one compared with",
    "prepare.ray_data_blocks": "derived: the number of CPUs of the Ray cluster (rluf/prepare/pipeline.py)",
    "prepare.return_days": "prepare.return_window_days",
    "prepare.user_cap": "prepare.user_row_cap",
    "prepare.user_row_cap": "a constant: USER_ROW_CAP = 200 in rluf/prepare/abuse.py",
    "publish.bucket_mib": "weight_sync.bucket_mib",
    "publish.deadline_s": "timeouts.call_s",
    "publish.engine": "weight_sync.transport",
    "publish.probe_tolerance": "weight_sync.logprob_tolerance",
    "reward.*.calibration": "always platt for labels and centered for pairs (fit_calibration in rluf/reward/card.py)",
    "reward.*.dropout": "a constant: DROPOUT_RATE = 0.1 in rluf/reward/fit.py",
    "reward.*.fuse": "reward.*.ensemble.shared_head",
    "reward.*.layers": "reward.*.ensemble.members",
    "reward.*.margin": "a constant: 0 for bradley_terry, HINGE_MARGIN = 1 for hinge, in rluf/reward/losses.py",
    "reward.*.members": "reward.*.ensemble.members",
    "reward.*.next_turn": "reward.*.read_at_next_turn",
    "reward.*.patience": "a constant: EARLY_STOPPING_EPOCHS = 2 in rluf/reward/fit.py",
    "reward.*.positive_rate": "reward.*.pu_class_prior",
    "reward.*.probe": "reward.*.linear_probe",
    "reward.*.pu_class_prior": "a constant: PU_CLASS_PRIOR = 0.15 in rluf/reward/losses.py",
    "reward.*.shared_head": "reward.*.ensemble.shared_head",
    "reward.*.weight_decay": "a constant: WEIGHT_DECAY = 0.01 in rluf/reward/fit.py",
    "reward.deadline_s": "timeouts.reward_training_s",
    "reward.dtype": "model.dtype",
    "reward.heads": "reward.shared_backbone_heads",
    "reward.only": "reward.objectives",
    "reward.retries": "a constant: MAX_RESTARTS = 3 in rluf/reward/ray_trainer.py",
    "reward.scoring_batch_tokens": "a constant: SCORING_BATCH_TOKENS = 8192 in rluf/reward/text.py",
    "rollout.deadline_s": "timeouts.call_s",
    "rollout.tensor_parallel": "cluster.gpus_per_engine: an engine is tensor-parallel over all of its GPUs",
    "rollout.min_p": SAMPLING_REFUSAL,
    "rollout.presence_penalty": SAMPLING_REFUSAL,
    "rollout.repetition_penalty": SAMPLING_REFUSAL,
    "rollout.frequency_penalty": SAMPLING_REFUSAL,
    "rollout.top_k": SAMPLING_REFUSAL,
    "rollout.top_p": SAMPLING_REFUSAL,
    "run.profile_steps": "the option --profile steps=N of python -m rluf.train",
    "run.reuse": "run.cache: name an empty folder to build everything again",
    "run.upload": "run.checkpoint_upload_url",
    "serve.deadline_s": "timeouts.serve_request_s",
    "serve.feedback": "serve.feedback_path",
    "serve.flush_interval_s": "derived: serve.reaction_window_s, from 1 to 60 s (rluf/serve/application.py)",
    "serve.log_text": "gone: no log has the text of messages",
    "serve.max_body_kib": "a constant: MAX_BODY_BYTES, 1 MiB, in rluf/serve/middleware.py",
    "serve.max_queued_responses": "a constant: MAX_QUEUED_RESPONSES = 1024 in rluf/serve/batching.py",
    "serve.max_replicas": "serve.replicas",
    "serve.max_waiting": "serve.max_queued_responses",
    "serve.min_replicas": "serve.replicas",
    "serve.request_timeout_s": "timeouts.serve_request_s",
    "serve.requests_per_s": "serve.client_requests_per_s",
    "serve.rotate_s": "serve.flush_interval_s",
    "serve.settle_s": "serve.reaction_window_s",
    "simulate.base_love_rate": "a constant: BASE_LOVE_RATE = 0.06 in rluf/simulate/log.py",
    "simulate.events": "simulate.log_rows",
    "simulate.output": "derived: <run.root>/<name>/log",
    "simulate.preference_pairs": "a constant: PAIRS_PER_ROW = 0.2 of simulate.log_rows in rluf/simulate/log.py",
    "simulate.responses_per_prompt": "derived from simulate.log_rows (plan_traffic in rluf/simulate/styles.py)",
    "simulate.safety_labels": "a constant: SAFETY_LABELS_PER_ROW = 0.15 of simulate.log_rows in rluf/simulate/log.py",
    "simulate.users": "derived: one user per ROWS_PER_USER = 4 rows in rluf/simulate/log.py",
    "timeouts.learner_step_s": "timeouts.call_s",
    "timeouts.rollout_s": "timeouts.call_s",
    "timeouts.weight_sync_s": "timeouts.call_s",
    "tracking.sample_table_rows": "a constant: SAMPLE_TABLE_ROWS = 16 in rluf/tracking/run_files.py",
    "tracking.samples": "tracking.sample_table_rows",
    "weight_sync.bucket_mib": "derived: 512 MiB between GPUs, else 64 MiB (rluf/config/policy.py)",
}
"""What replaces an old key: a present key, another old key, or text. * stands for any objective."""


def describe_old_keys(values: Mapping[Any, Any]) -> dict[str, str]:
    """What replaces each old key in a tree of settings, by old key."""
    return {key: text for key in _iter_key_paths(values) if (text := _find_replacement(key)) is not None}


def _find_replacement(key: str) -> str | None:
    section, _, rest = key.partition(".")
    objective, _, name = rest.partition(".")
    text = REPLACED_SETTINGS.get(key)
    if text is None and f"{section}.*.{name}" in REPLACED_SETTINGS:
        text = REPLACED_SETTINGS[f"{section}.*.{name}"].replace("*", objective)
    return text and (_find_replacement(text) or text)


def _iter_key_paths(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        dotted_key = f"{prefix}{key}"
        yield dotted_key
        if isinstance(value, Mapping):
            yield from _iter_key_paths(value, f"{dotted_key}.")
