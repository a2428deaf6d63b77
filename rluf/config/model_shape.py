"""How large a model is, found without loading it: from a table, a local folder's headers, or a guess by its name."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SIZE_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory arithmetic needs: counts, and `note` on where they come from when they are not exact."""

    parameters: int
    layers: int
    hidden: int
    kv_width: int
    """Key-value heads times head size: the KV cache of a token holds twice this a layer."""
    vocabulary: int
    note: str = ""


EMBEDDED: Mapping[str, ModelShape] = {
    "smollm2-135m-instruct": ModelShape(134_515_008, 30, 576, 192, 49_152),
    "minilm": ModelShape(22_713_728, 6, 384, 384, 30_522),
    "multilingual-e5-small": ModelShape(117_653_760, 12, 384, 384, 250_037),
    "tiny": ModelShape(328_704, 2, 128, 64, 259),
    "tiny-encoder": ModelShape(120_832, 2, 64, 64, 261),
}


def model_shape(path: str) -> ModelShape:
    """Shape of an embedded model, of a local Hugging Face folder, or guessed from a size such as 8b in the name."""
    if path in EMBEDDED:
        return EMBEDDED[path]
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        try:
            return _from_folder(folder)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return replace(guessed_shape(path), note=f"{folder}/config.json could not be read; this is a guess by name")
    return guessed_shape(path)


def guessed_shape(name: str) -> ModelShape:
    """Shape of a dense decoder with the parameters that `name` promises (8b, 135M, 8x7b); 1b when it promises none.

    Layers follow from parameters = 12 * layers * hidden^2 with hidden = 128 * layers, the usual proportions; key-value
    heads are taken as a quarter of the heads, the vocabulary as 128k.
    """
    found = SIZE_IN_NAME.findall(name)
    note = "an estimate from the model's name"
    if found:
        experts, size, unit = found[-1]
        parameters = int(experts or 1) * float(size) * (1e9 if unit in "bB" else 1e6)
    else:
        parameters, note = 1e9, "the size is unknown before download; reckoned as 1b"
    layers = max(1, round((parameters / (12 * 128**2)) ** (1 / 3)))
    return ModelShape(int(parameters), layers, 128 * layers, 32 * layers, 128_256, note)


def _from_folder(folder: Path) -> ModelShape:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    shape = ModelShape(0, layers, hidden, kv_heads * head_size, int(config["vocab_size"]))
    counted = sum(_count_safetensors(file) for file in folder.glob("*.safetensors"))
    if counted:
        return replace(shape, parameters=counted)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    attention = 2 * hidden * heads * head_size + 2 * hidden * shape.kv_width
    embedding = shape.vocabulary * hidden * (1 if config.get("tie_word_embeddings", True) else 2)
    total = embedding + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden
    return replace(shape, parameters=total, note="counted from config.json, as there are no safetensors")


def _count_safetensors(file: Path) -> int:
    """Elements of all tensors by the file's header (8 bytes of length, then JSON), no tensor read."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
