"""Disk transport: one file per bucket in a folder that learner and engines share. Slow, and works on any cluster."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from rluf.backends.weight_transfer.base import LoadWeights, WeightBucket
from rluf.errors import ResourceError, WeightSyncError


class DiskSender:
    """Write buckets as safetensors files to a new folder."""

    def __init__(self, parent_folder: Path) -> None:
        """Create the folder under `parent_folder`. Raises ResourceError when it cannot be made."""
        self._folder, self._bucket_number = parent_folder / secrets.token_hex(8), 0
        self._last_file: Path | None = None
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise ResourceError(f"cannot make {self._folder} for the weight sync: {error}; set run.cache") from error

    def begin(self, weight_version: int) -> dict[str, Any]:
        """Transfer info with the folder of the files; engines that cannot read it raise an error."""
        return {"transport": "disk", "weight_version": weight_version, "folder": str(self._folder)}

    def send_bucket(self, bucket: WeightBucket) -> dict[str, Any]:
        """Write `bucket` to a new file; returns its path, names and shapes.

        Raises ResourceError when it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._delete_last_file()
        self._bucket_number += 1
        # A new name per bucket, since network file systems may serve the cached content of an old name.
        path = self._folder / f"{self._bucket_number}.safetensors"
        partial_path = path.with_suffix(".part")
        # Copied, since tied tensors share memory, which safetensors refuses.
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in bucket}
        try:
            save_file(tensors, str(partial_path))
            partial_path.rename(path)
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"a weight bucket could not be written to {path}: {error}; free some disk") from error
        self._last_file = path
        return {"path": str(path), "entries": [[name, list(tensor.shape)] for name, tensor in bucket]}

    def end(self) -> None:
        """Delete the last file: every engine has read it."""
        self._delete_last_file()

    def close(self) -> None:
        """Delete the folder. Closing twice is harmless."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _delete_last_file(self) -> None:
        if self._last_file is not None:
            self._last_file.unlink(missing_ok=True)
            self._last_file = None


class DiskReceiver:
    """Read buckets from files in a shared folder."""

    receives_rejected: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        """Tensors are loaded onto `device`."""
        self._device = device

    def begin(self, transfer_info: Mapping[str, Any]) -> None:
        """Raise WeightSyncError where the folder does not exist on this host."""
        if not Path(transfer_info["folder"]).is_dir():
            raise WeightSyncError(
                f"the learner writes weights to {transfer_info['folder']}, which does not exist on this engine's host; "
                "put run.cache into a folder that all machines share, or set weight_sync.transport=nccl"
            )

    def list_tensors(self, bucket_info: Mapping[str, Any]) -> list[tuple[str, Sequence[int]]]:
        """Names and shapes of the tensors of a bucket."""
        return [(name, shape) for name, shape in bucket_info["entries"]]

    def receive_bucket(self, bucket_info: Mapping[str, Any], load_weights: LoadWeights) -> None:
        """Read the file of a bucket and load it. Raises WeightSyncError, see read_bucket_file."""
        load_weights(read_bucket_file(bucket_info["path"], self._device))

    def end(self) -> None:
        """Do nothing: no file stays open."""

    def close(self) -> None:
        """Do nothing, as end."""


def read_bucket_file(path: str, device: torch.device | str = "cpu") -> list[tuple[str, torch.Tensor]]:
    """The tensors of a bucket that DiskSender wrote. Raises WeightSyncError when the file is missing or incomplete."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return list(load_file(path, device=str(device)).items())
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(
            f"cannot read the weight bucket {path}: {error}; weight_sync.transport=disk needs run.cache in a folder "
            "that learner and engines share"
        ) from error
