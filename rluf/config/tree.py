"""All settings sections in one tree, before the rules between its keys are checked."""

from __future__ import annotations

from pydantic import Field

from rluf.config.base import SettingsSection
from rluf.config.cpu_dtype import Dtype, detect_cpu_dtype
from rluf.config.data import DataSettings, PrepareSettings, SimulateSettings
from rluf.config.policy import (
    AlgorithmSettings,
    LearnerSettings,
    ModelSettings,
    RolloutSettings,
    WeightSyncSettings,
)
from rluf.config.reward import AggregationSettings, ObjectivesSettings, RewardSettings
from rluf.config.run import (
    MIN_CPUS_BY_ROLE,
    ClusterSettings,
    EvaluateSettings,
    RunSettings,
    TimeoutSettings,
    TrackingSettings,
)
from rluf.config.serve import ServeSettings


class SettingsTree(SettingsSection):
    """All settings of all commands, and the values derived from several sections."""

    name: str = Field(default="quickstart", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the configuration; run folders are <root>/<name>/<time>."""
    seed: int = Field(default=1, ge=0, lt=2**31)
    """Seed of sampling, splits, initialization and bootstrap."""
    run: RunSettings = RunSettings()
    """Outputs of a run, and resuming."""
    model: ModelSettings = ModelSettings()
    """The policy."""
    data: DataSettings = DataSettings()
    """Raw data."""
    simulate: SimulateSettings = SimulateSettings()
    """Simulated users."""
    prepare: PrepareSettings = PrepareSettings()
    """Raw rows to training data."""
    reward: RewardSettings = RewardSettings()
    """Reward models."""
    objectives: ObjectivesSettings = ObjectivesSettings()
    """Objectives of the policy."""
    aggregation: AggregationSettings = AggregationSettings()
    """Scores of all objectives to one reward."""
    rollout: RolloutSettings = RolloutSettings()
    """vLLM rollout actors."""
    algorithm: AlgorithmSettings = AlgorithmSettings()
    """Policy-gradient method."""
    learner: LearnerSettings = LearnerSettings()
    """DeepSpeed learner actors."""
    weight_sync: WeightSyncSettings = WeightSyncSettings()
    """Weights from learners to engines."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Base against aligned policy."""
    serve: ServeSettings = ServeSettings()
    """HTTP service."""
    cluster: ClusterSettings = ClusterSettings()
    """Ray cluster and resources."""
    timeouts: TimeoutSettings = TimeoutSettings()
    """Deadlines of a run."""
    tracking: TrackingSettings = TrackingSettings()
    """W&B and console."""

    @property
    def policy_dtype(self) -> Dtype:
        """Compute dtype of engines and learners, with auto resolved for this machine."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "bfloat16" if self.policy_gpus > 0 else detect_cpu_dtype()

    @property
    def tensor_parallel(self) -> int:
        """GPUs over which each engine is tensor-parallel: all of its own."""
        return max(1, int(self.cluster.gpus_per_engine))

    @property
    def is_colocated(self) -> bool:
        """Whether engines and learners share the same GPUs."""
        return self.weight_sync.transport == "cuda_ipc"

    def get_reward_actor_resources(self, objective: str) -> tuple[float, float]:
        """Ray CPUs and GPUs of one reward actor of `objective`; only an actor with a model in it has a GPU."""
        if self.objectives.by_objective[objective].source == "model":
            return self.cluster.get_role_resources("reward")
        return MIN_CPUS_BY_ROLE["reward"], 0.0

    @property
    def policy_gpus(self) -> float:
        """GPUs per engine or learner, whichever is larger; 0 when both run on CPUs."""
        return max(self.cluster.gpus_per_engine, self.cluster.gpus_per_learner)

    @property
    def reward_dtype(self) -> Dtype:
        """Compute dtype of reward training: the policy's; where only one of them has GPUs, the device's usual one."""
        is_on_gpu = self.cluster.reward_training_gpus > 0
        if is_on_gpu == (self.policy_gpus > 0):
            return self.policy_dtype
        return "bfloat16" if is_on_gpu else "float32"
