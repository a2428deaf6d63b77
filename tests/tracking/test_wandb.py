"""The real W&B package, offline: its files are read back record by record."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rluf.config.run import TrackingSettings
from rluf.config.settings import Settings
from rluf.tracking.metric_registry import list_metric_specs
from rluf.tracking.run_files import PromptComparison, RolloutSample
from rluf.tracking.wandb import WandbTracker
from rluf.utils.cache import Artifact
from rluf.utils.files import JsonlWriter, write_json

BLOCK_BYTES = 32_768
COMPARISON: PromptComparison = {
    "prompt_id": "p1",
    "topic": "chat",
    "prompt": "hello",
    "base": {"text": "Hi.", "scores": {"love": 0.04}, "failed": []},
    "aligned": {"text": "Hi, how nice! Bye.", "scores": {"love": 0.09}, "failed": ["unprompted_farewell", "length"]},
}
ROLLOUT_SAMPLE: RolloutSample = {
    "step": 2,
    "version": 1,
    "topic": "chat",
    "prompt": "hello",
    "response": "x" * 3000,
    "scores": {"safety": 0.9, "love": 0.05},
    "reward": 0.5,
    "kl": 1.5,
    "failed": ["repetition"],
}


def read_records(folder: Path) -> Iterator[Any]:
    """Protobuf records of the one .wandb file under `folder` (LevelDB log format behind a 7-byte header)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    data, position, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        remaining = BLOCK_BYTES - position % BLOCK_BYTES
        if remaining < 7:
            position += remaining
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        message = chunk if kind in (1, 2) else message + chunk
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(message)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Logged rows, without W&B's own keys."""
    rows = []
    for record in read_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def make_step_rows(settings: Settings, steps: int) -> list[dict[str, float]]:
    """Step rows with every registered metric and one that is not registered."""
    keys = [spec.key for spec in list_metric_specs(settings.objectives.by_objective)]
    fixed_values = {"samples": 48.0, "response_tokens": 2000.0, "of_a_new_algorithm": 0.25, "skipped": 0.0}
    return [
        dict.fromkeys(keys, 0.1 * (step + 1)) | fixed_values | {"step": step + 1, "version": step + 1}
        for step in range(steps)
    ]


def test_every_registered_metric_is_logged_with_its_axis(tmp_path: Path) -> None:
    settings = Settings()
    tracker = WandbTracker(settings, tmp_path, "quickstart-1", {"model": {"path": "tiny"}, "seed": 1})
    assert (tracker.mode, tracker.is_active) == ("offline", True)
    for number, row in enumerate(make_step_rows(settings, 3), start=1):
        tracker.log_step(number, {**row, "kl": float("nan") if number == 3 else row["kl"]}, {"love": [0.01, 0.05, 0.2]})
    tracker.log_rollout_samples(2, [ROLLOUT_SAMPLE])
    tracker.log_rollout_samples(3, [])
    tracker.log_comparisons([COMPARISON])
    tracker.update_summary(
        {
            "love_rate": {"lift": {"mean": 0.21}},
            "gates": {"verdict": "undecided", "measured_verdict": "undecided", "reasons": ["love undecided"]},
        }
    )
    tracker.finish()
    assert not tracker.is_active

    records = list(read_records(tmp_path))
    axes = {record.metric.name: record.metric for record in records if record.WhichOneof("record_type") == "metric"}
    logged = [row for row in read_history(tmp_path) if "samples" in row]
    for spec in list_metric_specs(settings.objectives.by_objective):
        assert axes[spec.wandb_name].step_metric == spec.axis, spec
        assert getattr(axes[spec.wandb_name].summary, spec.summary_statistic), spec
        assert all(spec.wandb_name in row for row in logged[:2]), spec
        assert spec.axis in logged[0]
    assert [(row["step"], row["samples"], row["tokens"], row["version"]) for row in logged] == [
        (1, 48, 2000, 1), (2, 96, 4000, 2), (3, 144, 6000, 3),
    ]  # fmt: skip
    assert [row["objectives/love"] for row in logged] == pytest.approx([0.1, 0.2, 0.3])
    assert "learning/kl" not in logged[2]
    assert logged[0]["other/of_a_new_algorithm"] == 0.25
    assert sum(logged[0]["distributions/love/values"]) == 3
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("rluf", "quickstart-1")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model"] == {"path": "tiny"}
    assert set(config["origin"]) == {"git_commit", "git_changed", "code_digest", "ray_job_id", "submission_id"}
    summary = [str(record.summary) for record in records if record.WhichOneof("record_type") == "summary"]
    assert any("love_rate" in text and "0.21" in text for text in summary)
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text) for alert in alerts] == [("quickstart: gates undecided", "love undecided.")]
    rollout_table, comparison_table = (
        json.loads(next(tmp_path.glob(f"wandb/*run-*/files/media/table/{name}_*.json")).read_text())
        for name in ("rollout_samples", "side_by_side")
    )
    assert comparison_table["columns"] == [
        "topic", "prompt", "base", "aligned", "love/base", "love/aligned", "verdicts/base", "verdicts/aligned",
    ]  # fmt: skip
    assert comparison_table["data"] == [
        ["chat", "hello", "Hi.", "Hi, how nice! Bye.", 0.04, 0.09, "passes", "fails unprompted_farewell, length"]
    ]
    assert rollout_table["columns"] == [
        "step", "version", "topic", "prompt", "response", "love", "safety", "reward", "kl", "verdicts",
    ]  # fmt: skip
    (cells,) = rollout_table["data"]
    assert cells == [2, 1, "chat", "hello", "x" * 1000 + " …", 0.05, 0.9, 0.5, 1.5, "fails repetition"]
    assert [row["step"] for row in read_history(tmp_path) if "rollout_samples/_type" in row] == [2]


def test_cards_are_artifacts_with_their_lineage(tmp_path: Path) -> None:
    artifact_folder = tmp_path / "artifact"
    write_json(artifact_folder / "data_card.json", {"sources": [{"kind": "feedback", "rows": 6}], "counts": {}})
    for name in ("data", "love"):
        write_json(tmp_path / "cards" / f"{name}.json", {"name": name})
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").write_text("weights")
    with WandbTracker(Settings(), tmp_path) as tracker:
        tracker.log_artifacts(
            Artifact("data", artifact_folder, "aaa", False),
            {"love": Artifact("reward-love", artifact_folder, "bbb", True), "safety": None},
        )
        tracker.log_policy_artifact({"gates": {"verdict": "pass"}, "kl": 0.02})
    artifacts = {
        record.artifact.name: record.artifact
        for record in read_records(tmp_path)
        if record.WhichOneof("record_type") == "artifact"
    }
    sources = {name: json.loads(artifact.metadata)["made_from"] for name, artifact in artifacts.items()}
    assert sources == {
        "quickstart-log": [],
        "quickstart-data": ["quickstart-log"],
        "quickstart-reward-love": ["quickstart-data"],
        "quickstart-policy": [
            "quickstart-data", "quickstart-reward-love", "quickstart-reward-helpfulness", "quickstart-reward-safety",
        ],
    }  # fmt: skip
    inputs = {name for name, artifact in artifacts.items() if artifact.use_after_commit}
    assert inputs == {"quickstart-log", "quickstart-reward-love"}  # they existed before the run
    assert set(artifacts["quickstart-reward-love"].aliases) == {"latest", "bbb"}
    (card,) = artifacts["quickstart-reward-love"].manifest.contents
    assert Path(card.local_path) == tmp_path / "cards" / "love.json"
    (weights,) = artifacts["quickstart-policy"].manifest.contents
    assert weights.ref == (tmp_path / "policy" / "model.safetensors").as_uri()


def test_a_run_has_group_tags_job_type_and_the_curves_of_reward_training(tmp_path: Path) -> None:
    history = [{"epoch": 1.0, "train_loss": 0.6, "dev_log_loss": 0.3}, {"epoch": 2.0, "train_loss": 0.5}]
    write_json(tmp_path / "cards" / "love.json", {"training": {"history": history}})
    write_json(tmp_path / "cards" / "safety.json", {})
    tracking = {"group": "weights-sweep", "tags": ["nightly", "grpo", "x" * 100]}
    settings = Settings.model_validate({"model": {"path": "org/small-model"}, "tracking": tracking})
    with WandbTracker(settings, tmp_path, job_type="evaluate") as tracker:
        tracker.log_reward_training()
    (run,) = [record.run for record in read_records(tmp_path) if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_group, run.job_type) == ("weights-sweep", "evaluate")
    assert sorted(run.tags) == sorted(["grpo", "small-model", "nightly", "x" * 64])
    rows = read_history(tmp_path)
    assert [{key.rpartition("/")[2]: value for key, value in row.items() if "love" in key} for row in rows] == history
    metrics = {
        record.metric.name: record.metric.step_metric
        for record in read_records(tmp_path)
        if record.WhichOneof("record_type") == "metric"
    }
    assert metrics["reward_training/love/dev_log_loss"] == "reward_training/love/epoch"


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path: Path) -> None:
    settings = Settings()
    first, second, third = make_step_rows(settings, 3)
    with JsonlWriter(tmp_path / "metrics.jsonl") as metrics:
        metrics.append_row(first)
        metrics.append_row(second)
    attempts = []
    for row in (second, third):
        with WandbTracker(settings, tmp_path) as tracker:
            tracker.log_step(int(row["step"]), row)
        (attempt_folder,) = set(tmp_path.glob("wandb/offline-run-*")) - {path for path, _ in attempts}
        attempts.append((attempt_folder, read_history(attempt_folder)[0]))
        time.sleep(1.1)  # the folder name has a resolution of one second
    assert [(row["step"], row["samples"]) for _, row in attempts] == [(2, 96), (3, 144)]
    assert len({path.name.rpartition("-")[2] for path, _ in attempts}) == 1


def test_mode_off_writes_nothing(tmp_path: Path) -> None:
    with WandbTracker(Settings(tracking=TrackingSettings(wandb="off")), tmp_path) as tracker:
        tracker.log_step(1, {"love": 0.5})
    assert not tracker.is_active
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_folder_is_a_single_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        tracker = WandbTracker(Settings(), tmp_path / "file" / "run", "broken", {})
        tracker.log_step(1, {"love": 0.5})
        tracker.log_comparisons([COMPARISON])
        tracker.finish()
    assert not tracker.is_active
    assert len([record for record in caplog.records if record.name == "rluf.tracking.background"]) == 1


UNREACHABLE_SERVER_PROGRAM = """
import logging, pathlib, sys
import rluf.tracking.wandb as module
from rluf.config.settings import Settings

logging.basicConfig(stream=sys.stdout, format="%(message)s")
module.START_TIMEOUT_S = 1.0
tracker = module.WandbTracker(Settings(), pathlib.Path(sys.argv[1]))
tracker.log_step(7, {"love": 0.5})
logging.warning("%s %s", tracker.mode, tracker.is_active)
tracker.finish()
"""


def test_online_without_a_reachable_server_falls_back_to_offline(tmp_path: Path) -> None:
    # In a separate process, since W&B reads its environment once. Nothing listens on port 9 of this machine.
    environment = {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", UNREACHABLE_SERVER_PROGRAM, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "W&B could not start online (CommError" in result.stdout
    assert "offline True" in result.stdout
    assert read_history(next(tmp_path.glob("wandb/offline-run-*"))) == [
        {"step": 7, "samples": 0, "tokens": 0, "version": 0, "objectives/love": 0.5}
    ]


LOST_SERVER_PROGRAM = """
import os, pathlib, signal, sys
import rluf.tracking.wandb as module
from rluf.config.settings import Settings

module.START_TIMEOUT_S, module.FINISH_TIMEOUT_S = 10.0, 2.0
tracker = module.WandbTracker(Settings(), pathlib.Path(sys.argv[1]))
tracker.log_step(1, {"love": 0.5})
os.kill(int(sys.argv[2]), signal.SIGKILL)
for step in range(2, 40):
    tracker.log_step(step, {"love": 0.5})
print(tracker.mode)
tracker.finish()
print("the run ended")
"""


def start_server(*arguments: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """Start a W&B server in a separate process; returns it and the environment variables for its clients."""
    command = [sys.executable, str(Path(__file__).with_name("wandb_server.py")), *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = f"http://127.0.0.1:{int(server.stdout.readline())}"
    return server, {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}


@pytest.mark.slow
def test_a_server_lost_during_the_run_loses_no_metric_and_stops_nothing(tmp_path: Path) -> None:
    server, environment = start_server()
    result = subprocess.run(
        [sys.executable, "-c", LOST_SERVER_PROGRAM, str(tmp_path), str(server.pid)],
        env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    server.wait(10)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["online", "the run ended"], result.stdout + result.stderr
    rows = read_history(next(tmp_path.glob("wandb/run-*")))
    assert [row["step"] for row in rows if "objectives/love" in row] == list(range(1, 40))


def run_command(command: list[str], environment: dict[str, str]) -> str:
    """Run a command that must succeed; returns its standard output."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


LINEAGE_PROGRAM = """
import pathlib, sys
import rluf.tracking.wandb as module
from rluf.config.settings import Settings
from rluf.utils.cache import Artifact

module.START_TIMEOUT_S = 10.0
folder = pathlib.Path(sys.argv[1])
tracker = module.WandbTracker(Settings(), folder)
tracker.log_artifacts(Artifact("data", folder, "aaa", True), {"love": Artifact("reward-love", folder, "bbb", False)})
tracker.log_step(1, {"kl": 0.25})
tracker.finish()
print(tracker.mode)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_synced_later", [False, True], ids=["online", "wandb sync"])
def test_the_server_gets_the_inputs_and_outputs_of_a_run(tmp_path: Path, *, is_synced_later: bool) -> None:
    write_json(tmp_path / "data_card.json", {"sources": [], "counts": {}})
    for name in ("data", "love"):
        write_json(tmp_path / "cards" / f"{name}.json", {"name": name})
    log_file = tmp_path / "requests.jsonl"
    server, environment = start_server(str(log_file))
    wandb_command = str(Path(sys.executable).with_name("wandb"))
    try:
        output = run_command(
            [sys.executable, "-c", LINEAGE_PROGRAM, str(tmp_path)], dict(os.environ) if is_synced_later else environment
        )
        assert output.split() == ["offline" if is_synced_later else "online"]
        if is_synced_later:
            run_command([wandb_command, "sync", *map(str, tmp_path.glob("wandb/offline-run-*"))], environment)
    finally:
        server.kill()
        server.wait(10)
    requests = [json.loads(line)["request"] for line in log_file.read_text().splitlines()]
    assert sum("mutation CreateArtifact " in request for request in requests) == 3
    assert sum("mutation UseArtifact " in request for request in requests) == 2
    assert any("learning/kl" in request for request in requests)
