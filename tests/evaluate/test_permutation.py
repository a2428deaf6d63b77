"""Permutation tests: agreement with exact tests, strata, maxima of blocks, and error rates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rluf.evaluate.permutation import PermutationTest


def p_of(test: PermutationTest, features: np.ndarray, starts: list[int], level: float = 1e-4) -> np.ndarray:
    return test.compute_p_values(test.standardize(features), np.array(starts), smallest_level=level)


def test_one_stratum_agrees_with_fishers_exact_test() -> None:
    hits = np.concatenate([np.repeat([1.0, 0.0], [2, 38]), np.repeat([1.0, 0.0], [9, 21])])[:, None]
    test = PermutationTest(np.arange(70) >= 40, np.zeros(70, dtype=np.int64))
    exact = stats.fisher_exact([[9, 21], [2, 38]], alternative="greater").pvalue
    assert p_of(test, hits, [0])[0] == pytest.approx(exact, rel=0.25)


def test_the_z_score_has_the_moments_of_the_permutations() -> None:
    rng = np.random.default_rng(0)
    features, strata = rng.gamma(1.0, 1.0, (24, 2)), np.repeat(np.arange(6), 4)
    is_current = np.tile([True, True, True, False], 6)
    scaled = PermutationTest(is_current, strata).standardize(features)
    order = np.argsort(rng.random((20_000, 24)) + strata, axis=1)
    labels = np.zeros((20_000, 24))
    np.put_along_axis(labels, order, np.broadcast_to(is_current.astype(float), labels.shape), axis=1)
    z_scores = labels @ scaled
    assert z_scores.mean(axis=0) == pytest.approx([0.0, 0.0], abs=0.03)
    assert z_scores.std(axis=0) == pytest.approx([1.0, 1.0], abs=0.02)


def test_a_feature_of_the_prompt_alone_is_no_evidence_within_prompts() -> None:
    strata = np.repeat(np.arange(30), 4)
    prompt_feature = np.repeat(np.random.default_rng(1).random(30), 4)[:, None]
    test = PermutationTest(np.tile([True, True, False, False], 30), strata)
    assert np.all(test.standardize(prompt_feature) == 0.0)
    assert p_of(test, prompt_feature, [0])[0] == 1.0


def test_the_largest_of_many_features_keeps_the_level() -> None:
    rng = np.random.default_rng(2)
    test = PermutationTest(np.arange(60) >= 30, np.zeros(60, dtype=np.int64))
    p_values = np.array([p_of(test, rng.normal(size=(60, 40)), [0, 20], 0.05) for _ in range(200)])
    # The largest of twenty z-scores exceeds 1.96 in most samples; the test of the maximum must not.
    assert stats.binomtest(int((p_values <= 0.1).sum()), p_values.size, 0.1).pvalue > 0.001


def test_a_ranking_of_blocks_and_a_small_level() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(80, 6))
    features[40:, 4] += 3.0
    test = PermutationTest(np.arange(80) >= 40, np.zeros(80, dtype=np.int64))
    clean, shifted = p_of(test, features, [0, 3])
    assert clean > 0.01
    assert shifted < 1e-4
