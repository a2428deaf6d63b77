"""Signs of a collapsed policy: phrases and similarity that replies to different prompts share.

Nothing here depends on a list of words or on a language: a policy that says one thing to everybody is noticed by the
repetition across prompts. Features are computed on the replies of both policies together and never see which policy
wrote a reply, which keeps permutation tests of them exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from rluf.utils.stats import Floats

MIN_PHRASE_REPLIES, MIN_PHRASE_SHARE, MIN_PHRASE_PROMPTS = 6, 0.01, 4
"""A phrase is tested if it occurs in this many replies and this share of them, to this many prompts."""
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# A word with its apostrophe, one character of a script without spaces, or a symbol such as an emoji; no punctuation.
_PUNCTUATION = r"!-/:-@\[-`{-~¡¿«»‘’“”–—…\u3000-\u303f\uff00-\uff0f\uff1a-\uff20"
_TOKEN_PATTERN = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:'[^\W{_CJK}]+)?|[^\w\s{_PUNCTUATION}]")
# What sets words off: "Absolutely! ...", "... Cheers!", a heading.
_CLAUSE_END_PATTERN = re.compile(r"[.!?,;:…—–\n。！？，、：；]+|\s-+\s")


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """Features of N replies: `values` [N, K], for phrases 1 where reply n contains phrase k; else without `phrases`."""

    values: Floats
    phrases: tuple[str, ...] = ()


@lru_cache(maxsize=8192)
def split_tokens(text: str) -> tuple[str, ...]:
    """Lower-case tokens of a text in any script: words, CJK characters, emoji."""
    return tuple(_TOKEN_PATTERN.findall(text.lower().replace("\u2019", "'")))


def list_phrases(text: str) -> list[str]:
    """Runs of three tokens; "^" before the first and "$" after the last token make openings and endings phrases.

    A single word that a mark sets off at the start or the end is a phrase too: whatever comes next differs.
    """
    tokens = ["^", *split_tokens(text), "$"]
    first, last = _find_set_off_words(text)
    phrases = [" ".join(tokens[start : start + 3]) for start in range(len(tokens) - 2)]
    return phrases + [f"^ {word}" for word in first] + [f"{word} $" for word in last]


def list_opening(text: str) -> list[str]:
    """The first two tokens as one phrase, and the first alone if a mark sets it off; none for a shorter text."""
    tokens = split_tokens(text)[:2]
    return [" ".join(tokens), *_find_set_off_words(text)[0]] if len(tokens) == 2 else []


def _find_set_off_words(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The first and the last token of a text, each if a mark sets it off from the others."""
    clauses = [tokens for clause in _CLAUSE_END_PATTERN.split(text) if (tokens := split_tokens(clause))]
    if len(clauses) < 2:
        return (), ()
    return (clauses[0] if len(clauses[0]) == 1 else ()), (clauses[-1] if len(clauses[-1]) == 1 else ())


def find_recurring_phrases(
    texts: Sequence[str], prompt_index: NDArray[np.intp], list_units: Callable[[str], list[str]]
) -> FeatureTable:
    """Phrases (by `list_units`) that recur in replies to different prompts; `prompt_index` [N] numbers the prompts."""
    units = [list_units(text) for text in texts]
    if not any(units):
        return FeatureTable(np.zeros((len(texts), 0)))
    vectorizer = CountVectorizer(analyzer=lambda index: units[index], binary=True, dtype=np.float64)
    occurs = vectorizer.fit_transform(range(len(texts))).tocsc()
    reply_counts = np.diff(occurs.indptr)
    frequent = np.flatnonzero(reply_counts >= max(MIN_PHRASE_REPLIES, MIN_PHRASE_SHARE * len(texts)))
    prompts = [np.unique(prompt_index[occurs.indices[occurs.indptr[k] : occurs.indptr[k + 1]]]) for k in frequent]
    recurring = frequent[[len(prompt) >= MIN_PHRASE_PROMPTS for prompt in prompts]]
    names = vectorizer.get_feature_names_out()
    # Runs of one longer phrase occur in the same replies: one column for all of them.
    columns = {occurs[:, k].indices.tobytes(): k for k in reversed(recurring)}.values()
    return FeatureTable(occurs[:, list(columns)].toarray(), tuple(str(names[k]) for k in columns))


def measure_similarity(texts: Sequence[str], prompt_index: NDArray[np.intp]) -> Floats:
    """Mean cosine [N] of each reply with the replies to other prompts, by tf-idf; nan for a single prompt."""
    vectors, sizes = _compute_tfidf(texts), np.bincount(prompt_index)
    if len(sizes) < 2:
        return np.full(len(texts), np.nan)
    membership = sparse.csr_matrix((np.ones(len(texts)), (prompt_index, np.arange(len(texts)))))
    prompt_sums = membership @ vectors
    # Products within a prompt, including that of a reply with itself, are no similarity to other prompts.
    same_prompt = _compute_row_products(vectors, prompt_sums[prompt_index])
    return (_sum_products(vectors, prompt_sums) - same_prompt) / (len(texts) - sizes[prompt_index])


def measure_specificity(texts: Sequence[str], user_texts: Sequence[str], prompt_index: NDArray[np.intp]) -> Floats:
    """Cosine [N] of each reply with the message that it answers, minus its mean cosine with those of other prompts.

    `user_texts` [N] are the messages; nan for a single prompt.
    """
    first_rows = np.unique(prompt_index, return_index=True)[1]
    if len(first_rows) < 2:
        return np.full(len(texts), np.nan)
    vectors = _compute_tfidf([*texts, *(user_texts[row] for row in first_rows)])
    replies, messages = vectors[: len(texts)], vectors[len(texts) :]
    own = _compute_row_products(replies, messages[prompt_index])
    return own - (_sum_products(replies, messages) - own) / (len(first_rows) - 1)


def _compute_tfidf(texts: Sequence[str]) -> sparse.csr_matrix:
    # The empty token is in every text: without it a set of empty replies has no vocabulary, which is an error.
    return TfidfVectorizer(analyzer=lambda text: [*split_tokens(text), ""], sublinear_tf=True).fit_transform(texts)


def _sum_products(vectors: sparse.csr_matrix, others: sparse.csr_matrix) -> Floats:
    """Sum of the products of each vector with all of the others [N]."""
    # One product with the sum, not one per pair: memory stays linear in the number of replies.
    return np.asarray(vectors @ np.asarray(others.sum(axis=0)).T).ravel()


def _compute_row_products(left: sparse.csr_matrix, right: sparse.csr_matrix) -> Floats:
    return np.asarray(left.multiply(right).sum(axis=1)).ravel()
