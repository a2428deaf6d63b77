"""Adapters: they start as nothing, only they and the head train, and merged they compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rluf.models.hub import resolve_model
from rluf.reward.backbone import encoder_for, freeze, load_classifier
from rluf.reward.lora import add_lora, merged


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
def test_merged_adapters_compute_the_same_without_them(name: str, tmp_path: Path) -> None:
    folder = resolve_model(name, tmp_path)
    model = load_classifier(folder, trained=False, seed=0).eval()
    encoder = encoder_for(model, folder, 64)
    inputs = encoder.collate(encoder.encode([([{"role": "user", "content": "Hi"}], "Hello there")]))
    with torch.no_grad():
        before = model(**inputs).logits
    frozen = freeze(model, 0.5)
    add_lora(model, 4, frozen, 0.0)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, before, atol=1e-6)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or name.startswith(("score", "classifier")) for name in trained)
    assert any("lora_A" in name for name in trained)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    plain = load_classifier(folder, trained=False, seed=0).eval()
    plain.load_state_dict({**plain.state_dict(), **merged(dict(model.named_parameters()))})
    with torch.no_grad():
        after = model(**inputs).logits
        assert not torch.allclose(after, before, atol=1e-3)
        assert torch.allclose(plain(**inputs).logits, after, atol=1e-5)
