"""The probe finds every wrong sync of a tiny model, and never one that is right."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rluf.algorithms.logprobs import response_logprobs
from rluf.algorithms.packing import pack
from rluf.algorithms.policy_io import load_policy
from rluf.algorithms.sync_check import Reading, sync_problem
from rluf.models.hub import resolve_model
from rluf.types import Group, Prompt, Sample

TRIALS = 10
Weights = dict[str, torch.Tensor]


def reads(model: nn.Module, seed: int) -> tuple[float, ...]:
    """Logprobs of two random responses to one prompt."""
    draw = random.Random(seed)
    ids = tuple(draw.randrange(3, 250) for _ in range(8))
    texts = [tuple(draw.randrange(3, 250) for _ in range(20)) for _ in range(2)]
    group = Group(Prompt("", (), ids, "", ""), tuple(Sample("", ids, t, (0.0,) * 20, (), "stop", "") for t in texts), 0)
    batch = pack([(0, 0), (0, 1)], {0: group}, [[0.0, 0.0]])
    with torch.no_grad():
        return tuple(response_logprobs(model, batch).tolist())


def updated(model: nn.Module, draw: random.Random) -> nn.Module:
    """The model after an optimiser step: every weight moved by about the learning rate, as under Adam."""
    torch.manual_seed(draw.randrange(1 << 30))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter).sign())
    return moved


def right(old: Weights, new: Weights, draw: random.Random) -> Weights:
    del old, draw
    return new


def stale(old: Weights, new: Weights, draw: random.Random) -> Weights:
    del new, draw
    return old


def matrix(new: Weights, draw: random.Random) -> str:
    return draw.choice([name for name, tensor in new.items() if tensor.dim() == 2])


def permuted(old: Weights, new: Weights, draw: random.Random) -> Weights:
    del old
    name = matrix(new, draw)
    return {**new, name: new[name].roll(1, dims=0)}


def scaled(old: Weights, new: Weights, draw: random.Random) -> Weights:
    del old
    name = matrix(new, draw)
    return {**new, name: new[name] * 2.0}


def missing(old: Weights, new: Weights, draw: random.Random) -> Weights:
    """A tensor whose place in the engine was left as it was allocated: zeros."""
    del old
    name = matrix(new, draw)
    return {**new, name: torch.zeros_like(new[name])}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder: Path = resolve_model("tiny", tmp_path_factory.mktemp("cache"))
    return load_policy(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("fault", "caught"), [(right, 0), (stale, TRIALS), (permuted, TRIALS), (scaled, TRIALS), (missing, TRIALS)]
)
def test_every_fault_is_found_and_no_right_publish_is_called_wrong(
    model: nn.Module, fault: Callable[[Weights, Weights, random.Random], Weights], caught: int
) -> None:
    found = []
    for trial in range(TRIALS):
        draw = random.Random(trial)
        before = Reading(reads(model, trial), reads(model, trial))
        learner, engine = updated(model, draw), copy.deepcopy(model)
        engine.load_state_dict(fault(model.state_dict(), learner.state_dict(), draw))
        after = Reading(reads(learner, trial), reads(engine, trial))
        found.append(sync_problem(before, after, before.gap, tolerance=0.15))
    assert sum(problem is not None for problem in found) == caught, found


def reading(learner: float, engine: float) -> Reading:
    return Reading((learner, learner), (engine, engine))


def test_each_question_has_its_own_answer() -> None:
    before = reading(-1.0, -1.02)
    assert sync_problem(before, reading(-1.1, -1.12), 0.02, 0.15) is None
    assert "probe_tolerance is 0.15" in str(sync_problem(before, reading(-1.0, -1.2), 0.1, 0.15))
    assert "jumped" in str(sync_problem(before, reading(-1.1, -1.0), 0.02, 0.15))
    assert "kept its old weights" in str(sync_problem(before, reading(-1.03, -1.02), 0.02, 0.15))
    assert "probe_tolerance" in str(sync_problem(before, reading(-1.0, float("nan")), 0.02, 0.15))


def test_a_learner_that_did_not_move_proves_nothing() -> None:
    assert sync_problem(reading(-1.0, -1.02), reading(-1.0, -1.02), 0.02, 0.15) is None
