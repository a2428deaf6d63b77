"""Colocated GPUs: which components of engine and learner are in GPU memory in each phase, and how to switch phases.

Separate pools are the default. On a small cluster `weight_sync.transport=cuda_ipc` places a learner rank and an engine
on each GPU. They never work at once, so each moves to host memory what would take the other's room: the engine by
vLLM's sleep mode (level 1: weights in host memory, KV cache dropped), the learner by DeepSpeed's offload_states. During
a weight sync the weights of both are on the GPU, and neither the KV cache nor the optimizer state. Untested on GPUs.

This module is pure: phase_transitions lists the actions in order, rluf/train/actor_calls.py executes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

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
