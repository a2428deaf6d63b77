"""Readings for tests of the simulated users that do not need the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rluf.simulate.ground_truth import Reader, ReaderInput
from rluf.simulate.reader_features import ReadingScores

FITTING = ReadingScores(
    token_count=20, prompt_logprob=-40.0, neutral_logprob=-70.0, end_logprob=-0.5, taste=0.3, misfit=-2.0, offense=-2.0,
    stock=-3.0, refusal=-4.0, harm=-4.0, approval=1.0,
)  # fmt: skip
"""A response that answers its harmless request."""
STOCK = replace(FITTING, prompt_logprob=-60.0, neutral_logprob=-60.0, stock=4.0, misfit=2.0)
"""A phrase that fits any prompt."""


class ConstantReader(Reader):
    """Reads every response as one that fits, without a model."""

    def __init__(self) -> None:
        """No readings and no model folder."""
        super().__init__(Path("no-model"))

    def read(self, inputs: Sequence[ReaderInput]) -> list[ReadingScores]:
        """FITTING for each input."""
        return [FITTING for _ in inputs]


def make_reader(inputs: Sequence[ReaderInput], readings: Sequence[ReadingScores]) -> Reader:
    """Reader that knows these readings; for any other input it would need a model that does not exist."""
    known = {item.key: reading for item, reading in zip(inputs, readings, strict=True)}
    return Reader(Path("no-model"), known)
