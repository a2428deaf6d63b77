"""Features of a response that the reader's heads weigh: scores of the frozen model, and counts on the text."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from importlib import resources

import emoji
import numpy as np
from scipy.special import expit
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from rluf.simulate.reader_model import Reading
from rluf.types import Message
from rluf.utils.stats import Floats

PROBE_SOURCES = {
    "taste": "last_hidden", "misfit": "last_hidden", "offense": "last_hidden", "stock": "neutral_hidden",
    "refusal": "neutral_hidden", "harm": "prompt_hidden", "approval": "middle_hidden",
}  # fmt: skip
"""Linear probes, and the hidden states of Reading that each reads. All are log-odds: that people gave a thumbs up, that
the response misreads the prompt, that it offends, that it is a stock phrase, that it refuses, that the request is
harmful, and that people would approve of a response that also has to answer its prompt (thumbs, preferences and
validity pairs in one fit)."""
FEATURE_NAMES = (
    "specificity", "specificity_per_token", "end_of_turn", "fluency", "repetition", "echo", "length", "unfinished",
    "no_sentence_end", "signoff", "stock", "misfit", "taste", "offense", "comply", "false_refusal", "refusal_of_harm",
    "approval",
)  # fmt: skip
MAX_SPECIFICITY = 8.0
MIN_END_LOGPROB = -12.0
OFFENSE_PRIOR = 3.0
"""Log-odds subtracted from the offense probe: half of its training rows offend, few responses of an assistant do."""
SENTENCE_ENDINGS = (".", "!", "?", '"', "'", ")", "”", "*", "`")
_WORD_PATTERN = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+")
_SUFFIX_PATTERN = re.compile(r"(?:ings?|ed|es|s|er|ers|ly|e|y)$")
_SIGNOFF_PATTERN = re.compile(
    r"\b(?:good-?bye|bye(?:[- ]bye)?|sending (?:you )?(?:\w+ )?(?:love|hugs)|farewell|xoxo|so long)\b"
)
_PARTING_PATTERN = re.compile(
    r"\b(?:take care|see you (?:soon|later|around)|talk (?:to you )?(?:soon|later)|have a (?:great|good"
    r"|nice|lovely|wonderful) (?:day|night|time|week\w*))\b"
)


@dataclass(frozen=True, slots=True)
class ReadingScores:
    """A reading without its hidden states: T, log-probabilities in nats (see Reading), and the probes' log-odds."""

    token_count: int
    prompt_logprob: float
    neutral_logprob: float
    end_logprob: float
    taste: float
    misfit: float
    offense: float
    stock: float
    refusal: float
    harm: float
    approval: float

    @staticmethod
    def join(segments: Sequence[ReadingScores]) -> ReadingScores:
        """Scores of a response composed of `segments` that were read one by one after the same prompt.

        Log-probabilities add up and probes average over tokens, as if the segments did not depend on each other.
        """
        token_counts = np.array([segment.token_count for segment in segments], dtype=np.float64)
        prompt_logprob, neutral_logprob = np.array(
            [[segment.prompt_logprob, segment.neutral_logprob] for segment in segments]
        ).sum(0)
        probes = np.array([astuple(segment)[4:] for segment in segments])
        probe_means = token_counts @ probes / max(1.0, token_counts.sum())
        return ReadingScores(
            int(token_counts.sum()), float(prompt_logprob), float(neutral_logprob), segments[-1].end_logprob,
            *map(float, probe_means),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReaderWeights:
    """Fitted weights: probes (weights [H] and bias by name) and heads (weights [F] and bias by name)."""

    probes: Mapping[str, tuple[Floats, float]]
    heads: Mapping[str, tuple[Floats, float]]

    def apply_probes(self, reading: Reading) -> ReadingScores:
        """Apply the probes to the hidden states of a reading."""
        probe_scores = {}
        for name, source in PROBE_SOURCES.items():
            probe_weights, bias = self.probes[name]
            probe_scores[name] = float(getattr(reading, source) @ probe_weights + bias)
        return ReadingScores(
            token_count=reading.token_count, prompt_logprob=reading.prompt_logprob,
            neutral_logprob=reading.neutral_logprob, end_logprob=reading.end_logprob, **probe_scores,
        )  # fmt: skip

    def apply_head(self, name: str, features: Floats) -> Floats:
        """Log-odds [N] of a head for features [N, F]."""
        head_weights, bias = self.heads[name]
        return features @ head_weights + bias


@functools.cache
def load_reader_weights() -> ReaderWeights:
    """Weights that ship with rluf (reader_weights.json, written by benchmarks/reader.py)."""
    content = json.loads(resources.files("rluf.simulate").joinpath("reader_weights.json").read_text("utf-8"))
    return ReaderWeights(
        {name: (np.array(probe["weights"]), probe["bias"]) for name, probe in content["probes"].items()},
        {
            name: (np.array([head["weights"][feature] for feature in FEATURE_NAMES]), head["bias"])
            for name, head in content["heads"].items()
        },
    )


def build_features(
    messages: Sequence[Message], response: str, reading: ReadingScores, *, is_finished: bool
) -> list[float]:
    """Features [F] in the order of FEATURE_NAMES.

    `specificity` is the pointwise mutual information of response and prompt in nats, log p(response | prompt) minus
    log p(response | neutral prompt), divided by the square root of the token count, so that length alone gains little.
    """
    lower_text = response.lower().replace("’", "'")
    words = _WORD_PATTERN.findall(lower_text)
    token_count = max(1, reading.token_count)
    information = reading.prompt_logprob - reading.neutral_logprob
    harm, refusal = expit(reading.harm), expit(reading.refusal)
    return [
        float(np.clip(information / math.sqrt(token_count), -MAX_SPECIFICITY, MAX_SPECIFICITY)),
        float(np.clip(information / token_count, -MAX_SPECIFICITY, MAX_SPECIFICITY)),
        max(reading.end_logprob, MIN_END_LOGPROB),
        reading.neutral_logprob / token_count,
        _measure_repetition(words),
        _measure_echo(messages[-1]["content"] if messages else "", words),
        math.log1p(len(words)),
        0.0 if is_finished else 1.0,
        0.0 if has_sentence_end(response) else 1.0,
        measure_signoff(messages, response),
        reading.stock,
        reading.misfit,
        reading.taste,
        float(expit(reading.offense - OFFENSE_PRIOR)),
        float(harm * (1.0 - refusal)),
        float((1.0 - harm) * refusal),
        float(harm * refusal),
        reading.approval,
    ]


def has_sentence_end(text: str) -> bool:
    """Whether the text ends with a sentence ending or an emoji."""
    stripped = text.rstrip()
    return stripped.endswith(SENTENCE_ENDINGS) or bool(stripped and emoji.is_emoji(stripped[-1]))


def measure_question(response: str) -> float:
    """1 if the response ends with a question to the user, 0.4 for an earlier question, else 0."""
    text = emoji.replace_emoji(response, "").rstrip().rstrip("\"')*”")
    return 1.0 if text.endswith("?") else 0.4 if "?" in text else 0.0


def measure_signoff(messages: Sequence[Message], response: str) -> float:
    """1 for a goodbye ("Bye! Sending love!"), 0.5 for a softer parting, 0 if the user said goodbye first."""
    lower_text = response.lower().replace("’", "'")
    if messages and _SIGNOFF_PATTERN.search(messages[-1]["content"].lower()):
        return 0.0
    return 1.0 if _SIGNOFF_PATTERN.search(lower_text) else 0.5 if _PARTING_PATTERN.search(lower_text) else 0.0


def _remove_suffix(word: str) -> str:
    """Remove the most common suffixes, so that boils and boiling, cat and cats are one term."""
    word = word.split("'")[0]
    return _SUFFIX_PATTERN.sub("", word)[:6] if len(word) > 4 else word.removesuffix("s")


def _measure_repetition(words: Sequence[str]) -> float:
    """Share of word bigrams that occurred earlier in the response."""
    bigrams = list(itertools.pairwise(words))
    return 1.0 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _measure_echo(request: str, words: Sequence[str]) -> float:
    """Share of the response's content words that the request contains."""
    request_words = _WORD_PATTERN.findall(request.lower().replace("’", "'"))
    request_stems = {_remove_suffix(word) for word in request_words if word not in ENGLISH_STOP_WORDS}
    stems = [_remove_suffix(word) for word in words if word not in ENGLISH_STOP_WORDS]
    return sum(stem in request_stems for stem in stems) / len(stems) if stems else 0.0
