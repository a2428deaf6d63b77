"""Settings of the policy: its model, rollouts, the algorithm, the learners, and weight sync."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rluf.config.base import ADVANCED, SettingsSection, refuse_list

ALGORITHM_NAMES = (
    "grpo",
    "ppo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "dapo",
    "lite_ppo",
    "crpg",
    "crraft",
    "codpo",
    "kto",
    "dpo",
    "sft",
)
"""Built-in algorithms. A copy of the keys of rluf.algorithms.registry, because this layer must not import it."""

CGPO_ALGORITHMS = ("crpg", "crraft", "codpo")
"""Algorithms that expect calibrated rewards and bound the KL themselves."""
OFFLINE_ALGORITHMS = ("kto", "dpo", "sft")
"""Algorithms that train on logged responses."""

POLICY_LOSS_NAMES = ("ppo", "gspo", "cispo", "reinforce")
"""Built-in policy losses. A copy of the keys of rluf.algorithms.losses, because this layer must not import it."""

RENAMED_TRANSPORTS = {"ipc": "cuda_ipc", "adapter": "lora"}
"""Values of weight_sync.transport in earlier releases, and their present names."""


RESERVED_TEMPLATE_NAMES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
"""Variables of every chat template, which rluf and transformers set."""

Share = Annotated[float, Field(ge=0, lt=1)]

IMPORTANCE_CORRECTIONS = ("token", "sequence", "mask", "sequence_mask", "geometric", "geometric_mask", "off")


class ModelSettings(SettingsSection):
    """The policy to train; a frozen copy of it is the reference policy."""

    path: str = "smollm2-135m-instruct"
    """Embedded name (smollm2-135m-instruct, tiny), Hugging Face folder, or hub id."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype of engines, learners and reward training; master weights are always float32. auto: bfloat16 on GPUs
    and on CPUs with bfloat16 instructions, else float32, which is several times as fast there."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Leave it off unless you trust the author."""
    system_prompt: Annotated[str, ADVANCED] = ""
    """System message of conversations that have none, in training and in the saved policy's chat template."""
    examples: Annotated[tuple[tuple[str, str], ...] | None, ADVANCED] = None
    """Exchanges [user, assistant] that the policy's chat template puts after the system message, in training and in the
    saved policy. None: one for the embedded smollm2-135m-instruct, which rambles without, none for other models."""
    chat_template_args: Annotated[dict[str, bool | int | float | str], ADVANCED] = Field(default_factory=dict)
    """Variables of the chat template, such as {enable_thinking: false}; fixed in the saved policy's template too."""

    @field_validator("chat_template_args")
    @classmethod
    def _check_template_args(cls, values: dict[str, bool | int | float | str]) -> dict[str, bool | int | float | str]:
        for name in values:
            if name in RESERVED_TEMPLATE_NAMES or not name.isidentifier():
                raise ValueError(f"{name!r} cannot be set; name a variable of the model's own chat template")
        return values


class RolloutSettings(SettingsSection):
    """vLLM rollout actors."""

    engines: int = Field(default=1, ge=1)
    """Rollout actors, one vLLM engine each."""
    max_prompt_tokens: int = Field(default=192, ge=8)
    """Maximum tokens of a rendered prompt; longer prompts are quarantined, never truncated."""
    max_response_tokens: int = Field(default=64, ge=1)
    """Maximum tokens of a response."""
    temperature: float = Field(default=0.6, ge=0.01)
    """Sampling temperature in training and evaluation. Learner and engine use the same one; vLLM reads less than
    0.01 as 0.01."""
    stop: Annotated[tuple[str, ...], ADVANCED] = ()
    """Strings that end a response, in addition to the model's end-of-turn tokens; the response ends with the string."""
    concurrency: int = Field(default=64, ge=1)
    """Samples in flight per engine."""
    kv_cache_gib: float = Field(default=0.5, gt=0)
    """KV cache of a CPU engine in GiB (GPU engines use gpu_memory_share)."""
    gpu_memory_share: float = Field(default=0.85, gt=0, le=1)
    """Share of GPU memory that a GPU engine may use."""
    eager: Annotated[bool, ADVANCED] = False
    """Run GPU engines without CUDA graphs: starts faster, decodes slower. CPU engines always do."""

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, strings: tuple[str, ...]) -> tuple[str, ...]:
        if "" in strings:
            raise ValueError("an empty string would end every response at once; remove it")
        return strings


class AlgorithmSettings(SettingsSection):
    """The policy-gradient method. Three batch sizes only; everything else is derived and printed by --dry-run."""

    name: str = "grpo"
    """Algorithm: advantage estimator and loss aggregation (docs/algorithms.md has the table), or module:function."""
    loss: str | None = None
    """Policy loss: ppo, gspo, cispo, reinforce, or module:function; none uses the loss of the algorithm's own paper."""
    steps: int = Field(default=12, ge=1)
    """Optimizer steps."""
    prompts_per_step: int = Field(default=12, ge=1)
    """Batch size 1: prompts per step."""
    samples_per_prompt: int = Field(default=4, ge=2)
    """Batch size 2: samples per prompt (the group size)."""
    micro_batch_tokens: int = Field(default=1024, ge=64)
    """Batch size 3: tokens of a packed micro-batch on one learner."""
    topic_weights: Annotated[dict[str, PositiveInt], refuse_list("{risky: 3}")] = Field(
        default_factory=lambda: {"risky": 3}
    )
    """How often training prompts of a topic occur in one pass over the prompts; topics not listed occur once."""
    demonstrations: int = Field(default=3, ge=0)
    """Good logged responses, on topics of aggregation.topic_objectives, to imitate in step 1; the number then decays to
    0."""
    clip: PositiveFloat | tuple[PositiveFloat, PositiveFloat] = 0.2
    """PPO clip, or [low, high] as DAPO's [0.2, 0.28]: no gradient below a ratio of 1 - low or above 1 + high."""
    kl_coef: float = Field(default=0.05, ge=0)
    """KL penalty coefficient; 0 loads no reference policy."""
    kl_penalty: Literal["k1", "k2", "k3", "reward"] = "k3"
    """k1, k2 or k3: a loss term with that estimator (k2 has the on-policy gradient, k3 is GRPO's); reward: k1
    subtracted from the reward before advantages (as in RLOO and REINFORCE++)."""
    kl_target: float | None = Field(default=None, gt=0)
    """Target KL in nats per token; kl_coef is adapted towards it after each step. none keeps kl_coef fixed."""
    kl_horizon: Annotated[int | None, ADVANCED] = Field(default=None, ge=1)
    """Samples in which kl_target may change kl_coef by about a fifth; none: the samples of 10 steps."""
    kl_budget: Annotated[float | None, ADVANCED] = Field(default=None, gt=0)
    """KL in nats per token above which training ends; the policy of that step is evaluated. none never ends early."""
    reference_refresh_steps: Annotated[int, ADVANCED] = Field(default=0, ge=0)
    """Steps after which the present policy becomes the reference policy, again and again; 0 keeps the base policy."""
    entropy_coef: Annotated[float, ADVANCED] = Field(default=0.0, ge=0)
    """Coefficient of an entropy bonus in the loss, per nat of the sampled tokens."""
    mini_batches: Annotated[int, ADVANCED] = Field(default=1, ge=1)
    """Optimizer steps for one pass over the batch of a step, each on its share of the prompts."""
    epochs: Annotated[int, ADVANCED] = Field(default=1, ge=1)
    """Passes over the batch of a step; with mini_batches the clips then act."""
    old_policy: Annotated[Literal["auto", "learner", "engine"], ADVANCED] = "auto"
    """Denominator of the policy ratio: the learner before the step's first update, with importance_correction for its
    difference from the engine, or the engine itself. auto: engine for stale batches with one update, except for gspo,
    whose clip range is narrower than the engine's rounding; else learner."""
    importance_correction: Literal[
        "token", "sequence", "mask", "sequence_mask", "geometric", "geometric_mask", "off"
    ] = "token"
    """Correction of the mismatch between engine and learner probabilities: truncate or mask ratios, per token, or per
    sequence by their product or their geometric mean."""
    importance_correction_cap: Annotated[float, ADVANCED] = Field(default=2.0, ge=1)
    """Maximum ratio of learner to engine probability; mask also drops tokens below its inverse."""
    max_staleness: int = Field(default=0, ge=0)
    """Maximum lag of a batch in weight versions: 0 synchronous, 1 one step off-policy, more asynchronous."""
    overlong_buffer: Annotated[int, ADVANCED] = Field(default=0, ge=0)
    """Last tokens before rollout.max_response_tokens over which a response loses up to one unit of reward, linearly, as
    in DAPO; 0 for none."""
    truncated: Literal["penalize", "mask", "learn"] = "penalize"
    """Responses cut at rollout.max_response_tokens: penalize lowers their reward below that of the group's finished
    ones, mask leaves them out of the loss, learn treats them as finished."""
    min_reward_spread: Annotated[float, ADVANCED] = Field(default=0.1, ge=0, lt=10)
    """dapo drops a group whose rewards have no larger standard deviation, in standard deviations within a prompt of the
    reference policy; 0 drops only groups of equal rewards."""
    hacking_alarms: Literal["off", "warn", "act"] = "warn"
    """Reward-hacking alarms on each step: warn only logs; act also freezes love, rolls back a checkpoint, or stops."""

    @property
    def update_count(self) -> int:
        """Optimizer steps on one batch."""
        return self.mini_batches * self.epochs

    @property
    def kl_horizon_samples(self) -> int:
        """Samples in which kl_target may change kl_coef by about a fifth."""
        return self.kl_horizon or 10 * self.prompts_per_step * self.samples_per_prompt

    @property
    def has_reference(self) -> bool:
        """Whether a built-in algorithm of this name reads a reference policy."""
        if self.name in OFFLINE_ALGORITHMS:
            return self.name != "sft"
        return self.kl_coef > 0 or self.kl_budget is not None or self.name in CGPO_ALGORITHMS

    def has_learner_ratio(self, loss_name: str) -> bool:
        """Whether the policy ratio is relative to the learner at the start of the step, not to the engine."""
        if self.old_policy != "auto":
            return self.old_policy == "learner"
        return self.max_staleness == 0 or self.update_count > 1 or loss_name == "gspo"

    @property
    def clip_low(self) -> float:
        """Lower PPO clip: no gradient below a ratio of 1 - clip_low."""
        return self.clip if isinstance(self.clip, float) else self.clip[0]

    @property
    def clip_high(self) -> float:
        """Upper PPO clip: no gradient above a ratio of 1 + clip_high."""
        return self.clip if isinstance(self.clip, float) else self.clip[1]

    @property
    def kl_estimator(self) -> str:
        """Estimator of the KL that a step reports and, as a loss term, minimizes."""
        return "k3" if self.kl_penalty == "reward" else self.kl_penalty

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in ALGORITHM_NAMES and ":" not in name:
            raise ValueError(f"Input should be {', '.join(ALGORITHM_NAMES)} or module:function")
        return name

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, loss: str | None) -> str | None:
        if loss is not None and loss not in POLICY_LOSS_NAMES and ":" not in loss:
            raise ValueError(f"Input should be {', '.join(POLICY_LOSS_NAMES)} or module:function")
        return loss


class LearnerSettings(SettingsSection):
    """DeepSpeed learner actors, one data-parallel rank each."""

    workers: int = Field(default=1, ge=1)
    """Learner actors (data-parallel ranks)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    learning_rate: float = Field(default=6e-5, ge=0)
    """AdamW learning rate, constant after warm-up; 0 changes no weights (a control run)."""
    warmup_steps: int = Field(default=2, ge=0)
    """Optimizer steps of linear warm-up."""
    learning_rate_decay: Annotated[Literal["none", "linear", "cosine"], ADVANCED] = "none"
    """Decay of the learning rate after warm-up, to 0 after the last step."""
    adam_betas: Annotated[tuple[Share, Share], ADVANCED] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and of its square."""
    ema_decay: Annotated[Share, ADVANCED] = 0.0
    """Share that the moving average of the policy retains per step; the average is evaluated and saved at the end. 0
    evaluates and saves the last policy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    critic_learning_rate: float | None = Field(default=None, ge=0)
    """AdamW learning rate of PPO's critic; none uses ten times learning_rate."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of LoRA adapters on every linear layer, trained instead of the weights; 0 trains the full weights."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory (GPU learners)."""
    checkpoint_every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves one only when the run is terminated, and the final policy."""
    keep_checkpoints: int = Field(default=2, ge=0)
    """Newest checkpoints to keep, in addition to the one with the highest mean reward; 0 keeps all."""


class WeightSyncSettings(SettingsSection):
    """Transfer of the learners' weights to the engines, verified by logprobs after each sync."""

    transport: Literal["shm", "nccl", "disk", "cuda_ipc", "lora"] = "shm"
    """shm: shared memory on one host; nccl: between GPUs; disk: a file system that all hosts share; cuda_ipc: learners
    and engines colocated on the same GPUs; lora: only the LoRA adapters, through run.cache."""
    logprob_tolerance: float = Field(default=0.15, gt=0)
    """Maximum mean absolute logprob difference of engine and learner in nats per token; a larger one, or a sudden jump,
    stops the run."""

    @property
    def bucket_bytes(self) -> int:
        """Size of a weight bucket, of which each side buffers one; a larger tensor has its own bucket."""
        return (512 if self.transport in ("nccl", "cuda_ipc") else 64) << 20

    @field_validator("transport", mode="before")
    @classmethod
    def _refuse_old_names(cls, value: object) -> object:
        if isinstance(value, str) and value in RENAMED_TRANSPORTS:
            raise ValueError(f"{value} is now called {RENAMED_TRANSPORTS[value]}")
        if value == "tcp":
            raise ValueError("tcp was removed; use disk between CPU hosts, nccl between GPU hosts")
        return value
