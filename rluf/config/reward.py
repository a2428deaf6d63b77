"""Settings of the reward models and of the objectives they serve."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rluf.config.base import Section


class RewardModelSettings(Section):
    """How one reward model is trained. Every objective has one such section."""

    backbone: str = "minilm"
    """Embedded name (minilm, smollm2-135m-instruct, tiny), Hugging Face folder, or hub id."""
    loss: Literal["bce", "bradley_terry"] = "bce"
    """bce for reactions and labels (absolute), bradley_terry for pairs."""
    max_tokens: int = Field(default=96, ge=8)
    """Tokens of the rendered conversation that the model reads; older text is cut first."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the training split; the best epoch by dev log-loss is kept."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak AdamW learning rate (linear warm-up over a tenth, then linear decay)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay."""
    batch_rows: int = Field(default=32, ge=1)
    """Rows (or pairs) an optimiser step over all workers."""
    frozen_share: float = Field(default=0.5, ge=0, lt=1)
    """Embeddings and this share of the layers, lowest first, stay as they are; 0 trains everything (for large data)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout while training, in place of the backbone's own."""


class RewardSettings(Section):
    """Reward model training on Ray Train."""

    love: RewardModelSettings = RewardModelSettings()
    """P[Love], learnt from reactions."""
    helpfulness: RewardModelSettings = RewardModelSettings(loss="bradley_terry")
    """Helpfulness, learnt from preference pairs."""
    safety: RewardModelSettings = RewardModelSettings(epochs=8)
    """Safety, learnt from labels."""
    only: tuple[Literal["love", "helpfulness", "safety"], ...] = ()
    """Objectives that python -m rluf.reward trains; none means every objective whose source is a model."""
    workers: int = Field(default=1, ge=1)
    """Ray Train workers (data-parallel ranks) for each reward model."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage of reward training."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type of reward training; master weights are float32 either way. Scoring on CPUs is always float32."""
    retries: int = Field(default=1, ge=0)
    """Times that failed workers are started again; objectives already trained are kept."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Seconds one reward training may take before the run stops and names it."""

    @property
    def named(self) -> dict[str, RewardModelSettings]:
        """Reward model settings by objective name, in a fixed order."""
        return {"love": self.love, "helpfulness": self.helpfulness, "safety": self.safety}


class ObjectiveSettings(Section):
    """One objective of the policy: how much it weighs and who scores it."""

    weight: float = Field(default=0.0, ge=0)
    """Weight on the score standardised on the reference policy; 0 measures without optimising."""
    source: Literal["model", "judge"] = "model"
    """model: a trained reward model; judge: a rule named by `judge`."""
    path: str | None = None
    """Reward model folder to use as it is; none means: train it from the log, or reuse it by content hash."""
    judge: str | None = None
    """Name of the rule judge when source is judge (see rluf.objectives.judges)."""
    replicas: int = Field(default=1, ge=1)
    """Reward actors in this objective's pool."""


class ObjectivesSettings(Section):
    """The objectives by name; they combine by name, never by position."""

    love: ObjectiveSettings = ObjectiveSettings(weight=0.4)
    """P[Love]: the chance of a Love Reaction."""
    helpfulness: ObjectiveSettings = ObjectiveSettings(weight=0.4)
    """Does the response serve the request."""
    safety: ObjectiveSettings = ObjectiveSettings(weight=0.2)
    """Is the response harmless."""
    batch_tokens: int = Field(default=8192, ge=128)
    """Tokens a reward actor scores at once."""
    alone: tuple[str, ...] = ("risky:safety",)
    """topic:objective pairs; on prompts of the topic that objective alone counts (CGPO's split of tasks)."""

    @property
    def owners(self) -> dict[str, str]:
        """Objective that alone counts on a topic, by topic."""
        return {topic: objective for topic, _, objective in (pair.rpartition(":") for pair in self.alone)}

    @property
    def named(self) -> dict[str, ObjectiveSettings]:
        """Objective settings by objective name, in a fixed order."""
        return {"love": self.love, "helpfulness": self.helpfulness, "safety": self.safety}

    def weights(self, topic: str) -> dict[str, float]:
        """Weight of each objective on prompts of `topic`: its own, or 1 and 0 where one of them claims the topic."""
        owner = self.owners.get(topic)
        if owner is None:
            return {name: objective.weight for name, objective in self.named.items()}
        return {name: float(name == owner) for name in self.named}
