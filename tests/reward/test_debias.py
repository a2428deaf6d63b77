"""What is taken out of training: propensities, length and users' own readiness, each against planted truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rluf.reward.debias import LOWEST, fit_labels, fit_pairs, propensity_weights
from rluf.reward.losses import weighted_bce
from rluf.reward.text import Encoded
from rluf.reward.trainer import Rows


def test_reactions_from_where_few_react_weigh_more_and_no_more_than_ten_times() -> None:
    found = propensity_weights(np.asarray([0.4, 0.1, 0.2, 0.001]), np.asarray([1.0, 1, 0, 1]))
    assert found.tolist() == [1.0, 4.0, 1.0, 1 / LOWEST]
    thumbs = propensity_weights(np.asarray([0.4, 0.1]), np.asarray([1.0, 0]), reacted=True)
    assert thumbs.tolist() == [1.0, 4.0]


def test_propensities_weigh_in_the_cross_entropy_and_keep_the_class_balance() -> None:
    """Two places that react 4 to 1: weighed, a response liked alike in both gets the same logit in both."""
    labels = np.asarray([1.0] * 40 + [0.0] * 160 + [1.0] * 10 + [0.0] * 190)
    theta = np.asarray([0.4] * 200 + [0.1] * 200)
    rows = Rows(False, [], labels, np.ones(400), ["u"] * 400, np.ones(400), factors=propensity_weights(theta, labels))
    weights = torch.tensor(rows.loss_weights)
    assert float(weights[labels == 1].mean()) == pytest.approx(1.0)
    assert float(weights[labels == 0].mean()) == pytest.approx(1.0)
    logits = torch.zeros(2, requires_grad=True, dtype=torch.float64)
    place = torch.tensor([0] * 200 + [1] * 200)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weighted_bce(logits[place], torch.tensor(labels), weights)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    first, second = logits.tolist()
    plain = math.log(40 / 160) - math.log(10 / 190)
    assert abs(first - second) < 0.2 < plain  # what is left: (1 - Y) stands in for (1 - Y / theta)


def test_length_alone_is_scikit_learns_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(4, 0.7, 3000))
    x = (np.log1p(lengths) - np.log1p(lengths).mean()) / np.log1p(lengths).std()
    labels = (rng.random(3000) < 1 / (1 + np.exp(1 - 0.8 * x))).astype(float)
    found = fit_labels(labels, np.ones(3000), lengths, ["u"] * 3000, length=True, user=False)
    expected = LogisticRegression(C=1e6).fit(x[:, None], labels)
    assert found.slope == pytest.approx(float(expected.coef_[0, 0]), abs=1e-3)
    assert np.allclose(found.of_length(lengths), found.slope * x, atol=1e-6)


def test_users_are_shrunk_towards_the_spread_that_there_is() -> None:
    rng = np.random.default_rng(1)
    own = rng.normal(0, 1.0, 300)
    user = np.repeat(np.arange(300), 60)
    labels = (rng.random(len(user)) < 1 / (1 + np.exp(1 - own[user]))).astype(float)
    names = [f"u{u}" for u in user]
    found = fit_labels(labels, np.ones(len(user)), np.ones(len(user)), names, length=False, user=True)
    assert found.users is not None
    fitted = np.asarray([found.users[f"u{u}"][0] for u in range(300)])
    assert np.corrcoef(fitted, own)[0, 1] > 0.93
    assert 0.8 < fitted.std() < 1.05
    same = (rng.random(len(user)) < 0.27).astype(float)
    nothing = fit_labels(same, np.ones(len(user)), np.ones(len(user)), names, length=False, user=True)
    assert nothing.users is not None
    assert np.std([own for own, _ in nothing.users.values()]) < 0.1


def test_a_rows_offset_does_not_know_its_own_label() -> None:
    """Users with two rows and labels by the toss: what is added in training must not tell them, nor copies either."""
    rng = np.random.default_rng(3)
    count = 4000
    own = np.repeat(rng.normal(0, 0.8, count // 2), 2)
    labels = (rng.random(count) < 1 / (1 + np.exp(1 - own))).astype(float)
    copied = np.concatenate([np.arange(count), np.arange(0, count, 3)])
    users = [f"u{row // 2}" for row in copied]
    ones, twins = np.ones(len(copied)), labels[copied]
    shared = ones / np.bincount(copied)[copied]
    found = fit_labels(twins, shared, ones, users, length=False, user=True)
    assert found.users is not None
    in_sample = np.asarray([found.users[user][0] for user in users])
    offsets = found.offsets(twins, shared, ones, users, copied)
    assert np.corrcoef(in_sample, twins)[0, 1] > 0.6  # what the labels leak where they are left in
    assert 0.05 < np.corrcoef(offsets, twins)[0, 1] < 0.2  # what the other row tells: users do differ
    assert offsets[0] == pytest.approx(offsets[count], abs=1e-12)
    left = copied != 0
    again = fit_labels(twins[left], shared[left], ones[left], [u for u, k in zip(users, left, strict=True) if k],
                       length=False, user=True)  # fmt: skip
    assert again.users is not None
    assert offsets[0] == pytest.approx(again.users["u0"][0], abs=0.01)


def test_what_one_response_got_from_a_user_does_not_tell_its_own_offset() -> None:
    """Seven reactions to each of two responses: the other response tells the user's readiness, its own rows do not."""
    rng = np.random.default_rng(4)
    texts = np.repeat(np.arange(1000), 7)
    users = [f"u{text // 2}" for text in texts]
    liked = rng.random(1000) < 0.5
    labels = (rng.random(len(texts)) < np.where(liked, 0.9, 0.1)[texts]).astype(float)
    ones = np.ones(len(texts))
    found = fit_labels(labels, ones, ones, users, length=False, user=True)
    offsets = found.offsets(labels, ones, ones, users, texts)
    rate = np.bincount(texts, labels) / 7
    assert np.allclose(offsets[texts == 0], offsets[0])
    assert abs(np.corrcoef(offsets[::7], rate)[0, 1]) < 0.1
    assert np.corrcoef(offsets[::14], rate[1::2])[0, 1] > 0.95
    by_row = found.offsets(labels, ones, ones, users, np.arange(len(texts)))
    assert np.corrcoef(by_row[::7], rate)[0, 1] > 0.6
    strangers = [f"u{row % 7}-{text}" for row, text in enumerate(texts)]
    apart = fit_labels(labels, ones, ones, strangers, length=False, user=True)
    alone = apart.offsets(labels, ones, ones, strangers, texts)
    assert np.allclose(alone, 0, atol=1e-4)  # seven people with one row each: nobody else's row tells


def test_rows_that_read_alike_and_their_copies_are_one_text() -> None:
    first, second = Encoded((1, 2), 1), Encoded((1, 3), 1)
    rows = Rows(
        False, [first, second, first, Encoded((1, 3, 9), 1)], np.ones(4), np.ones(4), ["u"] * 4, np.ones(4),
        originals=np.asarray([1]),
    )  # fmt: skip
    assert rows.texts.tolist() == [0, 1, 0, 1]
    assert rows.items.tolist() == [0, 1, 2, 1]


def test_pairs_on_length_alone_are_bradley_terry() -> None:
    rng = np.random.default_rng(2)
    first, second = np.exp(rng.normal(4, 0.7, (2, 4000)))
    every = np.log1p(np.concatenate([first, second]))
    x = (np.log1p(first) - np.log1p(second)) / every.std()
    won = rng.random(4000) < 1 / (1 + np.exp(-0.7 * x))
    lengths = np.concatenate([np.where(won, first, second), np.where(won, second, first)])
    found = fit_pairs(lengths, np.ones(4000))
    expected = LogisticRegression(C=1e6, fit_intercept=False).fit(x[:, None], won.astype(float))
    assert found.slope == pytest.approx(float(expected.coef_[0, 0]), abs=1e-3)
