"""Rules between settings: combinations that cannot work, each refused with both keys, both values and a fix.

Each rule returns None, or the message for the first violation that it finds.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

from rluf.config.objectives import BUILTIN_OBJECTIVES, find_objective_spec
from rluf.config.policy import ALGORITHM_NAMES, CGPO_ALGORITHMS, OFFLINE_ALGORITHMS
from rluf.config.reward import REACTION_HEADS
from rluf.config.reward_rules import (
    check_debias,
    check_members,
    check_reader_independence,
    check_reward_losses,
    check_shared_backbone,
    check_shared_head,
    check_trained_parts,
    check_uncertainty_penalty,
)
from rluf.config.tree import SettingsTree

REINFORCE_LOSS_ALGORITHMS = ("rloo", *CGPO_ALGORITHMS, *OFFLINE_ALGORITHMS)
"""Algorithms whose own loss is reinforce (see rluf.algorithms.registry)."""
SAMPLING_SETTINGS = (
    "loss", "clip", "kl_penalty", "entropy_coef", "old_policy", "importance_correction", "importance_correction_cap",
    "max_staleness", "overlong_buffer", "truncated",
)  # fmt: skip
"""Settings of `algorithm` that act on responses that engines have sampled."""
MIN_ENGINE_CLIP = 0.05
"""Narrowest clip of a ratio relative to the engine, whose rounding moves the ratio of a token by about as much."""
MIN_MASK_CAP = 1.05
"""Smallest cap of a ratio above which tokens are left out."""
LARGEST_FLOOR = 10.0
"""Bound of a normalized score (MAX_NORMALIZED_SIGNAL of rluf/objectives/aggregator.py)."""


def check_objective_sources(settings: SettingsTree) -> str | None:
    """A judge or function needs a name, a service a URL, a model a folder or data."""
    for name, objective in settings.objectives.by_objective.items():
        key = f"objectives.{name}"
        if objective.source in ("judge", "function") and objective.path is None:
            return f"{key}.source={objective.source} needs {key}.path (now none); name one or set {key}.source=model"
        if (objective.source == "serve") != (objective.path or "").startswith(("http://", "https://")):
            return (
                f"{key}.source={objective.source} conflicts with {key}.path={objective.path}: source serve needs the "
                "URL of a service in path, source model a folder; change one of them"
            )
        needs_training = objective.source == "model" and objective.path is None
        # A misspelled built-in name ends here too: it is an objective without data.
        if needs_training and name not in BUILTIN_OBJECTIVES and not settings.data.labels.get(name):
            similar_names = difflib.get_close_matches(name, BUILTIN_OBJECTIVES, 1)
            return (
                f"{key} has no scores: set data.labels.{name} to labeled rows, {key}.path to a reward model folder, "
                f"or {key}.source to judge or function and {key}.path to one"
                + (f"; did you mean objectives.{similar_names[0]}?" if similar_names else "")
            )
    return None


def check_objective_names(settings: SettingsTree) -> str | None:
    """Sections and lists that name objectives name existing ones."""
    objectives = settings.objectives.by_objective
    names_by_key = {
        "reward": list(settings.reward.by_objective),
        "reward.objectives": settings.reward.objectives,
        "reward.shared_backbone_heads": settings.reward.shared_backbone_heads,
        "serve.objectives": settings.serve.objectives,
        "data.labels": list(settings.data.labels),
    }
    for key, names in names_by_key.items():
        known_names = [*objectives, *(REACTION_HEADS if key == "reward.shared_backbone_heads" else ())]
        for name in names:
            if name not in known_names:
                return (
                    f"{key} names {name!r}, which is not an objective; set it to {', '.join(known_names)}, or add an "
                    f"objective of your own by objectives.{name}.weight"
                )
    for name in (*settings.reward.objectives, *settings.reward.shared_backbone_heads):
        is_labeled = name in (*BUILTIN_OBJECTIVES, *REACTION_HEADS) or settings.data.labels.get(name)
        if not is_labeled:
            return (
                f"reward.objectives={list(settings.reward.objectives)} or reward.shared_backbone_heads="
                f"{list(settings.reward.shared_backbone_heads)} trains {name}, which has no data; set "
                f"data.labels.{name} to labeled rows, or remove it there"
            )
    for name in settings.data.labels:
        if name in BUILTIN_OBJECTIVES:
            data_key = find_objective_spec(name).data_key
            return f"data.labels has rows of {name!r}, whose data is data.{data_key}; move them there"
    return None


def check_topic_objectives(settings: SettingsTree) -> str | None:
    """aggregation.topic_objectives names existing objectives."""
    objectives = settings.objectives.by_objective
    for topic, objective in settings.aggregation.topic_objectives.items():
        if objective not in objectives:
            return (
                f"aggregation.topic_objectives gives topic {topic!r} to {objective!r}, which is not an objective; set "
                f"it to one of {', '.join(objectives)}"
            )
    return None


def check_objective_weights(settings: SettingsTree) -> str | None:
    """At least one objective has a weight."""
    if any(objective.weight > 0 for objective in settings.objectives.by_objective.values()):
        return None
    return "objectives.*.weight are all 0, so there is nothing to optimize; set at least one weight above 0"


def check_aggregation(settings: SettingsTree) -> str | None:
    """Floors require method=constrained and existing objectives; gdpo requires GRPO; CGPO requires calibrated."""
    objectives, algorithm = settings.objectives.by_objective, settings.algorithm.name
    method, floors = settings.aggregation.method, settings.aggregation.floors
    for objective in floors:
        if objective not in objectives:
            names = ", ".join(objectives)
            return f"aggregation.floors has {objective!r}, which is not an objective; set floors of {names}"
        if abs(floors[objective]) >= LARGEST_FLOOR:
            return (
                f"aggregation.floors={floors} for {objective}: a floor is a mean score in standard deviations of the "
                f"base policy, which stay within +-{LARGEST_FLOOR:g}; set one such as 0 or -0.2"
            )
    if (method == "constrained") != bool(floors):
        return (
            f"aggregation.method={method} conflicts with aggregation.floors={floors}; set "
            "aggregation.method=constrained with floors such as {safety: 0.0}, or neither"
        )
    if method == "gdpo" and algorithm != "grpo":
        return (
            f"aggregation.method=gdpo normalizes each objective as GRPO does and leaves algorithm.name={algorithm} "
            "unused; set algorithm.name=grpo or aggregation.method=linear"
        )
    if algorithm in CGPO_ALGORITHMS and method != "calibrated":
        return (
            f"algorithm.name={algorithm} expects rewards between 0 and 1, which aggregation.method={method} does not "
            "return; set aggregation.method=calibrated"
        )
    return None


def check_kl(settings: SettingsTree) -> str | None:
    """A KL target or penalty in the reward needs a coefficient; CGPO and offline algorithms bound the KL themselves."""
    algorithm = settings.algorithm
    if algorithm.kl_coef == 0 and algorithm.kl_target is not None:
        return (
            f"algorithm.kl_target={algorithm.kl_target:g} has no KL to control, as algorithm.kl_coef=0 loads no "
            "reference policy; set algorithm.kl_coef above 0 or algorithm.kl_target=null"
        )
    if algorithm.kl_coef == 0 and algorithm.kl_penalty == "reward":
        return (
            "algorithm.kl_penalty=reward has no KL to subtract, as algorithm.kl_coef=0 loads no reference policy; "
            "set algorithm.kl_coef above 0 or algorithm.kl_penalty=k3"
        )
    if algorithm.kl_penalty == "reward" and algorithm.name in (*CGPO_ALGORITHMS, *OFFLINE_ALGORITHMS):
        return (
            f"algorithm.kl_penalty=reward conflicts with algorithm.name={algorithm.name}, which bounds the distance "
            "to the reference policy itself; set algorithm.kl_penalty=k3"
        )
    return None


def check_kl_reader(settings: SettingsTree) -> str | None:
    """A KL target or budget needs sampled responses, a refreshed reference policy something that reads it."""
    algorithm = settings.algorithm
    for key, value in (("kl_target", algorithm.kl_target), ("kl_budget", algorithm.kl_budget)):
        if value is not None and algorithm.name in OFFLINE_ALGORITHMS:
            offline = f"algorithm.name={algorithm.name} samples nothing"
            return f"algorithm.{key}={value:g} has no KL to read, as {offline}; set algorithm.{key}=null"
    if algorithm.reference_refresh_steps and not algorithm.has_reference:
        return (
            f"algorithm.reference_refresh_steps={algorithm.reference_refresh_steps} has no reference policy to refresh "
            f"with algorithm.name={algorithm.name} and algorithm.kl_coef={algorithm.kl_coef:g}; set it to 0"
        )
    return None


def check_critic(settings: SettingsTree) -> str | None:
    """Only PPO has a critic."""
    name, rate = settings.algorithm.name, settings.learner.critic_learning_rate
    if rate is None or name == "ppo":
        return None
    return (
        f"learner.critic_learning_rate={rate:g} has no critic to train, as algorithm.name={name} has none; set "
        "learner.critic_learning_rate=null or algorithm.name=ppo"
    )


def check_policy_ratio(settings: SettingsTree) -> str | None:
    """Settings of the policy ratio need a loss that has one."""
    algorithm = settings.algorithm
    loss = algorithm.loss or ("reinforce" if algorithm.name in REINFORCE_LOSS_ALGORITHMS else "ppo")
    if algorithm.update_count > 1 and loss == "reinforce":
        return (
            f"algorithm.mini_batches={algorithm.mini_batches} and algorithm.epochs={algorithm.epochs} update several "
            f"times on a batch, which the loss reinforce of algorithm.name={algorithm.name} does not bound; set both "
            "to 1, or algorithm.loss=ppo with an algorithm that samples"
        )
    # Where the ratio's denominator is the engine's own logprob, nothing is left to correct.
    has_learner_ratio = algorithm.has_learner_ratio(loss)
    if not has_learner_ratio and loss != "reinforce" and algorithm.importance_correction not in ("token", "off"):
        return (
            f"algorithm.importance_correction={algorithm.importance_correction} would be unused with "
            f"algorithm.max_staleness={algorithm.max_staleness}, where the clipped ratio of algorithm.loss={loss} is "
            "relative to the engine; set algorithm.importance_correction=token, or algorithm.old_policy=learner"
        )
    return None


def check_ratio_bounds(settings: SettingsTree) -> str | None:
    """Bounds of ratios must leave room for the engine's rounding."""
    algorithm = settings.algorithm
    loss, clip = algorithm.loss or "ppo", min(algorithm.clip_low, algorithm.clip_high)
    is_clipped = loss in ("ppo", "gspo", "cispo") and algorithm.name not in REINFORCE_LOSS_ALGORITHMS
    if is_clipped and clip < MIN_ENGINE_CLIP and not algorithm.has_learner_ratio(loss):
        return (
            f"algorithm.clip={clip:g} is narrower than the engine's rounding, to which the ratio of algorithm.loss="
            f"{loss} is relative with algorithm.old_policy={algorithm.old_policy} and algorithm.max_staleness="
            f"{algorithm.max_staleness}, so most tokens would be clipped before any update; set "
            f"algorithm.old_policy=learner, or algorithm.clip to {MIN_ENGINE_CLIP} or more"
        )
    correction, cap = algorithm.importance_correction, algorithm.importance_correction_cap
    if correction in ("mask", "sequence_mask") and cap < MIN_MASK_CAP:
        return (
            f"algorithm.importance_correction_cap={cap:g} with algorithm.importance_correction={correction} leaves out "
            f"nearly every token, as engine and learner differ by rounding; set it to {MIN_MASK_CAP} or more"
        )
    return None


def check_unused_settings(settings: SettingsTree) -> str | None:
    """Settings that the algorithm does not read have their defaults."""
    algorithm = settings.algorithm
    reasons = {}
    if algorithm.name in OFFLINE_ALGORITHMS:
        reasons = dict.fromkeys(SAMPLING_SETTINGS, f"algorithm.name={algorithm.name} trains on responses of the log")
    if algorithm.name in ALGORITHM_NAMES and algorithm.name != "dapo":
        reasons["min_reward_spread"] = f"algorithm.name={algorithm.name} drops no group"
    if algorithm.kl_target is None:
        reasons["kl_horizon"] = "algorithm.kl_target=null leaves algorithm.kl_coef as it is"
    for name, reason in reasons.items():
        value, default = getattr(algorithm, name), type(algorithm).model_fields[name].default
        if value != default:
            default_text = "null" if default is None else default
            return f"algorithm.{name}={value} would be unused, as {reason}; set algorithm.{name}={default_text}"
    if algorithm.loss == "gspo" and algorithm.name in ("crraft", "codpo"):
        return (
            f"algorithm.loss=gspo divides the loss of a response by its length, but algorithm.name={algorithm.name} is "
            "a loss of whole responses; set algorithm.loss=null, or algorithm.name=crpg"
        )
    return None


def check_weight_copies(settings: SettingsTree) -> str | None:
    """Averages and refreshed references are copies of whole weights, which a rank has below ZeRO 3 only."""
    learner, refresh = settings.learner, settings.algorithm.reference_refresh_steps
    if learner.zero_stage == 3 and (refresh or learner.ema_decay):
        return (
            f"learner.zero_stage=3 shards the weights that learner.ema_decay={learner.ema_decay:g} or "
            f"algorithm.reference_refresh_steps={refresh} copy; set learner.zero_stage=2, or both to 0"
        )
    if refresh and learner.lora_rank:
        return (
            f"algorithm.reference_refresh_steps={refresh} conflicts with learner.lora_rank={learner.lora_rank}, whose "
            "reference is the policy without its adapters; set one of them to 0"
        )
    return None


def check_gpu_shares(settings: SettingsTree) -> str | None:
    """An engine shares one GPU or has whole ones, a learner has one or none, a reward actor at most one."""
    gpus_per_engine = settings.cluster.gpus_per_engine
    if gpus_per_engine > 1 and gpus_per_engine != int(gpus_per_engine):
        return (
            f"cluster.gpus_per_engine={gpus_per_engine:g}: an engine shares one GPU or spans whole ones; set "
            f"cluster.gpus_per_engine={math.ceil(gpus_per_engine)}"
        )
    engines_per_gpu = (
        min(settings.rollout.engines, math.floor(1 / gpus_per_engine + 1e-9)) if gpus_per_engine > 0 else 0
    )
    share = settings.rollout.gpu_memory_share
    if engines_per_gpu * share > 1 and not settings.is_colocated:
        return (
            f"cluster.gpus_per_engine={gpus_per_engine:g} places {engines_per_gpu} engines on one GPU, each of which "
            f"takes rollout.gpu_memory_share={share:g} of its memory; set rollout.gpu_memory_share="
            f"{math.floor(100 / engines_per_gpu) / 100:g} or less, or cluster.gpus_per_engine=1"
        )
    if settings.cluster.gpus_per_learner not in (0, 1) and settings.weight_sync.transport != "cuda_ipc":
        return (
            f"cluster.gpus_per_learner={settings.cluster.gpus_per_learner:g}: a learner runs on one GPU (1) or on the "
            f"CPU (0); for more GPUs raise learner.workers={settings.learner.workers}"
        )
    if settings.cluster.gpus_per_reward > 1:
        return (
            f"cluster.gpus_per_reward={settings.cluster.gpus_per_reward:g}: a reward actor uses at most one GPU; "
            f"for more raise objectives.*.replicas, or reward.workers={settings.reward.workers} for training"
        )
    training_gpus = settings.cluster.reward_training_gpus
    if training_gpus > 1 or (0 < training_gpus < 1 and settings.reward.max_workers > 1):
        # NCCL refuses two ranks on one GPU.
        return (
            f"cluster.gpus_per_reward_worker={training_gpus:g}: each of {settings.reward.max_workers} reward training "
            "workers needs a GPU of its own or none; set cluster.gpus_per_reward_worker to 1 or 0, or reward.workers=1"
        )
    policy_share = gpus_per_engine + (settings.cluster.gpus_per_learner if settings.is_colocated else 0)
    if settings.cluster.gpus_per_reward > 0 and 0 < gpus_per_engine < 1 and policy_share < 1:
        return (
            f"cluster.gpus_per_reward={settings.cluster.gpus_per_reward:g} could place a reward actor on the GPU of an "
            f"engine (cluster.gpus_per_engine={gpus_per_engine:g}), which starts only if its share of the memory is "
            "free; let engines and learners fill their GPUs, and set cluster.gpus_per_reward=0 or add GPUs for it"
        )
    return None


def check_nccl(settings: SettingsTree) -> str | None:
    """NCCL needs a whole GPU on both sides."""
    cluster = settings.cluster
    # NCCL allows one rank per GPU, so a GPU cannot be shared by an engine and a learner.
    if settings.weight_sync.transport != "nccl" or min(cluster.gpus_per_engine, cluster.gpus_per_learner) >= 1:
        return None
    return (
        f"weight_sync.transport=nccl needs whole GPUs on both sides, but cluster.gpus_per_engine="
        f"{cluster.gpus_per_engine:g} and cluster.gpus_per_learner={cluster.gpus_per_learner:g}; set both to 1 or "
        "more, or weight_sync.transport=shm"
    )


def check_colocation(settings: SettingsTree) -> str | None:
    """Colocated learners and engines: one of each per GPU, active in turn."""
    cluster, workers, engines = settings.cluster, settings.learner.workers, settings.rollout.engines
    if settings.weight_sync.transport != "cuda_ipc":
        return None
    gpu_shares = (cluster.gpus_per_engine, cluster.gpus_per_learner)
    if min(gpu_shares) <= 0 or sum(gpu_shares) > 1:
        return (
            "weight_sync.transport=cuda_ipc lets an engine and a learner share one GPU, but cluster.gpus_per_engine="
            f"{gpu_shares[0]:g} and cluster.gpus_per_learner={gpu_shares[1]:g}; set both to 0.5 on GPUs, or "
            "weight_sync.transport=shm on CPUs"
        )
    if workers > 1 and sum(gpu_shares) <= 0.5:
        return (
            "weight_sync.transport=cuda_ipc places one learner and one engine on each GPU, but "
            f"cluster.gpus_per_engine={gpu_shares[0]:g} and cluster.gpus_per_learner={gpu_shares[1]:g} leave room for "
            "two of each, and NCCL refuses two ranks on one GPU; set both to 0.5"
        )
    if workers != engines:
        return (
            f"weight_sync.transport=cuda_ipc places one learner and one engine on each GPU, but learner.workers="
            f"{workers} and rollout.engines={engines}; set both to the same number, or weight_sync.transport=nccl with "
            "separate GPUs"
        )
    rollout_labels, learner_labels = cluster.get_role_labels("rollout"), cluster.get_role_labels("learner")
    if any(rollout_labels.get(key, value) != value for key, value in learner_labels.items()):
        return (
            f"cluster.node_labels requires {rollout_labels} of rollout and {learner_labels} of learner, which share "
            "GPUs with weight_sync.transport=cuda_ipc; give both the same labels, or set weight_sync.transport=nccl"
        )
    if settings.algorithm.max_staleness:
        return (
            f"algorithm.max_staleness={settings.algorithm.max_staleness} samples during updates, but with "
            "weight_sync.transport=cuda_ipc engines and learners are active in turn; set algorithm.max_staleness=0, or "
            "weight_sync.transport=nccl"
        )
    learner = settings.learner
    if learner.zero_stage != 2 or learner.offload_optimizer:
        return (
            "weight_sync.transport=cuda_ipc offloads the learner's states to host memory and back, which DeepSpeed "
            "supports for ZeRO 2 without optimizer offload only (now "
            f"learner.zero_stage={learner.zero_stage}, "
            f"learner.offload_optimizer={str(learner.offload_optimizer).lower()}); "
            "set learner.zero_stage=2 and learner.offload_optimizer=false"
        )
    return None


def check_lora_sync(settings: SettingsTree) -> str | None:
    """Adapters can be synced only when adapters are trained."""
    if settings.weight_sync.transport != "lora" or settings.learner.lora_rank:
        return None
    return (
        "weight_sync.transport=lora has no adapters to send, as learner.lora_rank=0 trains the full weights; set "
        "learner.lora_rank=16, or weight_sync.transport=shm"
    )


def check_optimizer_offload(settings: SettingsTree) -> str | None:
    """Optimizer offload needs a GPU to offload from, and a ZeRO stage that does it."""
    if not settings.learner.offload_optimizer:
        return None
    if settings.cluster.gpus_per_learner > 0:
        if settings.learner.zero_stage > 0:
            return None
        return (
            "learner.offload_optimizer=true would be unused, as learner.zero_stage=0 cannot move the optimizer to host "
            "memory; set learner.zero_stage=1 or more, or learner.offload_optimizer=false"
        )
    return (
        "learner.offload_optimizer=true moves the optimizer off the GPU, but cluster.gpus_per_learner=0 trains on the "
        "CPU already; set learner.offload_optimizer=false or cluster.gpus_per_learner=1"
    )


def check_micro_batch(settings: SettingsTree) -> str | None:
    """The longest sample fits into one micro-batch."""
    rollout, micro_batch_tokens = settings.rollout, settings.algorithm.micro_batch_tokens
    max_sample_tokens = rollout.max_prompt_tokens + rollout.max_response_tokens
    # Packing never splits a sample: its attention spans all its tokens.
    if max_sample_tokens <= micro_batch_tokens:
        return None
    return (
        f"a sample may have {max_sample_tokens} tokens (rollout.max_prompt_tokens={rollout.max_prompt_tokens} + "
        f"rollout.max_response_tokens={rollout.max_response_tokens}), but algorithm.micro_batch_tokens="
        f"{micro_batch_tokens} is smaller; set algorithm.micro_batch_tokens={max_sample_tokens} or more"
    )


def check_step_shares(settings: SettingsTree) -> str | None:
    """Each mini-batch has a prompt, and the overlong penalty begins within a response."""
    algorithm, max_tokens = settings.algorithm, settings.rollout.max_response_tokens
    if algorithm.mini_batches > algorithm.prompts_per_step:
        return (
            f"algorithm.mini_batches={algorithm.mini_batches} is more than algorithm.prompts_per_step="
            f"{algorithm.prompts_per_step}, and each mini-batch needs a prompt; lower the first or raise the second"
        )
    if algorithm.overlong_buffer > max_tokens:
        return (
            f"algorithm.overlong_buffer={algorithm.overlong_buffer} is longer than a response "
            f"(rollout.max_response_tokens={max_tokens}), so an empty one would be penalized too; lower it"
        )
    return None


def check_learner_workers(settings: SettingsTree) -> str | None:
    """Every learner gets at least one sample per step."""
    algorithm, workers = settings.algorithm, settings.learner.workers
    samples = algorithm.prompts_per_step * algorithm.samples_per_prompt
    # A learner without samples would miss the collectives of the others, which would hang.
    if samples >= workers:
        return None
    return (
        f"learner.workers={workers} is more than the {samples} samples of a step (algorithm.prompts_per_step="
        f"{algorithm.prompts_per_step} x algorithm.samples_per_prompt={algorithm.samples_per_prompt}), so some learner "
        "would be idle; lower learner.workers or raise algorithm.prompts_per_step"
    )


def check_concurrency(settings: SettingsTree) -> str | None:
    """A whole group fits into one engine at once."""
    group_size, concurrency = settings.algorithm.samples_per_prompt, settings.rollout.concurrency
    # Prompts are admitted as whole groups, so a larger group would never be admitted.
    if concurrency >= group_size:
        return None
    return (
        f"rollout.concurrency={concurrency} is less than one group (algorithm.samples_per_prompt={group_size}); "
        f"set rollout.concurrency={group_size} or more"
    )


def check_checkpoint_upload_url(settings: SettingsTree) -> str | None:
    """Checkpoints are uploaded to a URL; run.root is the setting for a folder."""
    url = settings.run.checkpoint_upload_url
    if url is None or "://" in url:
        return None
    return (
        f"run.checkpoint_upload_url={url} is not a URL; set it to one such as s3://bucket/runs, or "
        "file:///absolute/folder"
    )


def check_split_shares(settings: SettingsTree) -> str | None:
    """The training split is not empty."""
    prepare = settings.prepare
    if prepare.dev_share + prepare.test_share < 1:
        return None
    return (
        f"prepare.dev_share={prepare.dev_share:g} and prepare.test_share={prepare.test_share:g} leave no rows for "
        "training; their sum must stay below 1"
    )


def check_serve(settings: SettingsTree) -> str | None:
    """The service's replica limits are ordered, and canary traffic has a candidate."""
    serve = settings.serve
    min_replicas, max_replicas = serve.replica_limits
    if min_replicas > max_replicas:
        return f"serve.replicas={[min_replicas, max_replicas]} has its minimum above its maximum; set the smaller first"
    if serve.canary_share > 0 and serve.candidate is None:
        return (
            f"serve.canary_share={serve.canary_share:g} needs a candidate (serve.candidate=null); name the candidate's "
            "folder or set serve.canary_share=0"
        )
    return None


SETTINGS_RULES: tuple[Callable[[SettingsTree], str | None], ...] = (
    check_objective_sources,
    check_objective_names,
    check_objective_weights,
    check_topic_objectives,
    check_aggregation,
    check_kl,
    check_kl_reader,
    check_critic,
    check_policy_ratio,
    check_ratio_bounds,
    check_unused_settings,
    check_weight_copies,
    check_reward_losses,
    check_trained_parts,
    check_debias,
    check_members,
    check_shared_head,
    check_uncertainty_penalty,
    check_shared_backbone,
    check_reader_independence,
    check_gpu_shares,
    check_nccl,
    check_colocation,
    check_lora_sync,
    check_optimizer_offload,
    check_micro_batch,
    check_step_shares,
    check_learner_workers,
    check_concurrency,
    check_checkpoint_upload_url,
    check_split_shares,
    check_serve,
)


def find_first_violation(settings: SettingsTree) -> str | None:
    """Message of the first violated rule; None when all hold."""
    return next((problem for rule in SETTINGS_RULES if (problem := rule(settings)) is not None), None)
