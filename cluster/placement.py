"""Placement of actors: Ray options and process environment of each role, and the placement groups of a run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rluf.errors import DeadlineError
from rluf.utils.devices import build_device_environment
from rluf.utils.host_memory import KEEP_FREED_MALLOC_CONF

if TYPE_CHECKING:
    from rluf.config.settings import Settings

SHARED_GROUP_NAME = "engines and learners"
"""The placement group of engines and learners that share GPUs."""
LEARNERS_GROUP_NAME = "learners"
PASSIVE_OPENMP_ENV = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Idle OpenMP threads sleep at once: actors share cores, and spinning threads would slow down the others."""


def actor_options(settings: Settings, role: str, objective: str = "") -> dict[str, Any]:
    """Options for `ray.remote(...).options(**...)` of one actor of `role` (rollout, reward or learner).

    `objective` is that of a reward actor: judges, functions and services reserve no GPU.
    """
    cluster = settings.cluster
    cpus, gpus = settings.get_reward_actor_resources(objective) if objective else cluster.get_role_resources(role)
    # Labels of the other roles are in their placement groups.
    node_labels = cluster.get_role_labels(role) if role == "reward" else {}
    return {
        **({"label_selector": node_labels} if node_labels else {}),
        "num_cpus": cpus,
        "num_gpus": gpus,
        # Ray must not restart actors itself: a new engine needs the current weights first (train/actor_calls.py).
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": actor_environment(settings, role) | build_device_environment(gpus)},
    }


def actor_environment(settings: Settings, role: str) -> dict[str, str]:
    """Environment variables of one actor's process; set before it starts, since OpenMP reads them only once."""
    threads = str(compute_threads(settings))
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        **PASSIVE_OPENMP_ENV,
        **build_device_environment(settings.cluster.get_role_resources(role)[1]),
    }
    if role == "rollout":
        # Without VLLM_CPU_KVCACHE_SPACE: it takes whole GiB only and would override rollout.kv_cache_gib.
        environment |= {"VLLM_NO_USAGE_STATS": "1"}
        if settings.cluster.gpus_per_engine == 0:
            # vLLM would pin its threads to cores that the other actors of the machine use too.
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if role == "learner" and settings.cluster.gpus_per_learner == 0:
        environment |= _jemalloc_environment()
    return environment


def _jemalloc_environment() -> dict[str, str]:
    """Variables that load jemalloc, which Ray ships, into a CPU learner; empty where this build of Ray has none."""
    # It keeps freed activations within a micro-batch instead of faulting them in again, which took a fifth of a step.
    # The learner returns them to the system after each micro-batch, or they would add up.
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not library.is_file():
        return {}
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": KEEP_FREED_MALLOC_CONF}


def compute_threads(settings: Settings, cores: int | None = None) -> int:
    """Compute threads per actor: `cluster.threads_per_actor`, else this process's cores divided by the learners."""
    if settings.cluster.threads_per_actor:
        return settings.cluster.threads_per_actor
    return max(1, (cores or len(os.sched_getaffinity(0))) // settings.learner.workers)


class PlacementGroups:
    """Reserved resources of one run's actors.

    Learners share one group and are placed close together; each engine has a group of its own, or both share the same
    GPUs in one group. The GPUs of an engine are one bundle, so they are on one node. Reward actors have no group. Ray
    moves the bundle of a lost node to another node, so a restarted actor finds resources.
    """

    def __init__(self, settings: Settings, *, with_learners: bool) -> None:
        """Request the groups from Ray; `wait_until_ready` waits for them."""
        self.groups_by_name: dict[str, PlacementGroup] = {}
        bundles_by_group = placement_bundles(settings, with_learners=with_learners)
        labels_by_group = {name: _group_node_labels(settings, name) for name in bundles_by_group}
        # Ray places groups in order of request: a group without labels must not take the labeled nodes first.
        for group_name in sorted(bundles_by_group, key=lambda name: -len(labels_by_group[name])):
            bundles, strategy = bundles_by_group[group_name]
            node_labels = labels_by_group[group_name]
            selector = [node_labels] * len(bundles) if node_labels else None
            self.groups_by_name[group_name] = placement_group(bundles, strategy, bundle_label_selector=selector)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Wait for all groups. Raises DeadlineError naming those not placed after `timeout_s`, and free resources."""
        waits = {name: asyncio.ensure_future(_wait_for_group(group)) for name, group in self.groups_by_name.items()}
        try:
            await asyncio.wait(waits.values(), timeout=timeout_s)
            missing_groups = [name for name, wait in waits.items() if not wait.done()]
            if missing_groups:
                raise DeadlineError(_no_room_message(missing_groups, timeout_s))
        finally:
            for wait in waits.values():
                wait.cancel()

    def scheduling_options(self, role: str, index: int) -> dict[str, Any]:
        """Ray options that place actor `index` of `role` into its bundle; none for reward actors."""
        own_name = {"learner": LEARNERS_GROUP_NAME, "rollout": _engine_group_name(index)}.get(role, "")
        shared_group = self.groups_by_name.get(SHARED_GROUP_NAME) if own_name else None
        group = shared_group or self.groups_by_name.get(own_name)
        if group is None:
            return {}
        # An engine's own group has a single bundle; the others have one per index.
        bundle_index = index if role == "learner" or shared_group else 0
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle_index)
        return {"scheduling_strategy": strategy}

    def release(self) -> None:
        """Remove all groups."""
        for group in self.groups_by_name.values():
            remove_placement_group(group)
        self.groups_by_name = {}


def placement_bundles(settings: Settings, *, with_learners: bool) -> dict[str, tuple[list[dict[str, float]], str]]:
    """Bundles and Ray strategy of each placement group by name."""

    def role_bundle(*roles: str) -> dict[str, float]:
        cpus, gpus = (sum(amounts) for amounts in zip(*map(settings.cluster.get_role_resources, roles), strict=True))
        return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}

    engine_count = settings.rollout.engines
    if with_learners and settings.is_colocated:
        # Rank i and engine i in one bundle get shares of the same GPU, so that the engine can map the rank's memory.
        return {SHARED_GROUP_NAME: ([role_bundle("rollout", "learner")] * engine_count, "PACK")}
    # Alone, a colocated engine still gets a GPU of its own: Ray would place two shares on one GPU, whose memory each
    # engine takes up to rollout.gpu_memory_share.
    engine_bundle = role_bundle("rollout", "learner") if settings.is_colocated else role_bundle("rollout")
    bundles = {_engine_group_name(i): ([engine_bundle], "STRICT_PACK") for i in range(engine_count)}
    if with_learners:
        bundles[LEARNERS_GROUP_NAME] = ([role_bundle("learner")] * settings.learner.workers, "PACK")
    return bundles


def _engine_group_name(index: int) -> str:
    return f"engine {index}"


def _group_node_labels(settings: Settings, group_name: str) -> dict[str, str]:
    """Node labels that a placement group requests: those of every role in it."""
    roles_by_group = {LEARNERS_GROUP_NAME: ("learner",), SHARED_GROUP_NAME: ("rollout", "learner")}
    roles = roles_by_group.get(group_name, ("rollout",))
    return {label: value for role in roles for label, value in settings.cluster.get_role_labels(role).items()}


async def _wait_for_group(group: PlacementGroup) -> None:
    await group.ready()


def _no_room_message(missing_groups: Sequence[str], timeout_s: float) -> str:
    free = ray.available_resources()
    return (
        f"waited {timeout_s:g} s for resources for {', '.join(missing_groups)}; the cluster has "
        f"{free.get('CPU', 0.0):g} CPU and {free.get('GPU', 0.0):g} GPU free; end other jobs on it, lower the number "
        "of actors, or raise timeouts.actor_start_s while nodes are still joining"
    )
