"""Response edits that must not change the score: counterfactual training rows and robustness perturbations.

A policy rewarded for love learns to append farewells and affection (reported by RLUF). Duplicating training rows with
such a phrase appended and the label unchanged teaches the reward model that the phrase earns nothing. Half of the
phrases are the sign-offs of the log's own responses, because these are the ones the log may reward.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rluf.objectives.judges import has_sign_off

SIGN_OFF_PHRASES = (
    "Bye! Sending love!", "Sending you lots of love!", "Take care, dear friend!", "With all my love.",
    "Goodbye for now!", "Hugs and kisses!", "I love you!", "Have a wonderful day, my dear!", "Yours truly, with love.",
    "See you soon, bye bye!", "Much love to you!", "Lots of hugs!", "Stay safe, sweetheart!",
    "You are amazing, I love talking to you!",
)  # fmt: skip
SIGN_OFF_SHARE = 0.3
"""Share of the training rows that are duplicated with a sign-off when debias contains sign_offs."""
MAX_LOG_SIGN_OFFS = 64
"""Number of distinct sign-offs taken from the log, most frequent first."""
MAX_SIGN_OFF_CHARACTERS = 100
"""Longest sentence, in characters, that may count as a sign-off."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
EMOJI_SUFFIXES = ("❤️", "😊", "🥰", "💕", "👍")
PADDING_SENTENCE = (
    "I hope that this helps, and please let me know whether there is anything else that you would like to know."
)

PARAPHRASE_PAIRS = (
    ("do not", "don't"), ("does not", "doesn't"), ("is not", "isn't"), ("are not", "aren't"), ("cannot", "can't"),
    ("will not", "won't"), ("i am", "i'm"), ("you are", "you're"), ("it is", "it's"), ("that is", "that's"),
    ("i will", "i'll"), ("you will", "you'll"), ("i have", "i've"), ("you have", "you've"), ("we are", "we're"),
    ("because", "since"), ("also", "too"), ("maybe", "perhaps"), ("big", "large"), ("quick", "fast"),
    ("start", "begin"), ("help", "assist"), ("need to", "have to"), ("lots of", "many"), ("want to", "would like to"),
    ("of course", "certainly"), ("for example", "for instance"), ("but", "however"), ("think", "believe"),
    ("happy", "glad"), ("great", "excellent"), ("sure", "certain"), ("important", "essential"), ("try", "attempt"),
)  # fmt: skip
"""Equivalent phrases; a paraphrase replaces either one by the other."""


def paraphrase_text(text: str) -> str:
    """Replace every phrase of PARAPHRASE_PAIRS by its counterpart, in both directions."""
    counterparts = {**dict(PARAPHRASE_PAIRS), **{second: first for first, second in PARAPHRASE_PAIRS}}
    # Longest phrases first: a regex alternation takes the first match, so "will not" must come before "i will".
    pattern = "|".join(re.escape(phrase) for phrase in sorted(counterparts, key=len, reverse=True))

    def replace_phrase(match: re.Match[str]) -> str:
        counterpart = counterparts[match.group().lower()]
        return counterpart[0].upper() + counterpart[1:] if match.group()[0].isupper() else counterpart

    return re.sub(rf"\b(?:{pattern})\b", replace_phrase, text.replace("’", "'"), flags=re.IGNORECASE)


RESPONSE_PERTURBATIONS: Mapping[str, Callable[[str, random.Random], str]] = {
    "sign_off": lambda text, rng: f"{text} {rng.choice(SIGN_OFF_PHRASES)}",
    "emoji": lambda text, rng: f"{text} {rng.choice(EMOJI_SUFFIXES)}",
    "padding": lambda text, rng: f"{text} {PADDING_SENTENCE}",
    "truncation": lambda text, rng: " ".join(text.split()[: -(-len(text.split()) // 2)]),
    "capitals": lambda text, rng: text.upper(),
    "paraphrase": lambda text, rng: paraphrase_text(text),
}
"""Perturbations of a response, by name. Truncation keeps the first half of the words, rounded up."""


def find_log_sign_offs(responses: Sequence[str]) -> list[str]:
    """Closing sentences of the responses that are a farewell or an affectionate close, most frequent first."""
    last_sentences = (SENTENCE_END.split(text.rstrip())[-1] for text in responses)
    sign_off_counts = Counter(
        sentence for sentence in last_sentences if len(sentence) <= MAX_SIGN_OFF_CHARACTERS and has_sign_off(sentence)
    )
    return [sentence for sentence, _ in sign_off_counts.most_common(MAX_LOG_SIGN_OFFS)]


def add_sign_off_copies(
    rows: Sequence[Mapping[str, Any]], share: float, *, is_pairwise: bool, seed: int
) -> tuple[list[Mapping[str, Any]], NDArray[np.int64]]:
    """Append copies of a share of the rows, each with a sign-off added to its response and the label unchanged.

    The second return value holds, for each copy, the index of the row it was copied from. For a pair, one side chosen
    at random gets the phrase. The choice depends only on the seed and the row's own text. Half of the phrases come from
    find_log_sign_offs of these rows, when there are any.
    """
    if share <= 0:
        return list(rows), np.empty(0, dtype=np.int64)
    response_columns = ("chosen", "rejected") if is_pairwise else ("response",)
    log_sign_offs = find_log_sign_offs([str(row[column]) for row in rows for column in response_columns])
    augmented_rows, source_indices = list(rows), []
    for row_index, row in enumerate(rows):
        # Seeded by the row's text: a row gets the same phrase whichever rank or shard order it is read in.
        rng = random.Random(f"{seed} {[row[column] for column in response_columns]}")
        if rng.random() < share:
            column = rng.choice(response_columns)
            phrase = rng.choice(log_sign_offs if log_sign_offs and rng.random() < 0.5 else SIGN_OFF_PHRASES)
            augmented_rows.append({**row, column: f"{row[column]} {phrase}"})
            source_indices.append(row_index)
    return augmented_rows, np.asarray(source_indices, dtype=np.int64)
