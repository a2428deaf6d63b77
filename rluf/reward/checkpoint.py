"""Save reward training in Ray Train's checkpoints, so that restarted workers resume from the last save.

Plain tensors and JSON: optimizer state, best weights so far, epoch, and the rows that it has read. At ZeRO 0 every rank
has the same state, so only rank 0 writes it and any number of ranks can resume from it.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from rluf.backends.optimizer_state import load_optimizer_state, save_optimizer_state
from rluf.reward.trainer import FitResult, TrainProgress

logger = logging.getLogger(__name__)

PROGRESS_FILE, BEST_WEIGHTS_FILE, ARRAYS_FILE = "progress.json", "best.safetensors", "arrays.safetensors"


class RewardCheckpointer:
    """Saves and restores the training of one model; all ranks must call both methods, in lockstep."""

    def __init__(self, *, rank: int, has_shared_state: bool) -> None:
        """`has_shared_state`: every rank has the complete optimizer state (ZeRO 0)."""
        self.rank, self.state_rank = rank, 0 if has_shared_state else rank

    def save(
        self, model_name: str, engine: Any, progress: TrainProgress, best_weights: dict[str, torch.Tensor]
    ) -> None:
        """Report a checkpoint of the model's training to Ray Train; `best_weights` are complete on rank 0 only."""
        from ray import train

        with tempfile.TemporaryDirectory(prefix="rluf-reward-checkpoint-") as temporary_folder:
            folder = Path(temporary_folder)
            if self.state_rank == self.rank:
                schedule = save_optimizer_state(engine, self._get_optimizer_path(folder), {})
                self._schedule_file(folder).write_text(json.dumps(schedule), encoding="utf-8")
            if self.rank == 0:
                _write_progress(folder, model_name, progress, best_weights)
            # Ray Train merges the ranks' folders into one checkpoint; a rank that wrote nothing reports without one.
            checkpoint = train.Checkpoint.from_directory(temporary_folder) if any(folder.iterdir()) else None
            train.report({"model": model_name, "epoch": progress.epoch + 1}, checkpoint=checkpoint)

    def restore(
        self, model_name: str, engine: Any, progress: TrainProgress, best_weights: dict[str, torch.Tensor]
    ) -> TrainProgress:
        """Restore engine, best weights and progress from the model's last checkpoint; `progress` if there is none."""
        with _open_latest_checkpoint() as folder:
            if folder is None:
                return progress
            progress_record = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            # The last checkpoint may be of a model that was trained before this one.
            if progress_record["name"] != model_name:
                return progress
            schedule = json.loads(self._schedule_file(folder).read_text(encoding="utf-8"))
            load_optimizer_state(engine, [self._get_optimizer_path(folder)], schedule)
            if self.rank == 0 and (folder / BEST_WEIGHTS_FILE).is_file():
                best_weights.update(load_file(folder / BEST_WEIGHTS_FILE))
            restored_progress = _read_progress(folder, progress_record)
        row_count = sum(len(task_keys) for task_keys in restored_progress.read_keys)
        logger.info("%s: resuming epoch %d after %d rows", model_name, restored_progress.epoch + 1, row_count)
        return restored_progress

    def _get_optimizer_path(self, folder: Path) -> Path:
        return folder / f"optimizer-{self.state_rank}.safetensors"

    def _schedule_file(self, folder: Path) -> Path:
        return folder / f"schedule-{self.state_rank}.json"


@contextmanager
def _open_latest_checkpoint() -> Iterator[Path | None]:
    from ray import train

    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _write_progress(
    folder: Path, model_name: str, progress: TrainProgress, best_weights: dict[str, torch.Tensor]
) -> None:
    # Arrays go to a file of their own: they are large, and JSON would not store uint64 keys and NaN exactly.
    results = [
        {key: value for key, value in asdict(result).items() if key != "dev_logits"} for result in progress.fit_results
    ]
    progress_record = {
        "name": model_name,
        "epoch": progress.epoch,
        "fit_results": results,
        "read_key_arrays": len(progress.read_keys),
    }
    (folder / PROGRESS_FILE).write_text(json.dumps(progress_record), encoding="utf-8")
    arrays: dict[str, Any] = {f"dev-{i}": result.dev_logits for i, result in enumerate(progress.fit_results)}
    arrays |= {f"keys-{i}": task_keys for i, task_keys in enumerate(progress.read_keys)}
    save_arrays(arrays, folder / ARRAYS_FILE)
    if best_weights:
        save_file({name: tensor.contiguous() for name, tensor in best_weights.items()}, folder / BEST_WEIGHTS_FILE)


def _read_progress(folder: Path, progress_record: dict[str, Any]) -> TrainProgress:
    arrays = load_arrays(folder / ARRAYS_FILE)
    results = [
        FitResult(**fields, dev_logits=np.asarray(arrays[f"dev-{i}"]))
        for i, fields in enumerate(progress_record["fit_results"])
    ]
    read_keys = [np.asarray(arrays[f"keys-{i}"], dtype=np.uint64) for i in range(progress_record["read_key_arrays"])]
    return TrainProgress(results, progress_record["epoch"], read_keys)
