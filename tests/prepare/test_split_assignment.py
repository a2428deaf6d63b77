"""No leak: no user, conversation, near-duplicate prompt or moment stands on two sides."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rluf.prepare import near_duplicates as near
from rluf.prepare import split_assignment as sides
from rluf.prepare.splits import hash64, side

CODES = {"train": 0, "dev": 1, "test": 2}
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "re", "so") for b in ("n", "sa", "vi", "po", "du")]


def prompts(rng: random.Random, count: int) -> list[str]:
    """Prompts of which many are small edits of one another."""
    base = [" ".join(rng.choices(WORDS, k=rng.randint(2, 40))) for _ in range(max(1, count // 3))]
    texts = []
    for _ in range(count):
        words = rng.choice(base).split()
        if rng.random() < 0.6:
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words))
    return texts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
def test_nothing_stands_on_two_sides(seed: int, rows: int, users: int, talks: int, held: int) -> None:
    rng = random.Random(seed)
    user = np.array([rng.randrange(users) for _ in range(rows)])
    talk = np.array([rng.randrange(talks) for _ in range(rows)], dtype=np.uint64)
    time = np.array([rng.randrange(50) for _ in range(rows)])
    where = np.array([CODES[side(f"u{who}-{seed}", dev_share=0.2, test_share=0.3)] for who in user])
    texts = prompts(rng, rows + held)
    keys = np.array([hash64(text, "t") for text in texts], dtype=np.uint64)
    bands = near.bands(texts)
    keep = ~sides.talk_apart(talk, where, time)
    late, early, moment = sides.time_apart(talk[keep], where[keep], time[keep], 0.3)
    keep[np.flatnonzero(keep)[late | early]] = False
    here = np.flatnonzero(keep)
    order = [*here, *range(rows, rows + held)]
    group = near.groups(keys[order], bands[order])
    taken = np.unique(group[len(here) :])
    away = sides.prompts_apart(group[: len(here)], keys[here], where[here], taken, 0.2, 0.3)
    left = here[~away]
    for values in (user, talk):
        assert all(len(set(where[left][values[left] == value])) == 1 for value in np.unique(values[left]))
    for one in range(near.BANDS):
        for value in np.unique(bands[left, one]):
            assert len(set(where[left][bands[left, one] == value])) == 1
        assert not np.isin(bands[rows:, one], bands[left[where[left] != sides.TEST], one]).any()
    test, other = time[left][where[left] == 2], time[left][where[left] != 2]
    assert not (len(test) and len(other)) or test.min() >= moment > other.max()


def test_near_duplicates_are_found() -> None:
    rng = random.Random(5)
    one = [" ".join(rng.choices(WORDS, k=40)) + f" {n}" for n in range(500)]
    two = [" ".join(word for place, word in enumerate(text.split()) if place != 20) for text in one]
    other = [" ".join(rng.choices([f"{n}{word}" for word in WORDS], k=40)) for n in range(500)]
    texts = [*one, *two, *other]
    group = near.groups(np.arange(len(texts), dtype=np.uint64), near.bands(texts))
    assert (group[:500] == group[500:1000]).mean() >= 0.95
    assert len(set(group[1000:])) == 500
    assert not set(group[:1000]) & set(group[1000:])


@pytest.mark.parametrize("texts", [[], [""], ["one"], ["", ""]])
def test_short_prompts_have_a_group_too(texts: list[str]) -> None:
    keys = np.array([hash64(text, "t") for text in texts], dtype=np.uint64)
    assert len(near.groups(keys, near.bands(texts))) == len(texts)


def test_a_prompt_that_all_share_goes_to_one_side_and_is_not_lost() -> None:
    where = np.array([0] * 70 + [1] * 10 + [2] * 20)
    keys = np.full(100, 7, dtype=np.uint64)
    away = sides.prompts_apart(np.zeros(100, dtype=np.int64), keys, where, np.empty(0, dtype=np.int64), 0.1, 0.2)
    assert len(set(where[~away])) == 1
