"""Protocols of weight transfer, and the manifest that makes an engine refuse a wrong or partial update.

The learner sends buckets of named tensors to every engine, in lockstep. Tensors have the names of the Hugging Face
checkpoint. An output head that is tied to the embedding is sent too, under its own name: engines have a repacked copy.

Neither this module nor any transport imports vLLM or Ray at its top, so a learner pays for vLLM only when it syncs over
NCCL.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError, safe_open

from rluf.errors import ModelError, WeightSyncError
from rluf.models.hub import read_weights_index

WeightBucket = Sequence[tuple[str, torch.Tensor]]
"""Named tensors that travel together; each tensor is whole (gathered), on the CPU or on this rank's GPU."""

SINGLE_WEIGHTS_FILE = "model.safetensors"

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
"""Load named tensors into the model of an engine worker."""


class WeightSender(Protocol):
    """Learner side of a transport: used by rank 0 only, or by every rank with CUDA IPC."""

    def begin(self, weight_version: int) -> dict[str, Any]:
        """Start the sync of `weight_version`; returns the transfer info that every engine's begin_weight_update takes.

        Its keys `transport` and `weight_version` are common to all transports.
        """

    def send_bucket(self, bucket: WeightBucket) -> dict[str, Any]:
        """Send one bucket; returns the bucket info that every engine's load_weight_bucket takes.

        Every engine has read the previous bucket by then.
        """

    def end(self) -> None:
        """End the sync: every engine has read every bucket."""

    def close(self) -> None:
        """Free all resources. Closing twice is harmless."""


class WeightReceiver(Protocol):
    """Engine side of a transport, in each vLLM worker."""

    receives_rejected: ClassVar[bool]
    """Whether a bucket that the manifest rejects must be received (and discarded) all the same."""

    def begin(self, transfer_info: Mapping[str, Any]) -> None:
        """Connect to the sender, before the first sync. Raises WeightSyncError where its buckets cannot be reached."""

    def list_tensors(self, bucket_info: Mapping[str, Any]) -> list[tuple[str, Sequence[int]]]:
        """Names and shapes of the tensors of a bucket."""

    def receive_bucket(self, bucket_info: Mapping[str, Any], load_weights: LoadWeights) -> None:
        """Read one bucket and load it. Raises WeightSyncError when it cannot be read."""

    def end(self) -> None:
        """End the sync: release the sender's buffers."""

    def close(self) -> None:
        """Free all resources."""


class WeightManifest:
    """Tensors that one update must contain, by name and shape, and those received so far.

    The list is that of the checkpoint the engine started from, plus the output head when it is tied to the embedding:
    the engine's head is a repacked copy, and without an update it silently remains at the old weights.
    """

    def __init__(self, model_folder: Path, has_tied_embeddings: bool) -> None:
        """Read names and shapes from the safetensors headers in `model_folder`."""
        self.expected_shapes = read_checkpoint_shapes(model_folder)
        self.tied_sources: dict[str, str] = {}
        """For each tied weight that the folder leaves out (mostly lm_head.weight), the tensor that is sent for it."""
        if has_tied_embeddings:
            self.tied_sources = find_tied_sources(model_folder, self.expected_shapes)
        for name, source_name in self.tied_sources.items():
            self.expected_shapes[name] = self.expected_shapes[source_name]
        self._received_names: set[str] = set()

    def reset(self) -> None:
        """Start a new update."""
        self._received_names.clear()

    def check_bucket(self, named_shapes: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Record (name, shape) pairs; WeightSyncError if one is unknown, misshapen or repeated."""
        for name, shape in named_shapes:
            if name not in self.expected_shapes:
                raise WeightSyncError(f"the learner sent {name}, which the engine's checkpoint does not contain")
            expected_shape = self.expected_shapes[name]
            if tuple(shape) != expected_shape:
                raise WeightSyncError(f"{name}: the engine expected shape {expected_shape}, got {tuple(shape)}")
            if name in self._received_names:
                raise WeightSyncError(f"the learner sent {name} twice in one weight sync")
            self._received_names.add(name)

    def check_complete(self) -> None:
        """WeightSyncError naming the tensors that were not sent."""
        missing = sorted(self.expected_shapes.keys() - self._received_names)
        if missing:
            examples = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            raise WeightSyncError(f"{len(missing)} of {len(self.expected_shapes)} tensors were not sent: {examples}")


def has_tied_embeddings(config: Any) -> bool:
    """Whether the output head of a model is its embedding, by its config or that of its language model."""
    model_configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    return any(getattr(model_config, "tie_word_embeddings", False) for model_config in model_configs)


def find_tied_sources(model_folder: Path, stored_names: Iterable[str]) -> dict[str, str]:
    """Weights that the folder leaves out because they are tied, each with the stored weight that it is tied to.

    transformers knows the pair of each architecture. For code in the folder or names of an older release it is
    lm_head.weight and the only embedding.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = set(stored_names)
    config_file = model_folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))
    tied_names = getattr(getattr(transformers, class_name, None), "_tied_weights_keys", None) if class_name else None
    if isinstance(tied_names, dict) and (
        sources := {name: source for name, source in tied_names.items() if source in names and name not in names}
    ):
        return sources
    embeddings = [name for name in names if name.endswith("embed_tokens.weight")]
    return {"lm_head.weight": embeddings[0]} if "lm_head.weight" not in names and len(embeddings) == 1 else {}


def list_checkpoint_files(model_folder: Path) -> list[Path]:
    """Safetensors files with the weights of a Hugging Face folder, as transformers chooses them.

    Those of its index, else model.safetensors, else all.
    """
    # Some repositories ship the same weights a second time (consolidated.safetensors), which the index leaves out.
    indexed_names = read_weights_index(model_folder)
    if indexed_names is not None:
        return sorted(model_folder / name for name in indexed_names)
    if (model_folder / SINGLE_WEIGHTS_FILE).is_file():
        return [model_folder / SINGLE_WEIGHTS_FILE]
    return sorted(model_folder.glob("*.safetensors"))


def read_checkpoint_shapes(model_folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every weight in a Hugging Face folder; reads headers only, no weights.

    Rotary frequencies, which old checkpoints contain, are computed and not weights: they are left out. Raises
    ModelError for a file that is cut, or a Git LFS pointer in the place of one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in list_checkpoint_files(model_folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in sorted(tensors.keys()):
                    if not name.endswith("rotary_emb.inv_freq"):
                        shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file} ({file.stat().st_size:,} bytes) is not a complete safetensors file: {error}; download it "
                "again (git lfs pull, if it is a clone)"
            ) from error
    return shapes


def get_dtype_name(tensor: torch.Tensor) -> str:
    """The dtype without its module, such as bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")
