"""What follows from the settings: batch arithmetic, who runs where, and an estimate of each one's memory.

Pure arithmetic, so `--dry-run` shows it without torch, ray or a cluster. All memory is in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rluf.config.model_shape import model_shape
from rluf.config.reward import RewardModelSettings
from rluf.config.settings import Settings

GIB = 1 << 30
MASTER_BYTES = 4
ADAM_BYTES = 8
ACTIVATION_FACTOR = 34
PROCESS_BYTES = int(0.8 * GIB)

Role = Literal["rollout", "reward", "learner", "reward_training"]


@dataclass(frozen=True, slots=True)
class Batches:
    """The arithmetic of one step. Tokens are upper bounds, from the longest prompt and response allowed."""

    samples: int
    longest: int
    tokens: int
    micro_batches: int
    rollout_waves: int
    total_samples: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Actors of one role: how many, what each reserves, and an estimate of what each one's memory holds, by name.

    `labels` are those that their nodes must have.
    """

    role: Role
    name: str
    count: int
    cpus: float
    gpus: float
    memory: dict[str, int]
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_each(self) -> int:
        """Estimated bytes of one actor, on its GPU if it has one, else in host memory."""
        return sum(self.memory.values())


def batches(settings: Settings) -> Batches:
    """Samples, tokens and micro-batches of one optimiser step."""
    algorithm, rollout = settings.algorithm, settings.rollout
    samples = algorithm.prompts_per_step * algorithm.samples_per_prompt
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    fit = algorithm.micro_batch_tokens // longest
    return Batches(
        samples=samples,
        longest=longest,
        tokens=samples * longest,
        micro_batches=math.ceil(math.ceil(samples / settings.learner.ranks) / fit),
        rollout_waves=math.ceil(samples / (rollout.concurrency * rollout.engines)),
        total_samples=samples * algorithm.steps,
    )


def learner_memory(settings: Settings) -> dict[str, int]:
    """Bytes of one learner rank by part, for mixed precision with AdamW.

    ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) divides by the ranks: optimiser state from stage 1, gradients from
    stage 2, weights at stage 3. Activations take about 34 bytes * hidden size a token and layer without the attention
    matrix (Korthikanti et al. 2022, arXiv 2205.05198), or 2 with recomputation. Logits count three float32 copies.
    """
    shape, learner = model_shape(settings.model.path), settings.learner
    compute = 2 if settings.policy_dtype == "bfloat16" else 4
    tokens, stage = settings.algorithm.micro_batch_tokens, learner.zero_stage

    def share(stage_from: int) -> int:
        return learner.ranks if stage >= stage_from else 1

    activation = 2 if learner.gradient_checkpointing else ACTIVATION_FACTOR
    memory = {
        "weights": compute * shape.parameters // share(3),
        "gradients": 4 * shape.parameters // share(2),
        "optimiser": (MASTER_BYTES + ADAM_BYTES) * shape.parameters // share(1),
        "activations": activation * tokens * shape.hidden * shape.layers * compute // 2,
        "logits": 3 * 4 * tokens * shape.vocabulary,
    }
    if settings.algorithm.kl_coef > 0:
        memory["reference"] = compute * shape.parameters // share(3)
    if settings.algorithm.name == "ppo":
        memory["critic"] = memory["weights"] + memory["gradients"] + memory["optimiser"]
    if learner.offload_optimizer:
        memory["optimiser"] = 0
    return memory


def engine_memory(settings: Settings) -> dict[str, int]:
    """Bytes of one rollout engine by part, over all the GPUs it spans."""
    shape = model_shape(settings.model.path)
    compute = 2 if settings.policy_dtype == "bfloat16" else 4
    if settings.cluster.gpus_per_engine == 0:
        cache = int(settings.rollout.kv_cache_gib * GIB)
    else:
        cache = kv_cache_need(settings)
    return {"weights": compute * shape.parameters, "kv cache": cache}


def kv_cache_need(settings: Settings) -> int:
    """Bytes of KV cache that keep `rollout.concurrency` samples of the longest kind in flight on one engine."""
    shape, rollout = model_shape(settings.model.path), settings.rollout
    compute = 2 if settings.policy_dtype == "bfloat16" else 4
    token = 2 * shape.layers * shape.kv_width * compute
    return token * rollout.concurrency * (rollout.max_prompt_tokens + rollout.max_response_tokens)


def scored_together(settings: Settings) -> tuple[tuple[str, ...], ...]:
    """The objectives by reward pool: heads of one backbone (reward.heads) are one pool, all others one each."""
    named, heads = settings.objectives.named, settings.reward.heads
    shared = [n for n in heads if n in named and named[n].source == "model" and named[n].path is None]
    groups = [(name,) for name in named if name not in shared]
    found: list[tuple[str, ...]] = [tuple(shared), *groups] if shared else list(groups)
    return tuple(sorted(found, key=lambda group: list(named).index(group[0])))


def pools(settings: Settings) -> list[Pool]:
    """All actors of the alignment phase, then the reward training workers, which run before it."""
    cluster, objectives = settings.cluster, settings.objectives
    models = settings.reward
    backbones = {"love": models.love, "helpfulness": models.helpfulness, "safety": models.safety}
    found = [
        Pool("rollout", "rollout", settings.rollout.engines, cluster.cpus_per_engine, cluster.gpus_per_engine,
             engine_memory(settings), cluster.labels_of("rollout")),
        Pool("learner", "learner", settings.learner.ranks, cluster.cpus_per_learner, cluster.gpus_per_learner,
             learner_memory(settings), cluster.labels_of("learner")),
    ]  # fmt: skip
    for name, *_ in scored_together(settings):
        objective = objectives.named[name]
        scoring, gpus = {}, 0.0
        if objective.source == "model":
            weights = model_shape(objective.path).parameters if objective.path else scoring_parameters(backbones[name])
            scoring, gpus = {"weights": 4 * weights}, cluster.gpus_per_reward
        found.append(Pool("reward", f"{name} reward", objective.replicas, cluster.cpus_per_reward, gpus, scoring,
                          cluster.labels_of("reward")))  # fmt: skip
    trained = [n for n, o in objectives.named.items() if o.source == "model" and o.path is None]
    if trained:
        largest = max((model_shape(backbones[name].backbone) for name in trained), key=lambda shape: shape.parameters)
        tokens = max(backbones[n].batch_rows * backbones[n].max_tokens for n in trained) // models.most_workers
        memory = {
            "weights": 4 * largest.parameters,
            "gradients": 4 * largest.parameters,
            "optimiser": ADAM_BYTES * largest.parameters // (models.most_workers if models.zero_stage else 1),
            "activations": 2 * ACTIVATION_FACTOR * tokens * largest.hidden * largest.layers,
        }
        found.append(Pool("reward_training", "reward training", models.most_workers, cluster.cpus_per_reward,
                          cluster.gpus_per_reward, memory))  # fmt: skip
    return found


def scoring_parameters(model: RewardModelSettings) -> int:
    """Parameters that scoring by a model holds in memory: once for members that share a pass, else a backbone each.

    A backbone whose upper layers are left out counts whole.
    """
    passes = {(member.backbone, member.response, model.depths(member)) for member in model.members}
    return sum(model_shape(backbone).parameters for backbone, _, _ in passes)


def host_bytes(settings: Settings) -> int:
    """Estimated peak of host memory over all CPU actors of the alignment phase, each with its process."""
    each = [p for p in pools(settings) if p.role != "reward_training"]
    return sum(p.count * (PROCESS_BYTES + (p.bytes_each if p.gpus == 0 else 0)) for p in each)


def policy_bytes(settings: Settings) -> int:
    """Bytes of the policy's weights in its compute type: what a publish moves and a checkpoint writes."""
    return (2 if settings.policy_dtype == "bfloat16" else 4) * model_shape(settings.model.path).parameters


def checkpoint_bytes(settings: Settings) -> int:
    """Bytes of a checkpoint to resume from: the policy, float32 weights and AdamW state of it, and of PPO's critic."""
    trained = (MASTER_BYTES + ADAM_BYTES) * model_shape(settings.model.path).parameters
    return policy_bytes(settings) + trained * (2 if settings.algorithm.name == "ppo" else 1)


def show_bytes(count: float) -> str:
    """Bytes in words: 266 MiB, 1.5 GiB."""
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def describe(settings: Settings) -> list[str]:
    """The derived figures in lines, as `--dry-run` shows them."""
    step, algorithm, rollout = batches(settings), settings.algorithm, settings.rollout
    shape = model_shape(settings.model.path)
    note = f" ({shape.note})" if shape.note else ""
    lines = [
        f"model: {settings.model.path}, {shape.parameters / 1e6:,.1f} M parameters{note}, {shape.layers} layers, "
        f"hidden {shape.hidden}, vocabulary {shape.vocabulary:,}",
        f"samples a step: {step.samples} = {algorithm.prompts_per_step} prompts x {algorithm.samples_per_prompt}; "
        f"{step.total_samples} in {algorithm.steps} steps",
        f"tokens a step: at most {step.tokens:,} = {step.samples} x ({rollout.max_prompt_tokens} prompt + "
        f"{rollout.max_response_tokens} response)",
        f"micro-batches a rank and step: at most {step.micro_batches} of {algorithm.micro_batch_tokens} tokens over "
        f"{settings.learner.ranks} rank(s)",
        f"rollout waves a step: {step.rollout_waves} at {rollout.concurrency} samples in flight on each of "
        f"{rollout.engines} engine(s)",
        f"kv cache for that: {show_bytes(kv_cache_need(settings))} an engine"
        + (
            f", rollout.kv_cache_gib gives {rollout.kv_cache_gib:g} GiB"
            if settings.cluster.gpus_per_engine == 0
            else ""
        ),
        f"a publish moves {show_bytes(policy_bytes(settings))} in buckets of {settings.publish.bucket_mib} MiB",
    ]
    if settings.publish.engine == "ipc":
        lines.append("engines and learners take turns on the same GPUs: one of each on every GPU")
    for pool in pools(settings):
        parts = ", ".join(f"{name} {show_bytes(size)}" for name, size in pool.memory.items() if size)
        where = f"{pool.gpus:g} GPU, {pool.cpus:g} CPU" if pool.gpus else f"{pool.cpus:g} CPU"
        lines.append(
            f"{pool.name}: {pool.count} x {where}, about {show_bytes(pool.bytes_each)} each"
            + (f" ({parts})" if parts else "")
        )
    align = [pool for pool in pools(settings) if pool.role != "reward_training"]
    lines.append(
        f"at once: {sum(p.count * p.cpus for p in align):g} CPU, {sum(p.count * p.gpus for p in align):g} GPU, "
        f"about {show_bytes(host_bytes(settings))} of host memory (estimates)"
    )
    return lines
