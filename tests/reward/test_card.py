"""Comparison of a reward model with an earlier one, and the optional sections of the card page."""

from __future__ import annotations

import numpy as np

from rluf.reward.card import compare_models
from rluf.reward.card_page import render_card_page
from rluf.reward.encoded_split import EncodedSplit


def build_split(labels: np.ndarray, *, is_pairwise: bool) -> EncodedSplit:
    count = len(labels)
    lengths, clusters = np.ones(count * (1 + is_pairwise)), [f"u{i % 40}" for i in range(count)]
    return EncodedSplit(is_pairwise, [], labels, np.ones(count), clusters, lengths)


def test_a_better_model_differs_significantly_from_an_earlier_one_on_the_same_rows() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.3).astype(float)
    good_logits, poor_logits = labels + rng.normal(0, 0.7, 400), labels + rng.normal(0, 2.5, 400)
    test_split = build_split(labels, is_pairwise=False)
    comparison = compare_models(test_split, good_logits, poor_logits, seed=0)
    assert comparison["auroc_difference"]["low"] > 0.05
    assert comparison["auroc"] < 0.75
    self_comparison = compare_models(test_split, good_logits, good_logits, seed=0)
    assert self_comparison["auroc_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert self_comparison["score_r"] == 1.0


def test_pairs_are_compared_by_accuracy() -> None:
    rng = np.random.default_rng(1)
    test_split = build_split(np.ones(300), is_pairwise=True)
    true_logits = np.concatenate([np.full(300, 1.0), np.zeros(300)])
    good_logits, poor_logits = true_logits + rng.normal(0, 0.4, 600), true_logits + rng.normal(0, 4.0, 600)
    comparison = compare_models(test_split, good_logits, poor_logits, seed=0)
    assert comparison["pair_accuracy_difference"]["low"] > 0.2
    assert 0.4 < comparison["pair_accuracy"] < 0.7


def test_the_page_has_curve_and_comparison_if_the_card_does_and_escapes_text() -> None:
    interval = {"mean": 0.71, "low": 0.66, "high": 0.76}
    card = {
        "objective": "<love>", "auroc": interval, "reliability": [], "training": {}, "settings": {}, "n": 9,
        "clusters": 3, "length_only_auroc": 0.5, "score_length_r": 0.1, "log_loss": 0.2, "brier": 0.1,
        "normalized_entropy": 0.9, "ece": 0.01, "pr_auc": 0.3, "base_rate": 0.05, "mean_value": 0.05,
    }  # fmt: skip
    page = render_card_page(card)
    assert "Learning curve" not in page
    assert "<love>" not in page
    optional_parts = {
        "learning_curve": [{"train_rows": 120, "auroc": interval, "log_loss": 0.3}],
        "previous": {"folder": "runs/a&b", "auroc": 0.7, "auroc_difference": interval, "score_r": 0.9},
    }
    page = render_card_page(card | optional_parts)
    assert "Learning curve" in page
    assert '<th scope="row">120</th>' in page
    assert "Compared with runs/a&amp;b" in page
