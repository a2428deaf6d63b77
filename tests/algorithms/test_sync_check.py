"""The sync check detects every failed sync of a tiny model, and has no false alarms."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rluf.algorithms.packing import pack_micro_batch
from rluf.algorithms.policy_model import compute_response_logprobs, load_policy
from rluf.algorithms.sync_check import ProbeLogprobs, find_sync_problem
from rluf.models.hub import resolve_model
from rluf.types import Group, Prompt, Sample

TRIALS = 10
Weights = dict[str, torch.Tensor]


def compute_probe_logprobs(model: nn.Module, seed: int) -> tuple[float, ...]:
    """Logprobs of two random responses to one prompt."""
    rng = random.Random(seed)
    prompt_ids = tuple(rng.randrange(3, 250) for _ in range(8))
    responses = [tuple(rng.randrange(3, 250) for _ in range(20)) for _ in range(2)]
    group = Group(
        Prompt("", (), prompt_ids, "", ""),
        tuple(Sample("", prompt_ids, response, (0.0,) * 20, (), "stop", "") for response in responses),
        0,
    )
    batch = pack_micro_batch([(0, 0), (0, 1)], {0: group}, [[0.0, 0.0]])
    with torch.no_grad():
        return tuple(compute_response_logprobs(model, batch).tolist())


def apply_update(model: nn.Module, rng: random.Random) -> nn.Module:
    """The model after an optimizer step: every weight moved by about the learning rate, as with Adam."""
    torch.manual_seed(rng.randrange(1 << 30))
    updated_model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in updated_model.parameters():
            parameter.add_(1e-4 * torch.randn_like(parameter).sign())
    return updated_model


def correct_sync(old: Weights, new: Weights, rng: random.Random) -> Weights:
    del old, rng
    return new


def stale_weights(old: Weights, new: Weights, rng: random.Random) -> Weights:
    del new, rng
    return old


def choose_matrix(new: Weights, rng: random.Random) -> str:
    return rng.choice([name for name, tensor in new.items() if tensor.dim() == 2])


def permuted_rows(old: Weights, new: Weights, rng: random.Random) -> Weights:
    del old
    name = choose_matrix(new, rng)
    return {**new, name: new[name].roll(1, dims=0)}


def scaled_matrix(old: Weights, new: Weights, rng: random.Random) -> Weights:
    del old
    name = choose_matrix(new, rng)
    return {**new, name: new[name] * 2.0}


def missing_tensor(old: Weights, new: Weights, rng: random.Random) -> Weights:
    """A tensor that the engine never received: zeros."""
    del old
    name = choose_matrix(new, rng)
    return {**new, name: torch.zeros_like(new[name])}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder: Path = resolve_model("tiny", tmp_path_factory.mktemp("cache"))
    return load_policy(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("fault", "detected_count"),
    [
        (correct_sync, 0),
        (stale_weights, TRIALS),
        (permuted_rows, TRIALS),
        (scaled_matrix, TRIALS),
        (missing_tensor, TRIALS),
    ],
)
def test_every_fault_is_detected_without_false_alarms(
    model: nn.Module, fault: Callable[[Weights, Weights, random.Random], Weights], detected_count: int
) -> None:
    problems = []
    for trial in range(TRIALS):
        rng = random.Random(trial)
        before = ProbeLogprobs(compute_probe_logprobs(model, trial), compute_probe_logprobs(model, trial))
        learner, engine = apply_update(model, rng), copy.deepcopy(model)
        engine.load_state_dict(fault(model.state_dict(), learner.state_dict(), rng))
        after = ProbeLogprobs(compute_probe_logprobs(learner, trial), compute_probe_logprobs(engine, trial))
        problems.append(find_sync_problem(before, after, before.mean_gap, tolerance=0.15))
    assert sum(problem is not None for problem in problems) == detected_count, problems


def make_logprobs(learner: float, engine: float) -> ProbeLogprobs:
    return ProbeLogprobs((learner, learner), (engine, engine))


def test_each_check_has_its_own_message() -> None:
    before = make_logprobs(-1.0, -1.02)
    assert find_sync_problem(before, make_logprobs(-1.1, -1.12), 0.02, 0.15) is None
    assert "logprob_tolerance=0.15" in str(find_sync_problem(before, make_logprobs(-1.0, -1.2), 0.1, 0.15))
    assert "jumped" in str(find_sync_problem(before, make_logprobs(-1.1, -1.0), 0.02, 0.15))
    assert "still has its previous weights" in str(find_sync_problem(before, make_logprobs(-1.03, -1.02), 0.02, 0.15))
    assert "logprob_tolerance" in str(find_sync_problem(before, make_logprobs(-1.0, float("nan")), 0.02, 0.15))


def test_a_learner_that_did_not_move_proves_nothing() -> None:
    assert find_sync_problem(make_logprobs(-1.0, -1.02), make_logprobs(-1.0, -1.02), 0.02, 0.15) is None
