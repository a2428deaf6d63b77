"""Any Hugging Face backbone: random ModernBERT, Llama and Qwen models train, save and score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, ModernBertConfig, ModernBertModel, Qwen3Config, Qwen3Model

from rluf.models.hub import load_tokenizer, resolve_model
from rluf.reward.backbone import encoder_for, freeze, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.frozen_prefix import FrozenPrefix
from rluf.reward.lora import add_lora
from rluf.reward.model import RewardModel
from rluf.reward.trainer import Fit, Plan, Position, Task, Trainer
from tests.reward.test_trainer import QUIET, TorchEngine, _rows

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def _backbone(name: str, root: Path) -> Path:
    """A random model of the family, with the embedded tiny models' tokenizers."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(resolve_model("tiny-encoder" if name == "modernbert" else "tiny", root / "cache"))
    size = {**SMALL, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    ends = {"eos_token_id": tokenizer.eos_token_id, "num_key_value_heads": 1, "head_dim": 16}
    if name == "modernbert":
        marks = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id, "eos_token_id": None}
        model = ModernBertModel(ModernBertConfig(**size, **marks, global_attn_every_n_layers=2, local_attention=16))
    elif name == "llama":
        model = LlamaModel(LlamaConfig(**size, **ends))
    else:
        model = Qwen3Model(Qwen3Config(**size, **ends))
    model.save_pretrained(str(root / name))
    tokenizer.save_pretrained(str(root / name))
    return root / name


@pytest.mark.parametrize("adapters", [0, 2], ids=["whole", "lora"])
@pytest.mark.parametrize("name", ["modernbert", "llama", "qwen3"])
def test_every_family_trains_saves_and_scores_alone_as_in_a_batch(name: str, adapters: int, tmp_path: Path) -> None:
    folder = _backbone(name, tmp_path)
    model = load_classifier(folder, trained=False, dropout=0.0, seed=1)
    encoder = encoder_for(model, folder, 64)
    train, dev = _rows(encoder, 160, 1), _rows(encoder, 32, 2)
    frozen = freeze(model, 0.5)
    assert frozen == 1
    prefix = FrozenPrefix(model, frozen)
    if adapters:
        add_lora(model, adapters, frozen, 0.0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = Plan(epochs=3, batch_rows=8, batch_tokens=1024, seed=0)
    trainer = Trainer(model, encoder, plan, prefix)
    (found,) = trainer.fit(TorchEngine(model, 4e-3), [Task("love", train, dev)], Position([Fit()]), **QUIET)
    assert found.history[-1]["train_loss"] < 0.9 * found.history[0]["train_loss"]
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved
    assert not any("embed" in key or ".layers.0." in key for key in moved)
    if adapters:
        return
    model.save_pretrained(str(tmp_path / "out"))
    encoder.tokenizer.save_pretrained(str(tmp_path / "out"))
    Calibration("love", max_tokens=64).save(tmp_path / "out")
    scorer = RewardModel.load(tmp_path / "out", batch_tokens=512)
    items = [([{"role": "user", "content": "hi"}], text) for text in ("", "wow", "no. cold. " * 9, "love !!!")]
    together = scorer.score(items, "love")  # type: ignore[arg-type]
    alone = [scorer.score([item], "love")[0] for item in items]  # type: ignore[list-item]
    assert [score.raw for score in together] == pytest.approx([score.raw for score in alone], abs=1e-4)
