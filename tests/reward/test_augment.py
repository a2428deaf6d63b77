"""Counterfactual rows, the robustness table and slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rluf.objectives.judges import signs_off
from rluf.reward.augment import CHANGES, SIGN_OFFS, own_sign_offs, with_sign_offs
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.reward.robustness import robustness, slices
from tests.reward.test_model import checkpoint


def _rows(count: int) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": "Hi"}]
    return [
        {"messages": messages, "response": f"word {i} and more", "label": i % 2, "topic": "ab"[i % 2]}
        for i in range(count)
    ]


def test_a_share_of_rows_comes_again_with_a_sign_off_and_its_own_label() -> None:
    rows = _rows(400)
    found, copied = with_sign_offs(rows, 0.25, pairs=False, seed=1)
    assert found[:400] == rows
    assert [rows[i]["response"] for i in copied] == [row["response"][: len(rows[i]["response"])]
                                                     for i, row in zip(copied, found[400:], strict=True)]  # fmt: skip
    assert 70 < len(found) - 400 < 130
    by_start = {row["response"]: row["label"] for row in rows}
    for row in found[400:]:
        phrase = next(phrase for phrase in SIGN_OFFS if row["response"].endswith(phrase))
        assert by_start[row["response"].removesuffix(f" {phrase}")] == row["label"]
    assert found == with_sign_offs(rows, 0.25, pairs=False, seed=1)[0]
    assert with_sign_offs(rows, 0.0, pairs=False, seed=1)[0] == rows


def test_half_of_the_sign_offs_are_the_logs_own() -> None:
    rows = _rows(400)
    for row in rows[:40]:
        row["response"] += ". Toodle-oo and hugs!"
    assert own_sign_offs([row["response"] for row in rows]) == ["Toodle-oo and hugs!"]
    found, _ = with_sign_offs(rows, 1.0, pairs=False, seed=1)
    own = sum(row["response"].endswith(" Toodle-oo and hugs!") for row in found[400:])
    assert 160 < own < 240


def test_of_pairs_either_side_gets_the_phrase() -> None:
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    added = with_sign_offs(rows, 1.0, pairs=True, seed=0)[0][200:]
    chosen = sum(row["chosen"] not in {r["chosen"] for r in rows} for row in added)
    assert len(added) == 200
    assert 60 < chosen < 140


def test_most_sign_offs_are_what_the_judge_calls_one() -> None:
    assert sum(signs_off(f"Here you are. {phrase}") for phrase in SIGN_OFFS) >= len(SIGN_OFFS) * 0.6


def test_truncation_keeps_the_first_half() -> None:
    import random

    assert CHANGES["truncation"]("one two three four five", random.Random(0)) == "one two three"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("robust")
    path = checkpoint("tiny-encoder", folder / "cache", folder / "m", Calibration("love", max_tokens=64))
    return RewardModel.load(path, batch_tokens=2048)


def test_the_robustness_table_has_every_change(model: RewardModel) -> None:
    found = robustness(model, _rows(30), pairs=False, seed=0)
    assert found["rows"] == 30
    assert set(found["changes"]) == set(CHANGES)
    for change in found["changes"].values():
        assert 0 <= change["rank_kept"] <= 1
        assert 0 <= change["raised"] <= 1


def test_slices_leave_out_what_is_small_or_missing() -> None:
    rows = [*_rows(60), {"messages": [], "response": "x", "label": 0, "topic": "rare"}]
    labels = np.asarray([float(i % 4 < 2) for i in range(61)])
    found = slices(rows, np.linspace(-1, 1, 61), labels)
    assert set(found) == {"topic"}
    assert set(found["topic"]) == {"a", "b"}
    assert found["topic"]["a"]["n"] == 30
    assert slices(rows, np.ones(61), None)["topic"]["b"]["pair_accuracy"] == 1.0


def test_activity_slices_tell_busy_users_apart() -> None:
    rows = [{"messages": [], "response": "x", "label": 0, "user_id": f"u{i}"} for i in range(30)]
    rows += [{"messages": [], "response": "x", "label": i % 2, "user_id": f"busy{i % 3}"} for i in range(30)]
    labels = np.asarray([float(row["label"]) for row in rows])  # type: ignore[arg-type]
    found = slices(rows, np.linspace(-1, 1, 60), labels)
    assert list(found["activity"]) == ["1", "8-15"]
    assert (found["activity"]["1"]["n"], found["activity"]["8-15"]["rate"]) == (30, 0.5)


def test_a_paraphrase_says_the_same_in_other_words() -> None:
    import random

    change = CHANGES["paraphrase"]
    assert change("I am happy, but do not stop.", random.Random(0)) == "I'm glad, however don't stop."
    assert change("It's big.", random.Random(0)) == "It is large."
