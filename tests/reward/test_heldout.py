"""Held-out rows: accepted and rejected input, and metrics against scikit-learn."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from rluf.errors import DataError
from rluf.reward.card import parse_heldout_row, summarize_scores

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"messages": MESSAGES, "response": "x", "label": 2}, "label 2"),
        ({"messages": MESSAGES, "response": "x"}, "label None"),
        ({"messages": MESSAGES, "label": 1}, "neither response"),
        ({"messages": MESSAGES, "chosen": "x"}, "neither response"),
        ({"messages": "Hi", "response": "x", "label": 1}, "no valid messages"),
        ({"messages": [{"role": "user"}], "response": "x", "label": 1}, "no valid messages"),
        ({"messages": MESSAGES, "response": "x", "label": 1, "finish_reason": "eos"}, "finish_reason 'eos'"),
        (
            {"messages": MESSAGES, "chosen": "x", "rejected": "", "rejected_finish_reason": 1},
            "rejected_finish_reason 1",
        ),
    ],
)
def test_errors_name_the_line_of_an_invalid_row(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        parse_heldout_row(row if isinstance(row, str) else json.dumps(row), "file.jsonl:7")
    assert "file.jsonl:7" in str(error.value)


def test_an_empty_response_and_an_empty_conversation_are_valid() -> None:
    row = parse_heldout_row(json.dumps({"messages": [], "response": "", "label": True}), "here")
    assert row["label"] == 1


def test_label_metrics_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=300)
    labels = (rng.random(300) < 1 / (1 + np.exp(-logits))).astype(int)
    scored_rows = [
        {"group": f"g{i % 40}", "label": int(y), "logit": float(z), "length": int(rng.integers(1, 90))}
        for i, (z, y) in enumerate(zip(logits, labels, strict=True))
    ]
    summary = summarize_scores(scored_rows)
    probabilities = 1 / (1 + np.exp(-logits))
    assert summary["auroc"]["mean"] == pytest.approx(reference.roc_auc_score(labels, logits), abs=1e-6)
    assert summary["pr_auc"] == pytest.approx(reference.average_precision_score(labels, logits), abs=1e-6)
    assert summary["brier"] == pytest.approx(reference.brier_score_loss(labels, probabilities), abs=1e-6)
    assert summary["log_loss"] == pytest.approx(reference.log_loss(labels, probabilities), abs=1e-6)
    assert summary["auroc"]["low"] < summary["auroc"]["mean"] < summary["auroc"]["high"]
    assert (summary["n"], summary["clusters"]) == (300, 40)


def test_pair_metrics_count_wins_and_the_length_baseline() -> None:
    scored_rows = [
        {"group": None, "margin": margin, "chosen_length": chosen_length, "rejected_length": 10}
        for margin, chosen_length in ((1.0, 5), (2.0, 6), (-1.0, 7), (0.0, 20))
    ]
    summary = summarize_scores(scored_rows)
    assert summary["pair_accuracy"]["mean"] == pytest.approx(2.5 / 4)
    assert summary["length_only_accuracy"] == pytest.approx(3 / 4)
    assert summary["length_only_prefers"] == "shorter"
    assert summary["clusters"] == 4


def test_empty_input_and_mixed_kinds_are_refused() -> None:
    with pytest.raises(DataError, match="no row"):
        summarize_scores([])
    with pytest.raises(DataError, match="mixed"):
        summarize_scores([{"group": "a", "margin": 1.0}, {"group": "a", "label": 1}])
