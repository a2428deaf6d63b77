"""Any Hugging Face backbone: random ModernBERT, Llama and Qwen models train, save and score."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, ModernBertConfig, ModernBertModel, Qwen3Config, Qwen3Model

from rluf.errors import ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.reward.backbone import (
    FrozenPrefix,
    add_layer_adapters,
    build_text_encoder,
    freeze_lowest_layers,
    load_classifier,
)
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.reward.trainer import FitResult, HeadTask, RewardModelTrainer, TrainPlan, TrainProgress
from rluf.types import ScoringItem
from tests.reward.test_trainer import NO_CALLBACKS, TorchEngine, build_split

SMALL_MODEL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def build_backbone(family: str, root: Path) -> Path:
    """A random model of the family with the tokenizer of an embedded tiny model."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(resolve_model("tiny-encoder" if family == "modernbert" else "tiny", root / "cache"))
    config = {
        **SMALL_MODEL,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    if family == "modernbert":
        special_ids = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        model = ModernBertModel(
            ModernBertConfig(
                **config, **special_ids, eos_token_id=None, global_attn_every_n_layers=2, local_attention=16
            )
        )
    else:
        decoder_config = {"eos_token_id": tokenizer.eos_token_id, "num_key_value_heads": 1, "head_dim": 16}
        if family == "llama":
            model = LlamaModel(LlamaConfig(**config, **decoder_config))
        else:
            model = Qwen3Model(Qwen3Config(**config, **decoder_config))
    model.save_pretrained(str(root / family))
    tokenizer.save_pretrained(str(root / family))
    return root / family


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["modernbert", "llama", "qwen3"])
def test_every_family_trains_saves_and_scores_independently_of_the_batch(
    family: str, lora_rank: int, tmp_path: Path
) -> None:
    folder = build_backbone(family, tmp_path)
    model = load_classifier(folder, require_all_weights=False, dropout=0.0, seed=1)
    encoder = build_text_encoder(model, folder, 64)
    train_split, dev_split = build_split(encoder, 160, 1), build_split(encoder, 32, 2)
    frozen_layers = freeze_lowest_layers(model, 0.5)
    assert frozen_layers == 1
    prefix = FrozenPrefix(model, frozen_layers)
    if lora_rank:
        add_layer_adapters(model, lora_rank, frozen_layers, 0.0)
    initial_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = TrainPlan(epochs=3, batch_rows=8, batch_tokens=1024, seed=0)
    trainer = RewardModelTrainer(model, encoder, plan, prefix)
    (result,) = trainer.fit(
        TorchEngine(model, 4e-3),
        [HeadTask("love", train_split, dev_split)],
        TrainProgress([FitResult()]),
        **NO_CALLBACKS,
    )
    assert result.history[-1]["train_loss"] < 0.9 * result.history[0]["train_loss"]
    changed_names = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, initial_weights[name])
    }
    assert changed_names
    assert not any("embed" in name or ".layers.0." in name for name in changed_names)
    if lora_rank:
        return
    model.save_pretrained(str(tmp_path / "out"))
    encoder.tokenizer.save_pretrained(str(tmp_path / "out"))
    Calibration("love", max_tokens=64).save(tmp_path / "out")
    reward_model = RewardModel.load(tmp_path / "out", batch_tokens=512)
    texts = ("", "wow", "no. cold. " * 9, "love !!!")
    items = [ScoringItem([{"role": "user", "content": "hi"}], text) for text in texts]
    batch_logits = [score.raw_logit for score in reward_model.score(items, "love")]
    single_logits = [reward_model.score([item], "love")[0].raw_logit for item in items]
    assert batch_logits == pytest.approx(single_logits, abs=1e-4)


OWN_MARKUP = "{% for m in messages %}<|user|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("token", "template"), [("<|pad|>", None), ("<|finetune_pad|>", None), ("<|user|>", OWN_MARKUP)]
)
def test_no_token_behind_the_rows_of_the_model_is_read(token: str, template: str | None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_model("tiny", tmp_path), tmp_path / "model"))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.pad_token = token if "pad" in token else None
    tokenizer.save_pretrained(folder)
    model = load_classifier(folder, require_all_weights=False)
    if template is None:
        assert build_text_encoder(model, folder, 64).pad_id < 259
        return
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=r"token id 259 \('<\|user\|>'\), but its model has 259 rows; call .*\(260\)"):
        build_text_encoder(model, folder, 64)
