"""LoRA adapters: they start as the identity, only they and the head train, and merged weights are equivalent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rluf.models.hub import resolve_model
from rluf.models.lora import merge_lora_weights
from rluf.reward.backbone import add_layer_adapters, build_text_encoder, freeze_lowest_layers, load_classifier
from rluf.types import ScoringItem


@pytest.mark.parametrize("backbone", ["tiny", "tiny-encoder"])
def test_merged_weights_give_the_same_logits_without_adapters(backbone: str, tmp_path: Path) -> None:
    folder = resolve_model(backbone, tmp_path)
    model = load_classifier(folder, require_all_weights=False, seed=0).eval()
    encoder = build_text_encoder(model, folder, 64)
    inputs = encoder.collate(encoder.encode([ScoringItem([{"role": "user", "content": "Hi"}], "Hello there")]))
    with torch.no_grad():
        initial_logits = model(**inputs).logits
    frozen_layers = freeze_lowest_layers(model, 0.5)
    add_layer_adapters(model, 4, frozen_layers, 0.0)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, initial_logits, atol=1e-6)
    trainable_names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or name.startswith(("score", "classifier")) for name in trainable_names)
    assert any("lora_A" in name for name in trainable_names)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    merged_model = load_classifier(folder, require_all_weights=False, seed=0).eval()
    merged_weights = merge_lora_weights(dict(model.named_parameters()))
    merged_model.load_state_dict({**merged_model.state_dict(), **merged_weights})
    with torch.no_grad():
        adapter_logits = model(**inputs).logits
        assert not torch.allclose(adapter_logits, initial_logits, atol=1e-3)
        assert torch.allclose(merged_model(**inputs).logits, adapter_logits, atol=1e-5)
