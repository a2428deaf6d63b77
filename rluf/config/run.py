"""Settings of the run itself: outputs, cluster, deadlines, evaluation and tracking."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from rluf.config.base import ADVANCED, SettingsSection, refuse_list

ClusterRole = Literal["rollout", "reward", "learner"]
MIN_CPUS_BY_ROLE: Mapping[str, float] = {"rollout": 0.5, "learner": 0.5, "reward": 0.1, "reward_training": 0.2}
CPUS_PER_GPU = 1.0
"""Ray CPUs reserved per actor: one per GPU, at least those of its role.

Reservations place actors and limit nothing. On CPUs the actors are active in turn, so a run fits on two cores.
"""

RESUME_WITH_PATTERN = re.compile(
    r"learner\.(learning_rate|critic_learning_rate|warmup_steps|learning_rate_decay|adam_betas)"
    r"|algorithm\.(kl_coef|kl_target|kl_horizon|kl_budget|entropy_coef|clip|epochs|mini_batches)"
    r"|algorithm\.(importance_correction|importance_correction_cap|overlong_buffer|truncated|hacking_alarms)"
    r"|aggregation\.(floors|multipliers)(\.\w+)?|objectives\.\w+\.weight"
)
"""Settings that run.resume_with may name: the state of a checkpoint has a meaning with any value of them."""

READER_MODEL = "smollm2-135m-instruct"
"""Frozen model behind the ground truth of the simulated users (rluf.simulate.reader_model)."""


class EvaluateSettings(SettingsSection):
    """Comparison of the base and the aligned policy on test prompts and new users."""

    candidate: str | None = None
    """Policy folder that `python -m rluf.evaluate` compares with the base; none means the newest run's policy."""
    prompts: int = Field(default=109, ge=2)
    """Prompts of the test split to use (all of them if there are fewer)."""
    samples_per_prompt: int = Field(default=3, ge=1)
    """Responses per prompt and policy."""
    simulated_users: int = Field(default=10_000, ge=0)
    """New simulated users (rluf.simulate) per policy whose reactions decide; 0 for prompts of real users."""
    monitors: tuple[str, ...] = ()
    """Further monitors of the replies as module:name, with alarms in training and in the comparison."""


class ClusterSettings(SettingsSection):
    """Ray cluster and the resources of each actor."""

    gpus_per_engine: float = Field(default=0.0, ge=0)
    """GPUs per rollout actor, whose engine is tensor-parallel over them; 0 runs vLLM's CPU build."""
    gpus_per_learner: float = Field(default=0.0, ge=0)
    """GPUs per learner; 0 runs on the CPU with gloo."""
    gpus_per_reward: float = Field(default=0.0, ge=0)
    """GPUs per reward actor, which scores; fractions share a GPU."""
    gpus_per_reward_worker: Annotated[float | None, ADVANCED] = Field(default=None, ge=0)
    """GPUs per reward training worker, which runs before the policy's actors; none means gpus_per_reward."""
    node_labels: Annotated[dict[ClusterRole, dict[str, str]], refuse_list("{learner: {pool: gpu}}")] = Field(
        default_factory=dict
    )
    """Ray node labels required by role (rollout, reward, learner), such as {learner: {pool: gpu}}."""
    threads_per_actor: Annotated[int, ADVANCED] = Field(default=0, ge=0)
    """Compute threads per actor; 0 divides the machine's cores by the number of learners."""
    max_restarts_per_hour: int = Field(default=3, ge=0)
    """Restarts per hour of one actor (or of all learners together) before the run stops."""

    def get_role_resources(self, role: str) -> tuple[float, float]:
        """Ray CPUs and GPUs that one actor of `role` (or a worker of reward_training) reserves."""
        gpus = {
            "rollout": self.gpus_per_engine,
            "learner": self.gpus_per_learner,
            "reward": self.gpus_per_reward,
            "reward_training": self.reward_training_gpus,
        }[role]
        return max(MIN_CPUS_BY_ROLE[role], CPUS_PER_GPU * gpus), gpus

    @property
    def reward_training_gpus(self) -> float:
        """GPUs of one reward training worker."""
        return self.gpus_per_reward if self.gpus_per_reward_worker is None else self.gpus_per_reward_worker

    def get_role_labels(self, role: str) -> dict[str, str]:
        """Labels required of the nodes that actors of `role` run on, value by key."""
        return next((dict(labels) for name, labels in self.node_labels.items() if name == role), {})


class TimeoutSettings(SettingsSection):
    """Deadlines in seconds. A call past its deadline ends the run and names the actor it waited for."""

    call_s: float = Field(default=600.0, gt=0)
    """One call to an actor: generation of a group, a learner step, a checkpoint, one phase of a weight sync."""
    reward_training_s: float = Field(default=1800.0, gt=0)
    """Training of all reward models."""
    actor_start_s: float = Field(default=180.0, gt=0)
    """Placement and start of the actors."""
    autoscale_s: Annotated[float, ADVANCED] = Field(default=0.0, ge=0)
    """Growth of an autoscaling cluster to the planned size; 0 refuses at once when resources are missing."""
    serve_request_s: float = Field(default=30.0, gt=0)
    """One request to the service before it gets 503; also the grace period of running requests at shutdown."""


class TrackingSettings(SettingsSection):
    """W&B and console."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when WANDB_API_KEY is set, else offline. tracking.trackers names others, such as tensorboard."""
    project: str = "rluf"
    """W&B project."""
    group: Annotated[str | None, ADVANCED] = None
    """W&B group of the run; none means the configuration's name. All runs of a sweep share one."""
    tags: Annotated[tuple[str, ...], ADVANCED] = ()
    """W&B tags of the run, in addition to algorithm and policy."""
    trackers: tuple[str, ...] = ()
    """Further trackers of step metrics and summary: tensorboard, mlflow, or module:function (settings, run folder) ->
    tracker."""


class RunSettings(SettingsSection):
    """Outputs of a run, and resuming."""

    root: str | None = None
    """Folder of run folders; none means $RLUF_RUNS, else ./runs (~/rluf/runs in a packaged Ray job)."""
    cache: str | None = None
    """Folder of finished artifacts and converted models; none means $RLUF_CACHE, else ~/.cache/rluf."""
    resume: str | None = None
    """Resume from the newest complete checkpoint of this run folder or upload URL; latest (--resume) uses the newest
    run."""
    resume_with: Annotated[tuple[str, ...], ADVANCED] = ()
    """Settings that the resumed run may change, such as [learner.learning_rate]: learning rate and schedule, KL, clips,
    updates per batch, floors, weights of objectives."""
    checkpoint_upload_url: str | None = None
    """Storage URL known to fsspec (s3://, gs://, file://) that gets a copy of each checkpoint."""
    deterministic: bool = False
    """Sample and score one response at a time: slower, but bit-reproducible on CPUs with algorithm.max_staleness=0."""

    @field_validator("resume_with")
    @classmethod
    def _check_resume_with(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            if not RESUME_WITH_PATTERN.fullmatch(key):
                raise ValueError(
                    f"{key!r} cannot change when a run is resumed; name learning rate, schedule, KL, clips, updates "
                    "per batch, floors or weights of objectives by their full keys, or start a new run"
                )
        return keys
