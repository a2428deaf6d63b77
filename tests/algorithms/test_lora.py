"""A policy with LoRA adapters is sent and saved as merged weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rluf.algorithms.policy_model import load_policy
from rluf.backends.deepspeed import gather_parameters
from rluf.models.hub import resolve_model
from rluf.models.lora import find_lora_adapters


def compute_logits(model: nn.Module) -> torch.Tensor:
    input_ids = torch.arange(5, 17)[None]
    token_index = torch.arange(12)[None]
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=input_ids,
            position_ids=token_index,
            sequence_token_index=token_index,
            token_output_index=token_index[0],
            use_cache=False,
        ).logits
    return logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return resolve_model("tiny", tmp_path)


def test_initial_adapters_change_nothing_and_are_all_that_is_trained(folder: Path) -> None:
    base_model = load_policy(folder, dtype=torch.float32)
    model = load_policy(folder, dtype=torch.float32, lora_rank=4)
    assert torch.equal(compute_logits(model), compute_logits(base_model))
    trained_names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained_names and all(".lora_" in name for name in trained_names)
    assert not any("lm_head" in name for name in find_lora_adapters(model))


def test_merged_weights_have_checkpoint_names_and_compute_the_same(folder: Path) -> None:
    model = load_policy(folder, dtype=torch.float32, lora_rank=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for adapter in find_lora_adapters(model).values():
            adapter.lora_b.normal_(std=0.1)
    buckets = gather_parameters(SimpleNamespace(module=model), 1 << 16)
    merged_weights = {name: tensor for bucket in buckets for name, tensor in bucket}
    base_model = load_policy(folder, dtype=torch.float32)
    logits_before = compute_logits(base_model)
    assert set(merged_weights) == {name for name, _ in base_model.named_parameters(remove_duplicate=False)}
    base_model.load_state_dict(merged_weights)
    assert torch.allclose(compute_logits(base_model), compute_logits(model), atol=1e-4)
    assert not torch.allclose(compute_logits(base_model), logits_before, atol=1e-2)
