"""Settings of the run itself: outputs, cluster, deadlines, evaluation and tracking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rluf.config.base import SettingsSection

ActorRole = Literal["rollout", "reward", "learner"]
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
    users: int = Field(default=2000, ge=10)
    """New simulated users per arm of the A/B comparison (only with simulated_users)."""
    responses_per_user: int = Field(default=20, ge=1)
    """Responses that each new user reads."""
    simulated_users: bool = True
    """Compare by the reactions of simulated users (rluf.simulate); turn it off for logs of real users."""
    monitors: tuple[str, ...] = ()
    """Further monitors of the replies as module:name, with alarms in training and in the comparison."""


class ClusterSettings(SettingsSection):
    """Ray cluster and the resources of each actor."""

    address: str | None = None
    """Ray address; none uses RAY_ADDRESS, else the local cluster, else starts one on this machine."""
    gpus_per_engine: float = Field(default=0.0, ge=0)
    """GPUs per rollout actor (a multiple of tensor_parallel); 0 runs vLLM's CPU build."""
    gpus_per_learner: float = Field(default=0.0, ge=0)
    """GPUs per learner; 0 runs on the CPU with gloo."""
    gpus_per_reward: float = Field(default=0.0, ge=0)
    """GPUs per reward actor or reward training worker; fractions share a GPU."""
    cpus_per_engine: float = Field(default=0.5, gt=0)
    """Ray CPUs reserved per rollout actor."""
    cpus_per_learner: float = Field(default=0.5, gt=0)
    """Ray CPUs reserved per learner."""
    cpus_per_reward: float = Field(default=0.2, gt=0)
    """Ray CPUs reserved per reward actor."""
    node_labels: dict[ActorRole, dict[str, str]] = Field(default_factory=dict)
    """Ray node labels required by role (rollout, reward, learner), such as {learner: {pool: gpu}}."""
    threads_per_actor: int = Field(default=0, ge=0)
    """Compute threads per actor; 0 divides the machine's cores by the number of learners."""
    health_check_interval_s: float = Field(default=30.0, gt=0)
    """Seconds between health checks of an actor; one that misses two is killed and restarted."""
    max_restarts_per_hour: int = Field(default=3, ge=0)
    """Restarts per hour of one actor (or of all learners together) before the run stops."""

    @field_validator("node_labels", mode="before")
    @classmethod
    def _refuse_entry_strings(cls, value: object) -> object:
        if not isinstance(value, (list, tuple)):
            return value
        labels: dict[str, list[str]] = {}
        for entry in value:
            role, _, label = str(entry).partition(":")
            labels.setdefault(role, []).append(": ".join(label.split("=", 1)))
        mapping = ", ".join(f"{role}: {{{', '.join(pairs)}}}" for role, pairs in labels.items())
        raise ValueError(f"expected a mapping by role, got a list; write {{{mapping}}}")

    def labels_for_role(self, role: str) -> dict[str, str]:
        """Labels required of the nodes that actors of `role` run on, value by key."""
        return next((dict(labels) for name, labels in self.node_labels.items() if name == role), {})


class TimeoutSettings(SettingsSection):
    """Deadlines in seconds. A call past its deadline ends the run and names the actor it waited for."""

    rollout_s: float = Field(default=300.0, gt=0)
    """Generation of one group."""
    learner_step_s: float = Field(default=600.0, gt=0)
    """One learner step, and one checkpoint."""
    weight_sync_s: float = Field(default=120.0, gt=0)
    """One phase of a weight sync."""
    reward_training_s: float = Field(default=1800.0, gt=0)
    """Training of all reward models."""
    actor_start_s: float = Field(default=180.0, gt=0)
    """Placement and start of the actors."""
    autoscale_s: float = Field(default=0.0, ge=0)
    """Growth of an autoscaling cluster to the planned size; 0 refuses at once when resources are missing."""


class TrackingSettings(SettingsSection):
    """W&B and console."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when WANDB_API_KEY is set, else offline."""
    project: str = "rluf"
    """W&B project."""
    sample_table_rows: int = Field(default=16, ge=0)
    """Rows of the sample table in the report and in W&B."""
    trackers: tuple[str, ...] = ()
    """Further trackers of step metrics and summary: module:function (settings, run folder) -> tracker."""


class RunSettings(SettingsSection):
    """Outputs of a run, and resuming."""

    root: str | None = None
    """Folder of run folders; none means $RLUF_RUNS, else ./runs (~/rluf/runs in a packaged Ray job)."""
    cache: str | None = None
    """Folder of finished artifacts and converted models; none means $RLUF_CACHE, else ~/.cache/rluf."""
    reuse: bool = True
    """Reuse cached artifacts whose content hash matches."""
    profile_steps: int = Field(default=0, ge=0)
    """Steps to profile, from step 2 on, into <run folder>/profile: learner traces and a timeline of all actors."""
    resume: str | None = None
    """Resume from the newest complete checkpoint of this run folder or upload URL; latest (--resume) uses the newest
    run."""
    checkpoint_upload_url: str | None = None
    """Storage URL known to fsspec (s3://, gs://, file://) that gets a copy of each checkpoint."""
    deterministic: bool = False
    """Sample and score one response at a time: slower, but bit-reproducible on CPUs with algorithm.max_staleness=0."""
