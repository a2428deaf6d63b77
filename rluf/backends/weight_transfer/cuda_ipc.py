"""CUDA IPC transport between processes that share a GPU. Untested without GPUs, except for the pure functions.

The buffer layout is that of vLLM's packed engine (vllm/distributed/weight_transfer/ipc_engine.py): each learner rank
copies a bucket into one buffer on its GPU and exports that buffer; the engine on the same GPU maps it and copies the
tensors out. Every rank has whole weights after a gather, so each serves its own engine, and rank 0 sends the handles of
all buffers, by GPU, to all engines. Unlike vLLM's, handles travel as plain numbers and bytes: nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from rluf.backends.weight_transfer.base import LoadWeights, WeightBucket, get_dtype_name
from rluf.errors import WeightSyncError

TYPE_POSITIONS = (0, 4, 5)
"""Positions in rebuild_cuda_tensor's arguments with Python types: tensor class, storage class, dtype."""
SHAPE_POSITIONS = (1, 2)
"""Positions with a size and a stride."""


class CudaIpcSender:
    """Export buckets from a buffer on this rank's GPU. All ranks call every method in lockstep."""

    def __init__(self, bucket_bytes: int) -> None:
        """Allocate nothing before the first bucket; the buffer has `bucket_bytes`, or more for one larger tensor."""
        self._buffer_bytes = bucket_bytes
        self._buffer: torch.Tensor | None = None
        self._handle: list[Any] = []

    def begin(self, weight_version: int) -> dict[str, Any]:
        """Transfer info without a rendezvous: each bucket info has all that an engine needs."""
        return {"transport": "cuda_ipc", "weight_version": weight_version}

    def send_bucket(self, bucket: WeightBucket) -> dict[str, Any]:
        """Copy `bucket` into this rank's buffer; returns names, dtypes, shapes, sizes in bytes, and handles by GPU.

        The last bucket has been copied out by then, on every GPU. All ranks return the same.
        """
        byte_count = sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
        if self._buffer is None or self._buffer.numel() < byte_count:
            self._allocate_buffer(max(byte_count, self._buffer_bytes))
        buffer = self._buffer
        tensor_sizes = [] if buffer is None else fill_buffer(buffer, bucket)
        # The engine reads the buffer from another process, which knows nothing of this process's streams.
        torch.cuda.current_stream().synchronize()
        handles = gather_ipc_handles({get_gpu_uuid(): self._handle})
        return {**describe_bucket(bucket, tensor_sizes), "handles": handles}

    def end(self) -> None:
        """Free the buffer: every engine has released it."""
        self._buffer, self._handle = None, []
        torch.cuda.ipc_collect()

    def close(self) -> None:
        """Free the buffer. Closing twice is harmless."""
        self._buffer, self._handle = None, []

    def _allocate_buffer(self, byte_count: int) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        self._buffer = torch.empty(byte_count, dtype=torch.uint8, device="cuda")
        # Exported once per buffer, not per bucket: torch counts one release by the consumer for each export.
        _, arguments = reduce_tensor(self._buffer)
        self._handle = to_plain_arguments(arguments)


class CudaIpcReceiver:
    """Copy buckets out of the learner's buffer on this worker's GPU."""

    receives_rejected: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        """`device` is the GPU of this worker."""
        self._device = device
        self._importer: Any = None

    def begin(self, transfer_info: Mapping[str, Any]) -> None:
        """Create the importer, which maps the learner's buffer once for all buckets of a sync."""
        from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter

        self._importer = PackedBufferImporter()

    def list_tensors(self, bucket_info: Mapping[str, Any]) -> list[tuple[str, Sequence[int]]]:
        """Names and shapes of the tensors of a bucket."""
        return list(zip(bucket_info["names"], bucket_info["shapes"], strict=True))

    def receive_bucket(self, bucket_info: Mapping[str, Any], load_weights: LoadWeights) -> None:
        """Copy a bucket out of the buffer on this GPU and load it. Raises WeightSyncError where there is none."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_consumer

        gpu_uuid, handles = get_gpu_uuid(self._device.index), bucket_info["handles"]
        if gpu_uuid not in handles:
            raise WeightSyncError(
                f"no learner rank runs on this engine's GPU {gpu_uuid} (they run on {', '.join(sorted(handles))}); "
                "with weight_sync.transport=cuda_ipc each engine shares its GPU with one rank"
            )
        load_weights(
            packed_ipc_consumer(
                ipc_handle={gpu_uuid: from_plain_arguments(handles[gpu_uuid])},
                names=bucket_info["names"],
                shapes=bucket_info["shapes"],
                dtype_names=bucket_info["dtype_names"],
                tensor_sizes=bucket_info["tensor_sizes"],
                device_index=self._device.index,
                importer=self._importer,
            )
        )

    def end(self) -> None:
        """Release the learner's buffer, so that the learner can free it."""
        if self._importer is not None:
            self._importer.close()

    def close(self) -> None:
        """Release the learner's buffer."""
        self.end()


def get_gpu_uuid(device_index: int | None = None) -> str:
    """UUID of a GPU of this process (by default the current one), by which vLLM identifies it too."""
    # Indices differ between processes with other CUDA_VISIBLE_DEVICES; the UUID does not.
    index = torch.cuda.current_device() if device_index is None else device_index
    return str(torch.cuda.get_device_properties(index).uuid)


def fill_buffer(buffer: torch.Tensor, bucket: WeightBucket) -> list[int]:
    """Copy the tensors of `bucket` one after the other into `buffer` (uint8, flat); returns the bytes of each."""
    tensor_sizes, start = [], 0
    for _, tensor in bucket:
        tensor_bytes = tensor.detach().contiguous().view(-1).view(torch.uint8)
        buffer[start : start + tensor_bytes.numel()].copy_(tensor_bytes)
        tensor_sizes.append(tensor_bytes.numel())
        start += tensor_bytes.numel()
    return tensor_sizes


def describe_bucket(bucket: WeightBucket, tensor_sizes: Sequence[int]) -> dict[str, Any]:
    """What the engines must expect of a bucket, under vLLM's names."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [get_dtype_name(tensor) for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "tensor_sizes": list(tensor_sizes),
    }


def gather_ipc_handles(local_handles: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The handles of all ranks by GPU. All ranks call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(local_handles)
    rank_handles: list[dict[str, list[Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(rank_handles, dict(local_handles))
    return {gpu_uuid: handle for handles in rank_handles for gpu_uuid, handle in handles.items()}


def to_plain_arguments(arguments: Sequence[Any]) -> list[Any]:
    """rebuild_cuda_tensor's arguments for a flat uint8 tensor as numbers and bytes; its types are constants."""
    return [
        None if position in TYPE_POSITIONS else list(value) if position in SHAPE_POSITIONS else value
        for position, value in enumerate(arguments)
    ]


def from_plain_arguments(plain_arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments that `to_plain_arguments` was given."""
    types = dict(zip(TYPE_POSITIONS, (torch.Tensor, torch.storage.TypedStorage, torch.uint8), strict=True))
    return tuple(
        types.get(position, torch.Size(value) if position in SHAPE_POSITIONS else value)
        for position, value in enumerate(plain_arguments)
    )
