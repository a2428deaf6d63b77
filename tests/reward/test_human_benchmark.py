"""benchmarks/human.py: figures by data set, and the pairs of a short right answer and a long wrong one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from human import measure_by_source

PAIRS_PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "short_right_pairs.jsonl"


def test_accuracy_is_reported_for_each_data_set_beside_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.normal(size=400)
    quality = rng.normal(size=400)
    # In the first data set the score is length alone, in the second one it knows the quality.
    scores = np.concatenate([2 * lengths[:200], np.abs(quality[200:]) + 2 * lengths[200:]])
    names = [str(row // 4) for row in range(400)]
    by_source = measure_by_source(["a"] * 200 + ["b"] * 200, scores, lengths, names)
    assert (by_source["a"]["pairs"], by_source["a"]["prompts"]) == (200, 50)
    assert by_source["a"]["accuracy"]["mean"] == pytest.approx((lengths[:200] > 0).mean())
    assert by_source["a"]["length_only"] >= 0.5
    assert by_source["b"]["without_length"]["mean"] > 0.8


def test_the_score_without_length_ignores_length_alone() -> None:
    lengths = np.array([3.0, -1.0, 2.0, -4.0])
    (figures,) = measure_by_source(["a"] * 4, 5 * lengths, lengths, list("wxyz")).values()
    assert figures["without_length"]["mean"] == 0.5


def test_the_short_answer_is_chosen_in_each_of_the_sixty_pairs() -> None:
    pairs = [json.loads(line) for line in PAIRS_PATH.read_text("utf-8").splitlines()]
    assert len({pair["messages"][0]["content"] for pair in pairs}) == len(pairs) == 60
    assert all(2 * len(pair["chosen"]) < len(pair["rejected"]) for pair in pairs)
