"""Settings of the policy: its model, rollouts, the algorithm, the learners, and how weights are published."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rluf.config.base import Section


class ModelSettings(Section):
    """The policy that is trained; a frozen copy of it is the reference policy."""

    path: str = "smollm2-135m-instruct"
    """Embedded name (smollm2-135m-instruct, tiny), Hugging Face folder, or hub id."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of engines and learners; master weights are float32 either way. auto: bfloat16 on GPUs and on CPUs
    with bfloat16 instructions, float32 on others, where it is several times as fast."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""


class RolloutSettings(Section):
    """vLLM rollout actors."""

    engines: int = Field(default=1, ge=1)
    """Rollout actors, one vLLM engine each."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs an engine spans."""
    max_prompt_tokens: int = Field(default=192, ge=8)
    """Longest rendered prompt in tokens; longer ones are quarantined, never cut."""
    max_response_tokens: int = Field(default=48, ge=1)
    """Longest response in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature in training and evaluation (1.0: what the importance correction assumes)."""
    concurrency: int = Field(default=64, ge=1)
    """Samples in flight on one engine."""
    kv_cache_gib: float = Field(default=0.5, gt=0)
    """KV cache of one CPU engine in GiB (GPU engines use gpu_memory_share)."""
    gpu_memory_share: float = Field(default=0.85, gt=0, le=1)
    """Share of GPU memory that one GPU engine may take."""
    deadline_s: float = Field(default=300.0, gt=0)
    """Seconds one group may take to be generated before the run stops and names the engine."""


class AlgorithmSettings(Section):
    """The policy-gradient method. Three batch sizes only; everything else is derived and printed."""

    name: Literal[
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
    ] = "grpo"
    """Method: how rewards become advantages and tokens are weighed (docs/algorithms.md has the table)."""
    loss: Literal["ppo", "gspo", "cispo", "reinforce"] | None = None
    """Policy loss (registry: rluf.algorithms.losses); none takes the one of the method's own paper."""
    steps: int = Field(default=14, ge=1)
    """Optimiser steps."""
    prompts_per_step: int = Field(default=12, ge=1)
    """Batch size 1: prompts a step."""
    samples_per_prompt: int = Field(default=4, ge=2)
    """Batch size 2: samples a prompt (the group)."""
    micro_batch_tokens: int = Field(default=1024, ge=64)
    """Batch size 3: tokens a packed micro-batch on one rank."""
    mix: tuple[str, ...] = ("risky:3",)
    """topic:times pairs; training prompts of the topic come up that many times in each pass over the prompts."""
    demonstrations: int = Field(default=3, ge=0)
    """Good responses of the log, on topics of objectives.alone, that step 1 imitates; fewer each step, then none."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Lower PPO clip: the ratio is not rewarded below 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """Upper PPO clip: the ratio is not rewarded above 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound c of the PPO loss at c * |advantage| where the advantage is negative (dual clip); none sets no bound."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """PPO's advantages: how far along a response its critic's errors count (1: the whole rest, 0: one token)."""
    kl_coef: float = Field(default=0.02, ge=0)
    """Weight of the KL to the reference policy; where it counts says kl_in."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: a term of the loss; reward: taken off the reward before advantages (k1, as in RLOO and REINFORCE++)."""
    kl_target: float | None = Field(default=None, gt=0)
    """KL in nats a token that kl_coef is steered towards after each step; none keeps kl_coef fixed."""
    kl_limit: float = Field(default=10.0, gt=0)
    """Largest KL of a response in nats (CGPO's crpg and crraft: beyond it a response earns nothing)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator of the loss term (method notes: k2 has the on-policy gradient, k3 is GRPO's)."""
    importance: Literal["token", "sequence", "mask", "sequence_mask", "off"] = "token"
    """Correction for what engine and learner disagree on: ratios truncated or masked, by token or response."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Largest ratio of learner to engine probability; mask also drops tokens below its inverse."""
    staleness: int = Field(default=0, ge=0)
    """Policy versions a batch may lag: 0 synchronous, 1 one step off, more asynchronous."""
    too_old: Literal["keep", "drop"] = "keep"
    """What becomes of a straggler that lags more versions than staleness: learn from it, or drop and refill."""
    alarms: Literal["off", "warn", "act"] = "warn"
    """Reward-hacking alarms on each step: warn only tells; act also freezes love, goes back a checkpoint, or stops."""
    alarm_prompts: int = Field(default=64, ge=16)
    """Training prompts that the base policy answers once each before the first step, for alarms to compare with."""

    @property
    def times(self) -> dict[str, int]:
        """How often a topic's prompts come up in a pass, by topic; topics not named come up once."""
        return {topic: int(times) for topic, _, times in (pair.rpartition(":") for pair in self.mix)}


class LearnerSettings(Section):
    """DeepSpeed learner actors, one rank each."""

    ranks: int = Field(default=1, ge=1)
    """Data-parallel ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    learning_rate: float = Field(default=6e-5, ge=0)
    """AdamW learning rate, constant after warm-up; 0 trains nothing (a control run)."""
    warmup_steps: int = Field(default=2, ge=0)
    """Optimiser steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    critic_rate: float | None = Field(default=None, ge=0)
    """AdamW learning rate of PPO's critic; none takes ten times learning_rate."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of LoRA adapters beside every linear layer, trained in place of the weights; 0 trains the weights."""
    offload_optimizer: bool = False
    """Keep the optimiser state in host memory (GPU learners)."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints to resume from; 0 keeps one only when the run is terminated, and the final policy."""
    keep_checkpoints: int = Field(default=2, ge=0)
    """Newest checkpoints kept, with the one of the highest mean reward beside them; 0 keeps all."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Seconds one learner step may take before the run stops and names the rank."""


class PublishSettings(Section):
    """How weights reach the engines: vLLM's four phases, then a probe."""

    engine: Literal["shm", "nccl", "tcp", "disk", "ipc", "adapter"] = "shm"
    """shm: shared memory on one host; nccl: between GPUs; tcp: between hosts, slower; disk: files all hosts see; ipc:
    learners and engines take turns on the same GPUs; adapter: LoRA adapters as they are, through run.cache."""
    bucket_mib: int = Field(default=64, ge=1)
    """MiB of weights sent at a time."""
    probe_tolerance: float = Field(default=0.15, gt=0)
    """Largest mean absolute logprob difference in nats per token before the run stops (a sudden jump stops it too)."""
    deadline_s: float = Field(default=120.0, gt=0)
    """Seconds one publish may take before the run stops and names the phase."""
