"""Inputs of a simulation, checked before Ray starts and in a dry run, which load no torch."""

from __future__ import annotations

from pathlib import Path

from rluf.config.settings import Settings
from rluf.errors import DataError
from rluf.models.hub import find_model_folder


def check_simulation(settings: Settings, earlier_log: Path | None) -> None:
    """Check the model and the earlier log. Raises ModelError or DataError."""
    find_model_folder(settings.model.path)
    if earlier_log is not None and not (earlier_log / "feedback.jsonl.gz").is_file():
        raise DataError(f"{earlier_log} has no feedback.jsonl.gz; give the folder of a simulated log")
