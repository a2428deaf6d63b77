"""Held-out rows: what is accepted, what is refused, and figures against scikit-learn."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from rluf.errors import DataError
from rluf.reward.heldout import parse_row, summarise

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ({"messages": MESSAGES, "response": "x", "label": 2}, "label 2"),
        ({"messages": MESSAGES, "response": "x"}, "label None"),
        ({"messages": MESSAGES, "label": 1}, "neither response"),
        ({"messages": MESSAGES, "chosen": "x"}, "neither response"),
        ({"messages": "Hi", "response": "x", "label": 1}, "no messages"),
        ({"messages": [{"role": "user"}], "response": "x", "label": 1}, "no messages"),
    ],
)
def test_bad_rows_are_named_with_their_line(row: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        parse_row(row if isinstance(row, str) else json.dumps(row), "file.jsonl:7")
    assert "file.jsonl:7" in str(error.value)


def test_an_empty_response_and_an_empty_conversation_are_rows() -> None:
    row = parse_row(json.dumps({"messages": [], "response": "", "label": True}), "here")
    assert row["label"] == 1


def test_label_figures_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=300)
    labels = (rng.random(300) < 1 / (1 + np.exp(-logits))).astype(int)
    rows = [
        {"group": f"g{i % 40}", "label": int(y), "logit": float(z), "length": int(rng.integers(1, 90))}
        for i, (z, y) in enumerate(zip(logits, labels, strict=True))
    ]
    found = summarise(rows)
    values = 1 / (1 + np.exp(-logits))
    assert found["auroc"]["mean"] == pytest.approx(reference.roc_auc_score(labels, logits), abs=1e-6)
    assert found["pr_auc"] == pytest.approx(reference.average_precision_score(labels, logits), abs=1e-6)
    assert found["brier"] == pytest.approx(reference.brier_score_loss(labels, values), abs=1e-6)
    assert found["log_loss"] == pytest.approx(reference.log_loss(labels, values), abs=1e-6)
    assert found["auroc"]["low"] < found["auroc"]["mean"] < found["auroc"]["high"]
    assert (found["n"], found["clusters"]) == (300, 40)


def test_pair_figures_count_wins_and_the_length_floor() -> None:
    rows = [
        {"group": None, "margin": margin, "chosen_length": long, "rejected_length": 10}
        for margin, long in ((1.0, 5), (2.0, 6), (-1.0, 7), (0.0, 20))
    ]
    found = summarise(rows)
    assert found["pair_accuracy"]["mean"] == pytest.approx(2.5 / 4)
    assert found["length_floor_accuracy"] == pytest.approx(3 / 4)
    assert found["length_floor_prefers"] == "shorter"
    assert found["clusters"] == 4


def test_no_rows_and_mixed_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="no row"):
        summarise([])
    with pytest.raises(DataError, match="mixed"):
        summarise([{"group": "a", "margin": 1.0}, {"group": "a", "label": 1}])
