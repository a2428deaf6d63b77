"""Engines get weights under the names, shapes and values of the checkpoint, also where transformers fuses them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconH1Config,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from benchmarks.families import COMMON, EXPERTS, LATENT, LINEAR, MAMBA
from rluf.algorithms.policy_model import load_policy
from rluf.backends.deepspeed import gather_checkpoint_tensors
from rluf.backends.weight_transfer import lora
from rluf.backends.weight_transfer.base import WeightManifest, list_checkpoint_files
from rluf.config.settings import Settings
from rluf.errors import SettingsError, WeightSyncError
from rluf.train.startup_check import check_weight_names

CONFIGS = {
    "llama tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, **EXPERTS),
    "qwen2_moe": Qwen2MoeConfig(**COMMON, **{**EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3_next": Qwen3NextConfig(**{**COMMON, **EXPERTS, **LINEAR}),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(**{**COMMON, **LATENT}),
    "gpt2 tied": GPT2Config(**COMMON, tie_word_embeddings=True),
    "gpt_bigcode tied": GPTBigCodeConfig(**COMMON, tie_word_embeddings=True),
    "gpt_neox tied": GPTNeoXConfig(**COMMON, tie_word_embeddings=True),
    "bloom tied": BloomConfig(**COMMON, tie_word_embeddings=True),
    "mpt tied": MptConfig(vocab_size=64, d_model=64, n_heads=4, n_layers=2, tie_word_embeddings=True),
    "mamba tied": MambaConfig(**COMMON, tie_word_embeddings=True),
}
TIED_SOURCES = {
    "llama tied": "model.embed_tokens.weight",
    "gpt2 tied": "transformer.wte.weight",
    "gpt_bigcode tied": "transformer.wte.weight",
    "gpt_neox tied": "gpt_neox.embed_in.weight",
    "bloom tied": "transformer.word_embeddings.weight",
    "mpt tied": "transformer.wte.weight",
    "mamba tied": "backbone.embeddings.weight",
}


def test_the_check_passes_for_mixtures_and_refuses_their_adapters(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["mixtral"]).save_pretrained(tmp_path)
    assert "tensors are equal" in check_weight_names(Settings(), tmp_path)
    with pytest.raises(SettingsError, match=r"learner\.lora_rank=4: adapters on fused experts"):
        check_weight_names(Settings.model_validate({"learner": {"lora_rank": 4}}), tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(**COMMON, tie_word_embeddings=False), "is not a weight of a linear layer"),
        (FalconH1Config(**COMMON, **MAMBA), "incompatible with Mamba-based models"),
        (Mamba2Config(**COMMON, num_heads=8, head_dim=16, state_size=16, n_groups=1), "incompatible with Mamba-based"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_adapters_that_do_not_fit_are_refused_before_training(config: Any, reason: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "tensors are equal" in check_weight_names(Settings(), tmp_path)
    with pytest.raises(SettingsError, match=rf"learner\.lora_rank=4: adapters do not fit .*{reason}"):
        check_weight_names(Settings.model_validate({"learner": {"lora_rank": 4}}), tmp_path)


@pytest.mark.parametrize("family", ["llama tied", "gpt_bigcode tied", "gpt_neox tied", "bloom tied"])
@pytest.mark.parametrize("transport", ["shm", "lora"])
def test_adapters_of_linear_layers_pass(family: str, transport: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    settings = Settings.model_validate({"learner": {"lora_rank": 4}, "weight_sync": {"transport": transport}})
    assert "tensors are equal" in check_weight_names(settings, tmp_path)


def test_adapters_that_an_engine_would_miss_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["gpt_bigcode tied"]).save_pretrained(tmp_path)
    monkeypatch.setattr(lora, "NAMES_WITHOUT_ADAPTER", ("lm_head", ".wpe."))
    settings = Settings.model_validate({"learner": {"lora_rank": 4}, "weight_sync": {"transport": "lora"}})
    with pytest.raises(SettingsError, match=r"1 weights \(transformer\.wte\.weight\)\); set weight_sync.transport=shm"):
        check_weight_names(settings, tmp_path)


@pytest.mark.parametrize("family", TIED_SOURCES)
def test_a_tied_head_is_sent_in_every_family(family: str, tmp_path: Path) -> None:
    """Whatever the embedding is called; without it the engine's head would stay at the old weights."""
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    assert "tensors are equal" in check_weight_names(Settings(), tmp_path)
    manifest = WeightManifest(tmp_path, has_tied_embeddings=True)
    (head_name,) = manifest.tied_sources
    assert manifest.tied_sources[head_name] == TIED_SOURCES[family]
    manifest.check_bucket((name, shape) for name, shape in manifest.expected_shapes.items() if name != head_name)
    with pytest.raises(WeightSyncError, match=rf"1 of \d+ tensors were not sent: {re.escape(head_name)}"):
        manifest.check_complete()


@pytest.mark.parametrize(("family", "lora_rank"), [*((family, 0) for family in CONFIGS), ("llama tied", 4)])
def test_an_engine_gets_the_tensors_of_the_checkpoint(family: str, lora_rank: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    policy: Any = load_policy(tmp_path, dtype=torch.float32, is_packed=False, lora_rank=lora_rank)
    manifest = WeightManifest(tmp_path, bool(CONFIGS[family].tie_word_embeddings))
    (weights_file,) = list_checkpoint_files(tmp_path)
    saved = load_file(weights_file)
    for bucket in gather_checkpoint_tensors(SimpleNamespace(module=policy), 1 << 15):
        manifest.check_bucket((name, tensor.shape) for name, tensor in bucket)
        for name, tensor in bucket:
            assert torch.equal(tensor, saved[manifest.tied_sources.get(name, name)]), name
            assert tensor.is_contiguous()
    manifest.check_complete()
