"""Reward models of the claims: logistic regression on what a reply says, learnt from the log alone.

They see words and word pairs (TF-IDF), the topic that the log names, and plain counts: words shared with the prompt,
length, question and exclamation marks. Labels come from users' reactions or raters; gold scores, users' traits and
which version wrote a reply are never seen. Scores are brought back to the natural rate by rluf's prior shift and
calibrated by its Platt scaling on other users. Neural readers of a log of seed 0 did worse (AUROC 0.72
against 0.82): they overfit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lab.dataset import Town
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from rluf.reward.calibration import Calibration, fit_platt
from rluf.simulate.prompts import TOPICS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Matrix = Any
"""A sparse matrix [N, features]."""
TOKEN = r"[A-Za-z']+|[^\sA-Za-z']"
WORD = re.compile(r"[a-z']+")
RARE = 8
"""Words and pairs that fewer texts hold are left out."""
STEM = 5
"""Letters of a word that are compared with the prompt's."""
STRENGTH = 1.0
"""C of the logistic regressions."""


class Features:
    """What the models see of a reply; the vocabulary is that of the texts of one log."""

    def __init__(self, town: Town, said: Sequence[str]) -> None:
        """Learn the vocabulary of `said`."""
        self.town = town
        self._words = TfidfVectorizer(token_pattern=TOKEN, sublinear_tf=True, min_df=RARE, ngram_range=(1, 2)).fit(said)
        self._asked = [_stems(place.asked) - _STOPS for place in town.places]
        self._topic = np.eye(len(TOPICS))[[TOPICS.index(place.topic) for place in town.places]]

    def of(self, places: Ints, said: Sequence[str]) -> Matrix:
        """Features [N, F] of the texts `said` [N] at `places` [N]."""
        counts = np.array([self._counts(place, text) for place, text in zip(places.tolist(), said, strict=True)])
        return sparse.hstack([self._words.transform(said), sparse.csr_matrix(self._topic[places]), counts]).tocsr()

    def _counts(self, place: int, text: str) -> list[float]:
        words = WORD.findall(text.lower())
        shared = len(self._asked[place] & {word[:STEM] for word in words})
        bare, marks = text.rstrip(), text.count("!")
        return [
            min(shared, 3) / 3, shared / max(1, len(self._asked[place])), float(np.log1p(len(words))),
            float(bare.endswith("?")), float(bare.endswith((".", "!", "?"))), float(marks > 0), float(marks > 3),
            len(set(words)) / max(1, len(words)),
        ]  # fmt: skip


def _stems(text: str) -> set[str]:
    return {word[:STEM] for word in WORD.findall(text.lower())}


_STOPS = {word[:STEM] for word in ENGLISH_STOP_WORDS}


@dataclass(frozen=True, slots=True)
class Judgement:
    """One trained objective: weights [members, F + 1] (the last is the bias) and the calibration of their mean."""

    weights: Floats
    calibration: Calibration

    def each(self, features: Matrix) -> Floats:
        """Calibrated logits [members, N]."""
        return np.stack([self.calibration.logits(one) for one in _raw(self.weights, features)])

    def logits(self, features: Matrix) -> Floats:
        """Calibrated logits [N] of the members' mean."""
        found: Floats = self.calibration.logits(_raw(self.weights, features).mean(0))
        return found


def _raw(weights: Floats, features: Matrix) -> Floats:
    return np.asarray(features @ weights[:, :-1].T + weights[:, -1]).T


def fit(features: Matrix, labels: Floats, *, bias: bool = True) -> Floats:
    """Weights [F + 1] by L2-penalised maximum likelihood."""
    model = LogisticRegression(C=STRENGTH, max_iter=300, fit_intercept=bias).fit(features, labels)
    return np.concatenate([model.coef_[0], model.intercept_ if bias else [0.0]]).astype(np.float64)


def fit_pairs(first: Matrix, second: Matrix, won: NDArray[np.bool_]) -> Floats:
    """Weights [F + 1] of a Bradley-Terry score: the chance that `first` wins is sigmoid(score - score of `second`)."""
    return fit(first - second, won.astype(np.float64), bias=False)


def sampled(labels: Floats, rng: np.random.Generator, share: float = 0.1) -> tuple[Ints, Floats]:
    """Rows with all positives and so many negatives that positives are `share`, as the paper has it, with weights
    1 / share kept; all rows where positives are more frequent than that."""
    positive, negative = np.flatnonzero(labels > 0.5), np.flatnonzero(labels <= 0.5)
    keep = min(len(negative), round(len(positive) * (1 - share) / share))
    chosen = rng.permutation(negative)[:keep]
    weights = np.concatenate([np.ones(len(positive)), np.full(keep, len(negative) / max(1, keep))])
    return np.concatenate([positive, chosen]).astype(np.int64), weights


def calibrated(name: str, members: Sequence[Floats], dev: Matrix, labels: Floats, shift: float) -> Judgement:
    """The members with Platt's scaling of their mean on `dev`."""
    weights = np.stack(members)
    raw = _raw(weights, dev).mean(0) + shift
    scale, offset = fit_platt(raw, labels, np.ones_like(raw))
    return Judgement(weights, Calibration(name, "platt", shift, scale, offset, members=len(members)))
