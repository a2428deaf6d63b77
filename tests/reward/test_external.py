"""Reward models that rluf did not train: scores equal transformers' own, and unusable ones are refused at the start."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rluf.artifacts import check_inputs
from rluf.config.load import load_settings
from rluf.errors import ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.objectives.aggregator import compute_signal
from rluf.reward.external import check_external_model
from rluf.reward.model import RewardModel, load_reward_scorer
from rluf.types import ScoringItem

KEY = "objectives.helpfulness.path"
ITEMS = [
    ScoringItem([{"role": "user", "content": "How do I cook rice?"}], "Rinse it, then boil it for 12 minutes."),
    ScoringItem([{"role": "user", "content": "Hi"}], "Hello."),
    ScoringItem([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}], "!"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODERS = ("llama", "qwen2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def save_model(cache: Path, folder: Path, family: str, labels: int = 1, scale: float = 1.0) -> Path:
    """A tiny model of random weights as transformers saves it; `scale` multiplies the head."""
    tokenizer = load_tokenizer(resolve_model("tiny" if family in DECODERS else "tiny-encoder", cache))
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_labels": labels,
        "pad_token_id": tokenizer.pad_token_id,
    }
    builders: dict[str, Any] = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, **common)),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, **common)),
        "distilbert": lambda: DistilBertForSequenceClassification(
            DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=2, **common)
        ),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, **common)),
        "qwen2": lambda: Qwen2ForSequenceClassification(Qwen2Config(**SIZES, num_key_value_heads=1, **common)),
    }
    torch.manual_seed(3)
    model: PreTrainedModel = builders[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("score", "classifier")) and name.endswith("weight"):
                parameter.normal_(std=scale)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def score_with_transformers(folder: Path, family: str, item: ScoringItem) -> list[float]:
    """Logits of the item alone, by transformers' own class and chat template or text pair."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if family in DECODERS:
        turns = [*item.messages, {"role": "assistant", "content": item.response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(item.messages[-1]["content"], item.response, return_tensors="pt")
        if family == "distilbert":
            inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        return list(model(**inputs).logits[0].tolist())


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", *DECODERS])
def test_scores_equal_those_of_transformers(family: str, labels: int, cache: Path, tmp_path: Path) -> None:
    folder = save_model(cache, tmp_path / family, family, labels)
    check_external_model(folder, KEY)
    scores = load_reward_scorer({"helpfulness": folder}, batch_tokens=4096)(ITEMS)["helpfulness"]
    for item, score in zip(ITEMS, scores, strict=True):
        logits = score_with_transformers(folder, family, item)
        expected = logits[0] if labels == 1 else logits[1] - logits[0]
        assert score.raw_logit == pytest.approx(expected, abs=2e-4)
        assert score.value == pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-4)
        assert compute_signal(score) == score.raw_logit


def test_rewards_use_large_logits_as_they_are(cache: Path, tmp_path: Path) -> None:
    folder = save_model(cache, tmp_path / "m", "bert", scale=400.0)
    scores = RewardModel.load(folder, batch_tokens=4096).score(ITEMS, "helpfulness")
    signals = [compute_signal(score) for score in scores]
    assert max(map(abs, signals)) > 40
    assert len(set(signals)) == len(signals)


def test_a_model_without_calibration_warns_once_and_names_its_label(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(cache, tmp_path / "m", "bert", labels=2)
    settings = load_settings(None, [f"{KEY}={folder}", f"run.root={tmp_path}", f"run.cache={cache}"]).settings
    with caplog.at_level(logging.WARNING):
        check_inputs(settings)
    (warning,) = [record.getMessage() for record in caplog.records if "calibration" in record.getMessage()]
    assert KEY in warning
    assert "'LABEL_1' against 'LABEL_0'" in warning


def remove_chat_template(folder: Path) -> None:
    for path in folder.glob("chat_template*"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not a header}")


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def make_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))


@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        pytest.param(5, lambda folder: None, r"5 labels \(LABEL_0, LABEL_1", id="five labels"),
        pytest.param(1, remove_chat_template, "neither CLS and SEP tokens nor a chat template", id="chat template"),
        pytest.param(1, damage_weights, "damaged safetensors", id="damaged"),
        pytest.param(1, remove_tokenizer, "tokenizer_config.json", id="tokenizer"),
        pytest.param(1, make_unknown_architecture, "not a sequence classification model", id="architecture"),
    ],
)
def test_an_unusable_model_is_refused_before_anything_starts(
    labels: int, change: Any, message: str, cache: Path, tmp_path: Path
) -> None:
    folder = save_model(cache, tmp_path / "m", "llama", labels)
    change(folder)
    settings = load_settings(None, [f"{KEY}={folder}", f"run.root={tmp_path}", f"run.cache={cache}"]).settings
    with pytest.raises(ModelError, match=message):
        check_inputs(settings)


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
def test_a_backbone_is_not_a_reward_model(name: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=rf"{KEY}: .* lacks the weights (score|classifier)\.weight"):
        check_external_model(resolve_model(name, cache), KEY)


def test_a_hub_id_without_network_is_one_error_with_the_key(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = load_settings(None, [f"{KEY}=owner/reward-model", f"run.root={tmp_path}"]).settings
    with pytest.raises(ModelError, match=rf"{KEY}=owner/reward-model: .*could not be downloaded"):
        check_inputs(settings)
