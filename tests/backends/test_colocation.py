"""Colocated GPUs: components in GPU memory per phase, and the order of transitions."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from actors.learner import LearnerActor
from rluf.backends import deepspeed as ds
from rluf.backends.colocation import (
    KV_CACHE_TAG,
    OPTIMIZER_STATES_TAG,
    RESIDENCY_BY_PHASE,
    WEIGHTS_TAG,
    GpuPhase,
    GpuResidency,
    PhaseAction,
    list_phase_transitions,
)
from rluf.config.settings import Settings

PHASES: tuple[GpuPhase, ...] = tuple(RESIDENCY_BY_PHASE)


def apply_action(residency: GpuResidency, action: PhaseAction) -> GpuResidency:
    """The effect of vLLM's sleep mode and DeepSpeed's offload."""
    if action.action == "sleep":
        return GpuResidency(frozenset(), residency.learner_components)
    if action.action == "wake":
        return GpuResidency(residency.engine_components | set(action.components), residency.learner_components)
    if action.action == "offload":
        return GpuResidency(residency.engine_components, residency.learner_components - set(action.components))
    return GpuResidency(residency.engine_components, frozenset({WEIGHTS_TAG, OPTIMIZER_STATES_TAG}))


@pytest.mark.parametrize(("before", "after"), list(itertools.product(PHASES, PHASES)))
def test_transitions_lead_to_the_phase_and_never_load_both_large_components(before: GpuPhase, after: GpuPhase) -> None:
    residency = RESIDENCY_BY_PHASE[before]
    for action in list_phase_transitions(before, after):
        residency = apply_action(residency, action)
        assert not (
            KV_CACHE_TAG in residency.engine_components and OPTIMIZER_STATES_TAG in residency.learner_components
        ), action
    assert residency == RESIDENCY_BY_PHASE[after]
    assert bool(list_phase_transitions(before, after)) == (before != after)


def test_the_transitions_of_one_step() -> None:
    transitions: list[tuple[GpuPhase, GpuPhase]] = [
        ("generate", "learn"),
        ("learn", "sync"),
        ("sync", "generate"),
    ]
    actions = [phase_action for transition in transitions for phase_action in list_phase_transitions(*transition)]
    assert [(phase_action.action, phase_action.components) for phase_action in actions] == [
        ("sleep", ()),
        ("reload", ()),
        ("offload", ("states",)),
        ("wake", ("weights",)),
        ("offload", ("weights",)),
        ("wake", ("kv_cache",)),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_random_transitions_end_in_the_right_residency(seed: int) -> None:
    rng, phase, residency = random.Random(seed), PHASES[0], RESIDENCY_BY_PHASE[PHASES[0]]
    for _ in range(50):
        phase, before = rng.choice(PHASES), phase
        for action in list_phase_transitions(before, phase):
            residency = apply_action(residency, action)
    assert residency == RESIDENCY_BY_PHASE[phase]


@pytest.mark.parametrize("components", [("states",), ("weights",), ("states", "weights")])
def test_the_average_of_the_policy_leaves_a_shared_gpu_with_the_states(
    components: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ds, "offload_to_host", lambda engine, components: None)
    monkeypatch.setattr(ds, "reload_to_device", lambda engine: None)
    moves: list[str] = []
    learner = LearnerActor(0, 1, Settings().model_dump_json(), "model")
    learner.device = torch.device("cuda", 0)
    learner._engine = SimpleNamespace()  # type: ignore[assignment]
    average = SimpleNamespace(move_to=lambda device: moves.append(str(device)))
    learner._weight_average = average  # type: ignore[assignment]
    learner.offload(components)
    assert moves == (["cpu"] if "states" in components else [])
    learner.reload()
    assert moves[-1] == "cuda:0"
