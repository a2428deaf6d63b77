"""Where reward training stands, kept in Ray Train's checkpoints, so that workers started again go on from there.

Plain tensors and JSON: the optimiser's state, the best weights so far, the epoch, and which rows it has read. At ZeRO 0
every rank holds the same state, so rank 0 alone writes it and any number of ranks can go on from it.
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

from rluf.backends.deepspeed import load_optimizer, save_optimizer
from rluf.reward.trainer import Fit, Position

logger = logging.getLogger(__name__)

STAND, BEST, ARRAYS = "stand.json", "best.safetensors", "arrays.safetensors"


class Keeper:
    """Keeps and restores where the training of one model stands; all ranks call both, in lockstep."""

    def __init__(self, *, rank: int, shared_state: bool) -> None:
        """`shared_state`: every rank holds the whole optimiser state (ZeRO 0)."""
        self.rank, self.owner = rank, 0 if shared_state else rank

    def keep(self, name: str, engine: Any, position: Position, weights: dict[str, torch.Tensor]) -> None:
        """Report a checkpoint of `name`'s training to Ray Train; `weights` are the best so far (on rank 0)."""
        from ray import train

        with tempfile.TemporaryDirectory(prefix="rluf-stand-") as scratch:
            folder = Path(scratch)
            if self.owner == self.rank:
                schedule = save_optimizer(engine, self._optimizer(folder), {})
                self._schedule(folder).write_text(json.dumps(schedule), encoding="utf-8")
            if self.rank == 0:
                _write(folder, name, position, weights)
            checkpoint = train.Checkpoint.from_directory(scratch) if any(folder.iterdir()) else None
            train.report({"model": name, "epoch": position.epoch + 1}, checkpoint=checkpoint)

    def restore(self, name: str, engine: Any, position: Position, weights: dict[str, torch.Tensor]) -> Position:
        """Put engine and best weights where the last checkpoint of `name` left them; `position` where there is none."""
        with _latest() as folder:
            if folder is None:
                return position
            told = json.loads((folder / STAND).read_text(encoding="utf-8"))
            if told["name"] != name:
                return position
            schedule = json.loads(self._schedule(folder).read_text(encoding="utf-8"))
            load_optimizer(engine, self._optimizer(folder), schedule)
            if self.rank == 0 and (folder / BEST).is_file():
                weights.update(load_file(folder / BEST))
            found = _read(folder, told)
        rows = sum(len(done) for done in found.done)
        logger.info("%s: goes on in epoch %d, after %d of its rows", name, found.epoch + 1, rows)
        return found

    def _optimizer(self, folder: Path) -> Path:
        return folder / f"optimizer-{self.owner}.safetensors"

    def _schedule(self, folder: Path) -> Path:
        return folder / f"schedule-{self.owner}.json"


@contextmanager
def _latest() -> Iterator[Path | None]:
    from ray import train

    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _write(folder: Path, name: str, position: Position, weights: dict[str, torch.Tensor]) -> None:
    fits = [{key: value for key, value in asdict(fit).items() if key != "dev_logits"} for fit in position.fits]
    stand = {"name": name, "epoch": position.epoch, "fits": fits, "read": len(position.done)}
    (folder / STAND).write_text(json.dumps(stand), encoding="utf-8")
    arrays: dict[str, Any] = {f"dev-{i}": fit.dev_logits for i, fit in enumerate(position.fits)}
    save_arrays(arrays | {f"done-{i}": done for i, done in enumerate(position.done)}, folder / ARRAYS)
    if weights:
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / BEST)


def _read(folder: Path, told: dict[str, Any]) -> Position:
    arrays = load_arrays(folder / ARRAYS)
    fits = [Fit(**fit, dev_logits=np.asarray(arrays[f"dev-{i}"])) for i, fit in enumerate(told["fits"])]
    done = [np.asarray(arrays[f"done-{i}"], dtype=np.uint64) for i in range(told["read"])]
    return Position(fits, told["epoch"], done)
