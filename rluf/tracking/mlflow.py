"""MLflow: settings, metrics, verdict and report of a run; a file store without a server. Needs mlflow-skinny."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rluf.config.settings import Settings
from rluf.tracking.metric_registry import list_metric_specs
from rluf.tracking.run_files import read_provenance

MAX_PARAM_CHARS = 500
"""Longest value of a parameter that every MLflow server accepts."""


class MlflowTracker:
    """One MLflow run of the experiment `tracking.project`. A resumed run continues the same MLflow run."""

    def __init__(self, settings: Settings, run_folder: Path) -> None:
        """Start or continue the run at MLFLOW_TRACKING_URI, by default the folder mlruns next to the run folders."""
        # MLflow 3 warns that file stores get no new features; the variable says that one is wanted.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        tracking_uri = os.environ.get("MLFLOW_TRACKING_URI") or (run_folder.parent.parent / "mlruns").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._run_folder = run_folder
        self._names = {spec.key: spec.wandb_name for spec in list_metric_specs(settings.objectives.by_objective)}
        id_file = run_folder / "mlflow_run_id"
        if id_file.is_file():
            self._run_id = id_file.read_text("utf-8").strip()
            self._client.update_run(self._run_id, status="RUNNING")
            return
        name = settings.tracking.project
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        origin = {key: str(value) for key, value in read_provenance().items() if value is not None}
        tags = {**origin, "group": settings.tracking.group or settings.name, "algorithm": settings.algorithm.name}
        run = self._client.create_run(experiment_id, run_name=f"{settings.name}-{run_folder.name}", tags=tags)
        self._run_id = str(run.info.run_id)
        run_folder.mkdir(parents=True, exist_ok=True)
        id_file.write_text(self._run_id, "utf-8")
        for key, value in _flatten(settings.model_dump(mode="json")).items():
            self._client.log_param(self._run_id, key, str(value)[:MAX_PARAM_CHARS])

    def log_step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Record a step; missing and non-finite values are left out."""
        for key, value in metrics.items():
            if key != "step" and value is not None and math.isfinite(value):
                self._client.log_metric(self._run_id, self._names.get(key, f"other/{key}"), float(value), step=step)

    def update_summary(self, summary: Mapping[str, Any]) -> None:
        """Record every number of summary.json as a metric, the verdicts as tags, and the report as an artifact."""
        for key, value in _flatten(summary).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self._client.log_metric(self._run_id, f"summary/{key.replace('.', '/')}", float(value))
        gates = summary.get("gates", {})
        for key in ("verdict", "measured_verdict"):
            self._client.set_tag(self._run_id, key, str(gates.get(key)))
        self._client.set_tag(self._run_id, "reasons", "; ".join(gates.get("reasons", ())))
        for name in ("report.html", "summary.json"):
            if (self._run_folder / name).is_file():
                self._client.log_artifact(self._run_id, str(self._run_folder / name))

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
