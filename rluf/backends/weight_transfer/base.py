"""The learner's side of publishing weights: buckets of named tensors go to every engine, in lockstep.

A sender has four calls, one for each phase of a publish: `offer` (what the engines' begin_update takes), `send` (one
bucket; its result is what the engines' update takes), `finish` (all engines are done) and `close`. Tensors are sent
under the names of the Hugging Face checkpoint. With tied embeddings `lm_head.weight` is sent too: engines keep a
repacked copy of it, and refuse an update without it.

This module imports neither vLLM nor Ray, so that a learner pays for vLLM only when it publishes over NCCL.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rluf.backends.weight_transfer.lora import write_adapter
from rluf.errors import ResourceError, StallError, SyncError
from rluf.utils.paths import cache_dir

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger(__name__)

Bucket = Sequence[tuple[str, torch.Tensor]]
"""Named tensors that travel together; each tensor is whole (gathered), on the CPU or on this rank's GPU."""

ALIGNMENT = 64
"""Tensors start at multiples of this many bytes in a segment (one cache line)."""
TOKEN_BYTES = 16
"""Bytes at the start of a segment that prove it is the one the sender means."""


class Sender(Protocol):
    """What a learner's rank 0 publishes through, and with CUDA IPC every rank."""

    def offer(self, version: int) -> dict[str, Any]:
        """Start a publish of weight `version`; returns what every engine's begin_update takes."""

    def send(self, bucket: Bucket) -> dict[str, Any]:
        """Hand over one bucket; returns what every engine's update takes. The last bucket has been read by then."""

    def finish(self) -> None:
        """End a publish: every engine has read every bucket."""

    def close(self) -> None:
        """Free what the sender holds."""


def make_sender(settings: Settings, host: str, port: int) -> Sender:
    """The sender named by `publish.engine`; `host` and `port` (free) are where NCCL's members meet."""
    if settings.publish.engine == "shm":
        return ShmSender()
    if settings.publish.engine == "disk":
        return DiskSender(cache_dir(settings) / "publish")
    if settings.publish.engine == "tcp":
        from rluf.backends.weight_transfer.tcp import TcpSender

        return TcpSender(host, settings.publish.deadline_s)
    if settings.publish.engine == "adapter":
        return AdapterSender(cache_dir(settings) / "publish")
    if settings.publish.engine == "ipc":
        from rluf.backends.weight_transfer.cuda_ipc import IpcSender

        return IpcSender(settings.publish.bucket_mib << 20)
    members = 1 + settings.rollout.engines * settings.rollout.tensor_parallel
    return NcclSender(host, port, members, settings.publish.bucket_mib << 20, settings.publish.deadline_s)


def machine_id() -> str:
    """Names this boot of this machine and its process namespace: only there can /proc/<pid>/fd be shared."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


class ShmSender:
    """Sends through one anonymous shared-memory segment (memfd), rewritten for each bucket.

    Engines open it as /proc/<learner pid>/fd/<n>. Against a named segment under /dev/shm this has two advantages: the
    kernel frees it when the last process that uses it ends, however it ends, so nothing can be left behind; and it
    is not bound by the size of /dev/shm (64 MB in a Docker container by default).
    """

    def __init__(self) -> None:
        """Reserve the segment; it takes no memory until the first bucket. Raises ResourceError if it cannot."""
        try:
            self._file = os.memfd_create("rluf-weights", os.MFD_CLOEXEC)
        except OSError as error:
            raise ResourceError(f"cannot create shared memory for publishing: {error}") from error
        self._memory: mmap.mmap | None = None
        self._token = secrets.token_bytes(TOKEN_BYTES)

    def offer(self, version: int) -> dict[str, Any]:
        """Where the segment is; engines on another machine refuse it."""
        return {"engine": "shm", "version": version, "machine": machine_id()}

    def send(self, bucket: Bucket) -> dict[str, Any]:
        """Copy `bucket` into the segment; returns its path, size in bytes, and each tensor's place.

        Entries are [name, dtype, shape, offset in bytes]. Raises ResourceError when memory runs out.
        """
        entries, size = [], TOKEN_BYTES
        for name, tensor in bucket:
            size = -(-size // ALIGNMENT) * ALIGNMENT
            entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size])
            size += tensor.numel() * tensor.element_size()
        memory = self._mapped(size)
        for (_, tensor), (_, _, _, offset) in zip(bucket, entries, strict=True):
            if tensor.numel():
                place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
                place.copy_(tensor.detach().reshape(-1))
        return {
            "path": f"/proc/{os.getpid()}/fd/{self._file}",
            "token": self._token.hex(),
            "size": size,
            "entries": entries,
        }

    def finish(self) -> None:
        """Give the segment's memory back until the next publish."""
        self._memory = None
        os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Free the segment. Closing twice is harmless."""
        self._memory = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _mapped(self, size: int) -> mmap.mmap:
        if self._memory is not None and len(self._memory) >= size:
            return self._memory
        self._memory = None
        try:
            os.ftruncate(self._file, 0)
            os.posix_fallocate(self._file, 0, size)
            self._memory = mmap.mmap(self._file, size)
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"no shared memory for a bucket of {size / 2**20:.1f} MiB: {error}; lower publish.bucket_mib"
            ) from error
        self._memory[:TOKEN_BYTES] = self._token
        return self._memory


def read_segment(
    path: str, token: str, size: int, entries: Iterable[Sequence[Any]], device: torch.device | str = "cpu"
) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket that ShmSender wrote, copied to `device` (the sender rewrites its segment).

    Raises SyncError if the segment cannot be opened here or is not the one that `token` names.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SyncError(
            f"cannot open the learner's shared memory {path}: {error}; publish.engine=shm needs learner and engine "
            "alive, on one machine, in one container, under one user; else set publish.engine=nccl, or tcp on CPUs"
        ) from error
    try:
        if os.fstat(file).st_size < size:
            raise SyncError(f"the learner's shared memory {path} is shorter than the {size} bytes announced")
        memory = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    finally:
        os.close(file)
    if memory[:TOKEN_BYTES].hex() != token:
        raise SyncError(f"{path} is not the learner's shared memory; are learner and engine on one machine?")
    return list(_copies(memory, entries, device))


def _copies(
    memory: mmap.mmap, entries: Iterable[Sequence[Any]], device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, kind, shape, offset in entries:
        dtype = getattr(torch, kind)
        count = math.prod(shape)
        if count == 0:
            yield name, torch.empty(tuple(shape), dtype=dtype, device=device)
            continue
        view = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))
        yield name, view.to(device, copy=True)


class DiskSender:
    """Sends through files in a folder that learner and engines share, one file a bucket: slow, and works anywhere."""

    def __init__(self, root: Path) -> None:
        """Files go to a new folder under `root`. Raises ResourceError when it cannot be made."""
        self._folder, self._number = root / secrets.token_hex(8), 0
        self._last: Path | None = None
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise ResourceError(f"cannot make {self._folder} for publishing: {error}; set run.cache") from error

    def offer(self, version: int) -> dict[str, Any]:
        """Where the files will be; engines that do not see the folder refuse it."""
        return {"engine": "disk", "version": version, "folder": str(self._folder)}

    def send(self, bucket: Bucket) -> dict[str, Any]:
        """Write `bucket` as a safetensors file under a name of its own; returns its path, names and shapes.

        Raises ResourceError when the disk refuses it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._drop()
        self._number += 1
        path = self._folder / f"{self._number}.safetensors"
        part = path.with_suffix(".part")
        try:
            save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in bucket}, str(part))
            part.rename(path)
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"a bucket could not be written to {path}: {error}; free some disk") from error
        self._last = path
        return {"path": str(path), "entries": [[name, list(tensor.shape)] for name, tensor in bucket]}

    def finish(self) -> None:
        """Delete the last file: every engine has read it."""
        self._drop()

    def close(self) -> None:
        """Delete the folder. Closing twice is harmless."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _drop(self) -> None:
        if self._last is not None:
            self._last.unlink(missing_ok=True)
            self._last = None


class AdapterSender:
    """Sends LoRA adapters as they are: a folder in a place that learner and engines share, all of it in one bucket."""

    def __init__(self, root: Path) -> None:
        """Folders go to a new one under `root`."""
        self._folder = root / secrets.token_hex(8)
        self._version = 0

    def offer(self, version: int) -> dict[str, Any]:
        """Nothing to meet over."""
        self._version = version
        return {"engine": "adapter", "version": version}

    def send(self, bucket: Bucket) -> dict[str, Any]:
        """Write the adapter; returns its folder. Raises ResourceError when the disk refuses it."""
        folder = self._folder / str(self._version)
        shutil.rmtree(folder, ignore_errors=True)
        write_adapter(folder, dict(bucket))
        return {"path": str(folder)}

    def finish(self) -> None:
        """Delete what engines have loaded."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """As finish; closing twice is harmless."""
        self.finish()


def read_file(path: str, device: torch.device | str = "cpu") -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket that DiskSender wrote. Raises SyncError when the file is not there or not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return list(load_file(path, device=str(device)).items())
    except (OSError, SafetensorError) as error:
        raise SyncError(
            f"cannot read the bucket {path}: {error}; publish.engine=disk needs run.cache in a folder that learner and "
            "engines share"
        ) from error


class NcclSender:
    """Broadcasts from this rank's GPU to every engine worker over vLLM's NCCL weight transfer. Untested without GPUs.

    Both sides of an NCCL call must be in it at once, while a publish goes phase by phase. So meeting the engines and
    each broadcast run on a thread of their own; the next call waits for it, `deadline_s` seconds at most.
    The learner is member 0, engine i holds members 1 + i * tensor_parallel and up.
    """

    def __init__(self, host: str, port: int, members: int, bucket_bytes: int, deadline_s: float) -> None:
        """Nothing is opened before the first offer. `members` counts the learner and all engine workers."""
        self._host, self._port, self._members = host, port, members
        self._bytes, self._deadline = bucket_bytes, deadline_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rluf-nccl")
        self._device = torch.accelerator.current_device_index()
        self._group: Any = None
        self._pending: Future[None] | None = None

    def offer(self, version: int) -> dict[str, Any]:
        """Where to meet; the first offer also starts waiting for the engines."""
        self._settle("the last publish")
        if self._group is None:
            self._pending = self._thread.submit(self._meet)
        return {
            "engine": "nccl",
            "version": version,
            "master_address": self._host,
            "master_port": self._port,
            "world_size": self._members,
            "packed": True,
            "packed_buffer_size_bytes": self._bytes,
        }

    def send(self, bucket: Bucket) -> dict[str, Any]:
        """Start broadcasting `bucket`; returns the names, dtypes and shapes that the engines must expect."""
        self._settle("meeting the engines, or the bucket before")
        ready = torch.cuda.current_stream().record_event()
        self._pending = self._thread.submit(self._broadcast, list(bucket), ready)
        return {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
        }

    def finish(self) -> None:
        """Wait for the last broadcast."""
        self._settle("the last bucket")

    def close(self) -> None:
        """Leave the NCCL group without waiting for a broadcast that may never end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._group is not None and (self._pending is None or self._pending.done()):
            self._group.destroy()
        self._group = None

    def _settle(self, what: str) -> None:
        if self._pending is None:
            return
        try:
            self._pending.result(timeout=self._deadline)
        except FutureTimeoutError as error:
            raise StallError(f"publish over NCCL: {what} took longer than {self._deadline:g} s") from error
        self._pending = None

    def _meet(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        torch.cuda.set_device(self._device)
        self._group = trainer_init(
            {"master_address": self._host, "master_port": self._port, "world_size": self._members}
        )

    def _broadcast(self, bucket: list[tuple[str, torch.Tensor]], ready: torch.cuda.Event) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(self._device)
        ready.synchronize()
        packed_nccl_broadcast_producer(
            iterator=iter(bucket),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1].detach(),
            buffer_size_bytes=self._bytes,
        )
