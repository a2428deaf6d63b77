"""Packing is used only where it gives the log-probabilities and gradients of one sample at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    FalconH1Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    SeedOssConfig,
    StableLmConfig,
    Starcoder2Config,
)

from rluf.algorithms.batch_layout import choose_batch_layout, compare_layouts
from rluf.algorithms.packing import pack_micro_batch
from rluf.algorithms.policy_model import compute_response_logprobs, load_policy, remove_noise
from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.types import Group, Prompt, Sample

COMMON = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.1, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}


def make_group(name: str, prompt: tuple[int, ...], responses: tuple[tuple[int, ...], ...]) -> Group:
    samples = tuple(Sample(name, prompt, r, (-1.0,) * len(r), ((0, 0),), "stop", "") for r in responses)
    return Group(Prompt(name, ({"role": "user", "content": "x"},), prompt, "", "train"), samples, 0)


GROUPS = {
    0: make_group("a", tuple(range(10, 40)), ((60, 61, 62, 63, 2), (70, 71, 72, 2))),
    1: make_group("b", tuple(range(50, 85)), ((80,) * 9, (90, 91, 2))),
}
PAIRS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def measure_batch_error(folder: Path, is_packed: bool) -> float:
    """Mean |difference| of a batch of four samples from transformers' own forward of each alone (nats per token)."""
    model = load_policy(folder, dtype=torch.float32, is_packed=is_packed).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    expected = []
    with torch.no_grad():
        for group, sample_index in PAIRS:
            sample = GROUPS[group].samples[sample_index]
            ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
            logprobs = torch.log_softmax(plain(ids, use_cache=False).logits[0].float(), -1)
            start = len(sample.prompt_ids) - 1
            expected += [logprobs[start + i, token].item() for i, token in enumerate(sample.response_ids)]
        batch_logprobs = compute_response_logprobs(model, pack_micro_batch(PAIRS, GROUPS, [[1.0, 1.0]] * 2))
    return (batch_logprobs - torch.tensor(expected)).abs().mean().item()


@pytest.mark.parametrize(
    ("config", "layout", "reason"),
    [
        (LlamaConfig(**COMMON), "packed", ""),
        (MistralConfig(**COMMON, sliding_window=64), "packed", ""),
        (MistralConfig(**COMMON, sliding_window=32), "rows", "sliding window"),
        (FalconH1Config(**COMMON, **MAMBA), "rows", "packing changes its log-probabilities"),
        (Gemma2Config(**COMMON, head_dim=16), "rows", "softcap"),
        (StableLmConfig(**COMMON), "rows", "does not pass the fields of a packed batch"),
    ],
    ids=["llama", "long window", "short window", "falcon_h1", "gemma2", "stablelm"],
)
def test_a_batch_is_exact_in_the_chosen_layout(config: Any, layout: str, reason: str, tmp_path: Path) -> None:
    trial = compare_layouts(config, max_row_tokens=48)
    assert trial.layout == layout
    assert reason in trial.reason
    assert trial.logprob_error < 1e-5
    assert trial.gradient_cosine > 0.999999
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert measure_batch_error(tmp_path, is_packed=layout == "packed") < 1e-5


def test_the_layout_is_stored_and_a_critic_needs_packing(tmp_path: Path) -> None:
    values = {"run": {"cache": str(tmp_path / "cache")}, "rollout": {"max_prompt_tokens": 32}}
    config = MistralConfig(**COMMON, sliding_window=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    trial = choose_batch_layout(Settings.model_validate(values), tmp_path / "model")
    assert trial.layout == "rows"
    assert len(list((tmp_path / "cache" / "batch-layouts").iterdir())) == 1
    assert choose_batch_layout(Settings.model_validate(values), tmp_path / "model") == trial
    with pytest.raises(ModelError, match=r"algorithm\.name=ppo reads packed batches only"):
        choose_batch_layout(Settings.model_validate({**values, "algorithm": {"name": "ppo"}}), tmp_path / "model")


def test_a_model_without_some_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 2 weights: lm_head\.weight, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy(tmp_path, dtype=torch.float32)


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            **COMMON | {"max_position_embeddings": 20}, rope_parameters={"rope_type": "dynamic", "factor": 2.0}
        ),
        Phi3Config(**COMMON, rope_parameters=LONG_ROPE, original_max_position_embeddings=20),
    ],
    ids=["dynamic", "longrope"],
)
def test_a_model_whose_samples_depend_on_their_batch_in_every_layout_is_refused(config: Any) -> None:
    with pytest.raises(ModelError, match=r"depend on the other samples of its batch.*choose another model\.path"):
        compare_layouts(config, max_row_tokens=48)


RANDOM = {"attention_dropout": 0.3, "dropout": 0.3, "layerdrop": 0.5, "residual_dropout": 0.3, "hidden_dropout": 0.3}
RANDOM_CONFIGS = [
    OPTConfig(**COMMON, **RANDOM, ffn_dim=96, word_embed_proj_dim=64),
    Starcoder2Config(**COMMON, **RANDOM),
    SeedOssConfig(**COMMON, **RANDOM, head_dim=16),
    NemotronConfig(**COMMON, **RANDOM),
    BioGptConfig(**COMMON, **RANDOM),
    Gemma2Config(**COMMON, **RANDOM, head_dim=16),
    PhimoeConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, input_jitter_noise=0.3, router_jitter_noise=0.3),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", RANDOM_CONFIGS, ids=lambda config: config.model_type)
def test_training_gives_the_log_probabilities_of_sampling_in_every_family(
    config: Any, recompute: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    is_packed = compare_layouts(config, max_row_tokens=48).layout == "packed"
    model = load_policy(tmp_path, dtype=torch.float32, is_packed=is_packed, gradient_checkpointing=recompute).train()
    remove_noise(model)
    assert any(module.training for module in model.modules()) == recompute
    batch = pack_micro_batch(PAIRS, GROUPS, [[1.0, 1.0]] * 2)
    logprobs = compute_response_logprobs(model, batch)
    assert torch.equal(logprobs, compute_response_logprobs(model, batch))
    with torch.no_grad():
        assert torch.allclose(logprobs, compute_response_logprobs(model.eval(), batch), atol=1e-5)
    logprobs.sum().backward()
