"""Losses against worked numbers and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn import metrics

from rluf.reward.losses import bradley_terry, focal, hinge, non_negative_pu, weighted_bce


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


def test_a_margin_moves_the_difference_and_a_tie_asks_for_none() -> None:
    chosen, rejected = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    won = bradley_terry(chosen, rejected, torch.ones(2), margin=0.5)
    assert math.isclose(float(won), math.log(1 + math.exp(-0.5)), rel_tol=1e-6)
    tied = bradley_terry(chosen, rejected, torch.ones(2), wins=torch.full((2,), 0.5), margin=0.5)
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert math.isclose(float(tied), expected, rel_tol=1e-6)


def test_focal_is_the_published_formula() -> None:
    found = focal(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0]))
    p = 1 / (1 + math.exp(-2.0))
    expected = (0.5**2 * math.log(2) + 3 * p**2 * -math.log(1 - p)) / 4
    assert math.isclose(float(found), expected, rel_tol=1e-6)


def test_hinge_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=40), rng.integers(0, 2, 40), rng.uniform(0.1, 3, 40)
    expected = metrics.hinge_loss(labels, logits, sample_weight=weights)
    found = hinge(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights), 1.0)
    assert math.isclose(float(found), expected, rel_tol=1e-5)


def _reference_nnpu(z: np.ndarray, y: np.ndarray, prior: float) -> tuple[float, float]:
    """Risks of the positives and of the negatives as in formulas 2 and 6 of Kiryo et al., written out."""
    loss = lambda t: 1 / (1 + np.exp(t))  # noqa: E731
    positive = prior * loss(z[y == 1]).mean()
    return positive, loss(-z[y == 0]).mean() - prior * loss(-z[y == 1]).mean()


def test_non_negative_pu_is_the_published_risk() -> None:
    z, y = np.asarray([1.0, -0.5, 0.3, -2.0, 0.0]), np.asarray([1, 1, 0, 0, 0])
    positive, negative = _reference_nnpu(z, y, 0.3)
    found = non_negative_pu(torch.tensor(z), torch.tensor(y), torch.ones(5), 0.3)
    assert negative > 0
    assert math.isclose(float(found), positive + negative, rel_tol=1e-5)


def test_non_negative_pu_steps_back_where_the_negative_risk_is_below_nought() -> None:
    z, y = np.asarray([5.0, 4.0, -6.0, -5.0]), np.asarray([1, 1, 0, 0])
    _, negative = _reference_nnpu(z, y, 0.4)
    logits = torch.tensor(z, requires_grad=True)
    found = non_negative_pu(logits, torch.tensor(y), torch.ones(4), 0.4)
    found.backward()
    assert negative < 0
    assert math.isclose(float(found), -negative, rel_tol=1e-4)
    assert logits.grad is not None
    assert (logits.grad[2:] < 0).all()  # a step against it raises the unlabelled rows again
