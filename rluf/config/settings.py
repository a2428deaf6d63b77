"""The whole settings tree and the rules between its keys."""

from __future__ import annotations

from pydantic import Field, model_validator

from rluf.config.base import Section
from rluf.config.cpu_dtype import Dtype, cpu_dtype
from rluf.config.data import DataSettings, PrepareSettings, SimulateSettings
from rluf.config.policy import (
    AlgorithmSettings,
    LearnerSettings,
    ModelSettings,
    PublishSettings,
    RolloutSettings,
)
from rluf.config.reward import ObjectivesSettings, RewardSettings
from rluf.config.rules import broken_rule
from rluf.config.run import ClusterSettings, EvaluateSettings, RunSettings, TrackingSettings
from rluf.config.serve import ServeSettings


class Settings(Section):
    """Everything a command can be told. YAML files and key=value overrides fill it; `--dry-run` prints it."""

    name: str = Field(default="quickstart", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the configuration; run folders are <root>/<name>/<time>."""
    seed: int = Field(default=1, ge=0)
    """Seed of sampling, splits, initialisation and bootstrap."""
    run: RunSettings = RunSettings()
    """Where the run writes."""
    model: ModelSettings = ModelSettings()
    """The policy."""
    data: DataSettings = DataSettings()
    """Raw data."""
    simulate: SimulateSettings = SimulateSettings()
    """Simulated users."""
    prepare: PrepareSettings = PrepareSettings()
    """From raw rows to training data."""
    reward: RewardSettings = RewardSettings()
    """Reward model training."""
    objectives: ObjectivesSettings = ObjectivesSettings()
    """What the policy is moved towards."""
    rollout: RolloutSettings = RolloutSettings()
    """vLLM rollout actors."""
    algorithm: AlgorithmSettings = AlgorithmSettings()
    """Policy-gradient method."""
    learner: LearnerSettings = LearnerSettings()
    """DeepSpeed learner actors."""
    publish: PublishSettings = PublishSettings()
    """Weights from learner to engines."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Base against aligned."""
    serve: ServeSettings = ServeSettings()
    """Reward models and policies over HTTP."""
    cluster: ClusterSettings = ClusterSettings()
    """What the actors run on."""
    tracking: TrackingSettings = TrackingSettings()
    """W&B and console."""

    @property
    def policy_dtype(self) -> Dtype:
        """Compute type of engines and learners, with what auto means on this machine."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "bfloat16" if self.policy_gpus > 0 else cpu_dtype()

    @property
    def policy_gpus(self) -> float:
        """GPUs of an engine or a learner, whichever has more; 0 when both are on CPUs."""
        return max(self.cluster.gpus_per_engine, self.cluster.gpus_per_learner)

    @property
    def reward_dtype(self) -> Dtype:
        """Compute type of reward training, with what auto means on this machine."""
        if self.reward.dtype != "auto":
            return self.reward.dtype
        return "bfloat16" if self.cluster.gpus_per_reward > 0 else cpu_dtype()

    @model_validator(mode="after")
    def _pairs(self) -> Settings:
        problem = broken_rule(self)
        if problem is not None:
            raise ValueError(problem)
        return self
