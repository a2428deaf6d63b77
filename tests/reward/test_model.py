"""Scoring: one response alone scores as in a batch, for encoders and decoders, empty responses included."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import encoder_for, load_classifier, quick_cpu_matmul
from rluf.reward.calibration import Calibration, sigmoid
from rluf.reward.model import RewardModel
from rluf.reward.text import Item


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def checkpoint(name: str, cache: Path, folder: Path, calibration: Calibration) -> Path:
    """An untrained reward model folder with a head that spreads its scores."""
    backbone = resolve_model(name, cache)
    model = load_classifier(backbone, trained=False, seed=3)
    encoder = encoder_for(model, backbone, 96)
    for key, parameter in model.named_parameters():
        if key.startswith(("classifier", "score")):
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(folder))
    encoder.tokenizer.save_pretrained(str(folder))
    calibration.save(folder)
    return folder


def _items(count: int) -> list[Item]:
    rng = random.Random(0)
    words = ["warm", "kind", "cold", "plain", "answer", "question", "please", "thanks", "tomorrow"]
    rows: list[Item] = []
    for number in range(count):
        question = " ".join(rng.choices(words, k=rng.randrange(1, 12)))
        rows.append(([{"role": "user", "content": question}], " ".join(rng.choices(words, k=number))))
    return rows


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny", "minilm"])
def test_a_batch_of_one_equals_a_batch_of_many(name: str, cache: Path, tmp_path: Path) -> None:
    quick_cpu_matmul()
    path = checkpoint(name, cache, tmp_path / name, Calibration(objective="love", max_tokens=96))
    model, items = RewardModel.load(path, batch_tokens=700), _items(20)
    together = model.score(items, "love")
    for item, score in zip(items, together, strict=True):
        alone = model.score([item], "love")[0]
        assert abs(alone.raw - score.raw) < 1e-4
        assert abs(alone.value - score.value) < 1e-4
    assert len({round(score.raw, 3) for score in together}) > 10


def test_values_are_calibrated_and_raw_logits_are_not(cache: Path, tmp_path: Path) -> None:
    path = checkpoint("tiny-encoder", cache, tmp_path / "m", Calibration("love", "platt", -2.0, 0.5, 0.25, 64))
    model = RewardModel.load(path, batch_tokens=512)
    assert model.encoder.max_tokens == 64
    for score in model.score(_items(5), "love"):
        assert score.objective == "love"
        assert score.value == pytest.approx(float(sigmoid(torch.tensor(0.5 * (score.raw - 2.0) + 0.25).numpy())))
    assert model.score([], "love") == []


def test_bad_folders_are_model_errors_that_say_why(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        RewardModel.load(tmp_path / "nowhere", batch_tokens=512)
    with pytest.raises(ModelError, match=r"calibration\.json"):
        RewardModel.load(resolve_model("tiny-encoder", cache), batch_tokens=512)
    path = checkpoint("tiny-encoder", cache, tmp_path / "m", Calibration(max_tokens=64))
    (path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="no model that can score"):
        RewardModel.load(path, batch_tokens=512)


def test_a_backbone_is_not_taken_for_a_reward_model(cache: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(resolve_model("tiny-encoder", cache), tmp_path / "backbone")
    Calibration(max_tokens=64).save(folder)
    with pytest.raises(ModelError, match="classifier"):
        RewardModel.load(folder, batch_tokens=512)
