"""LoRA transport: only the adapters, as a PEFT folder on a shared disk that vLLM loads by itself."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rluf.backends.weight_transfer.base import WeightBucket, read_checkpoint_shapes
from rluf.errors import ResourceError, WeightSyncError
from rluf.models.lora import ALPHA_PER_RANK

LORA_A_SUFFIX, LORA_B_SUFFIX = "lora_A.weight", "lora_B.weight"
PEFT_NAME_PREFIX = "base_model.model."
"""PEFT's prefix of module names."""
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
NAMES_WITHOUT_ADAPTER = ("embed", "lm_head", ".wte.", ".wpe.")
"""Parts of the names of embeddings, GPT-2's too, and of output heads."""
VLLM_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as max_lora_rank."""


class LoraSender:
    """Write the adapters to a new folder that the engines can read; all matrices are one bucket."""

    def __init__(self, parent_folder: Path) -> None:
        """Adapters go to a new folder under `parent_folder`."""
        self._folder = parent_folder / secrets.token_hex(8)
        self._weight_version = 0

    def begin(self, weight_version: int) -> dict[str, Any]:
        """Transfer info without a rendezvous: the bucket info has the folder."""
        self._weight_version = weight_version
        return {"transport": "lora", "weight_version": weight_version}

    def send_bucket(self, bucket: WeightBucket) -> dict[str, Any]:
        """Write the adapter; returns its folder. Raises ResourceError when it cannot be written."""
        adapter_folder = self._folder / str(self._weight_version)
        # A repeated sync of a version, after an engine was lost, replaces what the first try wrote.
        shutil.rmtree(adapter_folder, ignore_errors=True)
        write_adapter(adapter_folder, dict(bucket))
        return {"path": str(adapter_folder)}

    def end(self) -> None:
        """Delete the adapter: engines have loaded it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Delete the folder. Closing twice is harmless."""
        self.end()


def select_max_lora_rank(rank: int) -> int:
    """The smallest max_lora_rank of vLLM that fits adapters of `rank`."""
    return next((max_rank for max_rank in VLLM_MAX_LORA_RANKS if max_rank >= rank), VLLM_MAX_LORA_RANKS[-1])


def get_lora_names(weight_name: str) -> tuple[str, str]:
    """PEFT's names of the two matrices that change a weight: lora_A [rank, in] and lora_B [out, rank]."""
    module_name = PEFT_NAME_PREFIX + weight_name.removesuffix("weight")
    return module_name + LORA_A_SUFFIX, module_name + LORA_B_SUFFIX


def write_adapter(adapter_folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the matrices (by get_lora_names) as a PEFT folder. Raises ResourceError when it cannot be written."""
    lora_a_names = [name for name in tensors if name.endswith(LORA_A_SUFFIX)]
    rank = int(tensors[lora_a_names[0]].shape[0])
    adapter_config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(ALPHA_PER_RANK * rank),
        "target_modules": list_target_modules(name.removesuffix(LORA_A_SUFFIX) + "weight" for name in lora_a_names),
        "bias": "none",
        "base_model_name_or_path": "",
    }
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        adapter_folder.mkdir(parents=True)
        save_file(copies, adapter_folder / ADAPTER_WEIGHTS_FILE)
        (adapter_folder / "adapter_config.json").write_text(json.dumps(adapter_config))
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"an adapter could not be written to {adapter_folder}: {error}; free some disk") from error


def build_zero_adapter(model_folder: Path, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An adapter that changes nothing, for an engine before its first sync.

    It has the matrices of one weight only: a module that an adapter does not name stays unchanged.
    """
    shapes = read_linear_shapes(model_folder)
    weight_name, (out_features, in_features) = next((name, shape) for name, shape in shapes.items() if len(shape) == 2)
    lora_a, lora_b = get_lora_names(weight_name)
    return {lora_a: torch.zeros(rank, in_features, dtype=dtype), lora_b: torch.zeros(out_features, rank, dtype=dtype)}


def read_linear_shapes(model_folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes [out, in] of the weights that may have an adapter: matrices except embeddings and the output head."""
    return {
        name: shape
        for name, shape in read_checkpoint_shapes(model_folder).items()
        if len(shape) == 2 and name.endswith(".weight") and not any(word in name for word in NAMES_WITHOUT_ADAPTER)
    }


def list_target_modules(weight_names: Iterable[str]) -> list[str]:
    """Last names of the modules of the weights: q_proj for model.layers.0.self_attn.q_proj.weight."""
    return sorted({weight_name.split(".")[-2] for weight_name in weight_names})


def check_adapter(adapter_folder: Path, expected_shapes: Mapping[str, Sequence[int]]) -> None:
    """WeightSyncError unless the adapter has both matrices, in the right shape, of every expected weight and no other.

    vLLM itself ignores missing modules, which would silently keep parts of the old policy.
    """
    try:
        with safe_open(adapter_folder / ADAPTER_WEIGHTS_FILE, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(
            f"cannot read the adapter {adapter_folder}: {error}; weight_sync.transport=lora needs run.cache in a "
            "folder that learner and engines share"
        ) from error
    for weight_name, (out_features, in_features) in expected_shapes.items():
        lora_a, lora_b = get_lora_names(weight_name)
        for name in (lora_a, lora_b):
            if name not in shapes:
                raise WeightSyncError(
                    f"the learner sent no {name}, which {weight_name} of the engine's checkpoint needs"
                )
        adapter_shapes = (shapes.pop(lora_a), shapes.pop(lora_b))
        rank = adapter_shapes[0][0]
        if adapter_shapes != ((rank, in_features), (out_features, rank)):
            raise WeightSyncError(
                f"the learner sent an adapter of shapes {adapter_shapes} for {weight_name}, which is "
                f"{out_features} x {in_features}"
            )
    if shapes:
        raise WeightSyncError(
            f"the learner sent {sorted(shapes)[0]}, which changes no weight of the engine's checkpoint"
        )
