"""Engines and learners that share GPUs: whose parts are in GPU memory in which phase of a step, and how to get there.

Separate pools are the default. On a small cluster `publish.engine=ipc` puts a learner rank and an engine on each GPU.
As they never work at once, each moves to host memory what the other needs the room for: the engine by vLLM's sleep mode
(level 1: weights wait in host memory, the KV cache is dropped), the learner by DeepSpeed's offload_states. While
weights are published both sides' weights are there, and neither KV cache nor optimiser state. Untested on GPUs.

Pure: `moves` only says what to do and in which order, the actors do it (rluf/train/gpu_phases.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from rluf.config.settings import Settings

Phase = Literal["generate", "learn", "publish"]
Action = Literal["sleep", "wake", "offload", "reload"]

WEIGHTS, CACHE = "weights", "kv_cache"
"""An engine's parts, under the names of vLLM's wake-up tags."""
STATES = "states"
"""A learner's master weights, optimiser state and gradients; its other part is WEIGHTS."""


@dataclass(frozen=True, slots=True)
class Held:
    """Parts of each side that are in GPU memory."""

    engine: frozenset[str]
    learner: frozenset[str]


@dataclass(frozen=True, slots=True)
class Move:
    """One call to all engines (sleep, wake) or all learner ranks (offload, reload); `parts` as that call takes them."""

    action: Action
    parts: tuple[str, ...] = ()


NOTHING: frozenset[str] = frozenset()
PHASES: Mapping[Phase, Held] = MappingProxyType(
    {
        "generate": Held(frozenset({WEIGHTS, CACHE}), NOTHING),
        "publish": Held(frozenset({WEIGHTS}), frozenset({WEIGHTS})),
        "learn": Held(NOTHING, frozenset({WEIGHTS, STATES})),
    }
)
"""What is in GPU memory in each phase."""


def shares_gpus(settings: Settings) -> bool:
    """Whether engines and learners take turns on the same GPUs."""
    return settings.publish.engine == "ipc"


def moves(before: Phase, after: Phase) -> tuple[Move, ...]:
    """The calls that lead from one phase to another, in order: what must go leaves before anything comes.

    vLLM's sleep sends all of an engine away and its wake-up brings single parts; DeepSpeed's reload brings all of a
    learner and its offload sends single parts.
    """
    held, wanted = PHASES[before], PHASES[after]
    engine, learner = held.engine, held.learner
    found: list[Move] = []
    if engine - wanted.engine:
        found.append(Move("sleep"))
        engine = NOTHING
    if wanted.learner - learner:
        found.append(Move("reload"))
        learner = frozenset({WEIGHTS, STATES})
    if learner - wanted.learner:
        found.append(Move("offload", tuple(sorted(learner - wanted.learner))))
    if wanted.engine - engine:
        found.append(Move("wake", tuple(sorted(wanted.engine - engine, reverse=True))))
    return tuple(found)
