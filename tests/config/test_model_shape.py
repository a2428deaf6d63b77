"""Shapes that the plan reads from a folder, against the models that transformers builds from the same config.json."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from rluf.config.model_shape import HUB_MODEL_SHAPES, ModelShape, estimate_model_shape

LLAMA_SIZES = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 5000, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 96, "num_experts": 16}
LATENT_ATTENTION = {
    "num_key_value_heads": 8, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "moe_intermediate_size": 96, "n_routed_experts": 16, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama": ("Llama", {}, 64),
    "Llama with one head for inputs and outputs": ("Llama", {"tie_word_embeddings": True}, 64),
    "Qwen3, heads wider than hidden / heads": ("Qwen3", {"head_dim": 64}, 128),
    "Gemma 3": ("Gemma3Text", {"head_dim": 64, "num_key_value_heads": 1}, 64),
    "Mixtral, experts in every layer": ("Mixtral", {"num_local_experts": 4}, 64),
    "Qwen3-MoE": ("Qwen3Moe", {**EXPERTS, "head_dim": 64}, 128),
    "Qwen2-MoE, a shared expert": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 384}, 64),
    "gpt-oss": ("GptOss", {"num_local_experts": 8, "head_dim": 64}, 128),
    "DeepSeek-V3, compressed keys and values": (
        "DeepseekV3", {**LATENT_ATTENTION, "n_shared_experts": 1, "q_lora_rank": 96, "n_group": 1, "topk_group": 1}, 40
    ),
    "DeepSeek-V2-Lite, queries are not compressed": (
        "DeepseekV2", {**LATENT_ATTENTION, "n_shared_experts": 2, "q_lora_rank": None}, 40
    ),
    "GPT-NeoX, no gate": ("GPTNeoX", {"intermediate_size": 1024, "num_key_value_heads": 8}, 256),
    "Starcoder2, no gate": ("Starcoder2", {"intermediate_size": 1024}, 64),
    "Nemotron, no gate": ("Nemotron", {"head_dim": 32}, 64),
    "Falcon, one key-value head": ("Falcon", {"multi_query": True, "intermediate_size": 1024}, 32),
    "Falcon 40B, several key-value heads": (
        "Falcon", {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2,
                   "intermediate_size": 1024}, 64
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_family_are_counted_from_its_config(family: str, tmp_path: Path) -> None:
    import torch
    import transformers

    name, sizes, kv_width = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**LLAMA_SIZES, **sizes})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = estimate_model_shape(str(tmp_path))
    actual = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameter_count == pytest.approx(actual, rel=0.01), "only biases, norms of heads and sinks are missing"
    assert (shape.kv_width, shape.layer_count, shape.hidden_size) == (kv_width, 4, 256)


QWEN3 = {
    "0.6b": (1024, 3072, 28, 16), "1.7b": (2048, 6144, 28, 16), "4b": (2560, 9728, 36, 32),
    "8b": (4096, 12288, 36, 32), "14b": (5120, 17408, 40, 40), "32b": (5120, 25600, 64, 64),
}  # fmt: skip


def qwen3_sizes(size: str) -> tuple[str, dict[str, Any]]:
    hidden, intermediate, layers, heads = QWEN3[size]
    return "Qwen3", {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "tie_word_embeddings": float(size[:-1]) < 8,
    }  # fmt: skip


def sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "tie_word_embeddings": False, **others,
    }  # fmt: skip


GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 256}
GEMMA_27B: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 128}
VISION_PARAMETERS = 416_867_184
"""Parameters of Gemma 3's encoder of images; a projection of 1152 x hidden size comes with it."""
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"qwen3-{size}": qwen3_sizes(size) for size in QWEN3},
    "qwen2.5-14b": ("Qwen2", sizes(5120, 13824, 48, 40, 8, 152_064)),
    "qwen2.5-32b": ("Qwen2", sizes(5120, 27648, 64, 40, 8, 152_064)),
    "qwen2.5-72b": ("Qwen2", sizes(8192, 29568, 80, 64, 8, 152_064)),
    "qwen3-30b-a3b": (
        "Qwen3Moe", sizes(2048, 6144, 48, 32, 4, 151_936, moe_intermediate_size=768, num_experts=128, head_dim=128)
    ),
    "qwen3-235b-a22b": (
        "Qwen3Moe", sizes(4096, 12288, 94, 64, 4, 151_936, moe_intermediate_size=1536, num_experts=128, head_dim=128)
    ),
    "llama-3-8b": ("Llama", sizes(4096, 14336, 32, 32, 8, 128_256)),
    "llama-3-70b": ("Llama", sizes(8192, 28672, 80, 64, 8, 128_256)),
    "llama-3.1-405b": ("Llama", sizes(16384, 53248, 126, 128, 8, 128_256)),
    "mistral-7b-v0.1": ("Mistral", sizes(4096, 14336, 32, 32, 8, 32_000)),
    "mistral-7b-v0.3": ("Mistral", sizes(4096, 14336, 32, 32, 8, 32_768)),
    "mixtral-8x7b-v0.1": ("Mixtral", sizes(4096, 14336, 32, 32, 8, 32_000, num_local_experts=8)),
    "gemma-2-2b": ("Gemma2", sizes(2304, 9216, 26, 8, 4, 256_000, **GEMMA)),
    "gemma-2-9b": ("Gemma2", sizes(3584, 14336, 42, 16, 8, 256_000, **GEMMA)),
    "gemma-2-27b": ("Gemma2", sizes(4608, 36864, 46, 32, 16, 256_000, **GEMMA_27B)),
    "gemma-3-1b": ("Gemma3Text", sizes(1152, 6912, 26, 4, 1, 262_144, **GEMMA)),
    "gemma-3-4b": ("Gemma3Text", sizes(2560, 10240, 34, 8, 4, 262_208, **GEMMA)),
    "gemma-3-12b": ("Gemma3Text", sizes(3840, 15360, 48, 16, 8, 262_208, **GEMMA)),
    "gemma-3-27b": ("Gemma3Text", sizes(5376, 21504, 62, 32, 16, 262_208, **GEMMA_27B)),
    "phi-4": ("Phi3", sizes(5120, 17920, 40, 40, 10, 100_352, pad_token_id=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_table_has_the_sizes_of_the_models(name: str) -> None:
    import torch
    import transformers

    family, config_sizes = TABLE[name]
    config = getattr(transformers, f"{family}Config")(**config_sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if name in ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b"):
        parameters += VISION_PARAMETERS + 1152 * config.hidden_size
    head_size = config_sizes.get("head_dim", config.hidden_size // config.num_attention_heads)
    assert HUB_MODEL_SHAPES[name] == ModelShape(
        parameters, config.num_hidden_layers, config.hidden_size, head_size * config.num_key_value_heads,
        config.vocab_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "table_name"),
    [
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("google/gemma-3-1b-pt", "gemma-3-1b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b-v0.1"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("microsoft/phi-4", "phi-4"),
    ],
)
def test_names_of_other_families_are_in_the_table(name: str, table_name: str) -> None:
    assert estimate_model_shape(name) == HUB_MODEL_SHAPES[table_name]


def test_sizes_that_a_downloaded_config_leaves_to_its_class_are_those_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma 3's: heads and vocabulary are in the code only."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--google--gemma-3-4b-it" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 2560, "num_hidden_layers": 34}}))
    assert estimate_model_shape("google/gemma-3-4b-it") == HUB_MODEL_SHAPES["gemma-3-4b"]


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Instruct-2507", "mirror/qwen3-4b-thinking-2507"]
)
def test_variants_of_a_model_have_its_shape(name: str) -> None:
    assert estimate_model_shape(name) == HUB_MODEL_SHAPES["qwen3-4b"]


def write_folder(folder: Path, shapes_by_file: dict[str, dict[str, list[int]]], **config: Any) -> str:
    """A folder with config.json and safetensors files that have headers only."""
    (folder / "config.json").write_text(json.dumps({**LLAMA_SIZES, "model_type": "llama", **config}))
    for file_name, shapes in shapes_by_file.items():
        header = json.dumps({n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()})
        (folder / file_name).write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return str(folder)


def write_index(folder: Path, *file_names: str) -> None:
    index = {"weight_map": {f"tensor {position}": name for position, name in enumerate(file_names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_that_a_repository_ships_twice_count_once(tmp_path: Path) -> None:
    files = {"model-1-of-2.safetensors": {"a": [10]}, "model-2-of-2.safetensors": {"b": [20]}}
    folder = write_folder(tmp_path, {**files, "consolidated.safetensors": {"a": [10], "b": [20]}})
    write_index(tmp_path, *files, *files)
    assert estimate_model_shape(folder).parameter_count == 30


def test_a_single_file_of_weights_counts_without_copies(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"model.safetensors": {"a": [10]}, "model.fp32.safetensors": {"a": [10]}})
    assert estimate_model_shape(folder).parameter_count == 10


def test_a_download_that_has_not_ended_is_counted_from_the_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"model-1-of-2.safetensors": {"a": [10]}})
    write_index(tmp_path, "model-1-of-2.safetensors", "model-2-of-2.safetensors")
    shape = estimate_model_shape(folder)
    assert shape.parameter_count > 3e6 and "not all of its safetensors are there" in shape.note


def test_elements_of_quantized_weights_are_not_parameters(tmp_path: Path) -> None:
    quantization = {"quant_method": "awq", "bits": 4}
    folder = write_folder(tmp_path, {"model.safetensors": {"a.qweight": [10]}}, quantization_config=quantization)
    shape = estimate_model_shape(folder)
    assert shape.parameter_count > 3e6 and "quantized" in shape.note


@pytest.mark.parametrize(
    ("variables", "cache"),
    [
        ({"HF_HUB_CACHE": "{}/a"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "{}/b"}, "b"),
        ({"HF_HOME": "{}/c"}, "c/hub"),
        ({"XDG_CACHE_HOME": "{}/d"}, "d/huggingface/hub"),
        ({"HOME": "{}/e"}, "e/.cache/huggingface/hub"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_downloaded_model_is_found_where_the_hub_puts_it(
    variables: dict[str, str], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    snapshot = tmp_path / cache / "models--owner--model" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    write_folder(snapshot, {"model.safetensors": {"a": [7]}})
    assert estimate_model_shape("owner/model").parameter_count == 7
