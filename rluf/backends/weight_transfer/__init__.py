"""Weight transfer from learners to engines: the sender and the receiver of `weight_sync.transport`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from rluf.backends.weight_transfer.base import WeightReceiver, WeightSender
from rluf.backends.weight_transfer.cuda_ipc import CudaIpcReceiver, CudaIpcSender
from rluf.backends.weight_transfer.disk import DiskReceiver, DiskSender
from rluf.backends.weight_transfer.lora import LoraSender
from rluf.backends.weight_transfer.nccl import NcclReceiver, NcclSender
from rluf.backends.weight_transfer.shm import ShmReceiver, ShmSender
from rluf.config.settings import Settings
from rluf.utils.paths import resolve_cache_folder

if TYPE_CHECKING:
    from vllm.config.parallel import ParallelConfig

RECEIVED_TRANSPORTS = ("shm", "disk", "nccl", "cuda_ipc")
"""Transports with a receiver in the vLLM workers; LoRA adapters are loaded through vLLM's own API."""


def ensure_weight_sender(
    sender: WeightSender | None,
    settings: Settings,
    engine_indices: Mapping[str, int],
    find_rendezvous_address: Callable[[], tuple[str, int]],
) -> WeightSender:
    """`sender`, or a new one where there is none yet, or where its NCCL group is not that of the engines of this sync.

    `engine_indices` has the index of each engine by its name, which differs from one start of an engine to the next.
    """
    if sender is not None:
        if not isinstance(sender, NcclSender) or sender.engine_indices == engine_indices:
            return sender
        # A group takes no new members, and a broadcast to a lost one never ends.
        sender.close()
    return create_weight_sender(settings, *find_rendezvous_address(), engine_indices)


def create_weight_sender(settings: Settings, host: str, port: int, engine_indices: Mapping[str, int]) -> WeightSender:
    """The learner's sender; `host` and `port` (free) are the rendezvous of NCCL with the engines."""
    transport, bucket_bytes = settings.weight_sync.transport, settings.weight_sync.bucket_bytes
    if transport == "shm":
        return ShmSender()
    if transport == "disk":
        return DiskSender(resolve_cache_folder(settings) / "weight_sync")
    if transport == "lora":
        return LoraSender(resolve_cache_folder(settings) / "weight_sync")
    if transport == "cuda_ipc":
        return CudaIpcSender(bucket_bytes)
    return NcclSender(host, port, engine_indices, settings.tensor_parallel, bucket_bytes, settings.timeouts.call_s)


def create_weight_receiver(transport: str, device: torch.device, parallel_config: ParallelConfig) -> WeightReceiver:
    """The receiver of an engine worker whose model is on `device`. `transport` is one of RECEIVED_TRANSPORTS."""
    if transport == "nccl":
        return NcclReceiver(device, parallel_config)
    if transport == "cuda_ipc":
        return CudaIpcReceiver(device)
    return DiskReceiver(device) if transport == "disk" else ShmReceiver(device)
