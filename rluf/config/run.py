"""Settings of the run itself: where it writes, what it runs on, how it is evaluated and tracked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rluf.config.base import Section


class EvaluateSettings(Section):
    """Base against aligned policy on unseen prompts and new users."""

    candidate: str | None = None
    """Policy folder that `python -m rluf.evaluate` compares with the base; none means the newest run's policy."""
    prompts: int = Field(default=109, ge=2)
    """Prompts of the test split (all of them if there are fewer)."""
    samples_per_prompt: int = Field(default=3, ge=1)
    """Responses a policy gives to each prompt."""
    users: int = Field(default=2000, ge=10)
    """New simulated users an arm of the A/B comparison (only where the simulator is the judge)."""
    responses_per_user: int = Field(default=20, ge=1)
    """Responses each new user reads."""
    simulated_users: bool = True
    """Let the simulated users of rluf.simulate judge; off for logs of real users."""


class ClusterSettings(Section):
    """What the actors run on."""

    address: str | None = None
    """Ray address; none uses RAY_ADDRESS, else the local cluster, else starts one on this machine."""
    gpus_per_engine: float = Field(default=0.0, ge=0)
    """GPUs of one rollout actor (a multiple of tensor_parallel); 0 runs vLLM's CPU build."""
    gpus_per_learner: float = Field(default=0.0, ge=0)
    """GPUs of one learner rank; 0 runs on the CPU with gloo."""
    gpus_per_reward: float = Field(default=0.0, ge=0)
    """GPUs of one reward actor or reward training worker; fractions share a GPU."""
    cpus_per_engine: float = Field(default=0.5, gt=0)
    """Ray CPUs that one rollout actor reserves."""
    cpus_per_learner: float = Field(default=0.5, gt=0)
    """Ray CPUs that one learner rank reserves."""
    cpus_per_reward: float = Field(default=0.2, gt=0)
    """Ray CPUs that one reward actor reserves."""
    labels: tuple[str, ...] = ()
    """role:key=value triples: actors of the role (rollout, reward, learner) go to nodes that have this Ray label."""
    threads: int = Field(default=0, ge=0)
    """Compute threads an actor; 0 means all cores of the machine divided by learner ranks."""
    grow_deadline_s: float = Field(default=0.0, ge=0)
    """Seconds to wait for an autoscaling cluster to grow to what the plan needs; 0 refuses at once."""
    start_deadline_s: float = Field(default=180.0, gt=0)
    """Seconds the actors may take to be placed and ready before the run stops and names the missing ones."""
    heartbeat_s: float = Field(default=30.0, gt=0)
    """Seconds between health checks of each actor; one that misses two is ended and started again."""
    restarts_per_hour: int = Field(default=3, ge=0)
    """Times an hour that each actor (or the learners together) may be started again before the run stops."""

    def labels_of(self, role: str) -> dict[str, str]:
        """The labels that nodes for actors of `role` must have, value by key."""
        pairs = (one.partition(":")[2] for one in self.labels if one.partition(":")[0] == role)
        return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


class TrackingSettings(Section):
    """W&B and console."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online with WANDB_API_KEY, offline without."""
    project: str = "rluf"
    """W&B project."""
    samples: int = Field(default=16, ge=0)
    """Samples kept side by side in the report and the W&B table."""


class RunSettings(Section):
    """Where a run writes."""

    root: str | None = None
    """Folder of run folders; none means $RLUF_RUNS, else ./runs (~/rluf/runs in a packaged Ray job)."""
    cache: str | None = None
    """Folder of finished stages and converted models; none means $RLUF_CACHE, else ~/.cache/rluf."""
    reuse: bool = True
    """Reuse finished stages whose content hash matches."""
    profile_steps: int = Field(default=0, ge=0)
    """Steps, from the second on, to profile into <run folder>/profile: learner traces and a timeline of all actors."""
    resume: str | None = None
    """Go on from the newest whole checkpoint of this run folder or upload; latest (--resume) means the newest run's."""
    upload: str | None = None
    """URL of storage that fsspec knows (s3://, gs://, file://) which gets a copy of each checkpoint, beside the run."""
    deterministic: bool = False
    """Sample and score one response at a time: slower, but staleness 0 gives the same bits again on CPUs."""
