"""TensorBoard and MLflow: readers find what a run recorded, also after a resume; a missing package is named."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from rluf.artifacts import check_inputs
from rluf.config.load import load_settings
from rluf.errors import SettingsError
from rluf.tracking.wandb import WandbTracker

SUMMARY = {
    "gates": {
        "verdict": "fail",
        "measured_verdict": "fail",
        "reasons": ["safety fell by more than 5%"],
        "checks": [
            {"name": "safety", "lift": {"mean": -0.2, "low": -0.3, "high": -0.1}},
            {"name": "love", "lift": None},
        ],
    },
    "love_rate": {"lift": {"mean": 0.25}},
    "name": "tracked",
}


def record_run(tracker_name: str, run_folder: Path, first_step: int, last_step: int, *, failed: bool = False) -> None:
    overrides = ["name=tracked", "tracking.wandb=off", f"tracking.trackers=[{tracker_name}]", "tracking.group=team"]
    settings = load_settings(None, overrides).settings
    try:
        with WandbTracker(settings, run_folder) as tracker:
            for step in range(first_step, last_step + 1):
                row = {"step": step, "love": 0.1 * step, "kl": float("nan") if step == 1 else 0.01, "own_metric": None}
                tracker.log_step(step, {**row, "phase_of_moon": 0.5})
            if failed:
                raise KeyboardInterrupt
            tracker.update_summary(SUMMARY)
    except KeyboardInterrupt:
        return


def read_event_files(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """(scalars by tag and step, last text by tag) of TensorBoard's event files, in the order of their writing."""
    import struct

    from tensorboardX.proto.event_pb2 import Event

    scalars: dict[str, dict[int, float]] = defaultdict(dict)
    texts: dict[str, str] = {}
    for path in sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime_ns):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 12 + length + 4
            if event.HasField("session_log") and event.session_log.status == 1:  # START: drops later steps
                for values in scalars.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if value.HasField("tensor"):
                    texts[value.tag] = value.tensor.string_val[0].decode()
                else:
                    scalars[value.tag][event.step] = value.simple_value
    return scalars, texts


def test_tensorboard_has_every_step_once_and_the_verdict(tmp_path: Path) -> None:
    run_folder = tmp_path / "tracked" / "1"
    record_run("tensorboard", run_folder, 1, 3, failed=True)
    record_run("tensorboard", run_folder, 3, 4)
    scalars, texts = read_event_files(run_folder / "tensorboard")
    assert scalars["objectives/love"] == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    assert sorted(scalars["learning/kl"]) == [2, 3, 4]
    assert sorted(scalars["other/phase_of_moon"]) == [1, 2, 3, 4]
    assert "other/own_metric" not in scalars
    assert scalars["lift_low/safety"] == pytest.approx({4: -0.3})
    assert texts["gates/text_summary"] == "fail, measured fail\n\nsafety fell by more than 5%"
    assert texts["status/text_summary"] == "finished"
    assert '"name": "tracked"' in texts["settings/text_summary"]


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("mlflow", reason="the optional package mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=(tmp_path / "mlruns").resolve().as_uri())


def test_mlflow_has_settings_steps_verdict_and_report(tmp_path: Path, mlflow_client: Any) -> None:
    run_folder = tmp_path / "tracked" / "1"
    record_run("mlflow", run_folder, 1, 2, failed=True)
    experiment = mlflow_client.get_experiment_by_name("rluf")
    (run,) = mlflow_client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    (run_folder / "report.html").write_text("<html>")
    record_run("mlflow", run_folder, 3, 3)
    (run,) = mlflow_client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tracked-1")
    assert run.data.params["algorithm.name"] == "grpo"
    assert (run.data.tags["verdict"], run.data.tags["measured_verdict"]) == ("fail", "fail")
    assert run.data.tags["reasons"] == "safety fell by more than 5%"
    assert run.data.tags["group"] == "team"
    history = mlflow_client.get_metric_history(run.info.run_id, "objectives/love")
    assert {metric.step: metric.value for metric in history} == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert [metric.step for metric in mlflow_client.get_metric_history(run.info.run_id, "learning/kl")] == [2, 3]
    assert run.data.metrics["summary/love_rate/lift/mean"] == 0.25
    assert [artifact.path for artifact in mlflow_client.list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.parametrize(("name", "requirement"), [("tensorboard", "tensorboardx"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_named_before_anything_starts(
    name: str, requirement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rluf.tracking.plugin_tracker.importlib.util.find_spec", lambda module_name: None)
    settings = load_settings(None, [f"tracking.trackers=[{name}]", f"run.root={tmp_path}"]).settings
    with pytest.raises(SettingsError, match=rf"pip install '{requirement}'"):
        check_inputs(settings)


def test_an_unknown_tracker_is_refused_with_the_known_names(tmp_path: Path) -> None:
    settings = load_settings(None, ["tracking.trackers=[tensorbord]", f"run.root={tmp_path}"]).settings
    with pytest.raises(SettingsError, match="choose one of mlflow, tensorboard"):
        check_inputs(settings)
