"""benchmarks/human.py: figures by data set, and the pairs of a short right answer and a long wrong one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import over_refusal
import reward_ranking
from human import measure_by_source, measure_with_context, sample_unreacted_rows

from rluf.reward.encoded_split import EncodedSplit
from rluf.reward.linear_probe import assign_folds

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


def test_sampled_rows_without_a_reaction_stand_for_all_of_them() -> None:
    rows = [{"id": n, "reaction": "love" if n % 10 == 0 else None, "weight": 1.0} for n in range(100)]
    sampled = sample_unreacted_rows(rows, 30, seed=1)
    assert sum(row["reaction"] == "love" for row in sampled) == 10
    assert sum(row["weight"] for row in sampled) == pytest.approx(100)
    assert sample_unreacted_rows(rows, 90, seed=1) == rows


@pytest.mark.parametrize(("turn_effect", "text_effect"), [(2.0, 0.0), (0.0, 2.0), (2.0, 2.0)])
def test_the_turn_counts_as_far_as_it_explains_love(turn_effect: float, text_effect: float) -> None:
    rng = np.random.default_rng(0)
    turns, logits = rng.integers(0, 8, 2000), rng.normal(size=2000)
    log_odds = text_effect * logits - turn_effect * (np.log1p(turns) - 1.3) - 1
    labels = (rng.random(2000) < 1 / (1 + np.exp(-log_odds))).astype(float)
    clusters = [str(row // 10) for row in range(2000)]
    columns = np.stack([np.log1p(turns), turns == 0, rng.normal(size=2000)], axis=1)
    rows = EncodedSplit(False, [], labels, np.ones(2000), clusters, np.ones(2000), context_columns=columns)
    metrics = measure_with_context(rows, logits, assign_folds(clusters, 5))
    assert abs(metrics["context_only"]["mean"] - metrics["turn_only"]["mean"]) < 0.02  # the third column is noise
    assert (metrics["turn_only"]["mean"] > 0.6) == (turn_effect > 0)
    assert metrics["with_turn"]["mean"] > max(metrics["turn_only"]["mean"] - 0.01, 0.6)


def test_over_refusal_tells_a_model_that_reads_the_prompt_from_one_that_reads_the_response_alone() -> None:
    reading = over_refusal.summarize(np.tile([0.9, 0.2, 0.6, 0.8], 40))
    assert (reading["refuses_harmful"]["mean"], reading["refuses_harmless"]["mean"]) == (1, 0)
    assert (reading["answer_is_safe"]["mean"], reading["compliance_is_safe"]["mean"]) == (1, 0)
    assert reading["refusal_gain_harmful"]["mean"] > 0 > reading["refusal_gain_harmless"]["mean"]
    response_only = over_refusal.summarize(np.tile([0.9, 0.2, 0.9, 0.5], 40))
    assert (response_only["refuses_harmful"]["mean"], response_only["refuses_harmless"]["mean"]) == (1, 1)
    assert over_refusal.summarize(np.full(160, 0.7))["refuses_harmless"]["mean"] == 0.5


def test_over_refusal_has_forty_harmless_questions_and_as_many_harmful_prompts() -> None:
    rows = [json.loads(line) for line in over_refusal.PAIRS_PATH.read_text("utf-8").splitlines()]
    assert len({row["harmful_row"] for row in rows}) == len({row["harmless"] for row in rows}) == len(rows) == 40
    assert all(row[key].strip() for row in rows for key in ("harmless", "answer", "refusal", "comply"))


def test_a_score_that_knows_the_truth_of_each_prompt_gains_all_and_one_that_knows_the_prompt_alone_nothing() -> None:
    rng = np.random.default_rng(0)
    truths = rng.uniform(size=400)
    groups = [list(range(start, start + 4)) for start in range(0, 400, 4)]
    best = np.mean([truths[group].max() for group in groups])
    oracle = reward_ranking.measure_ranking(3.0 * truths - 1.0, truths, groups)
    assert oracle["correlation"]["mean"] == pytest.approx(1.0)
    assert oracle["lift"]["mean"] == pytest.approx(best / truths.mean() - 1.0)
    by_prompt = np.repeat([truths[group].mean() for group in groups], 4) + 0.01 * rng.normal(size=400)
    for key, bounds in reward_ranking.measure_ranking(by_prompt, truths, groups).items():
        assert bounds["low"] < 0 < bounds["high"], key
