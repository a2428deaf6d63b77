"""Shared-memory transport: one anonymous segment (memfd) on the learner's host, rewritten for each bucket."""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from rluf.backends.weight_transfer.base import LoadWeights, WeightBucket, get_dtype_name
from rluf.errors import ResourceError, WeightSyncError

ALIGNMENT_BYTES = 64
"""Tensors start at multiples of this many bytes in a segment (one cache line)."""
TOKEN_BYTES = 16
"""Bytes at the start of a segment that identify it as the sender's."""


def get_machine_id() -> str:
    """Identify this boot of this machine and its process namespace: only there can /proc/<pid>/fd be shared."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.readlink('/proc/self/ns/pid')}"


class ShmSender:
    """Send through one anonymous shared-memory segment, which engines open as /proc/<learner pid>/fd/<n>.

    Compared with a named segment under /dev/shm, the kernel frees it when the last process that uses it ends, however
    it ends, so nothing can be left behind; and its size is not limited by /dev/shm (64 MB in a Docker container by
    default).
    """

    def __init__(self) -> None:
        """Reserve the segment; it takes no memory until the first bucket. Raises ResourceError if it cannot."""
        try:
            self._file_descriptor = os.memfd_create("rluf-weights", os.MFD_CLOEXEC)
        except OSError as error:
            raise ResourceError(f"cannot create shared memory for the weight sync: {error}") from error
        self._segment: mmap.mmap | None = None
        self._token = secrets.token_bytes(TOKEN_BYTES)

    def begin(self, weight_version: int) -> dict[str, Any]:
        """Transfer info with the machine of the segment; engines on another machine refuse it."""
        return {"transport": "shm", "weight_version": weight_version, "machine": get_machine_id()}

    def send_bucket(self, bucket: WeightBucket) -> dict[str, Any]:
        """Copy `bucket` into the segment; returns its path, token, size in bytes, and entries.

        Entries are [name, dtype, shape, offset in bytes]. Raises ResourceError when memory runs out.
        """
        entries, size = [], TOKEN_BYTES
        for name, tensor in bucket:
            size = -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            entries.append([name, get_dtype_name(tensor), list(tensor.shape), size])
            size += tensor.numel() * tensor.element_size()
        segment = self._map_segment(size)
        for (_, tensor), (_, _, _, offset) in zip(bucket, entries, strict=True):
            # torch.frombuffer refuses a count of 0.
            if tensor.numel():
                target = torch.frombuffer(segment, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
                target.copy_(tensor.detach().reshape(-1))
        return {
            "path": f"/proc/{os.getpid()}/fd/{self._file_descriptor}",
            "token": self._token.hex(),
            "size": size,
            "entries": entries,
        }

    def end(self) -> None:
        """Release the segment's memory until the next sync."""
        self._segment = None
        os.ftruncate(self._file_descriptor, 0)

    def close(self) -> None:
        """Free the segment. Closing twice is harmless."""
        self._segment = None
        if self._file_descriptor >= 0:
            os.close(self._file_descriptor)
            self._file_descriptor = -1

    def _map_segment(self, byte_count: int) -> mmap.mmap:
        """The segment with at least `byte_count` bytes, starting with the token."""
        if self._segment is not None and len(self._segment) >= byte_count:
            return self._segment
        self._segment = None
        try:
            # Emptied first, although posix_fallocate could extend the segment in place: its content is not needed, and
            # an allocation that fails then leaves no memory reserved.
            os.ftruncate(self._file_descriptor, 0)
            # Allocate now: a plain ftruncate would succeed, and the copy would die with SIGBUS when memory runs out.
            os.posix_fallocate(self._file_descriptor, 0, byte_count)
            self._segment = mmap.mmap(self._file_descriptor, byte_count)
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"no shared memory for a weight bucket of {byte_count / 2**20:.1f} MiB: {error}; give "
                "/dev/shm more room"
            ) from error
        self._segment[:TOKEN_BYTES] = self._token
        return self._segment


class ShmReceiver:
    """Read buckets from shared memory on this machine, on the CPU or onto a GPU."""

    receives_rejected: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        """Tensors are copied to `device`."""
        self._device = device

    def begin(self, transfer_info: Mapping[str, Any]) -> None:
        """Raise WeightSyncError where the learner runs on another machine, whose memory cannot be read."""
        machine = get_machine_id()
        if transfer_info["machine"] != machine:
            raise WeightSyncError(
                f"the learner runs on another machine or container ({transfer_info['machine']}, engine {machine}), "
                "which weight_sync.transport=shm cannot reach; set weight_sync.transport=nccl (disk on CPUs), or place "
                "both on one host"
            )

    def list_tensors(self, bucket_info: Mapping[str, Any]) -> list[tuple[str, Sequence[int]]]:
        """Names and shapes of the tensors of a bucket."""
        return [(name, shape) for name, _, shape, _ in bucket_info["entries"]]

    def receive_bucket(self, bucket_info: Mapping[str, Any], load_weights: LoadWeights) -> None:
        """Copy a bucket out of the segment and load it. Raises WeightSyncError, see read_segment."""
        load_weights(read_segment(**bucket_info, device=self._device))

    def end(self) -> None:
        """Do nothing: the segment is mapped for one bucket at a time."""

    def close(self) -> None:
        """Do nothing, as end."""


def read_segment(
    path: str, token: str, size: int, entries: Iterable[Sequence[Any]], device: torch.device | str = "cpu"
) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket that ShmSender wrote, copied to `device` (the sender rewrites its segment).

    Raises WeightSyncError if the segment cannot be opened here or does not start with `token`.
    """
    try:
        file_descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise WeightSyncError(
            f"cannot open the learner's shared memory {path}: {error}; weight_sync.transport=shm needs learner and "
            "engine alive, on one machine, in one container, under one user; else set weight_sync.transport=nccl, or "
            "disk on CPUs"
        ) from error
    try:
        if os.fstat(file_descriptor).st_size < size:
            raise WeightSyncError(f"the learner's shared memory {path} is shorter than the {size} bytes announced")
        # Copy-on-write, since torch.frombuffer warns about memory that it must not write to.
        segment = mmap.mmap(file_descriptor, size, access=mmap.ACCESS_COPY)
    finally:
        os.close(file_descriptor)
    # The path names a process id and a number: after a restart of the learner it can be another process's file.
    if segment[:TOKEN_BYTES].hex() != token:
        raise WeightSyncError(f"{path} is not the learner's shared memory; are learner and engine on one machine?")
    return list(_copy_tensors(segment, entries, device))


def _copy_tensors(
    segment: mmap.mmap, entries: Iterable[Sequence[Any]], device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype_name, shape, offset in entries:
        dtype = getattr(torch, dtype_name)
        count = math.prod(shape)
        if count == 0:
            yield name, torch.empty(tuple(shape), dtype=dtype, device=device)
            continue
        view = torch.frombuffer(segment, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))
        yield name, view.to(device, copy=True)
