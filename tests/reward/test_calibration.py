"""Prior correction and calibration against worked numbers and scikit-learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rluf.errors import ModelError
from rluf.reward.calibration import (
    Calibration,
    compute_prior_shift,
    fit_member_weights,
    fit_pair_scale,
    fit_platt,
)
from rluf.reward.metrics import expected_calibration_error
from rluf.utils.stats import Floats, logit, sigmoid


def test_the_prior_shift_is_the_log_of_the_sampling_rate() -> None:
    labels = np.asarray([1] * 10 + [0] * 30)
    weights = np.asarray([1.0] * 10 + [1 / 0.2] * 30)
    assert math.isclose(compute_prior_shift(labels, weights), math.log(0.2), rel_tol=1e-9)


@pytest.mark.parametrize(("rate", "shift"), [(0.02, -1.69), (0.01, -2.40), (0.005, -3.10), (0.001, -4.71)])
def test_the_prior_shift_from_ten_percent_as_in_the_method_notes(rate: float, shift: float) -> None:
    sampling_rate = (rate / (1 - rate)) * (0.9 / 0.1)
    labels = np.asarray([1] * 100 + [0] * 900)
    weights = np.where(labels == 1, 1.0, 1 / sampling_rate)
    assert abs(compute_prior_shift(labels, weights) - shift) < 0.011
    assert math.isclose((weights * labels).sum() / weights.sum(), rate, rel_tol=1e-9)


@pytest.mark.parametrize("effect", [-3.0, 0.5, 3.0])
def test_calibration_with_covariates_has_the_natural_rate_and_the_scale_within_a_context(effect: float) -> None:
    rng = np.random.default_rng(3)
    logits, context = rng.normal(size=6000), rng.normal(size=(6000, 1))
    labels = (rng.random(6000) < sigmoid(1.5 * logits + effect * context[:, 0] - 3)).astype(float)
    weights = rng.uniform(0.5, 2.0, 6000)
    scale, offset = fit_platt(logits, labels, weights, covariates=context)
    rate = np.average(labels, weights=weights)
    assert np.average(sigmoid(scale * logits + offset), weights=weights) == pytest.approx(rate, abs=1e-6)
    assert scale == pytest.approx(1.5, abs=0.15)
    without_context, _ = fit_platt(logits, labels, weights)
    assert abs(effect) < 1 or without_context < 0.75 * scale
    assert fit_platt(logits, labels, weights, covariates=np.empty((0, 0))) == fit_platt(logits, labels, weights)


def test_the_prior_shift_needs_both_classes() -> None:
    assert compute_prior_shift([1, 1], [1.0, 2.0]) == 0.0
    assert compute_prior_shift([], []) == 0.0


def test_the_corrected_probability_follows_the_formula() -> None:
    p, sampling_rate = 0.3, 0.25
    corrected = Calibration(prior_shift=math.log(sampling_rate)).compute_probabilities([logit(p)])[0]
    assert math.isclose(corrected, p / (p + (1 - p) / sampling_rate), rel_tol=1e-9)


def test_platt_equals_scikit_learns_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=400)
    y = (rng.random(400) < sigmoid(0.5 * z - 1)).astype(float)
    w = rng.uniform(0.5, 4, 400)
    scale, offset = fit_platt(z, y, w, ridge=0.0, smooth_targets=False)
    reference = LogisticRegression(C=np.inf, tol=1e-9).fit(z[:, None], y, sample_weight=w)
    assert abs(scale - reference.coef_[0, 0]) < 1e-4
    assert abs(offset - reference.intercept_[0]) < 1e-4


def test_platt_preserves_the_ranking_and_is_the_identity_without_two_classes() -> None:
    z, y = np.linspace(-2, 2, 100), (np.linspace(-2, 2, 100) < 0).astype(float)
    assert fit_platt(z, y, np.ones(100))[0] > 0
    assert fit_platt(z, np.zeros(100), np.ones(100)) == (1.0, 0.0)


def test_platt_relies_on_the_prior_when_positives_are_few() -> None:
    z, y = np.asarray([0.1, 0.2, 5.0]), np.asarray([0.0, 0.0, 1.0])
    weak_prior, strong_prior = (fit_platt(z, y, np.ones(3), ridge=ridge) for ridge in (0.01, 100.0))
    assert abs(strong_prior[0] - 1) < 0.05
    assert abs(weak_prior[0] - 1) > abs(strong_prior[0] - 1)


@pytest.mark.parametrize(("factor", "shift"), [(0.5, 0.0), (0.01, 0.0), (0.01, -3.0), (0.01, 20.0), (1e-5, 5.0)])
def test_logits_that_hardly_vary_are_scaled_up(factor: float, shift: float) -> None:
    """A model that trained little ranks by tiny differences, which the labels give their size."""
    rng = np.random.default_rng(3)
    z = rng.normal(size=600)
    labels = (rng.random(600) < sigmoid(z - 2)).astype(float)
    scale, offset = fit_platt(factor * z + shift, labels, np.ones(600))
    expected_scale, expected_offset = fit_platt(z, labels, np.ones(600))
    calibrated, expected = scale * (factor * z + shift) + offset, expected_scale * z + expected_offset
    assert np.abs(sigmoid(calibrated) - sigmoid(expected)).max() < 0.05
    differences = np.where(rng.random(600) < sigmoid(z), z, -z)
    pair_scale = fit_pair_scale(factor * differences, np.ones(600))
    assert factor * pair_scale == pytest.approx(fit_pair_scale(differences, np.ones(600)), rel=0.05)


def test_equal_logits_keep_scale_one() -> None:
    scale, offset = fit_platt(np.full(50, -2.0), np.arange(50) % 10 == 0, np.ones(50))
    assert scale == pytest.approx(1.0)
    assert sigmoid(scale * -2.0 + offset) == pytest.approx(0.1, abs=0.03)


def test_the_scale_of_pairs_recovers_the_temperature() -> None:
    rng = np.random.default_rng(1)
    differences = rng.normal(0, 3, 20_000)
    win_differences = np.where(rng.random(20_000) < sigmoid(0.4 * differences), differences, -differences)
    assert abs(fit_pair_scale(win_differences, np.ones(20_000)) - 0.4) < 0.02


def build_member_logits(count: int) -> tuple[Floats, Floats]:
    """Logits [3, count] of a good member, a worse one of larger scale, and an uninformative one; labels [count]."""
    rng = np.random.default_rng(5)
    true_logits = rng.normal(0, 1.5, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-true_logits))).astype(float)
    good_member = true_logits + rng.normal(0, 0.5, count)
    large_member = 5 * (true_logits + rng.normal(0, 2, count))
    return np.stack([good_member, large_member, rng.normal(size=count)]), labels


def test_member_weights_equal_logistic_regression_and_are_not_negative() -> None:
    member_logits, labels = build_member_logits(20_000)
    weights = np.asarray(fit_member_weights(member_logits, labels, np.ones(20_000), is_pairwise=False))
    coefficients = LogisticRegression(C=1e6).fit(member_logits[:2].T, labels).coef_[0]
    assert weights[:2] / weights[:2].sum() == pytest.approx(coefficients / coefficients.sum(), abs=0.01)
    assert weights.sum() == pytest.approx(1)
    assert 0 <= weights[2] < 0.06
    opposite_logits = np.stack([member_logits[0], -member_logits[1]])
    opposite_weights = fit_member_weights(opposite_logits, labels, np.ones(20_000), is_pairwise=False)
    assert opposite_weights == pytest.approx((1, 0), abs=1e-6)


def test_on_few_rows_member_weights_are_nearly_equal_and_with_one_label_equal() -> None:
    member_logits, labels = build_member_logits(12)
    weights = np.asarray(fit_member_weights(member_logits, labels, np.ones(12), is_pairwise=False))
    standardized_weights = weights * member_logits.std(axis=1)
    assert (standardized_weights / standardized_weights.sum()).min() > 0.1
    assert fit_member_weights(member_logits, np.ones(12), np.ones(12), is_pairwise=False) == (1 / 3, 1 / 3, 1 / 3)


def test_member_weights_of_pairs_do_not_depend_on_the_order_of_the_sides() -> None:
    member_logits, labels = build_member_logits(4000)
    signs = np.where(labels > 0.5, 1.0, -1.0)
    chosen_first = fit_member_weights(member_logits * signs, np.ones(4000), np.ones(4000), is_pairwise=True)
    either_order = fit_member_weights(member_logits, labels, np.ones(4000), is_pairwise=True)
    assert chosen_first == pytest.approx(either_order, abs=0.02)
    assert chosen_first[0] > 5 * chosen_first[1] > 0


def test_members_are_pooled_by_their_weights(tmp_path: Path) -> None:
    member_logits = np.asarray([[0.0, 4.0], [8.0, 0.0]])
    assert Calibration(member_count=2).pool_members(member_logits).tolist() == [4.0, 2.0]
    assert Calibration(member_count=2).pool_members(member_logits[:, :0]).tolist() == []
    calibration = Calibration(member_count=2, member_weights=(0.75, 0.25))
    calibration.save(tmp_path)
    assert Calibration.load(tmp_path) == calibration
    assert calibration.pool_members(member_logits).tolist() == [2.0, 3.0]
    Calibration(member_count=3, member_weights=(0.75, 0.25)).save(tmp_path)
    with pytest.raises(ModelError, match="2 member weights for 3 members"):
        Calibration.load(tmp_path)


def test_a_saved_calibration_loads_unchanged(tmp_path: Path) -> None:
    calibration = Calibration("love", "platt", -1.5, 0.9, 0.1, 96)
    calibration.save(tmp_path)
    assert Calibration.load(tmp_path) == calibration


def test_the_keys_of_earlier_releases_are_read(tmp_path: Path) -> None:
    earlier_content = {
        "objective": "helpfulness",
        "method": "centred",
        "members": 2,
        "shares": [0.75, 0.25],
        "fused": False,
        "next_turn": True,
        "response_alone": [1],
        "backbone": "abc",
    }
    (tmp_path / "calibration.json").write_text(json.dumps(earlier_content))
    assert Calibration.load(tmp_path) == Calibration(
        "helpfulness",
        "centered",
        member_count=2,
        member_weights=(0.75, 0.25),
        read_at_next_turn=True,
        response_only_members=(1,),
        backbone_hash="abc",
    )


@pytest.mark.parametrize("content", ['{"temperature": 2}', '{"knots": [[0, 1]]}', "[]", "not json"])
def test_missing_or_unexpected_calibration_is_a_model_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(ModelError, match=r"calibration\.json"):
        Calibration.load(tmp_path)
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ModelError, match=r"rluf\.reward"):
        Calibration.load(tmp_path)


def test_corrected_values_are_calibrated_at_a_base_rate_of_one_percent() -> None:
    """Train on rows with a love rate of 25%, score rows with 1%: ECE at most 0.01 after the correction."""
    rng = np.random.default_rng(4)

    def sample_rows(count: int) -> tuple[Floats, Floats]:
        true_logits = rng.normal(-5.6, 1.4, count)
        return true_logits, (rng.random(count) < sigmoid(true_logits)).astype(float)

    train_logits, train_labels = sample_rows(200_000)
    sampling_rate = 3 * train_labels.sum() / (1 - train_labels).sum()
    is_sampled = (train_labels == 1) | (rng.random(len(train_labels)) < sampling_rate)
    sampled_labels = train_labels[is_sampled]
    classifier = LogisticRegression().fit(train_logits[is_sampled, None], sampled_labels)
    shift = compute_prior_shift(sampled_labels, np.where(sampled_labels == 1, 1.0, 1 / sampling_rate))
    test_logits, test_labels = sample_rows(200_000)
    raw_logits, ones = classifier.decision_function(test_logits[:, None]), np.ones(200_000)
    assert 0.005 < test_labels.mean() < 0.015
    assert expected_calibration_error(sigmoid(raw_logits), test_labels, ones) > 0.1
    corrected = Calibration(prior_shift=shift).compute_probabilities(raw_logits)
    assert expected_calibration_error(corrected, test_labels, ones) <= 0.01
