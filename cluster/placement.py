"""How each role is placed: Ray options, environment of its process, and the wait until all of them have a place."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from rluf.errors import ActorError, StallError

if TYPE_CHECKING:
    from rluf.config.settings import Settings

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
    return {
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

    It keeps freed activations for five seconds instead of faulting them in again at once. Kept for ever, they made the
    learner of a run of 14 steps grow to 11.6 GiB. Empty where this build of Ray has no jemalloc.
    """
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not library.is_file():
        return {}
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": "dirty_decay_ms:5000,muzzy_decay_ms:5000"}


def compute_threads(settings: Settings, cores: int | None = None) -> int:
    """Compute threads of one actor: `cluster.threads`, else the cores this process may use divided by learner ranks."""
    if settings.cluster.threads:
        return settings.cluster.threads
    return max(1, (cores or len(os.sched_getaffinity(0))) // settings.learner.ranks)


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
            free = ray.available_resources()
            raise StallError(
                f"waited {seconds:g} s for a place for {', '.join(missing)}; the cluster has "
                f"{free.get('CPU', 0.0):g} CPU and {free.get('GPU', 0.0):g} GPU free; end other jobs on it, lower the "
                "number of actors, or raise cluster.start_deadline_s while nodes are still joining"
            )
    finally:
        for wait in waits.values():
            wait.cancel()


async def _constructed(handle: Any) -> None:
    await handle.__ray_ready__.remote()
