"""Pairs of settings that do not go together: each rule returns None, or both keys, both values and a fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from rluf.config import reward_rules

if TYPE_CHECKING:
    from rluf.config.settings import Settings

CGPO = ("crpg", "crraft", "codpo")
"""Methods that take calibrated rewards and bound the KL themselves."""
LIKELIHOOD = ("rloo", *CGPO, "kto")
"""Methods whose own loss is reinforce (rluf.algorithms.registry has the table)."""


def judges(settings: Settings) -> str | None:
    """A judge needs a name and no model folder; a model needs no judge; a service has a URL."""
    for name, objective in settings.objectives.named.items():
        key = f"objectives.{name}"
        if objective.source == "judge" and objective.judge is None:
            return f"{key}.source=judge needs {key}.judge (now none); name a rule judge or set {key}.source=model"
        if objective.source == "judge" and objective.path is not None:
            return (
                f"{key}.source=judge would leave {key}.path={objective.path} unused; "
                f"set {key}.path=null or {key}.source=model"
            )
        if objective.source != "judge" and objective.judge is not None:
            return (
                f"{key}.source={objective.source} would leave {key}.judge={objective.judge} unused; "
                f"set {key}.judge=null or {key}.source=judge"
            )
        if (objective.source == "serve") != (objective.path or "").startswith(("http://", "https://")):
            return (
                f"{key}.source={objective.source} does not go with {key}.path={objective.path}: source serve names the "
                f"URL of a service in path, source model a folder; change one of them"
            )
    return None


def topics(settings: Settings) -> str | None:
    """Entries of objectives.alone are topic:objective, a topic once."""
    objectives = settings.objectives
    for pair in objectives.alone:
        topic, _, objective = pair.rpartition(":")
        if not topic or objective not in objectives.named:
            return (
                f"objectives.alone has {pair!r}, which is not topic:objective; set it to pairs that end in "
                f"{', '.join(objectives.named)}"
            )
    if len(objectives.owners) < len(objectives.alone):
        return f"objectives.alone={list(objectives.alone)} names a topic twice; set each topic once"
    return None


def mix(settings: Settings) -> str | None:
    """Entries of algorithm.mix are topic:times."""
    for pair in settings.algorithm.mix:
        topic, _, times = pair.rpartition(":")
        if not topic or not times.isdigit() or int(times) < 1:
            return f"algorithm.mix has {pair!r}, which is not topic:times; set it to pairs such as risky:3"
    return None


def weights(settings: Settings) -> str | None:
    """At least one objective weighs something."""
    if any(objective.weight > 0 for objective in settings.objectives.named.values()):
        return None
    return "objectives.*.weight are all 0, so the policy would have nothing to learn; set at least one weight above 0"


def combination(settings: Settings) -> str | None:
    """Floors belong to the constrained combination and to objectives that are there; GDPO is a form of GRPO."""
    objectives, name = settings.objectives, settings.algorithm.name
    for pair in objectives.floors:
        objective, _, floor = pair.rpartition(":")
        if objective not in objectives.named or not _is_number(floor):
            return (
                f"objectives.floors has {pair!r}, which is not objective:number; set it to pairs that begin with "
                f"{', '.join(objectives.named)}, such as safety:0"
            )
    if len(objectives.bounds) < len(objectives.floors):
        return f"objectives.floors={list(objectives.floors)} names an objective twice; set each objective once"
    if (objectives.combine == "constrained") != bool(objectives.floors):
        return (
            f"objectives.combine={objectives.combine} and objectives.floors={list(objectives.floors)} do not go "
            "together; set objectives.combine=constrained with floors such as [safety:0], or neither"
        )
    if objectives.combine == "gdpo" and name != "grpo":
        return (
            f"objectives.combine=gdpo normalises each objective as GRPO does and leaves algorithm.name={name} unused; "
            "set algorithm.name=grpo or objectives.combine=linear"
        )
    if name in CGPO and objectives.combine != "calibrated":
        return (
            f"algorithm.name={name} takes rewards between 0 and 1, which objectives.combine={objectives.combine} does "
            "not give; set objectives.combine=calibrated"
        )
    return None


def kl(settings: Settings) -> str | None:
    """A KL that is steered or taken off the reward needs a weight; CGPO has its own limit in place of one."""
    algorithm = settings.algorithm
    if algorithm.kl_coef == 0 and algorithm.kl_target is not None:
        return (
            f"algorithm.kl_target={algorithm.kl_target:g} has no KL to steer, as algorithm.kl_coef=0 leaves the "
            "reference policy out; set algorithm.kl_coef above 0 or algorithm.kl_target=null"
        )
    if algorithm.kl_coef == 0 and algorithm.kl_in == "reward":
        return (
            "algorithm.kl_in=reward has no KL to take off, as algorithm.kl_coef=0 leaves the reference policy out; set "
            "algorithm.kl_coef above 0 or algorithm.kl_in=loss"
        )
    if algorithm.kl_in == "reward" and algorithm.name in (*CGPO, "kto"):
        return (
            f"algorithm.kl_in=reward does not go with algorithm.name={algorithm.name}, which holds the policy near the "
            "reference in its own way; set algorithm.kl_in=loss"
        )
    return None


def critic(settings: Settings) -> str | None:
    """Only PPO has a critic."""
    name, rate = settings.algorithm.name, settings.learner.critic_rate
    if rate is None or name == "ppo":
        return None
    return (
        f"learner.critic_rate={rate:g} has no critic to train, as algorithm.name={name} has none; set "
        "learner.critic_rate=null or algorithm.name=ppo"
    )


def ratios(settings: Settings) -> str | None:
    """Settings of the ratio reach a loss that has one."""
    algorithm = settings.algorithm
    loss = algorithm.loss or ("reinforce" if algorithm.name in LIKELIHOOD else "ppo")
    if algorithm.dual_clip is not None and loss not in ("ppo", "gspo"):
        return (
            f"algorithm.dual_clip={algorithm.dual_clip:g} bounds a clipped ratio, which algorithm.loss={loss} does not "
            "have; set algorithm.dual_clip=null or algorithm.loss=ppo"
        )
    if algorithm.staleness and loss != "reinforce" and algorithm.importance not in ("token", "off"):
        return (
            f"algorithm.importance={algorithm.importance} would be unused with algorithm.staleness="
            f"{algorithm.staleness}, where the clipped ratio of algorithm.loss={loss} is to the engine itself; set "
            "algorithm.importance=token, or algorithm.staleness=0"
        )
    return None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def tensor_parallel(settings: Settings) -> str | None:
    """An engine that spans n GPUs is given n GPUs."""
    span, given = settings.rollout.tensor_parallel, settings.cluster.gpus_per_engine
    if (span == 1 and given <= 1) or span == given:
        return None
    return f"rollout.tensor_parallel={span} needs cluster.gpus_per_engine={span} (now {given:g}); set them alike"


def gpu_shares(settings: Settings) -> str | None:
    """A learner rank is one GPU or none; a reward actor takes a share of one."""
    if settings.cluster.gpus_per_learner not in (0, 1) and settings.publish.engine != "ipc":
        return (
            f"cluster.gpus_per_learner={settings.cluster.gpus_per_learner:g}: a rank runs on one GPU (1) or on the CPU "
            f"(0); for more GPUs raise learner.ranks={settings.learner.ranks}"
        )
    if settings.cluster.gpus_per_reward > 1:
        return (
            f"cluster.gpus_per_reward={settings.cluster.gpus_per_reward:g}: a reward actor takes at most one GPU; "
            f"for more raise objectives.*.replicas, or reward.workers={settings.reward.workers} for training"
        )
    return None


def nccl(settings: Settings) -> str | None:
    """NCCL joins GPUs, one rank each."""
    cluster = settings.cluster
    if settings.publish.engine != "nccl" or min(cluster.gpus_per_engine, cluster.gpus_per_learner) >= 1:
        return None
    return (
        f"publish.engine=nccl needs whole GPUs on both sides, but cluster.gpus_per_engine={cluster.gpus_per_engine:g} "
        f"and cluster.gpus_per_learner={cluster.gpus_per_learner:g}; set both to 1 or more, or publish.engine=shm"
    )


def colocated(settings: Settings) -> str | None:
    """Learners and engines that take turns on GPUs: one of each on every GPU, never both at work."""
    cluster, ranks, engines = settings.cluster, settings.learner.ranks, settings.rollout.engines
    if settings.publish.engine != "ipc":
        return None
    shares = (cluster.gpus_per_engine, cluster.gpus_per_learner)
    if min(shares) <= 0 or sum(shares) > 1:
        return (
            "publish.engine=ipc lets an engine and a learner rank share one GPU, but cluster.gpus_per_engine="
            f"{shares[0]:g} and cluster.gpus_per_learner={shares[1]:g}; set both to 0.5 on GPUs, or publish.engine=shm "
            "on CPUs"
        )
    if ranks != engines or settings.rollout.tensor_parallel > 1:
        return (
            f"publish.engine=ipc puts one learner rank and one engine on each GPU, but learner.ranks={ranks}, "
            f"rollout.engines={engines} and rollout.tensor_parallel={settings.rollout.tensor_parallel}; set the first "
            "two alike and the third to 1, or publish.engine=nccl with separate GPUs"
        )
    if settings.algorithm.staleness:
        return (
            f"algorithm.staleness={settings.algorithm.staleness} samples while learners learn, but with "
            "publish.engine=ipc they take turns; set algorithm.staleness=0, or publish.engine=nccl"
        )
    learner = settings.learner
    if learner.zero_stage != 2 or learner.offload_optimizer:
        return (
            "publish.engine=ipc moves the learner's states to host memory and back, which DeepSpeed does with this "
            "optimiser for ZeRO 2 alone, while nothing is offloaded (now "
            f"learner.zero_stage={learner.zero_stage}, "
            f"learner.offload_optimizer={str(learner.offload_optimizer).lower()}); "
            "set learner.zero_stage=2 and learner.offload_optimizer=false"
        )
    return None


def adapter(settings: Settings) -> str | None:
    """Adapters are published where adapters are trained."""
    if settings.publish.engine != "adapter" or settings.learner.lora_rank:
        return None
    return (
        "publish.engine=adapter has no adapters to publish, as learner.lora_rank=0 trains the weights themselves; set "
        "learner.lora_rank=16, or publish.engine=shm"
    )


def offload(settings: Settings) -> str | None:
    """Offloading to host memory needs a GPU to offload from."""
    if not settings.learner.offload_optimizer or settings.cluster.gpus_per_learner > 0:
        return None
    return (
        "learner.offload_optimizer=true moves the optimiser off the GPU, but cluster.gpus_per_learner=0 learns on the "
        "CPU already; set learner.offload_optimizer=false or cluster.gpus_per_learner=1"
    )


def micro_batch(settings: Settings) -> str | None:
    """The longest sample fits into one micro-batch."""
    rollout, budget = settings.rollout, settings.algorithm.micro_batch_tokens
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if longest <= budget:
        return None
    return (
        f"a sample may have {longest} tokens (rollout.max_prompt_tokens={rollout.max_prompt_tokens} + "
        f"rollout.max_response_tokens={rollout.max_response_tokens}), but algorithm.micro_batch_tokens={budget} holds "
        f"fewer; set algorithm.micro_batch_tokens={longest} or more"
    )


def ranks(settings: Settings) -> str | None:
    """Every learner rank gets at least one sample a step."""
    algorithm, world = settings.algorithm, settings.learner.ranks
    samples = algorithm.prompts_per_step * algorithm.samples_per_prompt
    if samples >= world:
        return None
    return (
        f"learner.ranks={world} is more than the {samples} samples of a step (algorithm.prompts_per_step="
        f"{algorithm.prompts_per_step} x algorithm.samples_per_prompt={algorithm.samples_per_prompt}), so some rank "
        "would have nothing to do; lower learner.ranks or raise algorithm.prompts_per_step"
    )


def concurrency(settings: Settings) -> str | None:
    """One engine can hold a whole group in flight."""
    group, room = settings.algorithm.samples_per_prompt, settings.rollout.concurrency
    if room >= group:
        return None
    return (
        f"rollout.concurrency={room} is less than one group (algorithm.samples_per_prompt={group}); "
        f"set rollout.concurrency={group} or more"
    )


def labels(settings: Settings) -> str | None:
    """Entries of cluster.labels are role:key=value."""
    for entry in settings.cluster.labels:
        role, _, pair = entry.partition(":")
        key, equals, value = pair.partition("=")
        if role not in ("rollout", "reward", "learner") or not (key and equals and value):
            return (
                f"cluster.labels has {entry!r}, which is not role:key=value; set it to entries such as "
                "learner:ray.io/accelerator-type=H100 (roles: rollout, reward, learner)"
            )
    return None


def upload(settings: Settings) -> str | None:
    """Checkpoints are uploaded to a URL; a folder is what run.root is for."""
    target = settings.run.upload
    if target is None or "://" in target:
        return None
    return f"run.upload={target} is no URL; set it to one such as s3://bucket/runs, or file:///absolute/folder"


def splits(settings: Settings) -> str | None:
    """Something is left to train on."""
    prepare = settings.prepare
    if prepare.dev_share + prepare.test_share < 1:
        return None
    return (
        f"prepare.dev_share={prepare.dev_share:g} and prepare.test_share={prepare.test_share:g} leave nothing to train "
        "on; their sum must stay below 1"
    )


def serving(settings: Settings) -> str | None:
    """The service's replicas, versions and policies go together."""
    serve = settings.serve
    if serve.min_replicas > serve.max_replicas:
        return (
            f"serve.min_replicas={serve.min_replicas} is more than serve.max_replicas={serve.max_replicas}; "
            f"set serve.max_replicas={serve.min_replicas} or more"
        )
    if serve.canary_share > 0 and serve.candidate is None:
        return (
            f"serve.canary_share={serve.canary_share:g} has no candidate to go to (serve.candidate=null); name the "
            "candidate's folder or set serve.canary_share=0"
        )
    for pair in serve.policies:
        name, _, path = pair.partition(":")
        if not name.replace("-", "").replace("_", "").isalnum() or not path:
            return f"serve.policies has {pair!r}, which is not name:path; set it to pairs such as base:tiny"
    if len(serve.chat) < len(serve.policies):
        return f"serve.policies={list(serve.policies)} names a policy twice; give each a name of its own"
    return None


RULES: tuple[Callable[[Settings], str | None], ...] = (
    judges,
    weights,
    topics,
    mix,
    combination,
    kl,
    critic,
    ratios,
    *reward_rules.RULES,
    tensor_parallel,
    gpu_shares,
    nccl,
    colocated,
    adapter,
    offload,
    micro_batch,
    ranks,
    concurrency,
    labels,
    upload,
    splits,
    serving,
)


def broken_rule(settings: Settings) -> str | None:
    """The first rule that `settings` break, in words; None when all hold."""
    return next((problem for rule in RULES if (problem := rule(settings)) is not None), None)
