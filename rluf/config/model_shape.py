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
    """Key-value heads times head size: the KV cache holds two such vectors per token and layer."""
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
    "llama-3.2-1b": ModelShape(1_235_814_400, 16, 2048, 512, 128_256),
    "llama-3.2-3b": ModelShape(3_212_749_824, 28, 3072, 1024, 128_256),
    "llama-3.1-8b": ModelShape(8_030_261_248, 32, 4096, 1024, 128_256),
    "llama-3.1-70b": ModelShape(70_553_706_496, 80, 8192, 1024, 128_256),
    "llama-3.3-70b": ModelShape(70_553_706_496, 80, 8192, 1024, 128_256),
}
"""Models on the hub by repository name without owner and -Instruct, from their config.json."""


LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def estimate_model_shape(model_path: str) -> ModelShape:
    """Shape of an embedded model, a Hugging Face folder or a hub id, else estimated from a size such as 8b in the name.

    The shape of a hub id comes from its files in the hub's cache, or from a table of common models.
    """
    if model_path in EMBEDDED_MODEL_SHAPES:
        return EMBEDDED_MODEL_SHAPES[model_path]
    folder = Path(model_path).expanduser()
    if not folder.exists() and "/" in model_path:
        cached_folder = _find_cached_snapshot(model_path)
        hub_name = model_path.rpartition("/")[2].lower().removeprefix("meta-").removesuffix("-instruct")
        if cached_folder is None and hub_name in HUB_MODEL_SHAPES:
            return HUB_MODEL_SHAPES[hub_name]
        folder = cached_folder or folder
    if (folder / "config.json").is_file():
        try:
            return _read_shape_from_folder(folder)
        except (OSError, ValueError, KeyError, TypeError, StopIteration, struct.error):
            note = f"{folder}/config.json could not be read; estimated from the name"
            return replace(guess_shape_from_name(model_path), note=note)
    return guess_shape_from_name(model_path)


def _find_cached_snapshot(hub_id: str) -> Path | None:
    """The newest downloaded snapshot of a hub id that has a config.json; None if there is none."""
    # As huggingface_hub finds it, which is not imported: a dry run starts without it.
    hf_home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{hf_home}/hub").expanduser()
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
    config = config.get("text_config", config)  # vision-language models nest the decoder's config

    def read_size(*names: str) -> int:
        return next(int(config[name]) for name in names if config.get(name))

    hidden_size = read_size("hidden_size", "n_embd", "d_model")
    layers, heads = read_size(*LAYER_COUNT_KEYS), read_size("num_attention_heads", "n_head", "n_heads")
    head_size = int(config.get("head_dim") or hidden_size // heads)
    kv_heads = 1 if config.get("multi_query") else int(config.get("num_key_value_heads") or heads)
    shape = ModelShape(0, layers, hidden_size, kv_heads * head_size, int(config["vocab_size"]))
    parameter_count = sum(_count_safetensors_parameters(file) for file in folder.glob("*.safetensors"))
    if parameter_count:
        return replace(shape, parameter_count=parameter_count)
    # Without weights: attention with grouped key-value heads, a gated MLP (three matrices) and two norms per layer.
    intermediate_size = int(config.get("intermediate_size") or 4 * hidden_size)
    attention = 2 * hidden_size * heads * head_size + 2 * hidden_size * shape.kv_width
    experts = max(int(config.get(name) or 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if experts:
        intermediate_size = experts * int(config.get("moe_intermediate_size") or intermediate_size)
    embedding = shape.vocabulary_size * hidden_size * (1 if config.get("tie_word_embeddings", True) else 2)
    total = embedding + layers * (attention + 3 * hidden_size * intermediate_size + 2 * hidden_size) + hidden_size
    return replace(shape, parameter_count=total, note="computed from config.json, as there are no safetensors")


def _count_safetensors_parameters(file: Path) -> int:
    """Elements of all tensors from the file's header (8 bytes of length, then JSON); no tensor is read."""
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(header_bytes))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
