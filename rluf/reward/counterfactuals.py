"""Responses that are worse by construction, made from the log's own rows, so that a reward model reads the prompt.

A log has each response under its own prompt only, so a model trained on it can score the response alone. Five kinds:

- `mismatched`: a good response under the prompt of another good row;
- `generic`: a response of the log that resembles the responses to all other prompts;
- `echo`: the user's own message returned;
- `cut`: the start of a good response, marked as cut at the token limit;
- `loop`: the start of a good response whose last words repeat. It is longer than the good one by about as much as a cut
  one is shorter: with cut ones alone, a model would learn that longer is better.

In training the good response must score higher than they do (pairs: they lose against the chosen one). They take part
neither in calibration nor in the base rate. On the test split the same kinds, and flattery, which no training row has,
measure how often a model prefers the good response.
"""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rluf.reward.metrics import compute_accuracy_interval, round_for_json
from rluf.reward.text import is_truncated
from rluf.types import ScoringItem

if TYPE_CHECKING:
    from rluf.reward.model import RewardModel

logger = logging.getLogger(__name__)

LABEL_COPY_RATES: Mapping[str, float] = {"mismatched": 1.0, "generic": 0.25, "echo": 0.1, "cut": 0.25, "loop": 0.25}
"""Training rows of each kind per good row of a labeled log; a fraction is the probability of one more."""
PAIR_COPY_RATES: Mapping[str, float] = {"mismatched": 0.5, "generic": 0.15, "echo": 0.1, "cut": 0.15, "loop": 0.15}
"""The same per pair: every pair has a good response, but only a few rows of a labeled log do."""
MAX_TRIGRAM_OVERLAP = 0.3
"""Jaccard overlap of character trigrams from which two messages ask for much the same, so their responses may fit."""
PARTNER_ATTEMPTS = 20
"""Random rows tried as partner before a row goes without a copy."""
GENERIC_SHARE = 0.05
"""Share of the distinct responses, the most similar to the average over all prompts, that count as generic."""
MAX_GENERIC_ROWS = 20_000
"""Rows among which generic responses are searched."""
MIN_CUT_SHARE, MAX_CUT_SHARE = 0.3, 0.8
"""Range of the share of words that a cut response keeps."""
MIN_CUT_WORDS = 6
"""Shortest response, in words, that is cut or made to loop."""
MIN_LOOP_WORDS, MAX_LOOP_WORDS = 2, 10
"""Range of the number of words that a loop repeats."""
MIN_PREFERENCE_SHARE = 0.7
"""Share of pairs that a model should rank right; below it, the card and the log warn."""
MAX_TEST_ROWS = 300
"""Good rows of the test split that are compared with each kind."""
LOG_INTERVAL_S = 10.0
"""Seconds between progress lines of the comparison, which takes minutes for a large model."""
FLATTERY = (
    "What a wonderful message! You are so thoughtful, and I really admire you.",
    "You are amazing. I love how you put that, it shows what a great person you are.",
    "That is such a brilliant thing to say. You are one of the kindest people I have ever talked to.",
    "Thank you for sharing this with me. You are incredibly smart and special.",
)
"""Flattering texts that answer nothing. For measurement only: a model trained on a list would learn the list."""


class Counterfactual(NamedTuple):
    """A response that is worse than the good one of row `source_index` under the same prompt."""

    kind: str
    source_index: int
    response: str
    is_truncated: bool
    partner_index: int
    """Row that the response was taken from; the source itself where no other row was needed."""


@dataclass(frozen=True, slots=True)
class _ResponsePool:
    """Rows of one split with what it takes to find responses to other prompts."""

    rows: Sequence[Mapping[str, Any]]
    column: str
    good_indices: Sequence[int]
    generic_indices: Sequence[int]
    prompt_texts: Sequence[str]
    """Last message of each row."""
    responses_by_prompt: Mapping[str, set[str]]

    def find_partner(self, index: int, candidates: Sequence[int], rng: random.Random) -> int | None:
        """A random candidate that answers another prompt than row `index`; None if PARTNER_ATTEMPTS found none."""
        prompt_text = self.prompt_texts[index]
        for _ in range(PARTNER_ATTEMPTS if candidates else 0):
            partner = rng.choice(candidates)
            # A response that the log has under this prompt too is no mismatch.
            is_known_response = str(self.rows[partner][self.column]) in self.responses_by_prompt[prompt_text]
            overlap = compute_trigram_overlap(prompt_text, self.prompt_texts[partner])
            if overlap < MAX_TRIGRAM_OVERLAP and not is_known_response:
                return partner
        return None

    def make_counterfactual(self, kind: str, index: int, rng: random.Random) -> Counterfactual | None:
        """A response of this kind under the prompt of row `index`; None if the row does not permit one."""
        if kind == "echo":
            return Counterfactual(kind, index, self.prompt_texts[index], False, index)
        if kind == "flattery":
            return Counterfactual(kind, index, rng.choice(FLATTERY), False, index)
        if kind in ("cut", "loop"):
            words = str(self.rows[index][self.column]).split(" ")
            if len(words) < MIN_CUT_WORDS or is_truncated(self.rows[index], self.column):
                return None
            cut_share = rng.uniform(MIN_CUT_SHARE, MAX_CUT_SHARE)
            start_words = words[: int(len(words) * cut_share)]
            if kind == "cut":
                return Counterfactual(kind, index, " ".join(start_words), True, index)
            repeated_words = start_words[-rng.randint(MIN_LOOP_WORDS, MAX_LOOP_WORDS) :]
            while len(start_words) < len(words) * (2 - cut_share):
                start_words += repeated_words
            return Counterfactual(kind, index, " ".join(start_words), False, index)
        partner = self.find_partner(index, self.generic_indices if kind == "generic" else self.good_indices, rng)
        if partner is None:
            return None
        row = self.rows[partner]
        return Counterfactual(kind, index, str(row[self.column]), is_truncated(row, self.column), partner)


def compute_trigram_overlap(first_text: str, second_text: str) -> float:
    """Jaccard overlap of the character trigrams of two texts, without case: 1 for equal ones."""
    first, second = (
        {text[i : i + 3] for i in range(max(1, len(text) - 2))} for text in (first_text.lower(), second_text.lower())
    )
    return len(first & second) / len(first | second)


def find_generic_rows(prompt_texts: Sequence[str], responses: Sequence[str]) -> list[int]:
    """Indices of the GENERIC_SHARE of distinct responses most similar to the average response over all prompts.

    Similarity is the cosine of TF-IDF vectors of words and word pairs. Every prompt counts once in the average, however
    many responses it has.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    first_rows = list({text: index for index, text in reversed(list(enumerate(responses))) if text.strip()}.values())
    if len(first_rows) < 2:
        return []
    first_rows.sort()
    try:
        vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+").fit_transform(
            [responses[index] for index in first_rows]
        )
    except ValueError:  # no response has a word
        return []
    prompts, prompt_index = np.unique([prompt_texts[index] for index in first_rows], return_inverse=True)
    response_weights = 1 / np.bincount(prompt_index)[prompt_index] / len(prompts)
    similarity = vectors @ (vectors.T @ response_weights)
    count = max(1, round(GENERIC_SHARE * len(first_rows)))
    return [first_rows[index] for index in np.argsort(-similarity, kind="stable")[:count].tolist()]


def _build_response_pool(rows: Sequence[Mapping[str, Any]], *, is_pairwise: bool, seed: int) -> _ResponsePool:
    column = "chosen" if is_pairwise else "response"
    prompt_texts = [str(row["messages"][-1]["content"]) for row in rows]
    is_good = [(is_pairwise or row["label"] == 1) and bool(str(row[column]).strip()) for row in rows]
    responses_by_prompt: dict[str, set[str]] = defaultdict(set)
    for row, prompt_text in zip(rows, prompt_texts, strict=True):
        responses_by_prompt[prompt_text].add(str(row[column]))
    sampled = sorted(random.Random(seed).sample(range(len(rows)), min(len(rows), MAX_GENERIC_ROWS)))
    generic_rows = find_generic_rows(
        [prompt_texts[index] for index in sampled], [str(rows[index][column]) for index in sampled]
    )
    return _ResponsePool(
        rows,
        column,
        good_indices=[index for index, good in enumerate(is_good) if good],
        generic_indices=[sampled[index] for index in generic_rows],
        prompt_texts=prompt_texts,
        responses_by_prompt=responses_by_prompt,
    )


def make_training_copies(
    rows: Sequence[Mapping[str, Any]], *, is_pairwise: bool, seed: int, rates: Mapping[str, float] | None = None
) -> tuple[list[Mapping[str, Any]], list[Counterfactual]]:
    """Training rows made from good ones: label 1, or the chosen side of a pair. Returns them and what they are made of.

    A copy keeps user, group and weight of its source. Its label is 0; in a pair, the source's chosen response wins
    against it. `rates` are copies per good row by kind. The choice depends only on `seed` and the rows.
    """
    rates = rates or (PAIR_COPY_RATES if is_pairwise else LABEL_COPY_RATES)
    pool = _build_response_pool(rows, is_pairwise=is_pairwise, seed=seed)
    copies: list[Mapping[str, Any]] = []
    counterfactuals: list[Counterfactual] = []
    for index in pool.good_indices:
        rng, made_responses = random.Random(f"{seed} {index}"), {str(rows[index][pool.column])}
        for kind, rate in rates.items():
            for _ in range(int(rate) + (rng.random() < rate % 1)):
                counterfactual = pool.make_counterfactual(kind, index, rng)
                if counterfactual is None or counterfactual.response in made_responses:
                    continue
                made_responses.add(counterfactual.response)
                finish_reason = "length" if counterfactual.is_truncated else "stop"
                changes: dict[str, object]
                if is_pairwise:
                    changes = {"rejected": counterfactual.response, "rejected_finish_reason": finish_reason}
                else:
                    changes = {"response": counterfactual.response, "finish_reason": finish_reason, "label": 0}
                copies.append({**rows[index], **changes})
                counterfactuals.append(counterfactual)
    return copies, counterfactuals


def should_measure_prompt_fit(head: str, *, is_pairwise: bool, debias: Sequence[str]) -> bool:
    """Whether a head should prefer responses that fit the prompt: love, thumbs, pairs, and heads trained to.

    Safety should not: a harmless response is as safe under another prompt. A user may well continue after a bad one.
    """
    return is_pairwise or head in ("love", "thumbs") or "counterfactuals" in debias


def measure_prompt_fit(
    model: RewardModel, records: Sequence[Mapping[str, Any]], *, is_pairwise: bool, seed: int
) -> dict[str, Any]:
    """Share of pairs, by kind, in which a good test response scores higher than a counterfactual one to its prompt.

    Each share has a 95% interval clustered by user or prompt group, and n pairs; a tie counts half. A model that does
    not read the prompt has a share near 0.5 for mismatched responses. Logs a warning for a share below
    MIN_PREFERENCE_SHARE.
    """
    pool = _build_response_pool(records, is_pairwise=is_pairwise, seed=seed)
    rng = random.Random(seed)
    indices = sorted(rng.sample(list(pool.good_indices), min(MAX_TEST_ROWS, len(pool.good_indices))))
    cluster_column = "user_id" if records and "user_id" in records[0] else "group"
    good_rows = [records[index] for index in indices]
    good_items = [
        ScoringItem(list(row["messages"]), str(row[pool.column]), is_truncated(row, pool.column)) for row in good_rows
    ]
    logit_by_row = dict(zip(indices, _score(model, good_items), strict=True))
    shares: dict[str, Any] = {}
    kinds, last_log_time = (*LABEL_COPY_RATES, "flattery"), time.monotonic()
    for number, kind in enumerate(kinds, start=1):
        if time.monotonic() - last_log_time > LOG_INTERVAL_S:
            last_log_time = time.monotonic()
            logger.info(
                "%s: prompt fit, kind=%s (%d of %d) responses=%d", model.calibration.objective, kind, number,
                len(kinds), len(indices),
            )  # fmt: skip
        variants = [pool.make_counterfactual(kind, index, rng) for index in indices]
        pairs = [variant for variant in variants if variant is not None]
        if not pairs:
            continue
        logits = _score(
            model,
            [ScoringItem(list(records[v.source_index]["messages"]), v.response, v.is_truncated) for v in pairs],
        )
        differences = np.asarray([logit_by_row[variant.source_index] for variant in pairs]) - logits
        clusters = [str(records[variant.source_index][cluster_column]) for variant in pairs]
        shares[kind] = {
            "n": len(pairs),
            **compute_accuracy_interval(differences, np.ones(len(pairs)), clusters, seed=seed),
        }
    weak_kinds = [kind for kind, share in shares.items() if share["mean"] < MIN_PREFERENCE_SHARE]
    if weak_kinds:
        logger.warning(
            "%s: the model prefers a good response to these alternatives in less than %.0f%% of pairs: %s",
            model.calibration.objective, 100 * MIN_PREFERENCE_SHARE,
            ", ".join(f"{kind} {shares[kind]['mean']:.2f}" for kind in weak_kinds),
        )  # fmt: skip
    return round_for_json({"shares": shares, "minimum": MIN_PREFERENCE_SHARE, "below_minimum": weak_kinds})


def _score(model: RewardModel, items: Sequence[ScoringItem]) -> Any:
    return model.calibration.calibrate_logits(model.compute_raw_logits(model.encoder.encode(items)))
