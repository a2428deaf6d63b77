"""How each role is placed: Ray options, environment of its process, and the wait until all of them have a place."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rluf.backends.allocator import KEEP_FREED
from rluf.backends.colocation import shares_gpus
from rluf.errors import ActorError, StallError

if TYPE_CHECKING:
    from rluf.config.settings import Settings

SHARED = "engines and learners"
"""The placement group of engines and learners that take turns on GPUs."""
QUIET_THREADS = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Idle OpenMP threads sleep at once: actors share cores, and threads that spin starve their neighbours."""


def role_options(settings: Settings, role: str) -> dict[str, Any]:
    """Options for `ray.remote(...).options(**...)` of one actor of `role` (rollout, reward or learner)."""
    cluster = settings.cluster
    shares = {
        "rollout": (cluster.cpus_per_engine, cluster.gpus_per_engine),
        "reward": (cluster.cpus_per_reward, cluster.gpus_per_reward),
        "learner": (cluster.cpus_per_learner, cluster.gpus_per_learner),
    }
    cpus, gpus = shares[role]
    wanted = cluster.labels_of(role) if role == "reward" else {}  # the others' are in their placement groups
    return {
        **({"label_selector": wanted} if wanted else {}),
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": role_environment(settings, role)},
    }


def role_environment(settings: Settings, role: str) -> dict[str, str]:
    """Environment variables of one actor's process. They are set before it starts, as OpenMP reads them but once.

    VLLM_CPU_KVCACHE_SPACE is left out on purpose: it takes whole GiB only and would overrule `rollout.kv_cache_gib`.
    """
    threads = str(compute_threads(settings))
    names = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **QUIET_THREADS}
    if role == "rollout":
        names |= {"VLLM_NO_USAGE_STATS": "1"}
        if settings.cluster.gpus_per_engine == 0:
            names |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if role == "learner" and settings.cluster.gpus_per_learner == 0:
        names |= {"DS_ACCELERATOR": "cpu", **_jemalloc()}
    return names


def _jemalloc() -> dict[str, str]:
    """Variables that give a CPU learner jemalloc, which Ray ships: less CPU time a step.

    It keeps freed activations within a micro-batch instead of faulting them in again, which took a fifth of a step;
    the learner gives them back after each micro-batch, or they would add up. Empty where this build of Ray has no
    jemalloc.
    """
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not library.is_file():
        return {}
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": KEEP_FREED}


def compute_threads(settings: Settings, cores: int | None = None) -> int:
    """Compute threads of one actor: `cluster.threads`, else the cores this process may use divided by learner ranks."""
    if settings.cluster.threads:
        return settings.cluster.threads
    return max(1, (cores or len(os.sched_getaffinity(0))) // settings.learner.ranks)


class Places:
    """The room of one run's actors: learners close together in one group, each engine in a group of its own, or both
    on the same GPUs in one group.

    An engine's GPUs are one bundle, so they are on one node. Reward actors take what is left and have no group. Ray
    gives a bundle a new node when its own is lost, so an actor that is started again finds its place.
    """

    def __init__(self, settings: Settings, *, learners: bool) -> None:
        """Ask Ray for the room; `ready` waits for it."""
        self.groups: dict[str, PlacementGroup] = {}
        room = wanted_room(settings, learners=learners)
        labels = {name: _labels(settings, name) for name in room}
        # Ray places groups in the order they come: whoever may go anywhere must not take the labelled nodes first.
        for name in sorted(room, key=lambda name: -len(labels[name])):
            bundles, strategy = room[name]
            selector = [labels[name]] * len(bundles) if labels[name] else None
            self.groups[name] = placement_group(bundles, strategy, bundle_label_selector=selector)

    async def ready(self, seconds: float) -> None:
        """Wait for all of it. Raises StallError naming what has no room after `seconds`, and what is free."""
        waits = {name: asyncio.ensure_future(_reserved(group)) for name, group in self.groups.items()}
        try:
            await asyncio.wait(waits.values(), timeout=seconds)
            missing = [name for name, wait in waits.items() if not wait.done()]
            if missing:
                raise StallError(_no_room(missing, seconds))
        finally:
            for wait in waits.values():
                wait.cancel()

    def options(self, role: str, index: int) -> dict[str, Any]:
        """Ray options that put actor `index` of `role` into its place; none for reward actors."""
        own = {"learner": "learners", "rollout": f"engine {index}"}.get(role, "")
        shared = self.groups.get(SHARED) if own else None
        group = shared or self.groups.get(own)
        if group is None:
            return {}
        bundle = index if role == "learner" or shared else 0
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)}

    def release(self) -> None:
        """Give the room back."""
        for group in self.groups.values():
            remove_placement_group(group)
        self.groups = {}


def wanted_room(settings: Settings, *, learners: bool) -> dict[str, tuple[list[dict[str, float]], str]]:
    """Bundles and Ray strategy of each placement group by name.

    Where engines and learners take turns on GPUs, rank i and engine i have one bundle: a share of the same GPU each, so
    that what one publishes the other can map.
    """
    options = {role: role_options(settings, role) for role in ("rollout", "learner")}

    def bundle(*roles: str) -> dict[str, float]:
        cpus, gpus = (sum(options[role][kind] for role in roles) for kind in ("num_cpus", "num_gpus"))
        return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}

    engines = settings.rollout.engines
    if learners and shares_gpus(settings):
        return {SHARED: ([bundle("rollout", "learner")] * engines, "PACK")}
    room = {f"engine {i}": ([bundle("rollout")], "STRICT_PACK") for i in range(engines)}
    if learners:
        room["learners"] = ([bundle("learner")] * settings.learner.ranks, "PACK")
    return room


def _labels(settings: Settings, group: str) -> dict[str, str]:
    """Node labels that a placement group asks for: those of every role in it."""
    roles = {"learners": ("learner",), SHARED: ("rollout", "learner")}.get(group, ("rollout",))
    return {label: value for role in roles for label, value in settings.cluster.labels_of(role).items()}


async def _reserved(group: PlacementGroup) -> None:
    await group.ready()


def _no_room(missing: Sequence[str], seconds: float) -> str:
    free = ray.available_resources()
    return (
        f"waited {seconds:g} s for a place for {', '.join(missing)}; the cluster has {free.get('CPU', 0.0):g} CPU and "
        f"{free.get('GPU', 0.0):g} GPU free; end other jobs on it, lower the number of actors, or raise "
        "cluster.start_deadline_s while nodes are still joining"
    )


async def wait_for_placement(actors: Mapping[str, Any], seconds: float) -> None:
    """Wait until Ray has placed and constructed all `actors` (name -> handle).

    Raises StallError naming those that are missing after `seconds`, ActorError naming one that died on the way.
    """
    waits = {name: asyncio.ensure_future(_constructed(handle)) for name, handle in actors.items()}
    try:
        await asyncio.wait(waits.values(), timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for name, wait in waits.items():
            if wait.done() and isinstance(problem := wait.exception(), RayActorError):
                reason = str(problem).strip().splitlines()[-1]
                raise ActorError(f"{name} died while starting: {reason}; its log in the Ray dashboard says more")
        missing = [name for name, wait in waits.items() if not wait.done()]
        if missing:
            raise StallError(_no_room(missing, seconds))
    finally:
        for wait in waits.values():
            wait.cancel()


async def _constructed(handle: Any) -> None:
    await handle.__ray_ready__.remote()
