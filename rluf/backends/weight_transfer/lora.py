"""LoRA adapters as files that vLLM loads (PEFT's format): what learners write, what engines begin with and check."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rluf.algorithms.lora import ALPHA
from rluf.backends.weight_transfer.manifest import checkpoint_shapes
from rluf.errors import ResourceError, SyncError

DOWN, UP = "lora_A.weight", "lora_B.weight"
ROOT = "base_model.model."
"""What PEFT puts before the name of a module."""
WEIGHTS = "adapter_model.safetensors"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be told to make room for."""


def room_for(rank: int) -> int:
    """The smallest of vLLM's largest ranks that holds adapters of `rank`."""
    return next((room for room in RANKS if room >= rank), RANKS[-1])


def adapter_names(weight: str) -> tuple[str, str]:
    """PEFT's names of the two matrices that change the weight `weight`: down [rank, in] and up [out, rank]."""
    module = ROOT + weight.removesuffix("weight")
    return module + DOWN, module + UP


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the matrices (by adapter_names) as an adapter folder. Raises ResourceError when the disk refuses it."""
    rank = next(int(tensor.shape[0]) for name, tensor in tensors.items() if name.endswith(DOWN))
    told = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(ALPHA * rank),
        "target_modules": kinds_of(name.removesuffix(DOWN) + "weight" for name in tensors if name.endswith(DOWN)),
        "bias": "none",
        "base_model_name_or_path": "",
    }
    try:
        folder.mkdir(parents=True)
        save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
        (folder / "adapter_config.json").write_text(json.dumps(told))
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"an adapter could not be written to {folder}: {error}; free some disk") from error


def no_change(model: Path, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An adapter that changes nothing, for an engine that has not been published to: modules not named have none."""
    weight, (out, width) = next((name, shape) for name, shape in linear_shapes(model).items() if len(shape) == 2)
    down, up = adapter_names(weight)
    return {down: torch.zeros(rank, width, dtype=dtype), up: torch.zeros(out, rank, dtype=dtype)}


def linear_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Shapes [out, in] of the weights that may have an adapter: matrices but for embeddings and the output head."""
    return {
        name: shape
        for name, shape in checkpoint_shapes(model).items()
        if len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in ("embed", "lm_head"))
    }


def kinds_of(weights: Iterable[str]) -> list[str]:
    """Last names of the modules that hold `weights`: q_proj of model.layers.0.self_attn.q_proj.weight."""
    return sorted({weight.split(".")[-2] for weight in weights})


def check_adapter(folder: Path, expected: Mapping[str, Sequence[int]]) -> None:
    """SyncError unless the adapter in `folder` has both matrices, in the right shape, of every weight of `expected`."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SyncError(
            f"cannot read the adapter {folder}: {error}; publish.engine=adapter needs run.cache in a folder that "
            "learner and engines share"
        ) from error
    for weight, (out, width) in expected.items():
        down, up = adapter_names(weight)
        for name in (down, up):
            if name not in shapes:
                raise SyncError(f"the learner sent no {name}, which {weight} of the engine's checkpoint needs")
        found = (shapes.pop(down), shapes.pop(up))
        rank = found[0][0]
        if found != ((rank, width), (out, rank)):
            raise SyncError(f"the learner sent an adapter of shapes {found} for {weight}, which is {out} x {width}")
    if shapes:
        raise SyncError(f"the learner sent {sorted(shapes)[0]}, which changes nothing that the engine's checkpoint has")
