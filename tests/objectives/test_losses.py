"""Losses against worked numbers and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn import metrics

from rluf.objectives.losses import bradley_terry, weighted_bce


def test_weighted_bce_is_scikit_learns_log_loss() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=50), rng.integers(0, 2, 50)
    weights = rng.uniform(0.1, 5, 50)
    expected = metrics.log_loss(labels, 1 / (1 + np.exp(-logits)), sample_weight=weights)
    found = weighted_bce(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights))
    assert math.isclose(float(found), expected, rel_tol=1e-5)


def test_bce_survives_extreme_logits() -> None:
    loss = weighted_bce(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 0.0]), torch.ones(2))
    assert float(loss) == 5e3


def test_bradley_terry_worked_example() -> None:
    loss = bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0]))
    assert math.isclose(float(loss), (3 * math.log(1 + math.exp(-1)) + math.log(2)) / 4, rel_tol=1e-6)


def test_bradley_terry_pushes_the_sides_apart() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    bradley_terry(chosen, rejected, torch.ones(1)).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert float(chosen.grad) == -0.5
    assert float(rejected.grad) == 0.5
