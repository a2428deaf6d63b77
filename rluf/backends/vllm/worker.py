"""rluf's code inside vLLM's own processes: receive and check weights, and exit with the process that started them.

vLLM imports this module in its engine core (as the executor class) and in each worker (as the worker extension). The
import registers the weight-transfer engines, so no installed entry point is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from rluf.backends.weight_transfer import RECEIVED_TRANSPORTS, create_weight_receiver
from rluf.backends.weight_transfer.base import WeightManifest, WeightReceiver, has_tied_embeddings
from rluf.errors import RlufError
from rluf.utils.parent_watch import exit_with_parent

BACKEND_PREFIX = "rluf_"
"""Prefix of a transport's name in vLLM's registry of weight-transfer engines, which has an "nccl" of its own."""


class RlufUniProcExecutor(UniProcExecutor):
    """vLLM's single-process executor: the model runs in the engine core itself.

    A subclass for two reasons: the core exits with its parent, and vLLM's CPU build would turn the name "uni" into a
    second process.
    """

    def _init_executor(self) -> None:
        exit_with_parent()
        super()._init_executor()


class RlufMultiprocExecutor(MultiprocExecutor):
    """vLLM's executor of one process per GPU of an engine, in a core that exits with its parent.

    Each worker exits with the core: vLLM's worker reads a pipe that the core holds open.
    """

    def _init_executor(self) -> None:
        exit_with_parent()
        super()._init_executor()


class RlufWorkerExtension:
    """Methods added to vLLM's worker class, called through collective_rpc."""

    def describe_rluf_transfer_problem(self) -> str | None:
        """Describe what is wrong with the current or last update; None if nothing is."""
        problem = getattr(getattr(self, "weight_transfer_engine", None), "problem", None)
        return None if problem is None else str(problem)


@dataclass
class TransferInitInfo(WeightTransferInitInfo):
    """What vLLM passes to init_transfer_engine: the transfer info of WeightSender.begin."""

    transfer_info: dict[str, Any]


@dataclass
class BucketUpdateInfo(WeightTransferUpdateInfo):
    """What vLLM passes to receive_weights: the bucket info of WeightSender.send_bucket."""

    bucket_info: dict[str, Any]


class CheckedTransferEngine(WeightTransferEngine[TransferInitInfo, BucketUpdateInfo]):
    """Receive weight updates through a WeightReceiver, checked against the manifest of the checkpoint.

    The first problem of an update is recorded in `problem` instead of raised: an exception inside vLLM's core would
    arrive as plain text and leave layers without weights. So the rest of a bad update is skipped, finishing restores
    the old weights of the layers that received none, and the owner of the engine reads `problem`.
    """

    init_info_cls = TransferInitInfo
    update_info_cls = BucketUpdateInfo
    problem: RlufError | None = None
    _manifest: WeightManifest | None = None
    _receiver: WeightReceiver | None = None

    def init_transfer_engine(self, init_info: TransferInitInfo) -> None:
        """Connect to the sender, leaving an earlier one; record as the problem if that is impossible."""
        self.problem = None
        if self._receiver is not None:
            self._receiver.close()
        transport = self.config.backend.removeprefix(BACKEND_PREFIX)
        receiver = create_weight_receiver(transport, self.device, self.parallel_config)
        self._receiver = receiver
        self._record_problem(lambda: receiver.begin(init_info.transfer_info))

    def start_weight_update(self) -> None:
        """Prepare every layer for new weights (complete layers were repacked for the CPU's kernels)."""
        if self._manifest is None:
            is_tied = has_tied_embeddings(self.model_config.hf_config)
            self._manifest = WeightManifest(Path(self.model_config.model), is_tied)
        self._manifest.reset()
        self.problem = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketUpdateInfo) -> None:
        """Check names and shapes of one bucket, receive it, and load it if it is right."""
        manifest, receiver, bucket_info = self._manifest, self._receiver, update_info.bucket_info
        if manifest is None or receiver is None:
            raise RuntimeError("receive_weights was called before init_transfer_engine and start_weight_update")
        if self.problem is None:
            self._record_problem(lambda: manifest.check_bucket(receiver.list_tensors(bucket_info)))
        if self.problem is None:
            self._record_problem(lambda: receiver.receive_bucket(bucket_info, self._load_weights))
        elif receiver.receives_rejected:
            receiver.receive_bucket(bucket_info, _discard_weights)

    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        # Some models (Gemma) compute logits from the embedding itself, and vLLM refuses a head that they do not have.
        module_names = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
        tied_names = self._manifest.tied_sources if self._manifest is not None else {}
        ignored_names = {name for name in tied_names if name.split(".")[-2] not in module_names}
        return self.model.load_weights((name, weight) for name, weight in weights if name not in ignored_names)

    def finish_weight_update(self) -> None:
        """Put the new weights in place and record missing tensors."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.problem is None and self._manifest is not None:
            self._record_problem(self._manifest.check_complete)
        if self._receiver is not None:
            self._receiver.end()

    def shutdown(self) -> None:
        """Free the receiver's resources."""
        if self._receiver is not None:
            self._receiver.close()

    def _record_problem(self, action: Callable[[], None]) -> None:
        try:
            action()
        except RlufError as error:
            self.problem = error


def _discard_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Stand in for the model's load_weights while a rejected bucket is received."""
    for _ in weights:
        pass


# These side effects of the import are intended: vLLM's engine core imports this module first, before the model is
# loaded, and each worker before it creates its weight-transfer engine. In the core, the watch does nothing yet.
for _transport in RECEIVED_TRANSPORTS:
    WeightTransferEngineFactory.register_engine(f"{BACKEND_PREFIX}{_transport}", CheckedTransferEngine)
exit_with_parent()
