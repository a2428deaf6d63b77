"""Learners and engines on shared GPUs: what is in GPU memory in which phase, and in which order it comes and goes."""

from __future__ import annotations

import itertools
import random

import pytest

from rluf.backends.colocation import CACHE, PHASES, STATES, WEIGHTS, Held, Move, Phase, moves

NAMES: tuple[Phase, ...] = tuple(PHASES)


def made(held: Held, move: Move) -> Held:
    """What vLLM's sleep mode and DeepSpeed's offload do."""
    if move.action == "sleep":
        return Held(frozenset(), held.learner)
    if move.action == "wake":
        return Held(held.engine | set(move.parts), held.learner)
    if move.action == "offload":
        return Held(held.engine, held.learner - set(move.parts))
    return Held(held.engine, frozenset({WEIGHTS, STATES}))


@pytest.mark.parametrize(("before", "after"), list(itertools.product(NAMES, NAMES)))
def test_moves_lead_to_the_phase_and_never_hold_both_large_parts(before: Phase, after: Phase) -> None:
    held = PHASES[before]
    for move in moves(before, after):
        held = made(held, move)
        assert not (CACHE in held.engine and STATES in held.learner), move
    assert held == PHASES[after]
    assert bool(moves(before, after)) == (before != after)


def test_a_step_goes_round_as_written() -> None:
    ways: list[tuple[Phase, Phase]] = [("generate", "learn"), ("learn", "publish"), ("publish", "generate")]
    told = [(move.action, move.parts) for way in ways for move in moves(*way)]
    assert told == [
        ("sleep", ()),
        ("reload", ()),
        ("offload", ("states",)),
        ("wake", ("weights",)),
        ("offload", ("weights",)),
        ("wake", ("kv_cache",)),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_any_walk_ends_where_it_should(seed: int) -> None:
    draw, phase, held = random.Random(seed), NAMES[0], PHASES[NAMES[0]]
    for _ in range(50):
        phase, before = draw.choice(NAMES), phase
        for move in moves(before, phase):
            held = made(held, move)
    assert held == PHASES[phase]
