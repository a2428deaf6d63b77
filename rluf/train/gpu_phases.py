"""Lets engines and learners that share GPUs take turns: before each phase, who must leave leaves, who comes comes."""

from __future__ import annotations

import time

from rluf.backends.colocation import Move, Phase, moves, shares_gpus
from rluf.config.settings import Settings
from rluf.train.actor_groups import Crew, everyone


async def turn(settings: Settings, crew: Crew, phase: Phase) -> float:
    """Bring `crew` to `phase`; returns the seconds it took. Nothing happens where engines and learners have own GPUs.

    Raises StallError past `publish.deadline_s`, naming the actor and what it was doing.
    """
    if not shares_gpus(settings):
        return 0.0
    begun = time.monotonic()
    async with crew.turning:
        for move in moves(crew.phase, phase):
            await _make(settings, crew, move)
        crew.phase = phase
    return time.monotonic() - begun


async def _make(settings: Settings, crew: Crew, move: Move) -> None:
    members = crew.rollouts if move.action in ("sleep", "wake") else crew.learners
    arguments = (move.parts,) if move.parts else ()
    calls = [(m, getattr(m.handle, move.action).remote(*arguments)) for m in members]
    await everyone(calls, settings.publish.deadline_s, f"taking turns: {move.action} {' '.join(move.parts)}".rstrip())
