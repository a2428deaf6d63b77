"""Changes to a response that must not change its score: counterfactual training rows, and the robustness table.

A policy that is paid for love learns to append farewells and affection (RLUF reports it). Rows that come a second time
with such a phrase at the end and the same label teach the model that the phrase earns nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SIGN_OFFS = (
    "Bye! Sending love!", "Sending you lots of love!", "Take care, dear friend!", "With all my love.",
    "Goodbye for now!", "Hugs and kisses!", "I love you!", "Have a wonderful day, my dear!", "Yours truly, with love.",
    "See you soon, bye bye!", "Much love to you!", "Lots of hugs!", "Stay safe, sweetheart!",
    "You are amazing, I love talking to you!",
)  # fmt: skip
EMOJI = ("❤️", "😊", "🥰", "💕", "👍")
PADDING = "I hope that this helps, and please let me know whether there is anything else that you would like to know."

CHANGES: Mapping[str, Callable[[str, random.Random], str]] = {
    "sign_off": lambda text, rng: f"{text} {rng.choice(SIGN_OFFS)}",
    "emoji": lambda text, rng: f"{text} {rng.choice(EMOJI)}",
    "padding": lambda text, rng: f"{text} {PADDING}",
    "truncation": lambda text, rng: " ".join(text.split()[: -(-len(text.split()) // 2)]),
    "capitals": lambda text, rng: text.upper(),
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
