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
from rluf.errors import ModelError, StallError
from rluf.reward.card import calibrate
from rluf.reward.export import finish, thinned
from rluf.reward.fit import Splits, train_member, train_members
from rluf.reward.linear_probe import fit_probe
from rluf.reward.model import RewardModel, logits_of
from rluf.reward.trainer import dev_log_loss, encode_rows
from rluf.types import Message
from tests.reward.test_reward_training import COLD, WARM, write_data

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
"""Training dtypes that scores must not depend on: torch computes in both on every processor."""


def _settings(cache: Path, *, dtype: str = "float32", **model: Any) -> Settings:
    probe = {"backbone": "tiny", "probe": True, "epochs": 0, "frozen_share": 1, "max_tokens": 120, **model}
    helpful = {**probe, "loss": "bradley_terry"}
    reward = {"dtype": dtype, "safety": probe, "love": probe, "helpfulness": helpful}
    tree = {"run": {"cache": str(cache)}, "reward": reward}
    return Settings.model_validate(tree)


def _splits(data: Path, objective: str) -> Splits:
    folder = data / objective
    return Splits(
        objective, *(pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "dev")), folder
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("member") / "data", rows=160)


@DTYPES
def test_an_ensemble_of_probes_ranks_is_calibrated_and_has_a_card(data: Path, tmp_path: Path, dtype: str) -> None:
    settings = _settings(tmp_path, dtype=dtype, layers=[1, 2])
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


@DTYPES
@pytest.mark.parametrize("objective", ["love", "helpfulness"])
def test_a_fused_head_is_the_mean_of_the_members_parts_and_has_no_spread(
    data: Path, tmp_path: Path, objective: str, dtype: str
) -> None:
    layers = [1, 2, "tiny-encoder:1"]
    settings = _settings(tmp_path, dtype=dtype, layers=layers, fuse=True)
    members = train_members(settings, [_splits(data, objective)], math.inf)
    task, reads = members[0].tasks[0], [member.reads[0] for member in members]
    head, bias, _ = fit_probe(
        np.concatenate([read.train for read in reads], axis=1), task.train.labels, task.train.loss_weights,
        task.train.clusters, pairs=task.train.pairs, seed=settings.seed,
    )  # fmt: skip
    whole = np.concatenate([read.dev for read in reads], axis=1) @ head
    mean = np.mean([member.found[0].dev_logits for member in members], axis=0)
    assert np.allclose(mean - mean.mean(), whole - whole.mean(), atol=0.1 * whole.std())  # but for a bias folded in
    assert bias == 0.0 or objective == "love"
    finish(settings, {objective: (data / objective, tmp_path / "out")}, members, time.monotonic(), thorough=False)
    model = RewardModel.load(tmp_path / "out", batch_tokens=2048)
    assert model.calibration.fused
    card = json.loads((tmp_path / "out" / "reward_card.json").read_text())
    assert card["training"]["dev_log_loss"] == pytest.approx(
        dev_log_loss(mean, task.dev, members[0].found[0].shift), abs=1e-6
    )  # cards have six digits
    records = pq.read_table(data / objective / "dev.parquet").to_pylist()
    read = encode_rows(records, model.encoder, pairs=task.dev.pairs, where="dev")  # as each member's encoder reads
    assert np.allclose(model.raw(read.sequences), mean, atol=1e-3)
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    scores = model.score([(question, text) for text in (*WARM, *COLD)], objective)
    assert {score.spread for score in scores} == {0.0}
    assert min(score.value for score in scores[:3]) > max(score.value for score in scores[3:])


@DTYPES
@pytest.mark.parametrize("frozen_share", [0.0, 0.5])
def test_a_trained_model_is_calibrated_on_the_logits_that_it_is_scored_with(
    data: Path, tmp_path: Path, frozen_share: float, dtype: str, process_group: None
) -> None:
    settings = _settings(tmp_path, dtype=dtype, probe=False, epochs=2, frozen_share=frozen_share, learning_rate=1e-3)
    member = train_member(settings, [_splits(data, "love")], 0, math.inf)
    assert member.found[0].best_epoch >= 0
    finish(settings, {"love": (data / "love", tmp_path / "out")}, [member], time.monotonic(), thorough=False)
    model = RewardModel.load(tmp_path / "out", batch_tokens=512)
    records = pq.read_table(data / "love" / "dev.parquet").to_pylist()
    logits = model.raw(model.encoder.encode([(row["messages"], row["response"]) for row in records]))
    assert logits == pytest.approx(member.found[0].dev_logits, abs=1e-3)
    refitted = calibrate(member.tasks[0].dev, np.asarray(logits), model.calibration, "platt")
    assert (refitted.scale, refitted.offset) == pytest.approx(
        (model.calibration.scale, model.calibration.offset), abs=1e-2
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rows_are_thinned_by_label(share: float) -> None:
    rows: list[dict[str, Any]] = [{"id": n, "label": int(n % 20 == 0)} for n in range(400)]
    kept = thinned(rows, share, "love")
    assert [sum(row["label"] == label for row in kept) for label in (0, 1)] == pytest.approx(
        [380 * share, 20 * share], abs=1
    )
    assert kept == thinned(rows, share, "love")
    few = thinned([{"label": 1}, *({"label": 0} for _ in range(30))], share, "love")
    assert {row["label"] for row in few} == {0, 1}  # the only heart stays
    pairs = [{"chosen": "a", "rejected": "b"} for _ in range(100)]
    assert len(thinned(pairs, share, "helpfulness")) == pytest.approx(100 * share, abs=1)
    written_on = [{"label": 0, "continued": n % 2 == 0} for n in range(40)]
    kept = thinned(written_on, share, "continued")
    assert sum(row["continued"] for row in kept) == pytest.approx(len(kept) / 2, abs=1)


@DTYPES
@pytest.mark.parametrize(("backbone", "other"), [("tiny", "tiny-encoder:2"), ("tiny-encoder", "tiny:2")])
def test_members_on_two_backbones_read_in_their_own_way_and_are_as_loud(
    data: Path, tmp_path: Path, backbone: str, other: str, dtype: str
) -> None:
    """An encoder foresees no next message, so next_turn is for the decoder, wherever it stands."""
    settings = _settings(tmp_path, dtype=dtype, backbone=backbone, layers=[2, other], next_turn=True)
    members = [train_member(settings, [_splits(data, "love")], n, math.inf) for n in range(2)]
    finish(settings, {"love": (data / "love", tmp_path / "out")}, members, time.monotonic(), thorough=False)
    assert members[0].found[0].dev_logits.std() == pytest.approx(members[1].found[0].dev_logits.std())
    model = RewardModel.load(tmp_path / "out", batch_tokens=2048)
    question: list[Message] = [{"role": "user", "content": "How was the day?"}]
    items = [(question, text) for text in (*WARM, *COLD)]
    rows = model.encoder.encode(items)
    assert [len(row.others) for row in rows] == [1] * len(items)
    encoders = [model.encoder, *model.encoder.others]
    assert [e.next_turn for e in encoders] == [backbone == "tiny", backbone != "tiny"]
    alone = [logits_of(m, e, e.encode(items), 512) for m, e in zip(model.members, encoders, strict=True)]
    assert sum(model.calibration.shares) == pytest.approx(1)
    expected = np.average(alone, axis=0, weights=model.calibration.shares)
    assert model.raw(rows) == pytest.approx(expected[:, 0], abs=1e-4)
    assert min(model.raw(rows)[: len(WARM)]) > max(model.raw(rows)[len(WARM) :])


@DTYPES
@pytest.mark.parametrize("backbone", ["tiny", "tiny-encoder"])
def test_members_that_read_the_response_alone_have_a_pass_of_their_own(
    data: Path, tmp_path: Path, backbone: str, dtype: str
) -> None:
    layers = [1, 2, f"{backbone}:1:response", f"{backbone}:2:response"]
    settings = _settings(tmp_path, dtype=dtype, backbone=backbone, layers=layers, fuse=True)
    members = train_members(settings, [_splits(data, "love")], math.inf)
    finish(settings, {"love": (data / "love", tmp_path / "out")}, members, time.monotonic(), thorough=False)
    model = RewardModel.load(tmp_path / "out", batch_tokens=2048)
    assert model.calibration.response_alone == (2, 3)
    assert [(run.members, run.depths) for run in model._passes] == [((0, 1), (1, 2)), ((2, 3), (1, 2))]
    mild: list[Message] = [{"role": "user", "content": "How was the day?"}]
    other: list[Message] = [{"role": "user", "content": "Tell me of ships, and of the sea that they sail."}]
    each = model.each(model.encoder.encode([(mild, WARM[0]), (other, WARM[0])]))
    assert each[2:, 0] == pytest.approx(each[2:, 1], abs=1e-9)
    assert (abs(each[:2, 0] - each[:2, 1]) > 1e-6).all()
    dev = members[0].tasks[0].dev
    records = pq.read_table(data / "love" / "dev.parquet").to_pylist()
    read = model.encoder.encode([(row["messages"], row["response"]) for row in records])
    fitted = np.mean([member.found[0].dev_logits for member in members], axis=0)
    assert len(dev) == len(read)
    assert model.raw(read) == pytest.approx(fitted, abs=1e-3)


def test_next_turn_without_a_decoder_is_refused_before_anything_is_read(data: Path, tmp_path: Path) -> None:
    settings = _settings(tmp_path, backbone="tiny-encoder", layers=[1, 2], next_turn=True)
    with pytest.raises(ModelError, match=r"tiny-encoder\) are encoders"):
        train_members(settings, [_splits(data, "love")], math.inf)


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
