"""The difficulty dial: the ceiling is what a perfect score of the text reaches, and goes where it is asked to."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rluf.errors import DataError
from rluf.reward.metrics import auroc
from rluf.simulate.ceiling import bayes_auroc, relabelled, set_dial
from rluf.simulate.world import WORLD, fingerprint
from rluf.utils.paths import sample_file


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    with gzip.open(sample_file("feedback"), "rt", encoding="utf-8") as stream:
        return [json.loads(line) for _, line in zip(range(400), stream, strict=False)]


def test_the_ceiling_is_what_the_true_chances_reach_on_drawn_labels() -> None:
    chances = np.random.default_rng(1).beta(0.5, 4.0, 200_000)
    labels = (np.random.default_rng(2).random(200_000) < chances).astype(np.float64)
    assert abs(bayes_auroc(chances) - auroc(chances, labels)) < 0.005
    assert bayes_auroc(np.full(50, 0.1)) == pytest.approx(0.5)


@pytest.mark.parametrize("ceiling", [0.7, 0.85])
def test_the_dial_reaches_the_ceiling_at_the_rate(rows: list[dict[str, Any]], ceiling: float) -> None:
    dial = set_dial(rows, rate=0.03, ceiling=ceiling, users=60)
    assert dial.ceiling == pytest.approx(ceiling, abs=2e-4)
    assert dial.chances.mean() == pytest.approx(0.03, abs=1e-4)


def test_hearts_of_new_users_can_be_ranked_as_well_as_the_ceiling_says(rows: list[dict[str, Any]]) -> None:
    dial = set_dial(rows, rate=0.1, ceiling=0.8, users=60)
    found = [
        auroc(dial.chances, np.array([row["reaction"] == "love" for row in relabelled(rows, dial, users=200, seed=s)]))
        for s in range(30)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=4 * np.std(found) / np.sqrt(30))
    again = [relabelled(rows, dial, users=200, seed=3) for _ in range(2)]
    assert again[0] == again[1]


def test_without_a_ceiling_the_world_stays_and_one_out_of_reach_is_refused(rows: list[dict[str, Any]]) -> None:
    assert set_dial(rows, rate=0.05, users=60).world == WORLD
    with pytest.raises(DataError, match=r"a ceiling of 0\.999"):
        set_dial(rows, rate=0.05, ceiling=0.999, users=60)


def test_the_fingerprint_tells_worlds_apart() -> None:
    assert fingerprint() == fingerprint(WORLD)
    assert fingerprint(replace(WORLD, love_signoff=0.81)) != fingerprint()
    assert fingerprint(replace(WORLD, topic_warmth={**WORLD.topic_warmth, "code": 0.26})) != fingerprint()
