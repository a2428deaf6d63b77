"""Splits hold users apart; samples keep the natural rate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare.card_statistics import wilson
from rluf.prepare.sampling import choose, quota, sample_salt
from rluf.prepare.splits import context_text, hash64, side, unit_hash, units


@settings(deadline=None)
@given(st.lists(st.text(), min_size=1), st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_a_user_has_one_side_whatever_the_rows(users: list[str], dev: float, test: float) -> None:
    sides: dict[str, set[str]] = {}
    for user in users * 2:
        sides.setdefault(user, set()).add(side(user, dev_share=dev, test_share=test))
    assert all(len(found) == 1 for found in sides.values())


@settings(deadline=None)
@given(st.text(), st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_a_larger_train_share_never_moves_a_user_into_test(user: str, dev: float, test: float) -> None:
    if side(user, dev_share=dev, test_share=test) != "test":
        assert side(user, dev_share=dev / 2, test_share=test / 2) != "test"


def test_shares_are_met() -> None:
    sides = [side(f"user-{i}", dev_share=0.1, test_share=0.15) for i in range(20_000)]
    assert abs(sides.count("dev") / 20_000 - 0.1) < 0.01
    assert abs(sides.count("test") / 20_000 - 0.15) < 0.01


def test_sides_stay_for_ever() -> None:
    found = [side(f"user-{i}", dev_share=0.1, test_share=0.15) for i in range(12)]
    assert found == ["test", *["train"] * 8, "dev", "train", "test"]


@given(st.text(), st.text(max_size=10))
def test_unit_hashes_are_in_range_and_alike_for_arrays(key: str, salt: str) -> None:
    assert 0 <= unit_hash(key, salt) < 1
    assert units(np.array([hash64(key, salt)], dtype=np.uint64))[0] == unit_hash(key, salt)


def test_a_context_is_its_text_not_its_layout() -> None:
    one = context_text([("user", "Hello  there\n")])
    assert one == context_text([("user", "hello there")])
    assert one != context_text([("user", "hello"), ("user", "there")])


@settings(deadline=None)
@given(
    st.integers(0, 300),
    st.integers(0, 3000),
    st.none() | st.floats(0.05, 0.9),
    st.integers(10, 2000),
    st.integers(0, 9),
)
def test_weights_give_back_the_natural_rate(
    positives: int, negatives: int, share: float | None, most: int, seed: int
) -> None:
    plan = quota(positives, negatives, positive_share=share, max_rows=most)
    labels = np.arange(positives + negatives) < positives
    weight = choose(np.random.default_rng(seed).random(len(labels)), labels, plan)
    kept = weight > 0
    assert kept.sum() == plan.keep_positives + plan.keep_negatives <= max(most, 0)
    if len(labels):
        assert (weight * labels).sum() / weight.sum() == pytest.approx(labels.mean())
        assert weight.sum() == pytest.approx(len(labels))


def test_negatives_are_cut_to_the_share_and_never_more() -> None:
    assert quota(100, 5000, positive_share=0.25, max_rows=4000).keep_negatives == 300
    assert quota(100, 200, positive_share=0.25, max_rows=4000).keep_negatives == 200
    both = quota(2000, 50_000, positive_share=0.25, max_rows=4000)
    assert (both.keep_positives, both.keep_negatives) == (1000, 3000)


def test_the_choice_hangs_on_seed_not_on_order() -> None:
    ranks = [np.array([unit_hash(f"row-{i}", sample_salt(seed)) for i in range(500)]) for seed in (1, 2)]
    labels = np.arange(500) % 10 == 0
    plan = quota(50, 450, positive_share=0.5, max_rows=4000)
    first = choose(ranks[0], labels, plan)
    assert np.array_equal(first[::-1], choose(ranks[0][::-1], labels[::-1], plan))
    assert not np.array_equal(first, choose(ranks[1], labels, plan))


def test_wilson_matches_a_textbook_value() -> None:
    # Newcombe 1998, table I: 15 of 148 gives 0.0624 to 0.1605
    interval = wilson(15, 148)
    assert interval["low"] == pytest.approx(0.0624, abs=5e-5)
    assert interval["high"] == pytest.approx(0.1605, abs=5e-5)
    assert wilson(0, 20)["low"] == 0.0 and wilson(0, 20)["high"] == pytest.approx(0.1611, abs=5e-5)
    assert wilson(0, 0)["high"] == 1.0
