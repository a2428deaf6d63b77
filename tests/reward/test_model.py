"""Scoring: a response scores the same alone and in a batch, for encoders and decoders, empty responses included."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import build_text_encoder, enable_fast_cpu_matmul, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.types import ScoringItem
from rluf.utils.stats import sigmoid


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def write_checkpoint(name: str, cache: Path, folder: Path, calibration: Calibration) -> Path:
    """Write an untrained reward model whose random head spreads its scores."""
    backbone = resolve_model(name, cache)
    model = load_classifier(backbone, require_all_weights=False, seed=3)
    encoder = build_text_encoder(model, backbone, 96)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith(("classifier", "score")):
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(folder))
    encoder.tokenizer.save_pretrained(str(folder))
    calibration.save(folder)
    return folder


def build_items(count: int) -> list[ScoringItem]:
    """Items of random words; the response of item i has i words."""
    rng = random.Random(0)
    words = ["warm", "kind", "cold", "plain", "answer", "question", "please", "thanks", "tomorrow"]
    items = []
    for response_length in range(count):
        question = " ".join(rng.choices(words, k=rng.randrange(1, 12)))
        response = " ".join(rng.choices(words, k=response_length))
        items.append(ScoringItem([{"role": "user", "content": question}], response))
    return items


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny", "minilm"])
def test_a_batch_of_one_equals_a_batch_of_many(name: str, cache: Path, tmp_path: Path) -> None:
    enable_fast_cpu_matmul()
    path = write_checkpoint(name, cache, tmp_path / name, Calibration(objective="love", max_tokens=96))
    model, items = RewardModel.load(path, batch_tokens=700), build_items(20)
    batch_scores = model.score(items, "love")
    for item, batch_score in zip(items, batch_scores, strict=True):
        single_score = model.score([item], "love")[0]
        assert abs(single_score.raw_logit - batch_score.raw_logit) < 1e-4
        assert abs(single_score.value - batch_score.value) < 1e-4
    assert len({round(score.raw_logit, 3) for score in batch_scores}) > 10


def test_values_are_calibrated_and_raw_logits_are_not(cache: Path, tmp_path: Path) -> None:
    calibration = Calibration("love", "platt", prior_shift=-2.0, scale=0.5, offset=0.25, max_tokens=64)
    path = write_checkpoint("tiny-encoder", cache, tmp_path / "m", calibration)
    model = RewardModel.load(path, batch_tokens=512)
    assert model.encoder.max_tokens == 64
    for score in model.score(build_items(5), "love"):
        assert score.objective == "love"
        assert score.value == pytest.approx(float(sigmoid(0.5 * (score.raw_logit - 2.0) + 0.25)))
    assert model.score([], "love") == []


def test_invalid_folders_are_model_errors_that_name_the_cause(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        RewardModel.load(tmp_path / "nowhere", batch_tokens=512)
    damaged = write_checkpoint("tiny-encoder", cache, tmp_path / "damaged", Calibration())
    (damaged / "calibration.json").unlink()
    (damaged / "reward_card.json").write_text("{}")
    with pytest.raises(ModelError, match=r"calibration\.json"):
        RewardModel.load(damaged, batch_tokens=512)
    with pytest.raises(ModelError, match="lacks the weights classifier"):
        RewardModel.load(resolve_model("tiny-encoder", cache), batch_tokens=512)
    path = write_checkpoint("tiny-encoder", cache, tmp_path / "m", Calibration(max_tokens=64))
    (path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="does not contain a sequence classification model"):
        RewardModel.load(path, batch_tokens=512)


def test_a_backbone_is_not_accepted_as_a_reward_model(cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve_model("tiny-encoder", cache), tmp_path / "backbone")
    Calibration(max_tokens=64).save(folder)
    with pytest.raises(ModelError, match="classifier"):
        RewardModel.load(folder, batch_tokens=512)
