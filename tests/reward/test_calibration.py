"""Prior correction and calibration against worked numbers and scikit-learn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from rluf.errors import ModelError
from rluf.reward.calibration import (
    Calibration,
    fit_isotonic,
    fit_platt,
    fit_scale,
    fit_shares,
    fit_temperature,
    logit,
    prior_shift,
    sigmoid,
)
from rluf.reward.metrics import ece, log_loss


def test_prior_shift_is_log_of_the_share_kept() -> None:
    labels = np.asarray([1] * 10 + [0] * 30)
    weights = np.asarray([1.0] * 10 + [1 / 0.2] * 30)
    assert math.isclose(prior_shift(labels, weights), math.log(0.2), rel_tol=1e-9)


@pytest.mark.parametrize(("rate", "shift"), [(0.02, -1.69), (0.01, -2.40), (0.005, -3.10), (0.001, -4.71)])
def test_prior_shift_from_ten_percent_as_in_the_method_notes(rate: float, shift: float) -> None:
    keep = (rate / (1 - rate)) * (0.9 / 0.1)
    labels = np.asarray([1] * 100 + [0] * 900)
    weights = np.where(labels == 1, 1.0, 1 / keep)
    assert abs(prior_shift(labels, weights) - shift) < 0.011
    assert math.isclose((weights * labels).sum() / weights.sum(), rate, rel_tol=1e-9)


def test_prior_shift_needs_both_classes() -> None:
    assert prior_shift([1, 1], [1.0, 2.0]) == 0.0
    assert prior_shift([], []) == 0.0


def test_corrected_probability_is_that_of_the_formula() -> None:
    p, keep = 0.3, 0.25
    value = Calibration(prior_shift=math.log(keep)).values([logit(p)])[0]
    assert math.isclose(value, p / (p + (1 - p) / keep), rel_tol=1e-9)


def test_platt_is_scikit_learns_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=400)
    y = (rng.random(400) < sigmoid(0.5 * z - 1)).astype(float)
    w = rng.uniform(0.5, 4, 400)
    scale, offset = fit_platt(z, y, w, ridge=0.0, smooth=False)
    reference = LogisticRegression(C=np.inf, tol=1e-9).fit(z[:, None], y, sample_weight=w)
    assert abs(scale - reference.coef_[0, 0]) < 1e-4
    assert abs(offset - reference.intercept_[0]) < 1e-4


def test_platt_keeps_the_ranking_and_the_identity_without_two_classes() -> None:
    z, y = np.linspace(-2, 2, 100), (np.linspace(-2, 2, 100) < 0).astype(float)
    assert fit_platt(z, y, np.ones(100))[0] > 0
    assert fit_platt(z, np.zeros(100), np.ones(100)) == (1.0, 0.0)


def test_platt_leans_on_the_prior_when_positives_are_few() -> None:
    z, y = np.asarray([0.1, 0.2, 5.0]), np.asarray([0.0, 0.0, 1.0])
    free, held = fit_platt(z, y, np.ones(3), ridge=0.01), fit_platt(z, y, np.ones(3), ridge=100.0)
    assert abs(held[0] - 1) < 0.05
    assert abs(free[0] - 1) > abs(held[0] - 1)


def test_scale_of_pairs_recovers_the_temperature() -> None:
    rng = np.random.default_rng(1)
    differences = rng.normal(0, 3, 20_000)
    won = np.where(rng.random(20_000) < sigmoid(0.4 * differences), differences, -differences)
    assert abs(fit_scale(won, np.ones(20_000)) - 0.4) < 0.02


def _opinions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [3, count] of a good member, a worse and louder one, and one that knows nothing; labels [count]."""
    rng = np.random.default_rng(5)
    truth = rng.normal(0, 1.5, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-truth))).astype(float)
    return np.stack(
        [truth + rng.normal(0, 0.5, count), 5 * (truth + rng.normal(0, 2, count)), rng.normal(size=count)]
    ), labels


def test_shares_are_those_of_logistic_regression_and_none_is_below_nought() -> None:
    members, labels = _opinions(20_000)
    shares = np.asarray(fit_shares(members, labels, np.ones(20_000), pairs=False))
    fitted = LogisticRegression(C=1e6).fit(members[:2].T, labels).coef_[0]
    assert shares[:2] / shares[:2].sum() == pytest.approx(fitted / fitted.sum(), abs=0.01)
    assert shares.sum() == pytest.approx(1)
    assert 0 <= shares[2] < 0.06
    wrong = np.stack([members[0], -members[1]])
    assert fit_shares(wrong, labels, np.ones(20_000), pairs=False) == pytest.approx((1, 0), abs=1e-6)


def test_on_few_rows_members_count_nearly_alike_and_alike_without_both_labels() -> None:
    members, labels = _opinions(12)
    loudness = members.std(axis=1)
    shares = np.asarray(fit_shares(members, labels, np.ones(12), pairs=False)) * loudness
    assert (shares / shares.sum()).min() > 0.1
    assert fit_shares(members, np.ones(12), np.ones(12), pairs=False) == (1 / 3, 1 / 3, 1 / 3)


def test_shares_of_pairs_do_not_depend_on_which_side_is_named_first() -> None:
    members, labels = _opinions(4000)
    sign = np.where(labels > 0.5, 1.0, -1.0)
    chosen_first = fit_shares(members * sign, np.ones(4000), np.ones(4000), pairs=True)
    assert chosen_first == pytest.approx(fit_shares(members, labels, np.ones(4000), pairs=True), abs=0.02)
    assert chosen_first[0] > 5 * chosen_first[1] > 0


def test_members_are_pooled_by_their_shares(tmp_path: Path) -> None:
    each = np.asarray([[0.0, 4.0], [8.0, 0.0]])
    assert Calibration(members=2).pooled(each).tolist() == [4.0, 2.0]
    assert Calibration(members=2).pooled(each[:, :0]).tolist() == []
    told = Calibration(members=2, shares=(0.75, 0.25))
    told.save(tmp_path)
    assert Calibration.load(tmp_path) == told
    assert told.pooled(each).tolist() == [2.0, 3.0]
    Calibration(members=3, shares=(0.75, 0.25)).save(tmp_path)
    with pytest.raises(ModelError, match="2 shares for 3 members"):
        Calibration.load(tmp_path)


def test_saved_and_loaded_calibration_is_the_same(tmp_path: Path) -> None:
    calibration = Calibration("love", "platt", -1.5, 0.9, 0.1, 96)
    calibration.save(tmp_path)
    assert Calibration.load(tmp_path) == calibration


def test_missing_or_foreign_calibration_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"calibration\.json"):
        Calibration.load(tmp_path)
    (tmp_path / "calibration.json").write_text('{"temperature": 2}')
    with pytest.raises(ModelError, match=r"rluf\.reward"):
        Calibration.load(tmp_path)


def test_temperature_is_the_minimum_of_the_log_loss() -> None:
    rng = np.random.default_rng(2)
    z = rng.normal(0, 4, 3000)
    y = (rng.random(3000) < sigmoid(z / 3)).astype(float)
    scale = fit_temperature(z, y, np.ones(3000), ridge=0.0)
    losses = [log_loss(sigmoid(factor * scale * z), y, np.ones(3000)) for factor in (0.98, 1.0, 1.02)]
    assert min(losses) == losses[1]
    assert abs(scale - 1 / 3) < 0.03


def test_isotonic_blocks_are_scikit_learns_and_keep_the_ranking(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    z = rng.normal(0, 2, 4000)
    y = (rng.random(4000) < sigmoid(np.where(z > 0, 3 * z, 0.2 * z) - 1)).astype(float)
    knots = fit_isotonic(z, y, np.ones(4000))
    reference = IsotonicRegression().fit(z, y)
    inside = [knot for knot in knots if 0.02 < sigmoid(np.asarray(knot[1])) < 0.98]
    assert len(inside) > 5
    for centre, value in inside:
        assert abs(float(sigmoid(np.asarray(value))) - reference.predict([centre])[0]) < 0.12
    calibration = Calibration("love", "isotonic", knots=knots)
    calibration.save(tmp_path)
    found = Calibration.load(tmp_path).logits(np.linspace(-20, 20, 2001))
    assert (np.diff(found) >= 0).all()
    assert found[0] < found[5] and found[-6] < found[-1]
    values = calibration.values(z)
    assert ece(values, y, np.ones(4000)) < 0.02


def test_one_label_leaves_isotonic_without_knots() -> None:
    assert fit_isotonic(np.arange(3.0), np.zeros(3), np.ones(3)) == ()


def test_corrected_values_are_calibrated_at_a_base_rate_of_one_percent() -> None:
    """Learn on rows of which 25% are loved, score rows of which 1% are: ECE at most 0.01 after the correction."""
    rng = np.random.default_rng(4)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        truth = rng.normal(-5.6, 1.4, count)
        return truth, (rng.random(count) < sigmoid(truth)).astype(float)

    truth, loved = draw(200_000)
    keep = 3 * loved.sum() / (1 - loved).sum()
    kept = (loved == 1) | (rng.random(len(loved)) < keep)
    learnt = LogisticRegression().fit(truth[kept, None], loved[kept])
    weights = np.where(loved[kept] == 1, 1.0, 1 / keep)
    shift = prior_shift(loved[kept], weights)
    fresh, hearts = draw(200_000)
    raw = learnt.decision_function(fresh[:, None])
    assert 0.005 < hearts.mean() < 0.015
    assert ece(sigmoid(raw), hearts, np.ones(len(raw))) > 0.1
    assert ece(Calibration(prior_shift=shift).values(raw), hearts, np.ones(len(raw))) <= 0.01
