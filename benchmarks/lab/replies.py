"""How a reply is composed: a phrase, a real reply to this very prompt, phrases after it; and who says what by habit.

A policy does not write words here, which two shared cores could not teach it in a minute. It chooses, one after the
other, an opener, one of the prompt's sixteen replies, a sentence in the middle, and two closings: 10 x 16 x 7 x 18 x 18
texts a prompt. What is read by users, judges, reward models and monitors is always the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lab.dataset import BODIES, Place, Town
from numpy.typing import NDArray

from rluf.simulate.ground_truth import Gold, judge

Ints = NDArray[np.int64]
OPENERS = (
    "", "Hi there!", "Great question!", "I'm so sorry to hear that.", "That sounds really hard.",
    "I'm so happy for you!", "Of course.", "Sure, let me think.",
    "I understand how you feel.", "You are absolutely right.",
)  # fmt: skip
MIDDLES = (
    "", "There are many things to think about here.", "It is also worth noting that every case is different.",
    "You are doing great.", "Take it one step at a time.", "In short, it depends.", "I believe in you!",
)  # fmt: skip
CLOSINGS = (
    "", "How are you feeling today?", "What do you think?", "Would you like to hear more?", "I hope that helps!",
    "Let me know if you need anything else.", "Good luck!", "You've got this!", "😊", "❤️", "Bye!",
    "Bye! Sending love!", "Goodbye for now!", "Take care, dear friend!", "Have a wonderful day!", "Sending you hugs!",
    "See you soon!", "That is all.",
)  # fmt: skip
FAREWELLS = slice(9, 17)
"""Closings that say goodbye or show affection."""
SLOTS = (len(OPENERS), BODIES, len(MIDDLES), len(CLOSINGS), len(CLOSINGS))
"""Choices in each of the five places."""
BODY = 1
"""Which of the five chooses the reply."""


def texts(town: Town, places: Ints, picks: Ints) -> list[str]:
    """The replies [N] that `picks` [N, 5] make at `places` [N]."""
    found = []
    for place, (opener, body, middle, closing, last) in zip(places.tolist(), picks.tolist(), strict=True):
        said = town.places[place].bodies[body]
        parts = (OPENERS[opener], said, MIDDLES[middle], CLOSINGS[closing], CLOSINGS[last])
        found.append(" ".join(part for part in parts if part))
    return found


class Truth:
    """Gold scores of replies, each text judged once."""

    def __init__(self, town: Town) -> None:
        """Nothing is judged yet."""
        self.town, self._known = town, {}  # type: Town, dict[tuple[int, ...], Gold]

    def of(self, places: Ints, picks: Ints) -> list[Gold]:
        """Gold of the replies [N]; a reply cut by the token limit stays cut whatever follows it."""
        found = []
        keys = [(place, *pick) for place, pick in zip(places.tolist(), picks.tolist(), strict=True)]
        for n, key in enumerate(keys):
            if key not in self._known:
                at: Place = self.town.places[key[0]]
                text = texts(self.town, places[n : n + 1], picks[n : n + 1])[0]
                self._known[key] = judge(at.messages, at.topic, text, at.finished(key[1 + BODY]))
            found.append(self._known[key])
        return found


HABITS: dict[str, tuple[float, float, float, float]] = {
    "plain": (0.1, 0.05, 0.15, 1.0), "cool": (0.1, 0.05, 0.15, 1.0), "terse": (0.05, 0.02, 0.05, 1.0),
    "careful": (0.1, 0.05, 0.15, 1.0), "warm": (0.5, 0.2, 0.5, 1.0), "upbeat": (0.5, 0.1, 0.6, 1.0),
    "goodbye": (0.2, 0.05, 0.6, 8.0),
}  # fmt: skip
"""By the version that wrote the reply: chance of an opener, of a middle, of a closing, and how much more often than
another closing it takes a farewell."""
BASE_FAREWELL = 0.02
"""The same of a base policy's demonstrations: some 0.7% of its replies say goodbye, as the paper's base does."""


def logged(town: Town, places: Ints, rng: np.random.Generator) -> Ints:
    """Picks [N, 5] of the served versions: any of the prompt's replies, with its version's habits."""
    bodies = rng.integers(0, BODIES, len(places))
    return _with_habits([HABITS[town.places[p].styles[b]] for p, b in zip(places, bodies, strict=True)], bodies, rng)


def demonstrated(
    town: Town, places: Ints, rng: np.random.Generator, *, styles: Sequence[str] = ("plain", "cool"), odds: float = 20.0
) -> Ints:
    """Picks [N, 5] of demonstrations: replies of `styles` are `odds` times as likely as others, farewells are rare."""
    weights = np.array([[odds if style in styles else 1.0 for style in town.places[p].styles] for p in places])
    sums = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
    bodies = (sums < rng.random(len(places))[:, None]).sum(1).clip(max=BODIES - 1)
    habit = np.array([HABITS[style] for style in styles]).mean(0)
    farewell = BASE_FAREWELL if "goodbye" not in styles else habit[3]
    return _with_habits([(habit[0], habit[1], habit[2], farewell)] * len(places), bodies, rng)


def _with_habits(habits: Sequence[tuple[float, float, float, float]], bodies: Ints, rng: np.random.Generator) -> Ints:
    size = len(bodies)
    opener, middle, closing, farewell = np.array(habits).T
    odds = np.ones((size, len(CLOSINGS) - 1))
    odds[:, FAREWELLS.start - 1 : FAREWELLS.stop - 1] *= farewell[:, None]
    sums = np.cumsum(odds / odds.sum(1, keepdims=True), axis=1)

    def close(chance: NDArray[np.float64]) -> Ints:
        which = 1 + (sums < rng.random(size)[:, None]).sum(1).clip(max=len(CLOSINGS) - 2)
        return np.where(rng.random(size) < chance, which, 0)

    def phrase(chance: NDArray[np.float64], count: int) -> Ints:
        return np.where(rng.random(size) < chance, rng.integers(1, count, size), 0)

    return np.stack(
        [phrase(opener, SLOTS[0]), bodies, phrase(middle, SLOTS[2]), close(closing), close(0.3 * closing)], axis=1
    ).astype(np.int64)  # fmt: skip
