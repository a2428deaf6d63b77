"""Settings of the reward models and of the objectives they serve."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from rluf.config.base import Section

Count = Annotated[int, Field(ge=1)]


OF_HEAD = ("loss", "margin", "positive_rate", "calibration", "debias")
"""Keys of a section that stay the head's own where heads share a backbone."""


class MemberPlan(NamedTuple):
    """One model of an ensemble: its backbone, how many of the lowest layers are kept (0: all), whose it is, and what it
    reads."""

    backbone: str
    layers: int
    own: bool
    """On the section's own backbone, and so trained as the section says; others only get a fitted head."""
    response: bool = False
    """Reads the response alone, without the conversation."""


def _parts(entry: str) -> tuple[str, str, bool]:
    """Backbone, number of layers and whether the response is read alone, of `name:layers` or `name:layers:response`."""
    where = entry.removesuffix(":response")
    name, _, number = where.rpartition(":")
    return name, number, where != entry


class RewardModelSettings(Section):
    """How one reward model is trained. Every objective has one such section."""

    backbone: str = "minilm"
    """Embedded name (minilm, smollm2-135m-instruct, tiny), Hugging Face folder, or hub id."""
    loss: Literal["bce", "focal", "nnpu", "hinge", "bradley_terry"] = "bce"
    """For reactions and labels: bce, focal (hard rows count more), nnpu (no reaction is not a no), hinge. For pairs:
    bradley_terry."""
    margin: float = Field(default=0.0, ge=0)
    """Logits by which the chosen side shall win (bradley_terry), or a verdict be right (hinge, where 0 means 1)."""
    positive_rate: float = Field(default=0.2, gt=0, lt=1)
    """Share of responses that are truly liked, reacted to or not; for loss nnpu alone."""
    layers: tuple[int | str, ...] = ()
    """Lowest layers of the backbone that are kept. Several make an ensemble, a member each; none keeps all. A member on
    another backbone is `name:layers`; that one stays as it is and gets a fitted head. `name:layers:response` is one
    that reads the response alone."""
    fuse: bool = False
    """One fitted head on what all members read, side by side, in place of one each whose logits are averaged. Ranks
    better on small data; the members' logits are then terms of one sum, so there is no spread. With epochs=0 alone."""
    probe: bool = False
    """Start from a head fitted by regularised logistic regression on the untouched backbone; for small data."""
    next_turn: bool = False
    """Decoders: end the text with the opening of the user's next message, where the model foresees what it will be.
    Encoders of an ensemble leave it out; an encoder alone refuses it."""
    max_tokens: int = Field(default=96, ge=8)
    """Tokens of the rendered conversation that the model reads; older text is cut first."""
    epochs: int = Field(default=2, ge=0)
    """Passes over the training split; the best epoch by dev log-loss is kept. 0 leaves it at the probe."""
    patience: int = Field(default=2, ge=0)
    """Epochs without a better dev log-loss after which training stops early; 0 runs them all."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak AdamW learning rate (linear warm-up over a tenth, then linear decay)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW weight decay."""
    batch_rows: int = Field(default=32, ge=1)
    """Rows (or pairs) an optimiser step over all workers."""
    frozen_share: float = Field(default=0.5, ge=0, le=1)
    """Embeddings and this share of the layers, lowest first, stay as they are; 0 trains everything (for large data)."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of low-rank adapters on the layers that train, merged into the checkpoint; 0 trains their whole weights."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout while training, in place of the backbone's own."""
    calibration: Literal["platt", "temperature", "isotonic", "none"] = "platt"
    """What makes the dev split's logits probabilities after prior correction; isotonic wants 1000 positives there."""
    debias: tuple[Literal["sign_offs", "propensity", "length", "users"], ...] = ()
    """What shall earn nothing: sign_offs (rows come again with a farewell or an affectionate close, label as before),
    propensity (reactions count more where few react), length, and users' own readiness to react (both fitted first,
    learnt around, and left out of the score)."""

    @field_validator("layers")
    @classmethod
    def _are_layers(cls, layers: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for entry in layers:
            name, number, _ = _parts(entry) if isinstance(entry, str) else ("own", str(entry), False)
            if not name or not number.isdecimal():
                raise ValueError(
                    f"{entry!r} is neither a number of layers nor backbone:layers; write minilm:6, or "
                    "minilm:6:response for one that reads the response alone"
                )
        return layers

    @property
    def members(self) -> tuple[MemberPlan, ...]:
        """The models to train, in order; one where `layers` is empty."""
        found = []
        for entry in self.layers or (0,):
            if isinstance(entry, int):
                found.append(MemberPlan(self.backbone, entry, own=True))
            else:
                name, number, response = _parts(entry)
                found.append(MemberPlan(name, int(number), own=False, response=response))
        return tuple(found)

    def depths(self, member: MemberPlan) -> tuple[int, ...]:
        """Numbers of layers at which one pass over the member's backbone serves it and others; its own alone if none.

        Members share a pass where the backbone stays as it is: with a fitted head and no epoch.
        """
        read = member.backbone, member.response
        alike = {other.layers for other in self.members if (other.backbone, other.response) == read}
        if self.epochs or not self.probe or 0 in alike:
            return (member.layers,)
        return tuple(sorted(alike))


class RewardSettings(Section):
    """Reward model training on Ray Train."""

    love: RewardModelSettings = RewardModelSettings()
    """P[Love], learnt from reactions."""
    helpfulness: RewardModelSettings = RewardModelSettings(loss="bradley_terry")
    """Helpfulness, learnt from preference pairs."""
    safety: RewardModelSettings = RewardModelSettings(epochs=6)
    """Safety, learnt from labels."""
    only: tuple[Literal["love", "helpfulness", "safety"], ...] = ()
    """Objectives that python -m rluf.reward trains; none means every objective whose source is a model."""
    heads: tuple[Literal["love", "continued", "thumbs", "helpfulness", "safety"], ...] = ()
    """Heads that share one backbone and are trained together and scored by one forward pass; none: a model each. The
    first one's section says backbone, lengths, epochs and rates; loss, calibration and debias are each head's own
    (continued and thumbs: love's)."""
    workers: Count | tuple[Count, Count] = 1
    """Ray Train workers (data-parallel ranks) for each reward model; two numbers are the fewest and the most, and
    training goes on with what the cluster has."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage of reward training."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of reward training (auto as in model.dtype); master weights are float32 either way. Scoring on CPUs
    is always float32."""
    retries: int = Field(default=1, ge=0)
    """Times that failed workers are started again; they go on from where training was last kept, once a minute (an
    ensemble begins again with its first member)."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Seconds one reward training may take before the run stops and names it."""

    @property
    def named(self) -> dict[str, RewardModelSettings]:
        """Reward model settings by objective name, in a fixed order."""
        return {"love": self.love, "helpfulness": self.helpfulness, "safety": self.safety}

    @property
    def most_workers(self) -> int:
        """Workers when the cluster has room for all."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def of_head(self, head: str) -> RewardModelSettings:
        """The section that says how a head is trained: continued and thumbs follow love's, with a loss of labels."""
        return self.named.get(head, self.love)

    def trained_by(self, head: str, lead: str) -> RewardModelSettings:
        """What `head` is trained by on a backbone that it shares with the first head, `lead`: the lead's section, with
        the head's own loss, calibration and debias."""
        own = self.of_head(head)
        return self.of_head(lead).model_copy(update={key: getattr(own, key) for key in OF_HEAD})


class ObjectiveSettings(Section):
    """One objective of the policy: how much it weighs and who scores it."""

    weight: float = Field(default=0.0, ge=0)
    """Weight on the score standardised on the reference policy; 0 measures without optimising."""
    source: Literal["model", "judge", "serve"] = "model"
    """model: a trained reward model; judge: a rule named by `judge`; serve: a service of rluf.serve at `path`."""
    path: str | None = None
    """Reward model folder to use as it is (source serve: URL of the service); none means: train it, or reuse it."""
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

    combine: Literal["linear", "calibrated", "gdpo", "constrained"] = "linear"
    """How objectives become one reward: weighted sum of standardised scores, of scores against the base policy's reply
    (CGPO), of advantages (GDPO), or under floors with PID multipliers."""
    floors: tuple[str, ...] = ()
    """objective:floor pairs for combine=constrained; a mean score in reference-policy standard deviations."""
    pessimism: float = Field(default=0.0, ge=0)
    """Standard deviations over an ensemble's members taken off its value; 0 takes the members' mean."""
    judges: tuple[str, ...] = ()
    """Rule judges (rluf.objectives.judges) as gates: a response that fails one earns the least of its step."""

    @property
    def bounds(self) -> dict[str, float]:
        """Floor of an objective's mean standardised score, by objective."""
        return {name: float(floor) for name, _, floor in (pair.rpartition(":") for pair in self.floors)}

    @property
    def owners(self) -> dict[str, str]:
        """Objective that alone counts on a topic, by topic."""
        return {topic: objective for topic, _, objective in (pair.rpartition(":") for pair in self.alone)}

    @property
    def named(self) -> dict[str, ObjectiveSettings]:
        """Objective settings by objective name, in the order of the fields: a new one is one more field."""
        return {name: one for name, one in self if isinstance(one, ObjectiveSettings)}

    def weights(self, topic: str) -> dict[str, float]:
        """Weight of each objective on prompts of `topic`: its own, or 1 and 0 where one of them claims the topic."""
        owner = self.owners.get(topic)
        if owner is None:
            return {name: objective.weight for name, objective in self.named.items()}
        return {name: float(name == owner) for name in self.named}
