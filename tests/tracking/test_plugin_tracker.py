"""Trackers of the user's own: what they receive, and that their failures never stop a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rluf.config.settings import Settings
from rluf.errors import SettingsError
from rluf.tracking.plugin_tracker import PluginTracker
from rluf.tracking.wandb import WandbTracker


class FileTracker:
    """Writes what it receives to a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []  # type: ignore[var-annotated]

    def log_step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        if metrics["reward"] is None:
            raise ZeroDivisionError("no reward")
        self.rows.append([step, dict(metrics)])

    def update_summary(self, summary: Mapping[str, Any]) -> None:
        self.rows.append(summary)

    def finish(self, *, failed: bool) -> None:
        self.path.write_text(json.dumps([*self.rows, failed]))


def create_tracker(settings: Settings, run_folder: Path) -> FileTracker:
    return FileTracker(run_folder / f"{settings.name}.json")


class AsyncTracker:
    """Its coroutines would never run."""

    def __init__(self, settings: Settings, run_folder: Path) -> None:
        """Takes what every tracker takes."""

    async def log_step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        raise AssertionError


def refuse_to_start(settings: Settings, run_folder: Path) -> FileTracker:
    raise ConnectionError("no server")


def make_settings(*factories: str) -> Settings:
    trackers = [f"{__name__}:{factory}" for factory in factories]
    return Settings.model_validate({"name": "tracked", "tracking": {"wandb": "off", "trackers": trackers}})


def test_a_tracker_receives_steps_and_the_summary_also_without_wandb(tmp_path: Path) -> None:
    with WandbTracker(make_settings("create_tracker"), tmp_path) as tracker:
        tracker.log_step(1, {"step": 1, "reward": 0.5}, {"reward": [0.5]})
        tracker.update_summary({"gates": {"verdict": "pass"}})
    assert json.loads((tmp_path / "tracked.json").read_text()) == [
        [1, {"step": 1, "reward": 0.5}], {"gates": {"verdict": "pass"}}, False,
    ]  # fmt: skip


class StepCounter:
    """A tracker with the one required method."""

    def __init__(self, settings: Settings, run_folder: Path) -> None:
        self.path = run_folder / "steps.txt"

    def log_step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        with self.path.open("a") as file:
            file.write(f"{step} {metrics['reward']}\n")


def test_a_tracker_needs_log_step_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with WandbTracker(make_settings("StepCounter"), tmp_path) as tracker:
        tracker.log_step(1, {"reward": 0.5}, {"reward": [0.5]})
        tracker.update_summary({"gates": {"verdict": "pass"}})
    assert (tmp_path / "steps.txt").read_text() == "1 0.5\n" and not caplog.records


def test_failures_are_one_warning_each_and_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with WandbTracker(make_settings("create_tracker", "refuse_to_start"), tmp_path) as tracker:
        for step in (1, 2):
            tracker.log_step(step, {"reward": None})
    warnings = sorted(record.message.partition(":")[2] for record in caplog.records)
    assert warnings == [
        "create_tracker could not log step 1 (ZeroDivisionError: no reward); continuing without it",
        "refuse_to_start could not start (ConnectionError: no server); continuing without it",
    ]
    assert not (tmp_path / "tracked.json").exists()


def test_a_tracker_with_async_methods_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with WandbTracker(make_settings("AsyncTracker"), tmp_path) as tracker:
        tracker.log_step(1, {"reward": 0.5})
    (record,) = caplog.records
    assert "AsyncTracker could not start (SettingsError: log_step is an async function" in record.message


def test_a_wrong_reference_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="tracker 'missing:create' cannot be imported"):
        PluginTracker("missing:create", Settings(), tmp_path)
    with pytest.raises(SettingsError, match=r"W&B has a setting of its own, tracking\.wandb"):
        PluginTracker("wandb", Settings(), tmp_path)
    with pytest.raises(SettingsError, match=r"tracker 'json:loads': expected a function .*too many positional"):
        PluginTracker("json:loads", Settings(), tmp_path)
