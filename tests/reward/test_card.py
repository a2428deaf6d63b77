"""The card's comparison with an earlier model, and the page's parts that only some cards have."""

from __future__ import annotations

import numpy as np

from rluf.reward.card import compare
from rluf.reward.card_page import card_page
from rluf.reward.trainer import Rows


def _rows(labels: np.ndarray, *, pairs: bool) -> Rows:
    count = len(labels)
    lengths = np.ones(count * (1 + pairs))
    return Rows(pairs, [], labels, np.ones(count), [f"u{i % 40}" for i in range(count)], lengths)


def test_a_better_model_is_told_from_an_earlier_one_on_the_same_rows() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.3).astype(float)
    good, poor = labels + rng.normal(0, 0.7, 400), labels + rng.normal(0, 2.5, 400)
    test = _rows(labels, pairs=False)
    found = compare(test, good, poor, seed=0)
    assert found["auroc_difference"]["low"] > 0.05
    assert found["auroc"] < 0.75
    same = compare(test, good, good, seed=0)
    assert same["auroc_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert same["score_r"] == 1.0


def test_pairs_are_compared_by_accuracy() -> None:
    rng = np.random.default_rng(1)
    test = _rows(np.ones(300), pairs=True)
    better = np.concatenate([np.full(300, 1.0), np.zeros(300)]) + rng.normal(0, 0.4, 600)
    worse = np.concatenate([np.full(300, 1.0), np.zeros(300)]) + rng.normal(0, 4.0, 600)
    found = compare(test, better, worse, seed=0)
    assert found["pair_accuracy_difference"]["low"] > 0.2
    assert 0.4 < found["pair_accuracy"] < 0.7


def test_the_page_shows_curve_and_earlier_model_and_escapes_what_it_is_given() -> None:
    interval = {"mean": 0.71, "low": 0.66, "high": 0.76}
    figures = {"n": 9, "clusters": 3, "length_floor_auroc": 0.5, "score_length_r": 0.1, "log_loss": 0.2, "brier": 0.1}
    figures |= {"normalised_entropy": 0.9, "ece": 0.01, "pr_auc": 0.3, "base_rate": 0.05, "mean_value": 0.05}
    card = {"objective": "<love>", "auroc": interval, "reliability": [], "training": {}, "settings": {}, **figures}
    plain = card_page(card)
    assert "Learning curve" not in plain
    assert "<love>" not in plain
    more = {
        "learning_curve": [{"train_rows": 120, "auroc": interval, "log_loss": 0.3}],
        "previous": {"folder": "runs/a&b", "auroc": 0.7, "auroc_difference": interval, "score_r": 0.9},
    }
    page = card_page(card | more)
    assert "Learning curve" in page
    assert "<td>120</td>" in page
    assert "Beside runs/a&amp;b" in page
