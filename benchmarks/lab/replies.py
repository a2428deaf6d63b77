"""Composition of replies from an opener, a real reply to this very prompt and closing phrases; habits of the styles.

A policy does not generate words here, because training that takes more than two shared cores. It makes consecutive
choices: an opener, one of the prompt's sixteen replies, a sentence in the middle, and two closings, which are
10 x 16 x 7 x 18 x 18 texts per prompt. Users, judges, reward models and monitors always read the complete text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from lab.dataset import REPLIES_PER_PROMPT, PromptEntry, ReplyDataset
from numpy.typing import NDArray

from rluf.simulate.ground_truth import GroundTruth, ReaderInput, load_readings, score_readings
from rluf.simulate.reader_features import ReadingScores
from rluf.utils.paths import find_sample_log

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
SLOT_OPTIONS = (len(OPENERS), REPLIES_PER_PROMPT, len(MIDDLES), len(CLOSINGS), len(CLOSINGS))
"""Options of each of the five slots."""
BODY_SLOT = 1
"""The slot that selects the reply."""


def compose_texts(dataset: ReplyDataset, prompt_index: Ints, choices: Ints) -> list[str]:
    """Texts [N] that `choices` [N, 5] compose for prompts [N]."""
    reply_texts = []
    for prompt, (opener, body, middle, closing, last_closing) in zip(
        prompt_index.tolist(), choices.tolist(), strict=True
    ):
        body_text = dataset.entries[prompt].reply_texts[body]
        parts = (OPENERS[opener], body_text, MIDDLES[middle], CLOSINGS[closing], CLOSINGS[last_closing])
        reply_texts.append(" ".join(sentence for sentence in parts if sentence))
    return reply_texts


PHRASE_READINGS = Path(__file__).with_name("phrase_readings.json")
"""Reading of each phrase by topic (python benchmarks/reader.py phrases)."""


class GroundTruthCache:
    """Ground-truth scores of replies, computed once per text, without the reader's model.

    The reading of a composed reply is that of its parts (ReadingScores.join): the reply's own from the sample log, and
    for a phrase the mean over a few prompts of the topic. Features of the text are those of the complete text.
    """

    def __init__(self, dataset: ReplyDataset) -> None:
        """Read the readings of the sample log and of the phrases."""
        self.dataset = dataset
        self._truth_by_reply: dict[tuple[int, ...], GroundTruth] = {}
        self._body_readings = load_readings(find_sample_log("feedback").with_name("readings.jsonl.gz"))
        phrase_rows = json.loads(PHRASE_READINGS.read_text("utf-8"))
        self._phrase_readings = {
            (topic, phrase): ReadingScores(**reading)
            for topic, readings in phrase_rows.items()
            for phrase, reading in readings.items()
        }

    def truths_of(self, prompt_index: Ints, choices: Ints) -> list[GroundTruth]:
        """Ground truth of the replies [N]; a reply truncated by the token limit stays truncated whatever follows it."""
        keys = [(prompt, *choice) for prompt, choice in zip(prompt_index.tolist(), choices.tolist(), strict=True)]
        new_keys = list(dict.fromkeys(key for key in keys if key not in self._truth_by_reply))
        inputs, readings = [], []
        for key in new_keys:
            entry: PromptEntry = self.dataset.entries[key[0]]
            text = compose_texts(self.dataset, np.array(key[:1]), np.array([key[1:]]))[0]
            inputs.append(ReaderInput(entry.messages, text, entry.is_finished(key[1 + BODY_SLOT])))
            readings.append(self._join_readings(entry, key[1:]))
        self._truth_by_reply |= dict(zip(new_keys, score_readings(inputs, readings), strict=True))
        return [self._truth_by_reply[key] for key in keys]

    def _join_readings(self, entry: PromptEntry, choice: tuple[int, ...]) -> ReadingScores:
        opener, body, middle, closing, last_closing = choice
        body_reading = self._body_readings[ReaderInput(entry.messages, entry.reply_texts[body], True).key]
        phrases = (OPENERS[opener], MIDDLES[middle], CLOSINGS[closing], CLOSINGS[last_closing])
        readings = [self._phrase_readings[entry.topic, phrase] for phrase in phrases if phrase]
        # `harm` belongs to the prompt, and the end of the turn was measured where the reply itself ends.
        joined = ReadingScores.join([body_reading, *readings])
        return replace(joined, harm=body_reading.harm, end_logprob=body_reading.end_logprob)


HABITS: dict[str, tuple[float, float, float, float]] = {
    "plain": (0.1, 0.05, 0.15, 1.0), "cool": (0.1, 0.05, 0.15, 1.0), "terse": (0.05, 0.02, 0.05, 1.0),
    "careful": (0.1, 0.05, 0.15, 1.0), "warm": (0.5, 0.2, 0.5, 1.0), "upbeat": (0.5, 0.1, 0.6, 1.0),
    "goodbye": (0.2, 0.05, 0.6, 8.0),
}  # fmt: skip
"""By style: probability of an opener, of a middle, of a closing, and the odds of a farewell relative to another
closing."""
BASE_FAREWELL = 0.02
"""The farewell odds in a base policy's demonstrations: about 0.7% of its replies have one, as in the paper's base."""


def sample_logged_choices(dataset: ReplyDataset, prompt_index: Ints, rng: np.random.Generator) -> Ints:
    """Choices [N, 5] of the served versions: any of the prompt's replies, with the habits of its style."""
    reply_index = rng.integers(0, REPLIES_PER_PROMPT, len(prompt_index))
    return _with_habits(
        [
            HABITS[dataset.entries[prompt].reply_styles[body]]
            for prompt, body in zip(prompt_index, reply_index, strict=True)
        ],
        reply_index,
        rng,
    )


def sample_demonstrations(
    dataset: ReplyDataset,
    prompt_index: Ints,
    rng: np.random.Generator,
    *,
    styles: Sequence[str] = ("plain", "cool"),
    style_odds: float = 20.0,
) -> Ints:
    """Choices [N, 5] of demonstrations: replies of `styles` are `style_odds` times as likely, farewells are rare."""
    weights = np.array(
        [
            [style_odds if style in styles else 1.0 for style in dataset.entries[prompt].reply_styles]
            for prompt in prompt_index
        ]
    )
    cumulative = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
    reply_index = (cumulative < rng.random(len(prompt_index))[:, None]).sum(1).clip(max=REPLIES_PER_PROMPT - 1)
    mean_habit = np.array([HABITS[style] for style in styles]).mean(0)
    farewell = BASE_FAREWELL if "goodbye" not in styles else mean_habit[3]
    return _with_habits([(mean_habit[0], mean_habit[1], mean_habit[2], farewell)] * len(prompt_index), reply_index, rng)


def _with_habits(
    habits: Sequence[tuple[float, float, float, float]], reply_index: Ints, rng: np.random.Generator
) -> Ints:
    reply_count = len(reply_index)
    opener, middle, closing, farewell = np.array(habits).T
    closing_odds = np.ones((reply_count, len(CLOSINGS) - 1))
    closing_odds[:, FAREWELLS.start - 1 : FAREWELLS.stop - 1] *= farewell[:, None]
    cumulative = np.cumsum(closing_odds / closing_odds.sum(1, keepdims=True), axis=1)

    def sample_closing(probability: NDArray[np.float64]) -> Ints:
        closing_index = 1 + (cumulative < rng.random(reply_count)[:, None]).sum(1).clip(max=len(CLOSINGS) - 2)
        return np.where(rng.random(reply_count) < probability, closing_index, 0)

    def sample_phrase(probability: NDArray[np.float64], option_count: int) -> Ints:
        return np.where(rng.random(reply_count) < probability, rng.integers(1, option_count, reply_count), 0)

    return np.stack(
        [
            sample_phrase(opener, SLOT_OPTIONS[0]),
            reply_index,
            sample_phrase(middle, SLOT_OPTIONS[2]),
            sample_closing(closing),
            sample_closing(0.3 * closing),
        ],
        axis=1,
    ).astype(np.int64)
