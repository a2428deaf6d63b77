"""Colocated GPUs: which components of engine and learner are in GPU memory in each phase, and how to switch phases.

Separate pools are the default. On a small cluster `weight_sync.transport=cuda_ipc` places a learner rank and an engine
on each GPU. They never work at once, so each moves to host memory what would take the other's room: the engine by
vLLM's sleep mode (level 1: weights in host memory, KV cache dropped), the learner by DeepSpeed's offload_states. During
a weight sync the weights of both are on the GPU, and neither the KV cache nor the optimizer state. Untested on GPUs.

This module is pure: phase_transitions lists the actions in order, rluf/train/actor_groups.py executes them.
The last function returns freed host memory to the operating system (jemalloc).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from rluf.config.settings import Settings

GpuPhase = Literal["generate", "learn", "sync"]
GpuAction = Literal["sleep", "wake", "offload", "reload"]

WEIGHTS_TAG, KV_CACHE_TAG = "weights", "kv_cache"
"""Components of an engine, under the names of vLLM's wake-up tags."""
OPTIMIZER_STATES_TAG = "states"
"""A learner's master weights, optimizer state and gradients; its other component is WEIGHTS_TAG."""


@dataclass(frozen=True, slots=True)
class GpuResidency:
    """Components of engine and learner that are in GPU memory."""

    engine_components: frozenset[str]
    learner_components: frozenset[str]


@dataclass(frozen=True, slots=True)
class PhaseAction:
    """One call to all engines (sleep, wake) or to all learner ranks (offload, reload), with its `components`."""

    action: GpuAction
    components: tuple[str, ...] = ()


NO_COMPONENTS: frozenset[str] = frozenset()
RESIDENCY_BY_PHASE: Mapping[GpuPhase, GpuResidency] = MappingProxyType(
    {
        "generate": GpuResidency(frozenset({WEIGHTS_TAG, KV_CACHE_TAG}), NO_COMPONENTS),
        "sync": GpuResidency(frozenset({WEIGHTS_TAG}), frozenset({WEIGHTS_TAG})),
        "learn": GpuResidency(NO_COMPONENTS, frozenset({WEIGHTS_TAG, OPTIMIZER_STATES_TAG})),
    }
)
"""Components in GPU memory in each phase."""


def is_colocated(settings: Settings) -> bool:
    """Whether engines and learners share the same GPUs."""
    return settings.weight_sync.transport == "cuda_ipc"


def phase_transitions(from_phase: GpuPhase, to_phase: GpuPhase) -> tuple[PhaseAction, ...]:
    """Actions that lead from one phase to another, in order.

    vLLM's sleep offloads a whole engine and its wake-up restores single components; DeepSpeed's reload restores a whole
    learner and its offload takes single components.
    """
    before, after = RESIDENCY_BY_PHASE[from_phase], RESIDENCY_BY_PHASE[to_phase]
    engine, learner = before.engine_components, before.learner_components
    actions: list[PhaseAction] = []
    # Offload before load, or both together would exceed GPU memory. A reload can only restore a whole learner, so its
    # surplus is offloaded next, while the engine is still asleep.
    if engine - after.engine_components:
        actions.append(PhaseAction("sleep"))
        engine = NO_COMPONENTS
    if after.learner_components - learner:
        actions.append(PhaseAction("reload"))
        learner = frozenset({WEIGHTS_TAG, OPTIMIZER_STATES_TAG})
    if learner - after.learner_components:
        actions.append(PhaseAction("offload", tuple(sorted(learner - after.learner_components))))
    if after.engine_components - engine:
        # Reverse alphabetical order puts the weights before the KV cache.
        actions.append(PhaseAction("wake", tuple(sorted(after.engine_components - engine, reverse=True))))
    return tuple(actions)


JEMALLOC_ALL_ARENAS = 4096
"""jemalloc's MALLCTL_ARENAS_ALL."""
KEEP_FREED_MALLOC_CONF = "dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:2"
"""MALLOC_CONF of a process that calls release_freed_memory: until then the next micro-batch reuses freed memory."""


def release_freed_memory() -> bool:
    """Return freed memory to the system if the process runs on jemalloc; returns whether it does."""
    # jemalloc is preloaded, so its symbols are in the process itself; without it the lookup fails.
    mallctl = getattr(ctypes.CDLL(None), "mallctl", None)
    return mallctl is not None and mallctl(b"arena.%d.purge" % JEMALLOC_ALL_ARENAS, None, None, None, 0) == 0
