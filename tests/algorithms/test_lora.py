"""A policy with adapters is published and saved as the plain weights that it amounts to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rluf.algorithms.lora import adapters
from rluf.algorithms.policy_io import load_policy
from rluf.backends.deepspeed import gather_parameters
from rluf.models.hub import resolve_model


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 17)[None]
    rows = torch.arange(12)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, position_ids=rows, rows=rows, places=rows[0], use_cache=False).logits
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return resolve_model("tiny", tmp_path)


def test_adapters_start_as_no_change_and_alone_are_trained(folder: Path) -> None:
    plain = load_policy(folder, dtype=torch.float32)
    model = load_policy(folder, dtype=torch.float32, lora_rank=4)
    assert torch.equal(logits(model), logits(plain))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert not any("lm_head" in name for name in adapters(model))


def test_merged_weights_have_plain_names_and_compute_the_same(folder: Path) -> None:
    model = load_policy(folder, dtype=torch.float32, lora_rank=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for change in adapters(model).values():
            change.up.normal_(std=0.1)
    sent = {n: t for bucket in gather_parameters(SimpleNamespace(module=model), 1 << 16) for n, t in bucket}
    plain = load_policy(folder, dtype=torch.float32)
    before = logits(plain)
    assert set(sent) == {name for name, _ in plain.named_parameters(remove_duplicate=False)}
    plain.load_state_dict(sent)
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)
    assert not torch.allclose(logits(plain), before, atol=1e-2)
