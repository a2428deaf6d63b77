"""Members fitted without an epoch, calibrated and written together: no Ray and no DeepSpeed is needed for these."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.engine.train_member import Splits, train_member
from rluf.engine.write_reward import finish
from rluf.errors import StallError
from rluf.objectives.scorer import RewardModel, logits_of
from rluf.objectives.text import TextEncoder
from rluf.types import Message
from tests.test_reward_training import COLD, WARM, write_data


def _settings(cache: Path, **model: Any) -> Settings:
    probe = {"backbone": "tiny", "probe": True, "epochs": 0, "frozen_share": 1, "max_tokens": 120, **model}
    helpful = {**probe, "loss": "bradley_terry"}
    tree = {"run": {"cache": str(cache)}, "reward": {"safety": probe, "love": probe, "helpfulness": helpful}}
    return Settings.model_validate(tree)


def _splits(data: Path, objective: str) -> Splits:
    folder = data / objective
    return Splits(
        objective, *(pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "dev")), folder
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("member") / "data", rows=160)


def test_an_ensemble_of_probes_ranks_is_calibrated_and_has_a_card(data: Path, tmp_path: Path) -> None:
    settings = _settings(tmp_path, layers=[1, 2])
    shared: dict[tuple[str, str], Any] = {}
    members = [train_member(settings, [_splits(data, "love")], n, math.inf, shared=shared) for n in range(2)]
    assert list(shared) == [("tiny", "love")]
    again = train_member(settings, [_splits(data, "love")], 0, math.inf)
    assert np.allclose(again.found[0].dev_logits, members[0].found[0].dev_logits, atol=1e-4)
    finish(settings, {"love": (data / "love", tmp_path / "out")}, members, time.monotonic(), thorough=True)
    card = json.loads((tmp_path / "out" / "reward_card.json").read_text())
    assert card["training"]["members"] == 2
    assert card["training"]["best_epoch"] == 0
    assert card["training"]["train_tokens"] == members[0].tasks[0].train.tokens  # one pass reads for both
    assert card["robustness"]["rows"] > 20
    model = RewardModel.load(tmp_path / "out", batch_tokens=2048)
    assert [run.depths for run in model._passes] == [(1, 2)]
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    rows = model.encoder.encode([(question, text) for text in WARM])
    alone = [logits_of(member, model.encoder, rows, 512)[:, 0] for member in model.members]
    assert np.allclose(model.each(rows), alone, atol=1e-4)
    warm, cold = (model.score([(question, text) for text in texts], "love") for texts in (WARM, COLD))
    assert min(score.value for score in warm) > max(score.value for score in cold)
    assert all(score.spread > 0 for score in warm)


def test_members_on_two_backbones_read_in_their_own_way_and_weigh_the_same(data: Path, tmp_path: Path) -> None:
    settings = _settings(tmp_path, layers=[2, "tiny-encoder:2"], next_turn=True)
    members = [train_member(settings, [_splits(data, "love")], n, math.inf) for n in range(2)]
    finish(settings, {"love": (data / "love", tmp_path / "out")}, members, time.monotonic(), thorough=False)
    assert members[0].found[0].dev_logits.std() == pytest.approx(members[1].found[0].dev_logits.std())
    model = RewardModel.load(tmp_path / "out", batch_tokens=2048)
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    items = [(question, text) for text in (*WARM, *COLD)]
    rows = model.encoder.encode(items)
    assert [len(row.others) for row in rows] == [1] * len(items)
    alone = [logits_of(m, e, e.encode(items), 512) for m, e in zip(model.members, _encoders(model), strict=True)]
    assert model.raw(rows) == pytest.approx(np.mean(alone, axis=0)[:, 0], abs=1e-4)
    assert min(model.raw(rows)[: len(WARM)]) > max(model.raw(rows)[len(WARM) :])


def _encoders(model: RewardModel) -> list[TextEncoder]:
    others = list(model.encoder.others)
    assert [e.next_turn for e in (model.encoder, *others)] == [True, False]
    return [model.encoder, *others]


def test_a_probe_on_pairs_prefers_what_was_chosen(data: Path, tmp_path: Path) -> None:
    settings = _settings(tmp_path, next_turn=True)
    member = train_member(settings, [_splits(data, "helpfulness")], 0, math.inf)
    outs = {"helpfulness": (data / "helpfulness", tmp_path / "out")}
    finish(settings, outs, [member], time.monotonic(), thorough=False)
    card = json.loads((tmp_path / "out" / "reward_card.json").read_text())
    assert card["pair_accuracy"]["mean"] > 0.75
    assert card["calibration"]["next_turn"] is True
    assert RewardModel.load(tmp_path / "out", batch_tokens=512).encoder.next_turn


def test_a_passed_deadline_stops_the_probe(data: Path, tmp_path: Path) -> None:
    with pytest.raises(StallError, match="deadline_s"):
        train_member(_settings(tmp_path), [_splits(data, "safety")], 0, 0.0)
