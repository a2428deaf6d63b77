"""NCCL transport: broadcast from the learner's rank 0 to every engine worker. Untested without GPUs.

The protocol is that of vLLM's packed NCCL weight transfer (vllm/distributed/weight_transfer/nccl_engine.py), whose
functions both sides call.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rluf.backends.weight_transfer.base import LoadWeights, WeightBucket, get_dtype_name
from rluf.errors import DeadlineError, WeightSyncError

if TYPE_CHECKING:
    from vllm.config.parallel import ParallelConfig


class NcclSender:
    """Broadcast buckets from this rank's GPU.

    Both sides of an NCCL call must be in it at once, while a sync goes phase by phase. So joining the group and each
    broadcast run on a background thread; the next call waits for it, at most `timeout_s` seconds. The learner is rank 0
    of the group; the engines follow in the order of their indices, each with one rank per GPU. A sender has one group:
    after a loss, and with a new engine, another sender takes its place (`ensure_weight_sender`).
    """

    def __init__(
        self,
        host: str,
        port: int,
        engine_indices: Mapping[str, int],
        gpus_per_engine: int,
        bucket_bytes: int,
        timeout_s: float,
    ) -> None:
        """Open nothing before the first sync. `engine_indices` has the index of each engine by its name."""
        self.engine_indices = dict(engine_indices)
        self._host, self._port, self._gpus_per_engine = host, port, gpus_per_engine
        self._world_size = 1 + len(engine_indices) * gpus_per_engine
        self._group_id = uuid.uuid4().hex
        self._buffer_bytes, self._timeout_s = bucket_bytes, timeout_s
        # One worker: NCCL calls of a group must be issued in the same order on every rank.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rluf-nccl")
        self._device = torch.accelerator.current_device_index()
        self._group: Any = None
        self._pending: Future[None] | None = None

    def begin(self, weight_version: int) -> dict[str, Any]:
        """Transfer info with the rendezvous address; the first sync also starts waiting for the engines there."""
        self._wait_for_pending("the last weight sync")
        if ":" in self._host:
            raise WeightSyncError(
                f"weight sync over NCCL: vLLM's rendezvous has IPv4 only, but the learner's address is {self._host}; "
                "use weight_sync.transport=disk, or start Ray with an IPv4 --node-ip-address on every node"
            )
        if self._group is None and self.engine_indices:
            self._pending = self._executor.submit(self._join_nccl_group)
        first_ranks = {
            str(index): 1 + position * self._gpus_per_engine
            for position, index in enumerate(sorted(self.engine_indices.values()))
        }
        return {
            "transport": "nccl", "weight_version": weight_version, "master_address": self._host,
            "master_port": self._port, "world_size": self._world_size, "packed": True,
            "packed_buffer_size_bytes": self._buffer_bytes, "group_id": self._group_id, "first_ranks": first_ranks,
        }  # fmt: skip

    def send_bucket(self, bucket: WeightBucket) -> dict[str, Any]:
        """Start broadcasting `bucket`; returns the names, dtypes and shapes that the engines must expect."""
        self._wait_for_pending("joining the engines, or the previous bucket")
        if self.engine_indices:
            # The gathered tensors may still be computed on this thread's stream; the broadcast runs on another.
            ready_event = torch.cuda.current_stream().record_event()
            self._pending = self._executor.submit(self._broadcast_bucket, list(bucket), ready_event)
        return {
            "names": [name for name, _ in bucket],
            "dtype_names": [get_dtype_name(tensor) for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
        }

    def end(self) -> None:
        """Wait for the last broadcast."""
        self._wait_for_pending("the last bucket")

    def close(self) -> None:
        """Leave the NCCL group without waiting for a broadcast that may never end."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        # Destroying a group during a collective hangs or crashes: leave it to the end of the process then.
        if self._group is not None and (self._pending is None or self._pending.done()):
            self._group.destroy()
        self._group = None

    def _wait_for_pending(self, action: str) -> None:
        if self._pending is None:
            return
        try:
            self._pending.result(timeout=self._timeout_s)
        except FutureTimeoutError as error:
            raise DeadlineError(f"weight sync over NCCL: {action} took longer than {self._timeout_s:g} s") from error
        self._pending = None

    def _join_nccl_group(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        # The current device is a property of the thread.
        torch.cuda.set_device(self._device)
        self._group = trainer_init(
            {"master_address": self._host, "master_port": self._port, "world_size": self._world_size}
        )
        check_nccl_group(self._group)

    def _broadcast_bucket(self, bucket: list[tuple[str, torch.Tensor]], ready_event: torch.cuda.Event) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(self._device)
        ready_event.synchronize()
        packed_nccl_broadcast_producer(
            iterator=iter(bucket),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1].detach(),
            buffer_size_bytes=self._buffer_bytes,
        )


class NcclReceiver:
    """Receive broadcast buckets in one engine worker."""

    receives_rejected: ClassVar[bool] = True
    """A rejected bucket is received and discarded: the learner's broadcast would wait for this worker forever."""

    def __init__(self, device: torch.device, parallel_config: ParallelConfig) -> None:
        """`parallel_config` gives the rank of this worker within its engine."""
        self._device, self._parallel_config = device, parallel_config
        self._group: Any = None
        self._buffer_bytes = 0

    def begin(self, transfer_info: Mapping[str, Any]) -> None:
        """Join the learner's NCCL group; its `rank_offset` is the first rank of this engine.

        A receiver joins one group; each further group has a receiver of its own.
        """
        from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_process_group

        self._buffer_bytes = int(transfer_info["packed_buffer_size_bytes"])
        init_info = NCCLWeightTransferInitInfo(**transfer_info)
        self._group = worker_init_process_group(init_info, self._parallel_config)
        check_nccl_group(self._group)

    def list_tensors(self, bucket_info: Mapping[str, Any]) -> list[tuple[str, Sequence[int]]]:
        """Names and shapes of the tensors of a bucket."""
        return list(zip(bucket_info["names"], bucket_info["shapes"], strict=True))

    def receive_bucket(self, bucket_info: Mapping[str, Any], load_weights: LoadWeights) -> None:
        """Receive one bucket and load it."""
        if self._group is None:
            raise WeightSyncError("the engine has not joined the NCCL group of the learner; begin a weight sync first")
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        # A bucket is a part of the model, so models with multi-token prediction must not check for completeness here.
        with disable_mtp_completeness_check():
            packed_nccl_broadcast_consumer(
                iterator=_iter_tensor_specs(bucket_info),
                group=self._group,
                src=0,
                post_unpack_func=load_weights,
                buffer_size_bytes=self._buffer_bytes,
                device=self._device,
            )

    def end(self) -> None:
        """Do nothing: the group stays open for the next sync."""

    def close(self) -> None:
        """Leave the NCCL group."""
        if self._group is not None:
            self._group.destroy()
            self._group = None


def check_nccl_group(group: Any) -> None:
    """Raise WeightSyncError where vLLM could not load NCCL: its group then exists, and every broadcast does nothing."""
    if not group.available or group.disabled:
        raise WeightSyncError(
            "weight sync over NCCL: vLLM could not load libnccl in this process; install nvidia-nccl or set "
            "VLLM_NCCL_SO_PATH to the library on every host, or use weight_sync.transport=disk"
        )


def _iter_tensor_specs(bucket_info: Mapping[str, Any]) -> Iterator[tuple[str, tuple[list[int], torch.dtype]]]:
    names, shapes, dtype_names = bucket_info["names"], bucket_info["shapes"], bucket_info["dtype_names"]
    for name, shape, dtype_name in zip(names, shapes, dtype_names, strict=True):
        yield name, (shape, getattr(torch, dtype_name))
