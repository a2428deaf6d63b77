"""Settings of the reward models, the objectives they score, and how objectives become one reward."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from rluf.config.base import ADVANCED, ActorCount, SettingsSection, refuse_list
from rluf.config.objectives import ObjectiveSpec, describe_invalid_name, find_objective_spec

HEAD_SETTING_KEYS = ("loss", "debias")
"""Keys of a reward model section that stay per head when several heads share one backbone."""
REACTION_HEADS = ("continued", "thumbs", "dislike")
"""Heads of a shared backbone that are not objectives: labels in the reaction log next to love's."""

MIN_AUTO_TOKENS, MAX_AUTO_TOKENS = 96, 512
"""Limits of max_tokens=auto. Rows of the shipped sample log have 72 tokens or fewer (95%), so there it is 96; encoders
such as BERT have 512 positions, and longer rows would take more memory than a user who set nothing expects."""


Pooling = Literal["last", "response_end", "mean"]
"""Tokens that a head reads; EnsembleMemberSettings.pooling explains them."""


class HeadReading(NamedTuple):
    """Where a head reads a backbone: after how many of the lowest layers (0: all), and which tokens."""

    layers: int = 0
    pooling: Pooling = "last"


class EnsembleMemberSpec(NamedTuple):
    """One resolved ensemble member: backbone, number of lowest layers to keep (0: all), its input and its pooling."""

    backbone: str
    layers: int
    uses_section_backbone: bool
    """Trained as this section configures it. A member on another backbone, of responses only, or with another pooling
    than `last` gets a fitted head and is not trained."""
    response_only: bool = False
    """Reads the response without the conversation."""
    pooling: Pooling = "last"

    @property
    def reading(self) -> HeadReading:
        """Where this member's head reads its backbone."""
        return HeadReading(self.layers, self.pooling)


class EnsembleMemberSettings(SettingsSection):
    """One member of a reward model ensemble."""

    layers: int = Field(default=0, ge=0)
    """Lowest layers of the backbone to keep; 0 keeps all."""
    backbone: str | None = None
    """Backbone of this member; none means the section's. A member on another one gets a fitted head only."""
    input: Literal["conversation", "response"] = "conversation"
    """What the member reads: the rendered conversation, or the response alone."""
    pooling: Pooling = "last"
    """Where the head reads. last: the last token of a decoder (with read_at_next_turn, of the next turn's header), an
    encoder's own pooler. Decoders only: response_end (the response's last token) and mean (over its tokens)."""


class EnsembleSettings(SettingsSection):
    """An ensemble of reward models; by default a single model with all layers."""

    members: tuple[EnsembleMemberSettings, ...] = ()
    """Ensemble members, such as [{layers: 12}, {layers: 12, pooling: mean}, {backbone: minilm, input: response}]; empty
    means one model with all layers. Members on another backbone, of responses only, or with another pooling than last
    stay frozen and get a fitted head."""
    shared_head: bool = False
    """Fit one linear head on the concatenated features of all members instead of averaging one logit per member. Ranks
    better on small data, but gives no ensemble spread. Requires epochs=0 and linear_probe=true."""

    @field_validator("members", mode="before")
    @classmethod
    def _refuse_member_strings(cls, value: object) -> object:
        entries = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(entry, (int, str)) for entry in entries):
            raise ValueError(
                f"expected a list of mappings, got {value!r}; write one such as "
                "[{layers: 12}, {backbone: minilm, layers: 6, input: response}]"
            )
        return value


def describe_unusable_name(name: str) -> str | None:
    """Why a key of `objectives` cannot name an objective; None if it can.

    An objective also names a section of `reward`, so it cannot be a setting there or an attribute of the sections.
    """
    if name in RewardSettings.model_fields or any(hasattr(s, name) for s in (RewardSettings, ObjectivesSettings)):
        return "the name is a setting or an attribute of a settings section; choose another one"
    return describe_invalid_name(name)


class RewardModelSettings(SettingsSection):
    """Training of one reward model. Every objective has one such section."""

    backbone: str = "minilm"
    """Embedded name (minilm, smollm2-135m-instruct, tiny), Hugging Face folder, or hub id."""
    loss: Literal["bce", "focal", "nnpu", "hinge", "bradley_terry"] = "bce"
    """For reactions and labels: bce, focal (down-weights easy rows), nnpu (positive-unlabeled), hinge. For pairs:
    bradley_terry."""
    ensemble: EnsembleSettings = EnsembleSettings()
    """Members of an ensemble, and how they are combined."""
    linear_probe: bool = False
    """Start from a head fitted by regularized logistic regression on the frozen backbone; for small data."""
    read_at_next_turn: bool = False
    """Decoders only: append the user-turn header and read the hidden state there. Encoders in an ensemble ignore it; an
    encoder on its own refuses it."""
    max_tokens: Annotated[int, Field(ge=8)] | Literal["auto"] = "auto"
    """Maximum tokens that the model reads; auto: what 95% of the training rows have, 96 to 512. The oldest text of the
    conversation is left out first, down to a quarter of the tokens, then the middle of the response."""
    epochs: int = Field(default=2, ge=0)
    """Passes over the training split; the epoch with the lowest dev log-loss is saved. 0 stops at the linear probe."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak AdamW learning rate (linear warm-up over the first tenth, then linear decay)."""
    batch_rows: int = Field(default=32, ge=1)
    """Rows (or pairs) per optimizer step, over all workers."""
    frozen_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the layers, lowest first, that stays frozen together with the embeddings; 0 trains everything."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of LoRA adapters on the trained layers, merged into the checkpoint; 0 trains the full weights."""
    debias: tuple[Literal["counterfactuals", "sign_offs", "propensity", "context", "length", "users"], ...] = ()
    """Nuisance factors to remove. counterfactuals (default of love and helpfulness) adds responses that do not fit the
    prompt, are generic, echo the user, are cut or loop, and must score lower; sign_offs adds copies of rows with a
    farewell or an affectionate close and the same label; propensity weights reactions by the inverse reaction rate;
    context (fitted heads only) fits turn, user activity and model version with the head and leaves them out of the
    score; length and users (per-user reaction rate) are fitted first as offsets and left out of the score."""

    @property
    def token_limit(self) -> int:
        """`max_tokens` as a number; the least that auto can become, before training resolves it."""
        return MIN_AUTO_TOKENS if self.max_tokens == "auto" else self.max_tokens

    @property
    def member_specs(self) -> tuple[EnsembleMemberSpec, ...]:
        """The models to train, in order; a single one with all layers when `ensemble.members` is empty."""
        return tuple(
            EnsembleMemberSpec(
                backbone=member.backbone or self.backbone,
                layers=member.layers,
                uses_section_backbone=member.backbone is None
                and member.input == "conversation"
                and member.pooling == "last",
                response_only=member.input == "response",
                pooling=member.pooling,
            )
            for member in self.ensemble.members or (EnsembleMemberSettings(),)
        )

    @property
    def reads_response_tokens(self) -> bool:
        """Whether any member reads other tokens than the last one."""
        return any(member.pooling != "last" for member in self.member_specs)

    def list_shared_readings(self, member: EnsembleMemberSpec) -> tuple[HeadReading, ...]:
        """Where one forward pass is read for `member` and for the members that share it, shallowest first.

        Only frozen backbones (a linear probe without epochs) share a pass; otherwise the result is the member's own.
        """
        readings = {
            other.reading
            for other in self.member_specs
            if (other.backbone, other.response_only) == (member.backbone, member.response_only)
        }
        # 0 means all layers. Their number is unknown without the model, so 0 cannot be ordered among the others.
        depths = {reading.layers for reading in readings}
        if self.epochs or not self.linear_probe or (0 in depths and len(depths) > 1):
            return (member.reading,)
        return tuple(sorted(readings))


class RewardSettings(SettingsSection):
    """Reward model training on Ray Train, and scoring by the trained models.

    Further objectives have further sections, which use the defaults of RewardModelSettings.
    """

    model_config = ConfigDict(extra="allow")
    further_section: ClassVar[type[SettingsSection]] = RewardModelSettings
    __pydantic_extra__: dict[str, RewardModelSettings] = Field(init=False)

    love: RewardModelSettings = RewardModelSettings(debias=("counterfactuals",))
    """P[Love], trained on reactions."""
    helpfulness: RewardModelSettings = RewardModelSettings(loss="bradley_terry", debias=("counterfactuals",))
    """Helpfulness, trained on preference pairs."""
    safety: RewardModelSettings = RewardModelSettings(epochs=6)
    """Safety, trained on labels."""
    objectives: tuple[str, ...] = ()
    """Objectives that python -m rluf.reward trains; empty means every objective whose source is a model."""
    shared_backbone_heads: tuple[str, ...] = ()
    """Heads trained together on one backbone and scored by one forward pass; empty means one model per objective. The
    first head's section sets backbone, lengths, epochs and rates; loss, calibration and debias are per head (continued,
    thumbs and dislike use love's)."""
    workers: ActorCount | tuple[ActorCount, ActorCount] = 1
    """Ray Train workers (data-parallel ranks) per reward model; [min, max] makes training elastic."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage of reward training."""

    @property
    def by_objective(self) -> dict[str, RewardModelSettings]:
        """Reward model settings by objective name: the built-in objectives, then the others that have a section."""
        return {name: value for name, value in self if isinstance(value, RewardModelSettings)}

    @property
    def max_workers(self) -> int:
        """Number of workers when the cluster has room for all."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def get_head_settings(self, head: str) -> RewardModelSettings:
        """Section that configures `head`: that of its objective, by default RewardModelSettings().

        continued, thumbs and dislike are reaction labels, so they use love's section.
        """
        if head == "dislike":
            # Counterfactual copies must score lower, but a response that does not fit is disliked more.
            debias = tuple(factor for factor in self.love.debias if factor != "counterfactuals")
            return self.love.model_copy(update={"debias": debias})
        if head in REACTION_HEADS:
            return self.love
        return self.by_objective.get(head) or RewardModelSettings()

    def get_shared_backbone_settings(self, head: str, lead_head: str) -> RewardModelSettings:
        """Settings of `head` on a shared backbone: the section of `lead_head` with the head's own HEAD_SETTING_KEYS."""
        head_settings = self.get_head_settings(head)
        return self.get_head_settings(lead_head).model_copy(
            update={key: getattr(head_settings, key) for key in HEAD_SETTING_KEYS}
        )


class ObjectiveSettings(SettingsSection):
    """One objective of the policy: its weight and the source of its scores."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of the score normalized on the reference policy; 0 measures the objective without optimizing it."""
    source: Literal["model", "judge", "function", "serve"] = "model"
    """Source of the scores: a trained reward model, a rule judge, your own function, or a service of rluf.serve."""
    path: str | None = None
    """Source model: folder or hub id of a reward model (rluf's, or any Hugging Face model for sequence classification)
    to use without training; none trains or reuses one. Source judge: a name of
    rluf.objectives.judges, or module:function. Source function: module:function of a list of rows (messages, response,
    prompt_id, topic, and the fields of the prompt's row) that returns one number each, plain or async. Source serve:
    URL of the service."""
    replicas: int = Field(default=1, ge=1)
    """Reward actors in this objective's pool."""
    gate: Literal["auto", "must_rise", "must_hold", "none"] = "auto"
    """Release gate: must_rise (lift clear of zero), must_hold (no clear fall) or none; auto: must_rise for love,
    must_hold for every other objective."""

    @property
    def rule_arguments(self) -> dict[str, str]:
        """Arguments of rluf.objectives.judges.build_rule_scorer, for the sources judge and function."""
        return {"judge" if self.source == "judge" else "reward": str(self.path)}


class ObjectivesSettings(SettingsSection):
    """The objectives by name: these three, and any other name. They are combined by name, never by position."""

    model_config = ConfigDict(extra="allow")
    further_section: ClassVar[type[SettingsSection]] = ObjectiveSettings
    __pydantic_extra__: dict[str, ObjectiveSettings] = Field(init=False)

    love: ObjectiveSettings = ObjectiveSettings(weight=0.3)
    """P[Love]: the probability of a Love Reaction."""
    helpfulness: ObjectiveSettings = ObjectiveSettings(weight=0.5)
    """Whether the response serves the request."""
    safety: ObjectiveSettings = ObjectiveSettings(weight=0.2)
    """Whether the response is harmless."""

    @property
    def by_objective(self) -> dict[str, ObjectiveSettings]:
        """Objective settings by name: the built-in ones, then the others in the order of the settings."""
        return {name: value for name, value in self if isinstance(value, ObjectiveSettings)}

    @property
    def specs(self) -> dict[str, ObjectiveSpec]:
        """The table's entry of each objective, with the gate that the settings give it."""
        specs = {}
        for name, objective in self.by_objective.items():
            spec = find_objective_spec(name)
            specs[name] = spec if objective.gate == "auto" else replace(spec, gate=objective.gate)
        return specs

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.__pydantic_extra__ or ():
            problem = describe_unusable_name(name)
            if problem is not None:
                raise ValueError(f"{name!r} cannot name an objective: {problem}")
        return self


class ControllerGains(SettingsSection):
    """PID controller of the multipliers of aggregation.floors; shortfalls are in standard deviations of the reference
    policy."""

    proportional: Annotated[float, ADVANCED] = Field(default=1.0, ge=0)
    """Multiplier per standard deviation of the running shortfall beyond one standard error."""
    integral: Annotated[float, ADVANCED] = Field(default=0.1, ge=0)
    """Multiplier per accumulated standard deviation times step."""
    derivative: Annotated[float, ADVANCED] = Field(default=0.5, ge=0)
    """Multiplier per standard deviation by which the shortfall grew in a step."""
    integral_cap: Annotated[float, ADVANCED] = Field(default=2.0, ge=0)
    """Largest multiplier that the accumulated shortfall gives."""
    window_steps: Annotated[float, ADVANCED] = Field(default=8.0, ge=1)
    """Steps that the running shortfall averages over; 1 uses the last step alone."""


class AggregationSettings(SettingsSection):
    """How the scores of all objectives become one reward per sample."""

    method: Literal["linear", "calibrated", "gdpo", "constrained"] = "linear"
    """linear: weighted sum of normalized scores; calibrated: of scores relative to the base policy's response (CGPO);
    gdpo: of per-objective advantages; constrained: under floors with PID-controlled multipliers."""
    topic_objectives: Annotated[dict[str, str], refuse_list("{risky: safety}")] = Field(
        default_factory=lambda: {"risky": "safety"}
    )
    """Objective by topic: on prompts of the topic only that objective counts (CGPO's task split)."""
    floors: Annotated[dict[str, float], refuse_list("{safety: 0}")] = Field(default_factory=dict)
    """Floor by objective for method=constrained: a mean score in standard deviations within a prompt of the reference
    policy."""
    multipliers: ControllerGains = ControllerGains()
    """Controller of the floors' multipliers."""
    gate_judges: tuple[str, ...] = ()
    """Rule judges (rluf.objectives.judges) used as gates: a failing response gets a fixed negative advantage."""
    uncertainty_penalty: float = Field(default=0.0, ge=0)
    """Standard deviations of the ensemble members' logits subtracted from their mean (lower confidence bound); 0 uses
    the mean."""

    def get_topic_weights(self, objectives: ObjectivesSettings, topic: str) -> dict[str, float]:
        """Weight of each objective on prompts of `topic`: the configured ones, or 1 for the topic's objective only."""
        owner = self.topic_objectives.get(topic)
        if owner is None:
            return {name: objective.weight for name, objective in objectives.by_objective.items()}
        return {name: float(name == owner) for name in objectives.by_objective}
