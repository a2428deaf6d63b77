"""Changes to a response that must not change its score: counterfactual training rows, and the robustness table.

A policy that is paid for love learns to append farewells and affection (RLUF reports it). Rows that come a second time
with such a phrase at the end and the same label teach the model that the phrase earns nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SIGN_OFFS = (
    "Bye! Sending love!", "Sending you lots of love!", "Take care, dear friend!", "With all my love.",
    "Goodbye for now!", "Hugs and kisses!", "I love you!", "Have a wonderful day, my dear!", "Yours truly, with love.",
    "See you soon, bye bye!", "Much love to you!", "Lots of hugs!", "Stay safe, sweetheart!",
    "You are amazing, I love talking to you!",
)  # fmt: skip
SIGN_OFF_SHARE = 0.3
"""Share of the training rows that come again with a sign-off where debias names sign_offs."""
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


def with_sign_offs(
    rows: Sequence[Mapping[str, Any]], share: float, *, pairs: bool, seed: int
) -> list[Mapping[str, Any]]:
    """The rows and, after them, a share of them again with a sign-off at the end and the label as before.

    Of a pair, either side gets the phrase, at random. The choice hangs on the seed and on each row's own text.
    """
    found = list(rows)
    for row in rows:
        sides = ("chosen", "rejected") if pairs else ("response",)
        rng = random.Random(f"{seed} {[row[side] for side in sides]}")
        if rng.random() < share:
            side = rng.choice(sides)
            found.append({**row, side: CHANGES["sign_off"](str(row[side]), rng)})
    return found
