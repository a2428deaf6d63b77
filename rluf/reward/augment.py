"""Changes to a response that must not change its score: counterfactual training rows, and the robustness table.

A policy that is paid for love learns to append farewells and affection (RLUF reports it). Rows that come a second time
with such a phrase at the end and the same label teach the model that the phrase earns nothing. Half of the phrases are
those that the log's own responses end with, which are what the log may pay for.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.objectives.judges import signs_off

SIGN_OFFS = (
    "Bye! Sending love!", "Sending you lots of love!", "Take care, dear friend!", "With all my love.",
    "Goodbye for now!", "Hugs and kisses!", "I love you!", "Have a wonderful day, my dear!", "Yours truly, with love.",
    "See you soon, bye bye!", "Much love to you!", "Lots of hugs!", "Stay safe, sweetheart!",
    "You are amazing, I love talking to you!",
)  # fmt: skip
SIGN_OFF_SHARE = 0.3
"""Share of the training rows that come again with a sign-off where debias names sign_offs."""
CLOSES = 64
"""Closing sentences of the log's own that are used, the most frequent ones."""
LONGEST_CLOSE = 100
"""Characters of a sentence that may count as a sign-off."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
EMOJI = ("❤️", "😊", "🥰", "💕", "👍")
PADDING = "I hope that this helps, and please let me know whether there is anything else that you would like to know."

SAME = (
    ("do not", "don't"), ("does not", "doesn't"), ("is not", "isn't"), ("are not", "aren't"), ("cannot", "can't"),
    ("will not", "won't"), ("i am", "i'm"), ("you are", "you're"), ("it is", "it's"), ("that is", "that's"),
    ("i will", "i'll"), ("you will", "you'll"), ("i have", "i've"), ("you have", "you've"), ("we are", "we're"),
    ("because", "since"), ("also", "too"), ("maybe", "perhaps"), ("big", "large"), ("quick", "fast"),
    ("start", "begin"), ("help", "assist"), ("need to", "have to"), ("lots of", "many"), ("want to", "would like to"),
    ("of course", "certainly"), ("for example", "for instance"), ("but", "however"), ("think", "believe"),
    ("happy", "glad"), ("great", "excellent"), ("sure", "certain"), ("important", "essential"), ("try", "attempt"),
)  # fmt: skip
"""Ways to say the same; a paraphrase swaps either side for the other."""


def paraphrased(text: str) -> str:
    """The text with every phrase of SAME swapped for its twin, contractions written out and the other way round."""
    twins = {**dict(SAME), **{b: a for a, b in SAME}}
    pattern = "|".join(re.escape(phrase) for phrase in sorted(twins, key=len, reverse=True))

    def swap(found: re.Match[str]) -> str:
        twin = twins[found.group().lower().replace("’", "'")]
        return twin[0].upper() + twin[1:] if found.group()[0].isupper() else twin

    return re.sub(rf"\b(?:{pattern})\b", swap, text.replace("’", "'"), flags=re.IGNORECASE)


CHANGES: Mapping[str, Callable[[str, random.Random], str]] = {
    "sign_off": lambda text, rng: f"{text} {rng.choice(SIGN_OFFS)}",
    "emoji": lambda text, rng: f"{text} {rng.choice(EMOJI)}",
    "padding": lambda text, rng: f"{text} {PADDING}",
    "truncation": lambda text, rng: " ".join(text.split()[: -(-len(text.split()) // 2)]),
    "capitals": lambda text, rng: text.upper(),
    "paraphrase": lambda text, rng: paraphrased(text),
}
"""Change of a response by name. Truncation keeps the first half of the words."""


def own_sign_offs(responses: Sequence[str]) -> list[str]:
    """Last sentences of the responses that are a farewell or an affectionate close, the most frequent first."""
    ends = (SENTENCE_END.split(text.rstrip())[-1] for text in responses)
    found = Counter(end for end in ends if len(end) <= LONGEST_CLOSE and signs_off(end))
    return [end for end, _ in found.most_common(CLOSES)]


def with_sign_offs(
    rows: Sequence[Mapping[str, Any]], share: float, *, pairs: bool, seed: int
) -> tuple[list[Mapping[str, Any]], NDArray[np.int64]]:
    """The rows and, after them, a share of them again with a sign-off at the end and the label as before.

    The second value tells of each added row which row it is a copy of. Of a pair, either side gets the phrase, at
    random. The choice hangs on the seed and on each row's own text; half of the phrases are own_sign_offs of these
    rows, where there are any.
    """
    if share <= 0:
        return list(rows), np.empty(0, dtype=np.int64)
    sides = ("chosen", "rejected") if pairs else ("response",)
    own = own_sign_offs([str(row[side]) for row in rows for side in sides])
    found, copied = list(rows), []
    for number, row in enumerate(rows):
        rng = random.Random(f"{seed} {[row[side] for side in sides]}")
        if rng.random() < share:
            side = rng.choice(sides)
            phrase = rng.choice(own if own and rng.random() < 0.5 else SIGN_OFFS)
            found.append({**row, side: f"{row[side]} {phrase}"})
            copied.append(number)
    return found, np.asarray(copied, dtype=np.int64)
