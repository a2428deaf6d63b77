"""Sign-off copies, the robustness table and slices."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from rluf.objectives.judges import has_sign_off
from rluf.reward.calibration import Calibration
from rluf.reward.card import compute_slices, measure_robustness
from rluf.reward.debias import RESPONSE_PERTURBATIONS, SIGN_OFF_PHRASES, add_sign_off_copies, find_log_sign_offs
from rluf.reward.model import RewardModel
from tests.reward.test_model import write_checkpoint


def build_rows(count: int) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": "Hi"}]
    return [
        {"messages": messages, "response": f"word {i} and more", "label": i % 2, "topic": "ab"[i % 2]}
        for i in range(count)
    ]


def test_a_share_of_rows_is_copied_with_a_sign_off_and_the_same_label() -> None:
    rows = build_rows(400)
    augmented_rows, source_indices = add_sign_off_copies(rows, 0.25, is_pairwise=False, seed=1)
    assert augmented_rows[:400] == rows
    copies = augmented_rows[400:]
    assert 70 < len(copies) < 130
    for copy, source_index in zip(copies, source_indices, strict=True):
        source = rows[source_index]
        phrase = copy["response"].removeprefix(f"{source['response']} ")
        assert phrase in SIGN_OFF_PHRASES
        assert copy["label"] == source["label"]
    assert augmented_rows == add_sign_off_copies(rows, 0.25, is_pairwise=False, seed=1)[0]
    assert add_sign_off_copies(rows, 0.0, is_pairwise=False, seed=1)[0] == rows


def test_half_of_the_sign_offs_come_from_the_log() -> None:
    rows = build_rows(400)
    for row in rows[:40]:
        row["response"] += ". Toodle-oo and hugs!"
    assert find_log_sign_offs([row["response"] for row in rows]) == ["Toodle-oo and hugs!"]
    augmented_rows, _ = add_sign_off_copies(rows, 1.0, is_pairwise=False, seed=1)
    log_count = sum(row["response"].endswith(" Toodle-oo and hugs!") for row in augmented_rows[400:])
    assert 160 < log_count < 240


def test_either_side_of_a_pair_gets_the_phrase() -> None:
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    copies = add_sign_off_copies(rows, 1.0, is_pairwise=True, seed=0)[0][200:]
    chosen_responses = {row["chosen"] for row in rows}
    changed_chosen = sum(copy["chosen"] not in chosen_responses for copy in copies)
    assert len(copies) == 200
    assert 60 < changed_chosen < 140


def test_the_judge_recognizes_most_sign_off_phrases() -> None:
    recognized = sum(has_sign_off(f"Here you are. {phrase}") for phrase in SIGN_OFF_PHRASES)
    assert recognized >= len(SIGN_OFF_PHRASES) * 0.6


def test_truncation_retains_the_first_half() -> None:
    assert RESPONSE_PERTURBATIONS["truncation"]("one two three four five", random.Random(0)) == "one two three"


def test_a_paraphrase_has_the_same_meaning_in_other_words() -> None:
    paraphrase = RESPONSE_PERTURBATIONS["paraphrase"]
    assert paraphrase("I am happy, but do not stop.", random.Random(0)) == "I'm glad, however don't stop."
    assert paraphrase("It's big.", random.Random(0)) == "It is large."
    assert paraphrase("It’s big.", random.Random(0)) == "It is large."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("robustness")
    path = write_checkpoint("tiny-encoder", folder / "cache", folder / "m", Calibration("love", max_tokens=64))
    return RewardModel.load(path, batch_tokens=2048)


def test_the_robustness_table_has_every_perturbation(model: RewardModel) -> None:
    report = measure_robustness(model, build_rows(30), is_pairwise=False, seed=0)
    assert report["rows"] == 30
    assert set(report["changes"]) == set(RESPONSE_PERTURBATIONS)
    for metrics in report["changes"].values():
        assert 0 <= metrics["order_preserved_share"] <= 1
        assert 0 <= metrics["raised_share"] <= 1


def test_slices_leave_out_small_slices_and_missing_columns() -> None:
    rows = [*build_rows(60), {"messages": [], "response": "x", "label": 0, "topic": "rare"}]
    labels = np.asarray([float(i % 4 < 2) for i in range(61)])
    slices = compute_slices(rows, np.linspace(-1, 1, 61), labels)
    assert set(slices) == {"topic"}
    assert set(slices["topic"]) == {"a", "b"}
    assert slices["topic"]["a"]["n"] == 30
    assert compute_slices(rows, np.ones(61), None)["topic"]["b"]["pair_accuracy"] == 1.0


def test_activity_slices_separate_busy_users() -> None:
    rows: list[dict[str, Any]] = [{"messages": [], "response": "x", "label": 0, "user_id": f"u{i}"} for i in range(30)]
    rows += [{"messages": [], "response": "x", "label": i % 2, "user_id": f"busy{i % 3}"} for i in range(30)]
    labels = np.asarray([float(row["label"]) for row in rows])
    slices = compute_slices(rows, np.linspace(-1, 1, 60), labels)
    assert list(slices["activity"]) == ["1", "8-15"]
    assert (slices["activity"]["1"]["n"], slices["activity"]["8-15"]["rate"]) == (30, 0.5)
