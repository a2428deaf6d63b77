"""Pairs of settings that do not go together: each rule returns None, or both keys, both values and a fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rluf.config.settings import Settings


def judges(settings: Settings) -> str | None:
    """A judge needs a name and no model folder; a model needs no judge."""
    for name, objective in settings.objectives.named.items():
        key = f"objectives.{name}"
        if objective.source == "judge" and objective.judge is None:
            return f"{key}.source=judge needs {key}.judge (now none); name a rule judge or set {key}.source=model"
        if objective.source == "judge" and objective.path is not None:
            return (
                f"{key}.source=judge would leave {key}.path={objective.path} unused; "
                f"set {key}.path=null or {key}.source=model"
            )
        if objective.source == "model" and objective.judge is not None:
            return (
                f"{key}.source=model would leave {key}.judge={objective.judge} unused; "
                f"set {key}.judge=null or {key}.source=judge"
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


def losses(settings: Settings) -> str | None:
    """Pairs train with bradley_terry, single responses with bce."""
    reward = settings.reward
    for name, model, fit in (
        ("love", reward.love, "bce"),
        ("helpfulness", reward.helpfulness, "bradley_terry"),
        ("safety", reward.safety, "bce"),
    ):
        if model.loss != fit:
            rows = "pairs of responses" if fit == "bradley_terry" else "single responses with a label"
            return f"reward.{name}.loss={model.loss} does not fit its data, {rows}; set reward.{name}.loss={fit}"
    return None


def tensor_parallel(settings: Settings) -> str | None:
    """An engine that spans n GPUs is given n GPUs."""
    span, given = settings.rollout.tensor_parallel, settings.cluster.gpus_per_engine
    if (span == 1 and given <= 1) or span == given:
        return None
    return f"rollout.tensor_parallel={span} needs cluster.gpus_per_engine={span} (now {given:g}); set them alike"


def gpu_shares(settings: Settings) -> str | None:
    """A learner rank is one GPU or none; a reward actor takes a share of one."""
    if settings.cluster.gpus_per_learner not in (0, 1):
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


def splits(settings: Settings) -> str | None:
    """Something is left to train on."""
    prepare = settings.prepare
    if prepare.dev_share + prepare.test_share < 1:
        return None
    return (
        f"prepare.dev_share={prepare.dev_share:g} and prepare.test_share={prepare.test_share:g} leave nothing to train "
        "on; their sum must stay below 1"
    )


RULES: tuple[Callable[[Settings], str | None], ...] = (
    judges,
    weights,
    topics,
    mix,
    losses,
    tensor_parallel,
    gpu_shares,
    nccl,
    offload,
    micro_batch,
    ranks,
    concurrency,
    splits,
)


def broken_rule(settings: Settings) -> str | None:
    """The first rule that `settings` break, in words; None when all hold."""
    return next((problem for rule in RULES if (problem := rule(settings)) is not None), None)
