"""The fit of the reader: folds do not split groups, signs are respected, and probes find a direction."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab.reader_fit import HeadRows, fit_head, fit_probe, fit_sets, probe_out_of_fold, split_groups, split_together

from rluf.reward.metrics import auroc
from rluf.simulate.reader_features import FEATURE_NAMES


def test_a_group_is_never_in_two_folds() -> None:
    groups = [f"user {n % 17}" for n in range(120)]
    folds = split_groups(groups)
    assert set(folds) == set(range(5))
    assert all(len({fold for fold, name in zip(folds, groups, strict=True) if name == group}) == 1 for group in groups)


def test_a_group_has_one_fold_in_all_sets() -> None:
    pairs, mismatches = [f"prompt {n % 30}" for n in range(70)], [f"prompt {n // 2}" for n in range(40)]
    folds_of_group: dict[str, set[int]] = {}
    for groups, folds in zip((pairs, mismatches), split_together([pairs, mismatches]), strict=True):
        assert len(groups) == len(folds)
        for group, fold in zip(groups, folds.tolist(), strict=True):
            folds_of_group.setdefault(group, set()).add(fold)
    assert all(len(folds) == 1 for folds in folds_of_group.values())
    assert set.union(*folds_of_group.values()) == set(range(5))


def test_a_probe_generalizes_out_of_fold_but_not_to_random_labels() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(400, 20))
    labels = (hidden[:, 0] + 0.5 * rng.normal(size=400) > 0).astype(np.float64)
    folds = split_groups([str(n) for n in range(400)])
    assert auroc(probe_out_of_fold(hidden, labels, folds, 1e-2), labels) > 0.9
    shuffled = rng.permutation(labels)
    assert abs(auroc(probe_out_of_fold(hidden, shuffled, folds, 1e-2), shuffled) - 0.5) < 0.1
    probe = fit_probe(hidden, labels, 1e-2)
    assert int(np.argmax(np.abs(probe.weights))) == 0
    assert auroc(probe.apply(hidden), labels) > 0.9


def test_heads_follow_the_pairs_but_never_against_a_declared_sign() -> None:
    rng = np.random.default_rng(0)
    names = list(FEATURE_NAMES)
    differences = rng.normal(size=(300, len(names)))
    # Chosen responses are more specific and, against the declared sign, more often cut.
    differences[:, names.index("specificity")] += 1.0
    differences[:, names.index("unfinished")] += 1.0
    differences[:, names.index("taste")] += 1.0
    pairs = HeadRows(differences, None, 1.0, np.ones(300))
    weights, _ = fit_head([pairs], ridge=1e-2, excluded=frozenset({"taste"}))
    by_name = dict(zip(names, weights, strict=True))
    assert by_name["specificity"] > 0.3
    assert by_name["unfinished"] == 0.0 == by_name["taste"]


def test_labeled_rows_and_pairs_are_fitted_together() -> None:
    rng = np.random.default_rng(0)
    names = list(FEATURE_NAMES)
    features = rng.normal(size=(400, len(names)))
    labels = (features[:, names.index("taste")] > 0.8).astype(np.float64)
    differences = rng.normal(size=(300, len(names)))
    differences[:, names.index("specificity")] += 1.0
    sets = [HeadRows(features, labels, 1.0, np.ones(400)), HeadRows(differences, None, 1.0, np.ones(300))]
    weights, biases = fit_head(sets, ridge=1e-2)
    by_name = dict(zip(names, weights, strict=True))
    assert min(by_name["specificity"], by_name["taste"]) > 0.3
    assert biases.shape == (1,)
    assert biases[0] < 0.0  # fewer than half of the labels are 1


def test_a_fit_to_reactions_and_pairs_serves_both_and_has_the_bias_of_the_labels() -> None:
    rng = np.random.default_rng(0)
    # People react to the first two values; the pairs say that more of the second is worse, and know no first.
    states = rng.normal(size=(600, 5)) + 7.0
    labels = (states[:, 0] + states[:, 1] + rng.normal(size=600) > 14.0).astype(np.float64)
    differences = rng.normal(size=(300, 5))
    differences[:, 1] -= 1.5
    reactions = HeadRows(states, labels, 1.0, np.ones(600))
    alone, _ = fit_sets([reactions], ridge=0.1)
    weights, biases = fit_sets([reactions, HeadRows(differences, None, 1.0, np.ones(300))], ridge=0.1)
    assert alone[1] > 0.3
    assert weights[0] > 0.3
    assert weights[1] < 0.0
    logits = states @ weights + biases[0]
    assert abs((1 / (1 + np.exp(-logits))).mean() - labels.mean()) < 0.03
