"""Debiasing: propensities, length and per-user reaction rates, each against planted effects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rluf.reward.debias import (
    MAX_PROPENSITY_WEIGHT,
    compute_propensity_weights,
    count_context,
    encode_context,
    fit_label_nuisance,
    fit_pair_nuisance,
)
from rluf.reward.encoded_split import EncodedSplit
from rluf.reward.losses import weighted_bce_loss
from rluf.reward.text import EncodedItem


def test_reactions_of_low_propensity_weigh_more_up_to_ten_times() -> None:
    propensity, labels = np.asarray([0.4, 0.1, 0.2, 0.001]), np.asarray([1.0, 1, 0, 1])
    weights = compute_propensity_weights(propensity, labels)
    assert weights.tolist() == pytest.approx([0.25, 1.0, 1.0, MAX_PROPENSITY_WEIGHT])
    thumb_weights = compute_propensity_weights(np.asarray([0.4, 0.1]), np.asarray([1.0, 0]), all_reacted=True)
    assert thumb_weights[1] / thumb_weights[0] == pytest.approx(4.0)


def test_the_context_of_a_row_is_its_turn_its_users_activity_and_its_model_version() -> None:
    records = [{"turn": turn, "model_version": version} for turn, version in ((0, "a"), (3, "b"), (7, "a"), (0, None))]
    users, weights = ["u", "u", "v", "v"], np.asarray([1.0, 4.0, 1.0, 1.0])
    activity, versions = count_context(records, users, weights)
    assert activity == {"u": 5.0, "v": 2.0}
    columns = encode_context(records, users, activity, versions)
    assert np.allclose(columns[:, 0], np.log1p([0, 3, 7, 0]))
    assert columns[:, 1].tolist() == [1, 0, 0, 1]
    assert np.allclose(columns[:, 2], np.log1p([5, 5, 2, 2]))
    # The most frequent version by weight, b, is the reference; then a, then none.
    assert columns[:, 3:].tolist() == [[1, 0], [0, 0], [1, 0], [0, 1]]
    # Dev rows have the columns of the training versions; a version that training never saw has no effect.
    dev = encode_context([{"turn": 1, "model_version": "new"}], ["w"], {"w": 1.0}, versions)
    assert dev.shape == (1, columns.shape[1]) and not dev[0, 3:].any()
    rare = encode_context(records, users, activity, {"a": 99.0, "b": 99.0, "": 1.0})
    assert rare.shape == (4, 4)
    assert encode_context([{}], ["u"], {"u": 1.0}, {"": 1.0}).tolist() == [[0.0, 1.0, math.log(2)]]


def test_propensities_weight_the_cross_entropy_and_preserve_the_class_balance() -> None:
    """Two surfaces with reaction rates 4 to 1: with weights, equally liked responses get the same logit on both."""
    labels = np.asarray([1.0] * 40 + [0.0] * 160 + [1.0] * 10 + [0.0] * 190)
    propensity = np.asarray([0.4] * 200 + [0.1] * 200)
    split = EncodedSplit(
        is_pairwise=False,
        sequences=[],
        labels=labels,
        weights=np.ones(400),
        clusters=["u"] * 400,
        response_lengths=np.ones(400),
        loss_factors=compute_propensity_weights(propensity, labels),
    )
    weights = torch.tensor(split.loss_weights)
    assert float(weights[labels == 1].mean()) == pytest.approx(1.0)
    assert float(weights[labels == 0].mean()) == pytest.approx(1.0)
    logits = torch.zeros(2, requires_grad=True, dtype=torch.float64)
    surface_index = torch.tensor([0] * 200 + [1] * 200)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weighted_bce_loss(logits[surface_index], torch.tensor(labels), weights)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    first, second = logits.tolist()
    unweighted_difference = math.log(40 / 160) - math.log(10 / 190)
    # The rest of the difference: (1 - Y) approximates (1 - Y / theta).
    assert abs(first - second) < 0.2 < unweighted_difference


def test_length_only_equals_scikit_learns_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(4, 0.7, 3000))
    x = (np.log1p(lengths) - np.log1p(lengths).mean()) / np.log1p(lengths).std()
    labels = (rng.random(3000) < 1 / (1 + np.exp(1 - 0.8 * x))).astype(float)
    nuisance = fit_label_nuisance(labels, np.ones(3000), lengths, ["u"] * 3000, fit_length=True, fit_users=False)
    reference = LogisticRegression(C=1e6).fit(x[:, None], labels)
    assert nuisance.length_slope == pytest.approx(float(reference.coef_[0, 0]), abs=1e-3)
    assert np.allclose(nuisance.compute_length_offsets(lengths), nuisance.length_slope * x, atol=1e-6)


def test_user_effects_are_shrunk_towards_the_spread_in_the_data() -> None:
    rng = np.random.default_rng(1)
    true_effects = rng.normal(0, 1.0, 300)
    users = np.repeat(np.arange(300), 60)
    user_ids, ones = [f"u{user}" for user in users], np.ones(len(users))
    labels = (rng.random(len(users)) < 1 / (1 + np.exp(1 - true_effects[users]))).astype(float)
    nuisance = fit_label_nuisance(labels, ones, ones, user_ids, fit_length=False, fit_users=True)
    assert nuisance.user_effects is not None
    effects = np.asarray([nuisance.user_effects[f"u{user}"][0] for user in range(300)])
    assert np.corrcoef(effects, true_effects)[0, 1] > 0.93
    assert 0.8 < effects.std() < 1.05
    labels_without_effects = (rng.random(len(users)) < 0.27).astype(float)
    nuisance = fit_label_nuisance(labels_without_effects, ones, ones, user_ids, fit_length=False, fit_users=True)
    assert nuisance.user_effects is not None
    assert np.std([effect for effect, _ in nuisance.user_effects.values()]) < 0.1


def test_a_rows_offset_does_not_contain_its_own_label() -> None:
    """Users with two rows and random labels: neither a row's own label nor that of its copies leaks into its offset."""
    rng = np.random.default_rng(3)
    count = 4000
    true_effects = np.repeat(rng.normal(0, 0.8, count // 2), 2)
    original_labels = (rng.random(count) < 1 / (1 + np.exp(1 - true_effects))).astype(float)
    source = np.concatenate([np.arange(count), np.arange(0, count, 3)])  # every third row has a copy
    user_ids = [f"u{row // 2}" for row in source]
    ones, labels = np.ones(len(source)), original_labels[source]
    weights = ones / np.bincount(source)[source]
    nuisance = fit_label_nuisance(labels, weights, ones, user_ids, fit_length=False, fit_users=True)
    assert nuisance.user_effects is not None
    full_effects = np.asarray([nuisance.user_effects[user][0] for user in user_ids])
    offsets = nuisance.compute_row_offsets(labels, weights, ones, user_ids, source)
    assert np.corrcoef(full_effects, labels)[0, 1] > 0.6  # the leak without leaving the row out
    assert 0.05 < np.corrcoef(offsets, labels)[0, 1] < 0.2  # the user's other row is informative: users differ
    assert offsets[0] == pytest.approx(offsets[count], abs=1e-12)
    is_other = source != 0
    other_users = [user for user, is_used in zip(user_ids, is_other, strict=True) if is_used]
    refit = fit_label_nuisance(
        labels[is_other], weights[is_other], ones[is_other], other_users, fit_length=False, fit_users=True
    )
    assert refit.user_effects is not None
    assert offsets[0] == pytest.approx(refit.user_effects["u0"][0], abs=0.01)


def test_reactions_to_one_response_do_not_affect_its_own_offset() -> None:
    """Seven reactions to each of two responses per user: only those to the other response determine the offset."""
    rng = np.random.default_rng(4)
    text_ids = np.repeat(np.arange(1000), 7)
    user_ids = [f"u{text // 2}" for text in text_ids]
    is_liked = rng.random(1000) < 0.5
    labels = (rng.random(len(text_ids)) < np.where(is_liked, 0.9, 0.1)[text_ids]).astype(float)
    ones = np.ones(len(text_ids))
    nuisance = fit_label_nuisance(labels, ones, ones, user_ids, fit_length=False, fit_users=True)
    offsets = nuisance.compute_row_offsets(labels, ones, ones, user_ids, text_ids)
    love_rates = np.bincount(text_ids, labels) / 7
    assert np.allclose(offsets[text_ids == 0], offsets[0])
    assert abs(np.corrcoef(offsets[::7], love_rates)[0, 1]) < 0.1
    assert np.corrcoef(offsets[::14], love_rates[1::2])[0, 1] > 0.95
    row_offsets = nuisance.compute_row_offsets(labels, ones, ones, user_ids, np.arange(len(text_ids)))
    assert np.corrcoef(row_offsets[::7], love_rates)[0, 1] > 0.6
    # Seven users with one row each: without another row of the same user there is no offset.
    single_row_users = [f"u{row % 7}-{text}" for row, text in enumerate(text_ids)]
    nuisance = fit_label_nuisance(labels, ones, ones, single_row_users, fit_length=False, fit_users=True)
    single_offsets = nuisance.compute_row_offsets(labels, ones, ones, single_row_users, text_ids)
    assert np.allclose(single_offsets, 0, atol=1e-4)


def test_rows_of_identical_text_have_one_text_id_and_copies_name_their_source() -> None:
    first, second, second_copy = EncodedItem((1, 2), 1), EncodedItem((1, 3), 1), EncodedItem((1, 3, 9), 1)
    split = EncodedSplit(
        is_pairwise=False,
        sequences=[first, second, first, second_copy],
        labels=np.ones(4),
        weights=np.ones(4),
        clusters=["u"] * 4,
        response_lengths=np.ones(4),
        copy_sources=np.asarray([1]),
    )
    assert split.select_originals().text_ids.tolist() == [0, 1, 0]
    assert split.source_ids.tolist() == [0, 1, 2, 1]


def test_pairs_on_length_only_equal_bradley_terry() -> None:
    rng = np.random.default_rng(2)
    first, second = np.exp(rng.normal(4, 0.7, (2, 4000)))
    log_lengths = np.log1p(np.concatenate([first, second]))
    x = (np.log1p(first) - np.log1p(second)) / log_lengths.std()
    first_won = rng.random(4000) < 1 / (1 + np.exp(-0.7 * x))
    lengths = np.concatenate([np.where(first_won, first, second), np.where(first_won, second, first)])
    nuisance = fit_pair_nuisance(lengths, np.ones(4000))
    reference = LogisticRegression(C=1e6, fit_intercept=False).fit(x[:, None], first_won.astype(float))
    assert nuisance.length_slope == pytest.approx(float(reference.coef_[0, 0]), abs=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "others", "ratio"),
    [
        (500, 500, [0.5] * 100, 3.0),  # a tenth of the rows, above the high quantile
        (500, 500, [0.9] * 400, 3.0),
        (4, 4, [0.5], 3.0),  # a quantile of nine rows is their maximum
        (500, 500, [1e-9] * 50, 3.0),
        (500, 500, [0.0, 1.0], 3.0),
        (500, 500, [], 3.0),
        (500, 500, [0.5], 3.0),
        (500, 500, [1.0], 3.0),
    ],
)
def test_propensities_of_most_rows_keep_their_ratio(low: int, high: int, others: list[float], ratio: float) -> None:
    propensity = np.asarray([0.01] * low + [0.03] * high + others)
    weights = compute_propensity_weights(propensity, np.ones(len(propensity)), all_reacted=True)
    assert weights[0] / weights[low] == pytest.approx(ratio)
    assert weights.max() <= MAX_PROPENSITY_WEIGHT


@pytest.mark.parametrize(("silent_rows", "silent_propensity"), [(0, 0.001), (700, 0.001), (5000, 0.9)])
def test_rows_without_a_reaction_do_not_set_the_scale_of_reactions(silent_rows: int, silent_propensity: float) -> None:
    """As of a client without the buttons: its few reactions would weigh 50 times as much as all others."""
    propensity = np.asarray([0.001] * 4 + [0.05] * 20 + [silent_propensity] * silent_rows)
    labels = np.asarray([1.0] * 24 + [0.0] * silent_rows)
    weights = compute_propensity_weights(propensity, labels)
    assert weights[:24].tolist() == pytest.approx([MAX_PROPENSITY_WEIGHT] * 4 + [1.0] * 20)
    assert (weights[24:] == 1.0).all()


@pytest.mark.parametrize("propensity", [[0.0, 0.0, 0.0], [0.2, 0.2, 0.2], [1.0]])
def test_equal_propensities_give_equal_weights(propensity: list[float]) -> None:
    weights = compute_propensity_weights(np.asarray(propensity), np.ones(len(propensity)))
    assert np.isfinite(weights).all() and len(set(weights.tolist())) == 1
