"""Size of a model without loading it: from a table, the files of a folder or of the hub's cache, or else its name."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SIZE_IN_NAME_PATTERN = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)

ACTIVE_SIZE_PATTERN = re.compile(r"(?<![A-Za-z0-9.])a(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
"""Parameters that a mixture of experts uses for a token, as in 30b-a3b."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes for the memory arithmetic; `note` gives their origin when they are not exact."""

    parameter_count: int
    layer_count: int
    hidden_size: int
    kv_width: int
    """Half the values of the KV cache per token and layer: key-value heads times head size, where there are heads."""
    vocabulary_size: int
    note: str = ""


EMBEDDED_MODEL_SHAPES: Mapping[str, ModelShape] = {
    "smollm2-135m-instruct": ModelShape(134_515_008, 30, 576, 192, 49_152),
    "minilm": ModelShape(22_713_728, 6, 384, 384, 30_522),
    "multilingual-e5-small": ModelShape(117_653_760, 12, 384, 384, 250_037),
    "tiny": ModelShape(328_704, 2, 128, 64, 259),
    "tiny-encoder": ModelShape(120_832, 2, 64, 64, 261),
}
HUB_MODEL_SHAPES: Mapping[str, ModelShape] = {
    "qwen2.5-0.5b": ModelShape(494_032_768, 24, 896, 128, 151_936),
    "qwen2.5-1.5b": ModelShape(1_543_714_304, 28, 1536, 256, 151_936),
    "qwen2.5-3b": ModelShape(3_085_938_688, 36, 2048, 256, 151_936),
    "qwen2.5-7b": ModelShape(7_615_616_512, 28, 3584, 512, 152_064),
    "qwen2.5-14b": ModelShape(14_770_033_664, 48, 5120, 1024, 152_064),
    "qwen2.5-32b": ModelShape(32_763_876_352, 64, 5120, 1024, 152_064),
    "qwen2.5-72b": ModelShape(72_706_203_648, 80, 8192, 1024, 152_064),
    "qwen3-0.6b": ModelShape(596_049_920, 28, 1024, 1024, 151_936),
    "qwen3-1.7b": ModelShape(1_720_574_976, 28, 2048, 1024, 151_936),
    "qwen3-4b": ModelShape(4_022_468_096, 36, 2560, 1024, 151_936),
    "qwen3-8b": ModelShape(8_190_735_360, 36, 4096, 1024, 151_936),
    "qwen3-14b": ModelShape(14_768_307_200, 40, 5120, 1024, 151_936),
    "qwen3-32b": ModelShape(32_762_123_264, 64, 5120, 1024, 151_936),
    "qwen3-30b-a3b": ModelShape(30_532_122_624, 48, 2048, 512, 151_936),
    "qwen3-235b-a22b": ModelShape(235_093_634_560, 94, 4096, 512, 151_936),
    "llama-3-8b": ModelShape(8_030_261_248, 32, 4096, 1024, 128_256),
    "llama-3-70b": ModelShape(70_553_706_496, 80, 8192, 1024, 128_256),
    "llama-3.2-1b": ModelShape(1_235_814_400, 16, 2048, 512, 128_256),
    "llama-3.2-3b": ModelShape(3_212_749_824, 28, 3072, 1024, 128_256),
    "llama-3.1-8b": ModelShape(8_030_261_248, 32, 4096, 1024, 128_256),
    "llama-3.1-70b": ModelShape(70_553_706_496, 80, 8192, 1024, 128_256),
    "llama-3.1-405b": ModelShape(405_853_388_800, 126, 16384, 1024, 128_256),
    "llama-3.3-70b": ModelShape(70_553_706_496, 80, 8192, 1024, 128_256),
    "mistral-7b-v0.1": ModelShape(7_241_732_096, 32, 4096, 1024, 32_000),
    "mistral-7b-v0.2": ModelShape(7_241_732_096, 32, 4096, 1024, 32_000),
    "mistral-7b-v0.3": ModelShape(7_248_023_552, 32, 4096, 1024, 32_768),
    "mixtral-8x7b-v0.1": ModelShape(46_702_792_704, 32, 4096, 1024, 32_000),
    "gemma-2-2b": ModelShape(2_614_341_888, 26, 2304, 1024, 256_000),
    "gemma-2-9b": ModelShape(9_241_705_984, 42, 3584, 2048, 256_000),
    "gemma-2-27b": ModelShape(27_227_128_320, 46, 4608, 2048, 256_000),
    "gemma-3-1b": ModelShape(999_885_952, 26, 1152, 256, 262_144),
    "gemma-3-4b": ModelShape(4_300_079_472, 34, 2560, 1024, 262_208),
    "gemma-3-12b": ModelShape(12_187_325_040, 48, 3840, 2048, 262_208),
    "gemma-3-27b": ModelShape(27_432_406_640, 62, 5376, 2048, 262_208),
    "phi-4": ModelShape(14_659_507_200, 40, 5120, 1280, 100_352),
}
"""Models on the hub by repository name without owner and variant, from their config.json."""
VARIANT_PATTERN = re.compile(r"-(instruct|base|thinking|it|pt)(-\d{4})?(?=-v\d|$)")
"""Piece of a name that does not change the sizes, as in Qwen3-4B-Instruct-2507 and Mistral-7B-Instruct-v0.3."""


LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
UNGATED_MODEL_TYPES = frozenset(
    ("bert", "bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "nemotron", "opt", "phi",
     "roberta", "starcoder2", "xlm-roberta")
)  # fmt: skip
"""Families whose feed-forward part has two matrices; the others have three, one of them a gate."""


def estimate_model_shape(model_path: str) -> ModelShape:
    """Shape of an embedded model, a Hugging Face folder or a hub id, else estimated from a size such as 8b in the name.

    The shape of a hub id comes from its files in the hub's cache, or from a table of common models.
    """
    if model_path in EMBEDDED_MODEL_SHAPES:
        return EMBEDDED_MODEL_SHAPES[model_path]
    folder, known_shape = Path(model_path).expanduser(), None
    if not folder.exists() and "/" in model_path:
        hub_name = VARIANT_PATTERN.sub("", model_path.rpartition("/")[2].lower().removeprefix("meta-"))
        folder, known_shape = _find_cached_snapshot(model_path) or folder, HUB_MODEL_SHAPES.get(hub_name)
    if (folder / "config.json").is_file():
        try:
            return _read_shape_from_folder(folder)
        except (OSError, ValueError, KeyError, TypeError, StopIteration, struct.error):
            note = f"{folder}/config.json could not be read; estimated from the name"
            return known_shape or replace(guess_shape_from_name(model_path), note=note)
    return known_shape or guess_shape_from_name(model_path)


def _find_cached_snapshot(hub_id: str) -> Path | None:
    """The newest downloaded snapshot of a hub id that has a config.json; None if there is none."""
    # As huggingface_hub finds it, which is not imported: a dry run starts without it.
    hf_home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    named_cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    cache = Path(named_cache or f"{hf_home}/hub").expanduser()
    snapshots = (cache / f"models--{hub_id.replace('/', '--')}" / "snapshots").glob("*/config.json")
    return max((file.parent for file in snapshots), key=lambda folder: folder.stat().st_mtime, default=None)


def guess_shape_from_name(model_name: str) -> ModelShape:
    """Shape of a decoder with the parameter count in `model_name` (8b, 135M, 8x7b, 30b-a3b); 1b when it has none.

    Layers follow from parameters = 12 * layers * hidden^2 with hidden = 128 * layers, the usual proportions; a quarter
    of the heads are assumed to be key-value heads, and a vocabulary of 128k. The layers of a mixture of experts are
    those of a dense model of one expert's size, or of the size that is active for a token.
    """
    matches, active_sizes = SIZE_IN_NAME_PATTERN.findall(model_name), ACTIVE_SIZE_PATTERN.findall(model_name)
    note = "an estimate from the model's name"
    if matches:
        experts, size, unit = matches[-1]
        dense_parameters = float(size) * (1e9 if unit in "bB" else 1e6)
        parameters = int(experts or 1) * dense_parameters
        if active_sizes:
            dense_parameters = float(active_sizes[-1][0]) * (1e9 if active_sizes[-1][1] in "bB" else 1e6)
        if experts or active_sizes:
            note += ", a mixture of experts, which trains on GPUs only"
    else:
        parameters = dense_parameters = 1e9
        note = "the size is unknown before the download; assumed to be 1b"
    layers = max(1, round((dense_parameters / (12 * 128**2)) ** (1 / 3)))
    return ModelShape(int(parameters), layers, 128 * layers, 32 * layers, 128_256, note)


def _read_shape_from_folder(folder: Path) -> ModelShape:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    config = config.get("text_config", config)  # vision-language models nest the decoder's config
    hidden_size = _read_size(config, "hidden_size", "n_embd", "d_model")
    layers, heads = (
        _read_size(config, *LAYER_COUNT_KEYS),
        _read_size(config, "num_attention_heads", "n_head", "n_heads"),
    )
    head_size = int(config.get("head_dim") or hidden_size // heads)
    vocabulary_size = _read_size(config, "vocab_size", "padded_vocab_size")
    if config.get("kv_lora_rank"):
        # Multi-head latent attention caches one compressed vector per token for keys and values of all heads.
        kv_width = math.ceil((int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0)) / 2)
    else:
        kv_width = _count_kv_heads(config, heads) * head_size
    shape = ModelShape(0, layers, hidden_size, kv_width, vocabulary_size)
    # Elements of packed weights (int4 in int32) are not parameters.
    files = [] if quantization else list_weight_files(folder)
    if files and all(file.is_file() for file in files):
        return replace(shape, parameter_count=sum(_count_safetensors_parameters(file) for file in files))
    embedding = vocabulary_size * hidden_size * (1 if config.get("tie_word_embeddings", True) else 2)
    blocks = layers * (_count_attention_parameters(config, shape, heads, head_size) + 2 * hidden_size)
    total = embedding + blocks + _count_feed_forward_parameters(config, shape) + hidden_size
    reason = "its weights are quantized" if quantization else "not all of its safetensors are there"
    return replace(shape, parameter_count=total, note=f"computed from config.json, as {reason}")


def list_weight_files(folder: Path) -> list[Path]:
    """Safetensors files that transformers loads from a folder: those of its index, present or not, else all."""
    # Some repositories ship the same weights a second time (consolidated.safetensors), which must not count twice.
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({folder / str(name) for name in names})
    single_file = folder / "model.safetensors"
    return [single_file] if single_file.is_file() else sorted(folder.glob("*.safetensors"))


def _read_size(config: Mapping[str, Any], *names: str) -> int:
    """The first size that the config has among `names`. Raises StopIteration if it has none."""
    return next(int(config[name]) for name in names if config.get(name))


def _count_kv_heads(config: Mapping[str, Any], heads: int) -> int:
    # Falcon's newer models keep multi_query=true, which then has no effect.
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    attention = config.get("attn_config") or {}
    names = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
    return int(next((config[n] for n in names if config.get(n)), 0) or attention.get("kv_n_heads") or heads)


def _count_attention_parameters(config: Mapping[str, Any], shape: ModelShape, heads: int, head_size: int) -> int:
    """Weights of one layer's attention without biases."""
    hidden = shape.hidden_size
    if not config.get("kv_lora_rank"):
        return 2 * hidden * heads * head_size + 2 * hidden * shape.kv_width
    kv_rank, rope = int(config["kv_lora_rank"]), int(config.get("qk_rope_head_dim") or 0)
    key, value = int(config.get("qk_nope_head_dim") or head_size), int(config.get("v_head_dim") or head_size)
    query_rank = int(config.get("q_lora_rank") or 0)
    queries = query_rank * (hidden + heads * (key + rope)) if query_rank else hidden * heads * (key + rope)
    return queries + hidden * (kv_rank + rope) + kv_rank * heads * (key + value) + heads * value * hidden


def _count_feed_forward_parameters(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Weights of all layers' feed-forward parts: dense layers, experts with their routers, and shared experts."""
    hidden, layers = shape.hidden_size, shape.layer_count
    default_size = int(config.get("expansion_ratio") or 4) * hidden
    names = ("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
    dense_size = int(next((config[name] for name in names if config.get(name)), default_size))
    matrices = 2 if config.get("model_type") in UNGATED_MODEL_TYPES else 3
    experts = max(int(config.get(name) or 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if not experts:
        return layers * matrices * hidden * dense_size
    expert_size = int(config.get("moe_intermediate_size") or config.get("intermediate_size") or dense_size)
    shared_size = int(config.get("n_shared_experts") or 0) * expert_size
    shared_size = int(config.get("shared_expert_intermediate_size") or shared_size)
    dense_layers = int(config.get("first_k_dense_replace") or 0)
    dense_layers += (layers - dense_layers) - (layers - dense_layers) // int(
        config.get("interleave_moe_layer_step") or 1
    )
    expert_layer = matrices * hidden * (experts * expert_size + shared_size) + hidden * experts
    return dense_layers * matrices * hidden * dense_size + (layers - dense_layers) * expert_layer


def _count_safetensors_parameters(file: Path) -> int:
    """Elements of all tensors from the file's header (8 bytes of length, then JSON); no tensor is read."""
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(header_bytes))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
