"""Publishing between processes that share a GPU, over CUDA IPC. Untested without GPUs, but for what is pure.

The wire is that of vLLM's packed engine (vllm/distributed/weight_transfer/ipc_engine.py): each learner rank copies a
bucket into one buffer on its GPU and exports that buffer; the engine on the same GPU maps it and copies the tensors
out. Every rank holds whole weights after a gather, so each serves its own engine, and rank 0 tells all engines where
all buffers are, by GPU. Unlike vLLM's, handles travel as plain numbers and bytes: nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from rluf.backends.weight_transfer.base import Bucket

TYPES = (0, 4, 5)
"""Places in rebuild_cuda_tensor's arguments that hold Python types: tensor class, storage class, dtype."""
SHAPES = (1, 2)
"""Places that hold a size and a stride."""


class IpcSender:
    """What every learner rank publishes through in colocated mode. All ranks call it alike."""

    def __init__(self, bucket_bytes: int) -> None:
        """Nothing is allocated before the first bucket; the buffer has `bucket_bytes`, or what one tensor takes."""
        self._bytes = bucket_bytes
        self._buffer: torch.Tensor | None = None
        self._handle: list[Any] = []

    def offer(self, version: int) -> dict[str, Any]:
        """There is nowhere to meet: what an engine needs comes with each bucket."""
        return {"engine": "ipc", "version": version}

    def send(self, bucket: Bucket) -> dict[str, Any]:
        """Copy `bucket` into this rank's buffer; returns names, dtypes, shapes, sizes in bytes, and handles by GPU.

        The last bucket has been copied out by then, on every GPU. All ranks return the same.
        """
        need = sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
        if self._buffer is None or self._buffer.numel() < need:
            self._export(max(need, self._bytes))
        buffer = self._buffer
        sizes = [] if buffer is None else fill(buffer, bucket)
        torch.cuda.current_stream().synchronize()
        return {**describe(bucket, sizes), "handles": gathered({gpu_name(): self._handle})}

    def finish(self) -> None:
        """Free the buffer: every engine has let go of it."""
        self._buffer, self._handle = None, []
        torch.cuda.ipc_collect()

    def close(self) -> None:
        """As finish; closing twice is harmless."""
        self._buffer, self._handle = None, []

    def _export(self, size: int) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        self._buffer = torch.empty(size, dtype=torch.uint8, device="cuda")
        _, arguments = reduce_tensor(self._buffer)
        self._handle = plain(arguments)


def gpu_name(index: int | None = None) -> str:
    """The UUID of a GPU of this process, by which vLLM names it too."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index).uuid)


def fill(buffer: torch.Tensor, bucket: Bucket) -> list[int]:
    """Copy the tensors of `bucket` one after the other into `buffer` (uint8, flat); returns each one's bytes."""
    sizes, start = [], 0
    for _, tensor in bucket:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        buffer[start : start + raw.numel()].copy_(raw)
        sizes.append(raw.numel())
        start += raw.numel()
    return sizes


def describe(bucket: Bucket, sizes: Sequence[int]) -> dict[str, Any]:
    """What the engines must expect of a bucket, under vLLM's names."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "tensor_sizes": list(sizes),
    }


def gathered(own: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The handles of all ranks by GPU. All ranks call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(own)
    found: list[dict[str, list[Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, dict(own))
    return {gpu: handle for handles in found for gpu, handle in handles.items()}


def plain(arguments: Sequence[Any]) -> list[Any]:
    """rebuild_cuda_tensor's arguments for a flat uint8 tensor, as numbers and bytes: the types are known."""
    return [
        None if place in TYPES else list(value) if place in SHAPES else value for place, value in enumerate(arguments)
    ]


def whole(told: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments that `plain` was given."""
    types = dict(zip(TYPES, (torch.Tensor, torch.storage.TypedStorage, torch.uint8), strict=True))
    return tuple(types.get(place, torch.Size(value) if place in SHAPES else value) for place, value in enumerate(told))
