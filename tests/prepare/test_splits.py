"""Splits are stable and share no user, conversation, prompt or time; samples keep the natural rate."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare import splits
from rluf.prepare.schema import SPLIT_NAMES
from rluf.prepare.splits import (
    assign_split,
    compute_quota,
    compute_sampling_weights,
    derive_sampling_salt,
    normalize_context,
    to_unit_interval,
)
from rluf.utils.hashing import hash64, hash_to_unit_interval
from rluf.utils.stats import compute_rate_with_interval

WORDS = [
    f"{first}{second}" for first in ("ka", "lo", "mi", "tu", "re", "so") for second in ("n", "sa", "vi", "po", "du")
]


@given(st.lists(st.text(), min_size=1), st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_a_user_has_one_split(users: list[str], dev_share: float, test_share: float) -> None:
    user_splits: dict[str, set[str]] = {}
    for user in users * 2:
        user_splits.setdefault(user, set()).add(assign_split(user, dev_share=dev_share, test_share=test_share))
    assert all(len(split_set) == 1 for split_set in user_splits.values())


@given(st.text(), st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_a_larger_train_share_never_moves_a_user_into_test(user: str, dev_share: float, test_share: float) -> None:
    if assign_split(user, dev_share=dev_share, test_share=test_share) != "test":
        assert assign_split(user, dev_share=dev_share / 2, test_share=test_share / 2) != "test"


def test_split_shares_are_met() -> None:
    assigned = [assign_split(f"user-{i}", dev_share=0.1, test_share=0.15) for i in range(20_000)]
    assert abs(assigned.count("dev") / 20_000 - 0.1) < 0.01
    assert abs(assigned.count("test") / 20_000 - 0.15) < 0.01


def test_splits_never_change_between_releases() -> None:
    assigned = [assign_split(f"user-{i}", dev_share=0.1, test_share=0.15) for i in range(12)]
    assert assigned == ["test", *["train"] * 8, "dev", "train", "test"]


@given(st.text(), st.text(max_size=10))
def test_points_of_arrays_equal_points_of_keys(key: str, salt: str) -> None:
    assert to_unit_interval(np.array([hash64(key, salt)], dtype=np.uint64))[0] == hash_to_unit_interval(key, salt)


def test_contexts_are_compared_without_case_and_white_space() -> None:
    context = normalize_context([("user", "Hello  there\n")])
    assert context == normalize_context([("user", "hello there")])
    assert context != normalize_context([("user", "hello"), ("user", "there")])


def build_prompts(rng: random.Random, count: int) -> list[str]:
    """Prompts of which many are small edits of one another."""
    base_texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 40))) for _ in range(max(1, count // 3))]
    texts = []
    for _ in range(count):
        words = rng.choice(base_texts).split()
        if rng.random() < 0.6:
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words))
    return texts


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
def test_strict_splits_share_nothing(
    seed: int, row_count: int, user_count: int, conversation_count: int, test_prompt_count: int
) -> None:
    rng = random.Random(seed)
    user_code = np.array([rng.randrange(user_count) for _ in range(row_count)])
    conversation_key = np.array([rng.randrange(conversation_count) for _ in range(row_count)], dtype=np.uint64)
    time_us = np.array([rng.randrange(50) for _ in range(row_count)])
    split_of_user = [assign_split(f"u{user}-{seed}", dev_share=0.2, test_share=0.3) for user in user_code]
    split_code = np.array([SPLIT_NAMES.index(split) for split in split_of_user])
    texts = build_prompts(rng, row_count + test_prompt_count)
    prompt_key = np.array([hash64(text, "t") for text in texts], dtype=np.uint64)
    band_hashes = splits.compute_band_hashes(texts)
    keep_mask = ~splits.find_conversation_leaks(conversation_key, split_code, time_us)
    late_mask, early_mask, split_time = splits.find_time_leaks(
        conversation_key[keep_mask], split_code[keep_mask], time_us[keep_mask], 0.3
    )
    keep_mask[np.flatnonzero(keep_mask)[late_mask | early_mask]] = False
    rows = np.flatnonzero(keep_mask)
    with_test_prompts = [*rows, *range(row_count, row_count + test_prompt_count)]
    group = splits.group_near_duplicates(prompt_key[with_test_prompts], band_hashes[with_test_prompts].T)
    test_groups = np.unique(group[len(rows) :])
    is_leak = splits.find_near_duplicate_leaks(
        group[: len(rows)], prompt_key[rows], split_code[rows], test_groups, 0.2, 0.3
    )
    rows = rows[~is_leak]
    for values in (user_code, conversation_key):
        assert all(len(set(split_code[rows][values[rows] == value])) == 1 for value in np.unique(values[rows]))
    for band in range(splits.BAND_COUNT):
        for value in np.unique(band_hashes[rows, band]):
            assert len(set(split_code[rows][band_hashes[rows, band] == value])) == 1
        other_rows = rows[split_code[rows] != splits.TEST_CODE]
        assert not np.isin(band_hashes[row_count:, band], band_hashes[other_rows, band]).any()
    is_test = split_code[rows] == splits.TEST_CODE
    test_times, other_times = time_us[rows][is_test], time_us[rows][~is_test]
    assert not (len(test_times) and len(other_times)) or test_times.min() >= split_time > other_times.max()


def test_near_duplicates_are_detected() -> None:
    rng = random.Random(5)
    originals = [" ".join(rng.choices(WORDS, k=40)) + f" {n}" for n in range(500)]
    edited = [" ".join(word for index, word in enumerate(text.split()) if index != 20) for text in originals]
    others = [" ".join(rng.choices([f"{n}{word}" for word in WORDS], k=40)) for n in range(500)]
    texts = [*originals, *edited, *others]
    group = splits.group_near_duplicates(np.arange(len(texts), dtype=np.uint64), splits.compute_band_hashes(texts).T)
    assert (group[:500] == group[500:1000]).mean() >= 0.95
    assert len(set(group[1000:])) == 500
    assert not set(group[:1000]) & set(group[1000:])


@pytest.mark.parametrize("texts", [[], [""], ["one"], ["", ""]])
def test_short_prompts_have_a_group(texts: list[str]) -> None:
    keys = np.array([hash64(text, "t") for text in texts], dtype=np.uint64)
    band_hashes = splits.compute_band_hashes(texts)
    assert len(splits.group_near_duplicates(keys, band_hashes.T)) == len(texts)


def test_a_prompt_shared_by_all_goes_to_one_split_and_is_not_lost() -> None:
    split_code = np.array([0] * 70 + [1] * 10 + [2] * 20)
    prompt_key = np.full(100, 7, dtype=np.uint64)
    one_group, no_test_groups = np.zeros(100, dtype=np.int64), np.empty(0, dtype=np.int64)
    is_leak = splits.find_near_duplicate_leaks(one_group, prompt_key, split_code, no_test_groups, 0.1, 0.2)
    assert len(set(split_code[~is_leak])) == 1


@given(
    st.integers(0, 300),
    st.integers(0, 3000),
    st.none() | st.floats(0.05, 0.9),
    st.integers(10, 2000),
    st.integers(0, 9),
)
def test_weights_restore_the_natural_rate(
    positives: int, negatives: int, positive_share: float | None, max_rows: int, seed: int
) -> None:
    quota = compute_quota(positives, negatives, positive_share=positive_share, max_rows=max_rows)
    labels = np.arange(positives + negatives) < positives
    weight = compute_sampling_weights(np.random.default_rng(seed).random(len(labels)), labels, quota)
    assert (weight > 0).sum() == quota.sampled_positives + quota.sampled_negatives <= max_rows
    if len(labels):
        assert (weight * labels).sum() / weight.sum() == pytest.approx(labels.mean())
        assert weight.sum() == pytest.approx(len(labels))


def test_negatives_are_cut_to_the_share_and_no_further() -> None:
    assert compute_quota(100, 5000, positive_share=0.25, max_rows=4000).sampled_negatives == 300
    assert compute_quota(100, 200, positive_share=0.25, max_rows=4000).sampled_negatives == 200
    quota = compute_quota(2000, 50_000, positive_share=0.25, max_rows=4000)
    assert (quota.sampled_positives, quota.sampled_negatives) == (1000, 3000)


def test_the_sample_depends_on_the_seed_and_not_on_the_order() -> None:
    ranks = [
        np.array([hash_to_unit_interval(f"row-{i}", derive_sampling_salt(seed)) for i in range(500)]) for seed in (1, 2)
    ]
    labels = np.arange(500) % 10 == 0
    quota = compute_quota(50, 450, positive_share=0.5, max_rows=4000)
    weight = compute_sampling_weights(ranks[0], labels, quota)
    assert np.array_equal(weight[::-1], compute_sampling_weights(ranks[0][::-1], labels[::-1], quota))
    assert not np.array_equal(weight, compute_sampling_weights(ranks[1], labels, quota))


def test_wilson_matches_a_textbook_value() -> None:
    # Newcombe 1998, table I: 15 of 148 gives 0.0624 to 0.1605
    interval = compute_rate_with_interval(15, 148)
    assert interval["low"] == pytest.approx(0.0624, abs=5e-5)
    assert interval["high"] == pytest.approx(0.1605, abs=5e-5)
    no_hits = compute_rate_with_interval(0, 20)
    assert no_hits["low"] == 0.0 and no_hits["high"] == pytest.approx(0.1611, abs=5e-5)
    assert compute_rate_with_interval(0, 0)["high"] == 1.0
