"""Losses against worked numbers and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from rluf.errors import DataError
from rluf.reward.losses import (
    bradley_terry_loss,
    check_unlabeled_rows,
    focal_loss,
    hinge_loss,
    non_negative_pu_loss,
    weighted_bce_loss,
)
from rluf.utils.stats import Floats


def test_weighted_bce_equals_scikit_learns_log_loss() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=50), rng.integers(0, 2, 50)
    weights = rng.uniform(0.1, 5, 50)
    expected = reference.log_loss(labels, 1 / (1 + np.exp(-logits)), sample_weight=weights)
    loss = weighted_bce_loss(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights))
    assert math.isclose(float(loss), expected, rel_tol=1e-5)


def test_bce_is_finite_for_extreme_logits() -> None:
    loss = weighted_bce_loss(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 0.0]), torch.ones(2))
    assert float(loss) == 5e3


def test_bradley_terry_worked_example() -> None:
    loss = bradley_terry_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0]))
    assert math.isclose(float(loss), (3 * math.log(1 + math.exp(-1)) + math.log(2)) / 4, rel_tol=1e-6)


def test_bradley_terry_pushes_the_sides_apart() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    bradley_terry_loss(chosen, rejected, torch.ones(1)).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert float(chosen.grad) == -0.5
    assert float(rejected.grad) == 0.5


def test_focal_loss_follows_the_published_formula() -> None:
    loss = focal_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0]))
    p = 1 / (1 + math.exp(-2.0))
    expected = (0.5**2 * math.log(2) + 3 * p**2 * -math.log(1 - p)) / 4
    assert math.isclose(float(loss), expected, rel_tol=1e-6)


def test_hinge_loss_equals_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=40), rng.integers(0, 2, 40), rng.uniform(0.1, 3, 40)
    expected = reference.hinge_loss(labels, logits, sample_weight=weights)
    loss = hinge_loss(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights))
    assert math.isclose(float(loss), expected, rel_tol=1e-5)


def compute_reference_pu_risks(z: Floats, y: np.ndarray, class_prior: float) -> tuple[float, float]:
    """Positive and negative risk of formulas 2 and 6 of Kiryo et al., written out."""

    def sigmoid_loss(t: Floats) -> Floats:
        return np.asarray(1 / (1 + np.exp(t)))

    positive_risk = class_prior * sigmoid_loss(z[y == 1]).mean()
    negative_risk = sigmoid_loss(-z[y == 0]).mean() - class_prior * sigmoid_loss(-z[y == 1]).mean()
    return float(positive_risk), float(negative_risk)


def test_non_negative_pu_loss_equals_the_published_risk() -> None:
    z, y = np.asarray([1.0, -0.5, 0.3, -2.0, 0.0]), np.asarray([1, 1, 0, 0, 0])
    positive_risk, negative_risk = compute_reference_pu_risks(z, y, 0.3)
    loss = non_negative_pu_loss(torch.tensor(z), torch.tensor(y), torch.ones(5), 0.3)
    assert negative_risk > 0
    assert math.isclose(float(loss), positive_risk + negative_risk, rel_tol=1e-5)


def test_non_negative_pu_loss_reverses_the_step_if_the_negative_risk_is_below_zero() -> None:
    z, y = np.asarray([5.0, 4.0, -6.0, -5.0]), np.asarray([1, 1, 0, 0])
    _, negative_risk = compute_reference_pu_risks(z, y, 0.4)
    logits = torch.tensor(z, requires_grad=True)
    loss = non_negative_pu_loss(logits, torch.tensor(y), torch.ones(4), 0.4)
    loss.backward()
    assert negative_risk < 0
    assert math.isclose(float(loss.detach()), -negative_risk, rel_tol=1e-4)
    assert logits.grad is not None
    assert (logits.grad[2:] < 0).all()  # a descent step raises the unlabeled rows again


def build_reaction_rows(loved: int, disliked: int, unreacted: int) -> list[dict[str, object]]:
    reactions = ["love"] * loved + ["dislike"] * disliked + [None] * unreacted
    return [{"label": int(reaction == "love"), "reaction": reaction, "weight": 1.0} for reaction in reactions]


@pytest.mark.parametrize(
    ("loved", "disliked", "unreacted", "message"),
    [
        (6, 2, 92, None),
        (19, 20, 61, None),
        (10, 90, 0, "90 of the 90 rows of label 0 have a reaction"),  # thumbs up and down alone
        (10, 50, 40, "50 of the 90 rows of label 0 have a reaction"),
        (20, 0, 80, "20% of the rows have label 1"),
        (60, 0, 40, "60% of the rows have label 1"),
        (100, 0, 0, "100% of the rows have label 1"),
    ],
)
def test_nnpu_is_refused_where_its_assumptions_do_not_hold(
    loved: int, disliked: int, unreacted: int, message: str | None
) -> None:
    rows = build_reaction_rows(loved, disliked, unreacted)
    if message is None:
        check_unlabeled_rows(rows, "love")
        return
    with pytest.raises(DataError, match=rf"love: loss nnpu does not apply: {message}.*loss=bce"):
        check_unlabeled_rows(rows, "love")
