"""Our code inside vLLM's own processes: it receives weights, checks them, and ends with the process that started it.

vLLM imports this module in its engine core (as the executor class) and in each worker (as the worker extension); the
import registers the weight-transfer engines and starts the watch, so no installed entry point is needed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_consumer
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from rluf.backends.weight_transfer.base import machine_id, read_file, read_segment
from rluf.backends.weight_transfer.cuda_ipc import gpu_name, whole
from rluf.backends.weight_transfer.manifest import Checklist
from rluf.backends.weight_transfer.tcp import fetch
from rluf.errors import LostError, RlufError, SyncError

logger = logging.getLogger(__name__)


class HouseExecutor(UniProcExecutor):
    """vLLM's single-process executor: the model runs in the engine core itself.

    A class of ours for two reasons. Passing it makes the core import this module as its very first act, so that the
    watch stands before the model is loaded; and vLLM's CPU build would turn the name "uni" into a second process.
    """


class HouseExtension:
    """Methods added to vLLM's worker class, called through collective_rpc."""

    def rluf_transfer_problem(self) -> tuple[str, bool] | None:
        """What is wrong with the update under way or just finished, and whether the learner was out of reach."""
        problem = getattr(getattr(self, "weight_transfer_engine", None), "problem", None)
        return None if problem is None else (str(problem), isinstance(problem, LostError))


@dataclass
class ShmInit(WeightTransferInitInfo):
    """What the first offer of a ShmSender tells the engine: which machine the learner runs on."""

    machine: str


@dataclass
class ShmUpdate(WeightTransferUpdateInfo):
    """One bucket in shared memory; see rluf.backends.weight_transfer.base.ShmSender.send."""

    path: str
    token: str
    size: int
    entries: list[list[Any]] = field(default_factory=list)


class _Checked:
    """Keeps the first problem of an update instead of raising it inside vLLM's core.

    An exception there would come back as a bare text and leave layers without weights. So the rest of a bad update is
    skipped, finishing puts the old weights back in the layers that got none, and the engine's owner asks for `problem`.
    """

    model: torch.nn.Module
    model_config: Any
    problem: RlufError | None = None
    _checklist: Checklist | None = None

    def start_weight_update(self) -> None:
        """Make every layer ready to be loaded anew (layers are repacked for the CPU's kernels when complete)."""
        if self._checklist is None:
            tied = bool(getattr(self.model_config.hf_config, "tie_word_embeddings", False))
            self._checklist = Checklist(Path(self.model_config.model), tied)
        self._checklist.start()
        self.problem = None
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Put the layers in place and note missing tensors."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.problem is None and self._checklist is not None:
            self._note(self._checklist.finish)

    def _admit(self, arriving: Iterable[tuple[str, Sequence[int]]]) -> bool:
        checklist = self._checklist
        if self.problem is None and checklist is not None:
            self._note(lambda: checklist.admit(arriving))
        return self.problem is None

    def _note(self, check: Callable[[], None]) -> None:
        try:
            check()
        except RlufError as error:
            self.problem = error


class ShmReceiver(_Checked, WeightTransferEngine[ShmInit, ShmUpdate]):
    """Receives buckets from shared memory on this machine, on the CPU or on a GPU."""

    init_info_cls = ShmInit
    update_info_cls = ShmUpdate

    def init_transfer_engine(self, init_info: ShmInit) -> None:
        """Note as a problem that the learner runs elsewhere, where its memory cannot be read."""
        here = machine_id()
        self.problem = None
        if init_info.machine != here:
            self.problem = SyncError(
                f"the learner runs on another machine or container ({init_info.machine}, engine {here}), so "
                "publish.engine=shm cannot reach it; set publish.engine=nccl (tcp on CPUs), or place both on one host"
            )

    def receive_weights(self, update_info: ShmUpdate) -> None:
        """Check one bucket's names and shapes, copy it out of the segment, load it."""
        if not self._admit((name, shape) for name, _, shape, _ in update_info.entries):
            return
        self._note(lambda: self._load(update_info))

    def _load(self, info: ShmUpdate) -> None:
        tensors = read_segment(info.path, info.token, info.size, info.entries, self.device)
        self.model.load_weights(tensors)

    def shutdown(self) -> None:
        """Nothing is held between buckets."""


@dataclass
class DiskInit(WeightTransferInitInfo):
    """What the first offer of a DiskSender tells the engine: the folder that both must see."""

    folder: str


@dataclass
class DiskUpdate(WeightTransferUpdateInfo):
    """One bucket in a file; see rluf.backends.weight_transfer.base.DiskSender.send."""

    path: str
    entries: list[list[Any]] = field(default_factory=list)


class DiskReceiver(_Checked, WeightTransferEngine[DiskInit, DiskUpdate]):
    """Receives buckets from files in a shared folder."""

    init_info_cls = DiskInit
    update_info_cls = DiskUpdate

    def init_transfer_engine(self, init_info: DiskInit) -> None:
        """Note as a problem that the folder is not seen from here."""
        self.problem = None
        if not Path(init_info.folder).is_dir():
            self.problem = SyncError(
                f"the learner publishes to {init_info.folder}, which this engine does not see; put run.cache into a "
                "folder that all machines share, or set publish.engine=nccl (tcp on CPUs)"
            )

    def receive_weights(self, update_info: DiskUpdate) -> None:
        """Check one bucket's names and shapes, read the file, load it."""
        if self._admit((name, shape) for name, shape in update_info.entries):
            self._note(lambda: self._load(update_info))

    def _load(self, info: DiskUpdate) -> None:
        self.model.load_weights(read_file(info.path, self.device))

    def shutdown(self) -> None:
        """Nothing is held between buckets."""


@dataclass
class TcpInit(WeightTransferInitInfo):
    """What the first offer of a TcpSender tells the engine; each bucket says again where it is."""

    host: str
    port: int


@dataclass
class TcpUpdate(WeightTransferUpdateInfo):
    """One bucket at the learner's socket; see rluf.backends.weight_transfer.tcp.TcpSender.send."""

    host: str
    port: int
    token: str
    number: int
    seconds: float
    entries: list[list[Any]] = field(default_factory=list)


class TcpReceiver(_Checked, WeightTransferEngine[TcpInit, TcpUpdate]):
    """Fetches buckets from the learner's host."""

    init_info_cls = TcpInit
    update_info_cls = TcpUpdate

    def init_transfer_engine(self, init_info: TcpInit) -> None:
        """Nothing is held between buckets: a learner that cannot be reached is told at the first one."""
        self.problem = None

    def receive_weights(self, update_info: TcpUpdate) -> None:
        """Check one bucket's names and shapes, fetch it, load it."""
        if self._admit((name, shape) for name, shape in update_info.entries):
            self._note(lambda: self._load(update_info))

    def _load(self, info: TcpUpdate) -> None:
        self.model.load_weights(fetch(info.host, info.port, info.token, info.number, info.seconds, self.device))

    def shutdown(self) -> None:
        """Nothing is held between buckets."""


class NcclReceiver(_Checked, NCCLWeightTransferEngine):
    """vLLM's NCCL engine with our checklist. Untested without GPUs.

    A bucket with a wrong name or shape is still received, so that the learner's broadcast is not left waiting, and
    discarded.
    """

    init_info_cls = NCCLWeightTransferInitInfo
    update_info_cls = NCCLWeightTransferUpdateInfo

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Check one bucket's names and shapes, receive it, load it if it is right."""
        if self._admit(zip(update_info.names, update_info.shapes, strict=True)):
            super().receive_weights(update_info)
            return
        model, self.model = self.model, _Discard()
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model


@dataclass
class IpcInit(IPCWeightTransferInitInfo):
    """Nothing to agree on: buckets are always packed."""


@dataclass
class IpcUpdate(WeightTransferUpdateInfo):
    """One bucket in a buffer on each GPU; see rluf.backends.weight_transfer.cuda_ipc.IpcSender.send."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    tensor_sizes: list[int]
    handles: dict[str, list[Any]]


class IpcReceiver(_Checked, IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine with our checklist, and handles as plain values. Untested without GPUs."""

    init_info_cls = IpcInit
    update_info_cls = IpcUpdate

    def receive_weights(self, update_info: IpcUpdate) -> None:
        """Check one bucket's names and shapes, copy it out of the learner's buffer on this GPU, load it."""
        if self._admit(zip(update_info.names, update_info.shapes, strict=True)):
            self._note(lambda: self._load(update_info))

    def finish_weight_update(self) -> None:
        """As for every receiver; then let go of the learner's buffer."""
        super().finish_weight_update()
        self._packed_importer.close()

    def _load(self, info: IpcUpdate) -> None:
        here = gpu_name(self.device.index)
        if here not in info.handles:
            raise SyncError(
                f"no learner rank runs on this engine's GPU {here} (they run on {', '.join(sorted(info.handles))}); "
                "with publish.engine=ipc each engine shares its GPU with one rank"
            )
        weights = packed_ipc_consumer(
            ipc_handle={here: whole(info.handles[here])},
            names=info.names,
            shapes=info.shapes,
            dtype_names=info.dtype_names,
            tensor_sizes=info.tensor_sizes,
            device_index=self.device.index,
            importer=self._packed_importer,
        )
        self.model.load_weights(weights)


class _Discard(torch.nn.Module):
    """Stands in for the model while a bad bucket is received."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Drop the weights."""
        return {name for name, _ in weights}


def _follow_parent() -> None:
    """End this process as soon as the one that started it is gone, even by SIGKILL.

    The multiprocessing parent holds the writing end of a pipe open for its lifetime; the kernel closes it when it dies.
    PR_SET_PDEATHSIG was not used: it fires when the starting *thread* ends, and misses a parent that died before.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(t.name == "rluf-follow-parent" for t in threading.enumerate()):
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="rluf-follow-parent", daemon=True).start()


WeightTransferEngineFactory.register_engine("rluf_shm", ShmReceiver)
WeightTransferEngineFactory.register_engine("rluf_disk", DiskReceiver)
WeightTransferEngineFactory.register_engine("rluf_tcp", TcpReceiver)
WeightTransferEngineFactory.register_engine("rluf_nccl", NcclReceiver)
WeightTransferEngineFactory.register_engine("rluf_ipc", IpcReceiver)
_follow_parent()
