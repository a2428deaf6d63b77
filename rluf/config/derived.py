"""Figures derived from the settings: batch arithmetic, actors and their resources, and memory estimates in bytes.

Pure arithmetic, so that `--dry-run` shows it without torch, ray or a cluster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rluf.config.model_shape import estimate_model_shape
from rluf.config.reward import RewardModelSettings
from rluf.config.run import ClusterRole
from rluf.config.settings import Settings

BYTES_PER_GIB = 1 << 30
MASTER_WEIGHT_BYTES = 4
ADAM_STATE_BYTES = 8
ACTIVATION_BYTES_PER_HIDDEN_UNIT = 34
LOGIT_CHUNK_TOKENS = 256
"""Tokens whose float32 logits exist at once (LOGPROB_CHUNK_TOKENS of rluf/algorithms/policy_model.py)."""
REWARD_BATCH_TOKENS = 4096
"""Tokens of one forward pass of reward training (EVAL_BATCH_TOKENS of rluf/reward/fit.py)."""
ADAPTER_WIDTHS_PER_LAYER = 20
"""Values per rank of LoRA adapters on the seven matrices of a layer, in units of the hidden size."""
MAX_GATHERED_WEIGHTS = 1_000_000_000
"""Weights that ZeRO 3 has gathered at once (DeepSpeed's stage3_max_live_parameters)."""
GPU_CONTEXT_BYTES = 2 << 30
"""GPU memory of a process beyond its tensors: CUDA context, NCCL buffers and fragmentation of the allocator."""
PROCESS_BYTES = int(0.8 * BYTES_PER_GIB)
"""Host memory of an actor process without its model: Python, torch, Ray."""

ActorRole = Literal[ClusterRole, "reward_training"]


@dataclass(frozen=True, slots=True)
class StepBatchSizes:
    """Batch arithmetic of one step. Tokens are upper bounds: every sample has the maximum prompt and response."""

    samples_per_step: int
    max_sample_tokens: int
    max_tokens_per_step: int
    micro_batches_per_worker: int
    rollout_waves: int
    total_samples: int


@dataclass(frozen=True, slots=True)
class ActorPoolPlan:
    """Actors of one role: their number, the resources that each reserves, and its estimated memory by part.

    `node_labels` are required of the nodes that they run on.
    """

    role: ActorRole
    name: str
    actor_count: int
    cpus_per_actor: float
    gpus_per_actor: float
    memory_bytes: dict[str, int]
    node_labels: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_per_actor(self) -> int:
        """Estimated bytes of one actor, in GPU memory if it has a GPU, else in host memory."""
        return sum(self.memory_bytes.values())


def compute_batch_sizes(settings: Settings) -> StepBatchSizes:
    """Samples, tokens and micro-batches of one optimizer step."""
    algorithm, rollout = settings.algorithm, settings.rollout
    samples = algorithm.prompts_per_step * algorithm.samples_per_prompt
    max_sample_tokens = rollout.max_prompt_tokens + rollout.max_response_tokens
    samples_per_micro_batch = algorithm.micro_batch_tokens // max_sample_tokens
    return StepBatchSizes(
        samples_per_step=samples,
        max_sample_tokens=max_sample_tokens,
        max_tokens_per_step=samples * max_sample_tokens,
        micro_batches_per_worker=math.ceil(math.ceil(samples / settings.learner.workers) / samples_per_micro_batch),
        rollout_waves=math.ceil(samples / (rollout.concurrency * rollout.engines)),
        total_samples=samples * algorithm.steps,
    )


def estimate_learner_memory(settings: Settings) -> dict[str, int]:
    """Bytes of one learner by part, for mixed precision with AdamW.

    ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) shards over the learners: optimizer state from stage 1, gradients
    from stage 2, weights at stage 3, which gathers some of them at a time. Activations take about 34 bytes * hidden
    size per token and layer without the attention matrix (Korthikanti et al. 2022, arXiv 2205.05198); with
    recomputation 2, and 34 for the layer that is recomputed. Logits and their gradient exist in the compute dtype, in
    float32 for LOGIT_CHUNK_TOKENS tokens at a time. A PPO critic's activations follow those of the policy and are
    smaller.
    """
    shape, learner = estimate_model_shape(settings.model.path), settings.learner
    bytes_per_weight = _get_policy_bytes_per_weight(settings)
    tokens, trained_count = settings.algorithm.micro_batch_tokens, count_trained_parameters(settings)

    def count_shards(first_sharded_stage: int) -> int:
        return learner.workers if learner.zero_stage >= first_sharded_stage else 1

    activation_units = shape.layer_count * ACTIVATION_BYTES_PER_HIDDEN_UNIT
    if learner.gradient_checkpointing:
        # Only the input of each layer is stored: hidden size values of 2 bytes.
        activation_units = shape.layer_count * 2 + ACTIVATION_BYTES_PER_HIDDEN_UNIT
    memory = {
        "weights": bytes_per_weight * shape.parameter_count // count_shards(3),
        "gradients": 4 * trained_count // count_shards(2),
        "optimizer": (MASTER_WEIGHT_BYTES + ADAM_STATE_BYTES) * trained_count // count_shards(1),
        # The 34 bytes assume 2-byte activations.
        "activations": activation_units * tokens * shape.hidden_size * bytes_per_weight // 2,
        "logits": (2 * bytes_per_weight * tokens + 3 * 4 * min(tokens, LOGIT_CHUNK_TOKENS)) * shape.vocabulary_size,
    }
    if learner.zero_stage == 3 and learner.workers > 1:
        memory["gathered weights"] = bytes_per_weight * min(shape.parameter_count, MAX_GATHERED_WEIGHTS)
    # With LoRA the reference is the policy without its adapters.
    if settings.algorithm.has_reference and not learner.lora_rank:
        memory["reference"] = bytes_per_weight * shape.parameter_count // count_shards(3)
    if learner.offload_optimizer:
        memory["optimizer"] = 0
    if settings.algorithm.name == "ppo":
        # The critic has the policy's architecture with a value head, and no adapters; its optimizer state is offloaded
        # too.
        state_bytes = 0 if learner.offload_optimizer else MASTER_WEIGHT_BYTES + ADAM_STATE_BYTES
        memory["critic"] = memory["weights"] + shape.parameter_count * 4 // count_shards(2)
        memory["critic"] += shape.parameter_count * state_bytes // count_shards(1)
    if learner.ema_decay:
        memory["average"] = 4 * trained_count
    return memory


def count_trained_parameters(settings: Settings) -> int:
    """Parameters of the policy that have gradients and optimizer state: all, or those of its LoRA adapters."""
    shape, rank = estimate_model_shape(settings.model.path), settings.learner.lora_rank
    adapters = ADAPTER_WIDTHS_PER_LAYER * rank * shape.hidden_size * shape.layer_count
    return min(shape.parameter_count, adapters) if rank else shape.parameter_count


def estimate_engine_memory(settings: Settings) -> dict[str, int]:
    """Bytes of one rollout engine by part, over all the GPUs that it spans."""
    shape = estimate_model_shape(settings.model.path)
    if settings.cluster.gpus_per_engine == 0:
        kv_cache_bytes = int(settings.rollout.kv_cache_gib * BYTES_PER_GIB)
    else:
        kv_cache_bytes = estimate_kv_cache_bytes(settings)
    return {"weights": _get_policy_bytes_per_weight(settings) * shape.parameter_count, "kv cache": kv_cache_bytes}


def estimate_kv_cache_bytes(settings: Settings) -> int:
    """Bytes of KV cache for `rollout.concurrency` samples of maximum length on one engine."""
    shape, rollout = estimate_model_shape(settings.model.path), settings.rollout
    bytes_per_token = 2 * shape.layer_count * shape.kv_width * _get_policy_bytes_per_weight(settings)
    return bytes_per_token * rollout.concurrency * (rollout.max_prompt_tokens + rollout.max_response_tokens)


def group_objectives_by_pool(settings: Settings) -> tuple[tuple[str, ...], ...]:
    """Objectives grouped by reward pool: one pool for all heads of reward.shared_backbone_heads, one per other
    objective."""
    objectives, heads = settings.objectives.by_objective, settings.reward.shared_backbone_heads
    shared = [
        name
        for name in heads
        if name in objectives and objectives[name].source == "model" and objectives[name].path is None
    ]
    groups: list[tuple[str, ...]] = [(name,) for name in objectives if name not in shared]
    if shared:
        groups.append(tuple(shared))
    return tuple(sorted(groups, key=lambda group: list(objectives).index(group[0])))


def plan_actor_pools(settings: Settings) -> list[ActorPoolPlan]:
    """All actors of the training phase, then the reward training workers, which run before it."""
    objectives, reward = settings.objectives.by_objective, settings.reward
    pools = [
        _plan_pool(settings, "rollout", "rollout", settings.rollout.engines, estimate_engine_memory(settings)),
        _plan_pool(settings, "learner", "learner", settings.learner.workers, estimate_learner_memory(settings)),
    ]
    for name, *_ in group_objectives_by_pool(settings):
        objective = objectives[name]
        memory: dict[str, int] = {}
        if objective.source == "model":
            parameters = (
                estimate_model_shape(objective.path).parameter_count
                if objective.path
                else count_scoring_parameters(reward.get_head_settings(name))
            )
            memory = {"weights": 4 * parameters}  # float32, as on CPUs
        pool = _plan_pool(settings, "reward", f"{name} reward", objective.replicas, memory)
        cpus, gpus = settings.get_reward_actor_resources(name)
        pools.append(replace(pool, cpus_per_actor=cpus, gpus_per_actor=gpus))
    trained = [name for name, value in objectives.items() if value.source == "model" and value.path is None]
    if trained:
        pools.append(_plan_reward_training(settings, trained))
    return pools


def _plan_pool(
    settings: Settings, role: ClusterRole, name: str, actor_count: int, memory_bytes: dict[str, int]
) -> ActorPoolPlan:
    """Pool of `actor_count` actors with the resources and node labels of `role`."""
    cpus, gpus = settings.cluster.get_role_resources(role)
    return ActorPoolPlan(role, name, actor_count, cpus, gpus, memory_bytes, settings.cluster.get_role_labels(role))


def _plan_reward_training(settings: Settings, objectives: list[str]) -> ActorPoolPlan:
    """Workers of reward training, sized for the largest model and the largest batch of all `objectives`."""
    reward = settings.reward
    models = [reward.get_head_settings(name) for name in objectives]
    largest_model = max(models, key=lambda model: estimate_model_shape(model.backbone).parameter_count)
    largest, lora_rank = estimate_model_shape(largest_model.backbone), largest_model.lora_rank
    tokens = max(model.batch_rows * model.token_limit for model in models) // reward.max_workers
    trained = (
        ADAPTER_WIDTHS_PER_LAYER * lora_rank * largest.hidden_size * largest.layer_count
        if lora_rank
        else largest.parameter_count
    )
    bytes_per_weight = 2 if settings.reward_dtype == "bfloat16" else 4
    # In float32 the weights are the optimizer's masters.
    optimizer_bytes = ADAM_STATE_BYTES + (MASTER_WEIGHT_BYTES if bytes_per_weight == 2 else 0)
    memory_bytes = {
        "weights": bytes_per_weight * largest.parameter_count,
        "gradients": 4 * trained,
        "optimizer": optimizer_bytes * trained // (reward.max_workers if reward.zero_stage else 1),
        "activations": ACTIVATION_BYTES_PER_HIDDEN_UNIT * min(tokens, REWARD_BATCH_TOKENS) * largest.hidden_size
        * largest.layer_count * bytes_per_weight // 2,
    }  # fmt: skip
    cpus, gpus = settings.cluster.get_role_resources("reward_training")
    return ActorPoolPlan("reward_training", "reward training", reward.max_workers, cpus, gpus, memory_bytes)


def count_scoring_parameters(model_settings: RewardModelSettings) -> int:
    """Parameters that scoring loads: one backbone per forward pass, so members that share a pass count once.

    A backbone without its upper layers counts fully.
    """
    forward_passes = {
        (member.backbone, member.response_only, model_settings.list_shared_readings(member))
        for member in model_settings.member_specs
    }
    return sum(estimate_model_shape(backbone).parameter_count for backbone, _, _ in forward_passes)


def estimate_host_bytes(settings: Settings) -> int:
    """Estimated peak of host memory over all actors of the training phase, each with its process."""
    actor_bytes = sum(
        pool.actor_count * (PROCESS_BYTES + (pool.bytes_per_actor if pool.gpus_per_actor == 0 else 0))
        for pool in plan_actor_pools(settings)
        if pool.role != "reward_training"
    )
    learner = settings.learner
    if learner.offload_optimizer:
        return actor_bytes + _estimate_optimizer_bytes(settings)
    if not settings.is_colocated:
        return actor_bytes
    # What leaves a shared GPU: the engine's weights while it sleeps, and the learner's states while it does.
    learner_memory = estimate_learner_memory(settings)
    offloaded_bytes = sum(learner_memory.get(state, 0) for state in ("weights", "reference", "average"))
    if settings.algorithm.name == "ppo":
        offloaded_bytes += learner_memory["weights"]  # of the critic
    engine_bytes = settings.rollout.engines * estimate_engine_memory(settings)["weights"]
    return actor_bytes + engine_bytes + learner.workers * offloaded_bytes + _estimate_optimizer_bytes(settings)


def _estimate_optimizer_bytes(settings: Settings) -> int:
    """Bytes of the float32 master weights and AdamW state of all learners together, those of PPO's critic too."""
    trained_count = count_trained_parameters(settings)
    if settings.algorithm.name == "ppo":
        trained_count += estimate_model_shape(settings.model.path).parameter_count
    return (MASTER_WEIGHT_BYTES + ADAM_STATE_BYTES) * trained_count


def estimate_gpu_needs(settings: Settings) -> dict[str, tuple[int, str]]:
    """Least bytes that each GPU of a pool must have, and the settings that lower them, by pool.

    An engine needs its weights and one sample of maximum length in gpu_memory_share of its GPUs: a smaller KV cache
    than rollout.concurrency asks for makes it slower. A learner needs its whole estimate.
    """
    needs: dict[str, tuple[int, str]] = {}
    cluster, rollout = settings.cluster, settings.rollout
    if cluster.gpus_per_engine > 0:
        memory = estimate_engine_memory(settings)
        least_bytes = memory["weights"] + memory["kv cache"] // rollout.concurrency
        per_gpu = int(least_bytes / (settings.tensor_parallel * rollout.gpu_memory_share))
        needs["rollout"] = (
            per_gpu,
            "raise cluster.gpus_per_engine or rollout.gpu_memory_share, or use a smaller model",
        )
    if cluster.gpus_per_learner > 0:
        learner_bytes = sum(estimate_learner_memory(settings).values()) + GPU_CONTEXT_BYTES
        needs["learner"] = (
            learner_bytes,
            "raise learner.workers or learner.zero_stage, lower algorithm.micro_batch_tokens, or set "
            "learner.gradient_checkpointing=true or learner.offload_optimizer=true",
        )
    for pool in plan_actor_pools(settings):
        if pool.role in ("reward", "reward_training") and pool.gpus_per_actor > 0:
            per_gpu = int(pool.bytes_per_actor / min(1.0, pool.gpus_per_actor)) + GPU_CONTEXT_BYTES
            advice = "use a smaller reward backbone, lower reward.*.batch_rows, or give each actor a whole GPU"
            needs[pool.name] = (per_gpu, advice)
    return needs


def estimate_policy_bytes(settings: Settings) -> int:
    """Bytes of the policy's weights in its compute dtype: the size of a weight sync and of a saved policy."""
    return _get_policy_bytes_per_weight(settings) * estimate_model_shape(settings.model.path).parameter_count


def estimate_checkpoint_bytes(settings: Settings) -> int:
    """Bytes of a checkpoint: the policy, its float32 weights and AdamW state, and those of PPO's critic."""
    return estimate_policy_bytes(settings) + _estimate_optimizer_bytes(settings)


def _get_policy_bytes_per_weight(settings: Settings) -> int:
    return 2 if settings.policy_dtype == "bfloat16" else 4


def format_bytes(byte_count: float) -> str:
    """Bytes with a unit: 266 MiB, 1.5 GiB."""
    for unit, size in (("TiB", 1 << 40), ("GiB", BYTES_PER_GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if byte_count >= size:
            return f"{byte_count / size:.3g} {unit}" if byte_count < 1000 * size else f"{byte_count / size:,.0f} {unit}"
    return f"{byte_count:.0f} B"


def format_derived_figures(settings: Settings) -> list[str]:
    """The derived figures as the lines that `--dry-run` prints."""
    sizes, algorithm, rollout = compute_batch_sizes(settings), settings.algorithm, settings.rollout
    shape = estimate_model_shape(settings.model.path)
    note = f" ({shape.note})" if shape.note else ""
    kv_cache = f"kv cache for that: {format_bytes(estimate_kv_cache_bytes(settings))} per engine"
    if settings.cluster.gpus_per_engine == 0:
        kv_cache += f", rollout.kv_cache_gib is {rollout.kv_cache_gib:g} GiB"
    lines = [
        f"model: {settings.model.path}, {shape.parameter_count / 1e6:,.1f} M parameters{note}, "
        f"{shape.layer_count} layers, hidden {shape.hidden_size}, vocabulary {shape.vocabulary_size:,}",
        f"samples per step: {sizes.samples_per_step} = {algorithm.prompts_per_step} prompts x "
        f"{algorithm.samples_per_prompt}; {sizes.total_samples} in {algorithm.steps} steps",
        f"tokens per step: at most {sizes.max_tokens_per_step:,} = {sizes.samples_per_step} x "
        f"({rollout.max_prompt_tokens} prompt + {rollout.max_response_tokens} response)",
        f"micro-batches per learner and step: at most {sizes.micro_batches_per_worker} of "
        f"{algorithm.micro_batch_tokens} tokens on {settings.learner.workers} learner(s)",
        f"rollout waves per step: {sizes.rollout_waves} with {rollout.concurrency} samples in flight on each of "
        f"{rollout.engines} engine(s)",
        kv_cache,
        f"weight sync: {format_bytes(estimate_policy_bytes(settings))} in buckets of "
        f"{format_bytes(settings.weight_sync.bucket_bytes)}",
    ]
    if settings.weight_sync.transport == "cuda_ipc":
        lines.append("engines and learners are colocated: one of each on every GPU, active in turn")
    for pool in plan_actor_pools(settings):
        memory = ", ".join(f"{name} {format_bytes(size)}" for name, size in pool.memory_bytes.items() if size)
        resources = f"{pool.cpus_per_actor:g} CPU"
        if pool.gpus_per_actor:
            resources = f"{pool.gpus_per_actor:g} GPU, {resources}"
        lines.append(
            f"{pool.name}: {pool.actor_count} x {resources}, about {format_bytes(pool.bytes_per_actor)} each"
            + (f" ({memory})" if memory else "")
        )
    gpu_needs = estimate_gpu_needs(settings)
    if gpu_needs:
        lines.append(
            "memory of each GPU: at least "
            + ", ".join(f"{format_bytes(needed_bytes)} for {name}" for name, (needed_bytes, _) in gpu_needs.items())
        )
    training_pools = [pool for pool in plan_actor_pools(settings) if pool.role != "reward_training"]
    cpus = sum(pool.actor_count * pool.cpus_per_actor for pool in training_pools)
    gpus = sum(pool.actor_count * pool.gpus_per_actor for pool in training_pools)
    lines.append(
        f"at once: {cpus:g} CPU, {gpus:g} GPU, about {format_bytes(estimate_host_bytes(settings))} of host memory "
        "(estimates)"
    )
    return lines


def list_configured_reward_folders(settings: Settings) -> dict[str, Path | None]:
    """Reward model folders given in the settings, by served objective; None for judges."""
    objectives = settings.objectives.by_objective
    return {
        name: (Path(str(objectives[name].path)).expanduser().resolve() if objectives[name].source == "model" else None)
        for name in settings.serve.objectives
        if objectives[name].path is not None
    }
