"""TensorBoard: the metrics of every step and the verdict as event files in <run folder>/tensorboard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rluf.config.settings import Settings
from rluf.tracking.metric_registry import list_metric_specs


class TensorBoardTracker:
    """Writes event files with tensorboardX; `tensorboard --logdir runs` shows all runs below a folder."""

    def __init__(self, settings: Settings, run_folder: Path) -> None:
        """Tags are those of W&B, such as learning/kl; nothing is written before the first step."""
        self._folder = run_folder / "tensorboard"
        self._objective_names = tuple(settings.objectives.by_objective)
        self._tags = {spec.key: spec.wandb_name for spec in list_metric_specs(self._objective_names)}
        self._settings_text = json.dumps(settings.model_dump(mode="json"), indent=2)
        self._writer: Any = None
        self._last_step = 0

    def log_step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Record a step; missing and non-finite values are left out."""
        writer = self._open_writer(step)
        for key, value in metrics.items():
            if key != "step" and value is not None and math.isfinite(value):
                writer.add_scalar(self._tags.get(key, f"other/{key}"), float(value), step)
        self._last_step = step
        writer.flush()

    def update_summary(self, summary: Mapping[str, Any]) -> None:
        """Record verdicts and reasons as text, and the lift of each gate check with its interval."""
        writer = self._open_writer(self._last_step)
        gates = summary.get("gates", {})
        verdicts = f"{gates.get('verdict')}, measured {gates.get('measured_verdict')}"
        writer.add_text("gates", "\n\n".join([verdicts, *gates.get("reasons", ())]), self._last_step)
        for check in gates.get("checks", ()):
            for name, value in (check["lift"] or {}).items():
                writer.add_scalar(f"lift_{name}/{check['name']}", float(value), self._last_step)

    def finish(self, *, failed: bool) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.add_text("status", "failed" if failed else "finished", self._last_step)
            self._writer.close()

    def _open_writer(self, step: int) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # A resumed run repeats the steps after its checkpoint: TensorBoard then drops the earlier values of them.
            is_resumed = self._folder.is_dir()
            # Files are named by the second, so a quick restart would overwrite the file of the attempt before it.
            suffix = f".{time.time_ns()}"
            purge_step = step if is_resumed else None
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step, filename_suffix=suffix)
            self._writer.add_text("settings", f"```json\n{self._settings_text}\n```", step)
        return self._writer
