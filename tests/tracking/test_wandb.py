"""W&B for real, offline: the files are read back record by record."""

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
from rluf.tracking.metric_registry import catalogue
from rluf.tracking.run_files import DrawnRow, JsonlMetrics, SampleRow, write_json
from rluf.tracking.wandb import Tracker
from rluf.utils.cache import Stage

BLOCK = 32_768
SAMPLE: SampleRow = {
    "prompt_id": "p1",
    "topic": "chat",
    "prompt": "hello",
    "base": {"text": "Hi.", "scores": {"love": 0.04}, "failed": []},
    "aligned": {"text": "Hi, how nice! Bye.", "scores": {"love": 0.09}, "failed": ["unprompted_farewell", "length"]},
}
DRAWN: DrawnRow = {
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


def records(folder: Path) -> Iterator[Any]:
    """Protobuf records of the one .wandb file under `folder` (LevelDB log format behind a 7-byte header)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("run-*.wandb")
    data, position, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        whole = chunk if kind in (1, 2) else whole + chunk
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)


def history(folder: Path) -> list[dict[str, Any]]:
    """Logged rows, without W&B's own keys."""
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def rows_of(settings: Settings, steps: int) -> list[dict[str, float]]:
    """Steps that have every documented metric and one that is not."""
    keys = [spec.key for spec in catalogue(settings.objectives.named)]
    own = {"samples": 48.0, "response_tokens": 2000.0, "of_a_new_algorithm": 0.25, "skipped": 0.0}
    return [
        dict.fromkeys(keys, 0.1 * (step + 1)) | own | {"step": step + 1, "version": step + 1} for step in range(steps)
    ]


def test_every_documented_metric_is_there_with_its_axis(tmp_path: Path) -> None:
    settings = Settings()
    tracker = Tracker(settings, tmp_path, "quickstart-1", {"model": {"path": "tiny"}, "seed": 1})
    assert (tracker.mode, tracker.active) == ("offline", True)
    for number, row in enumerate(rows_of(settings, 3), start=1):
        tracker.log(number, {**row, "kl": float("nan") if number == 3 else row["kl"]}, {"love": [0.01, 0.05, 0.2]})
    tracker.log_drawn(2, [DRAWN])
    tracker.log_drawn(3, [])
    tracker.log_samples([SAMPLE])
    tracker.summarise({"love_rate": {"lift": {"mean": 0.21}}, "gates": {"alarms": ["emoji"], "verdict": "warn"}})
    tracker.finish()
    assert not tracker.active

    found = list(records(tmp_path))
    axes = {one.metric.name: one.metric for one in found if one.WhichOneof("record_type") == "metric"}
    logged = [row for row in history(tmp_path) if "samples" in row]
    for spec in catalogue(settings.objectives.named):
        assert axes[spec.name].step_metric == spec.axis, spec
        assert getattr(axes[spec.name].summary, spec.keep), spec
        assert all(spec.name in row for row in logged[:2]), spec
        assert spec.axis in logged[0]
    assert [(row["step"], row["samples"], row["tokens"], row["version"]) for row in logged] == [
        (1, 48, 2000, 1), (2, 96, 4000, 2), (3, 144, 6000, 3),
    ]  # fmt: skip
    assert [row["objectives/love"] for row in logged] == pytest.approx([0.1, 0.2, 0.3])
    assert "learning/kl" not in logged[2]
    assert logged[0]["other/of_a_new_algorithm"] == 0.25
    assert sum(logged[0]["distributions/love/values"]) == 3
    (run,) = (one.run for one in found if one.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("rluf", "quickstart-1")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model"] == {"path": "tiny"}
    assert set(config["origin"]) == {"git_commit", "git_changed", "ray_job_id", "submission_id"}
    summary = [str(one.summary) for one in found if one.WhichOneof("record_type") == "summary"]
    assert any("love_rate" in text and "0.21" in text for text in summary)
    alerts = [one.alert for one in found if one.WhichOneof("record_type") == "alert"]
    assert [(one.title, one.text) for one in alerts] == [("quickstart: monitors", "Raised an alarm: emoji.")]
    drawn, pairs = (
        json.loads(next(tmp_path.glob(f"wandb/*run-*/files/media/table/{name}_*.json")).read_text())
        for name in ("drawn", "side_by_side")
    )
    assert pairs["columns"] == [
        "topic", "prompt", "base", "aligned", "love/base", "love/aligned", "verdicts/base", "verdicts/aligned",
    ]  # fmt: skip
    assert pairs["data"] == [
        ["chat", "hello", "Hi.", "Hi, how nice! Bye.", 0.04, 0.09, "passes", "fails unprompted_farewell, length"]
    ]
    assert drawn["columns"] == [
        "step", "version", "topic", "prompt", "response", "love", "safety", "reward", "kl", "verdicts",
    ]  # fmt: skip
    (cells,) = drawn["data"]
    assert cells == [2, 1, "chat", "hello", "x" * 1000 + " …", 0.05, 0.9, 0.5, 1.5, "fails repetition"]
    assert [row["step"] for row in history(tmp_path) if "drawn/_type" in row] == [2]


def test_cards_are_artifacts_that_name_what_they_were_made_from(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    write_json(stage / "data_card.json", {"sources": [{"kind": "feedback", "rows": 6}], "counts": {}})
    for name in ("data", "love"):
        write_json(tmp_path / "cards" / f"{name}.json", {"name": name})
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").write_text("weights")
    with Tracker(Settings(), tmp_path) as tracker:
        tracker.log_stages(
            Stage("data", stage, "aaa", False), {"love": Stage("reward-love", stage, "bbb", True), "safety": None}
        )
        tracker.log_policy({"gates": {"verdict": "pass"}, "kl": 0.02})
    found = {
        one.artifact.name: one.artifact for one in records(tmp_path) if one.WhichOneof("record_type") == "artifact"
    }
    chain = {name: json.loads(one.metadata)["made_from"] for name, one in found.items()}
    assert chain == {
        "quickstart-log": [],
        "quickstart-data": ["quickstart-log"],
        "quickstart-reward-love": ["quickstart-data"],
        "quickstart-policy": [
            "quickstart-data", "quickstart-reward-love", "quickstart-reward-helpfulness", "quickstart-reward-safety",
        ],
    }  # fmt: skip
    taken = {name for name, one in found.items() if one.use_after_commit}
    assert taken == {"quickstart-log", "quickstart-reward-love"}  # the run began with them, it made the others
    assert set(found["quickstart-reward-love"].aliases) == {"latest", "bbb"}
    (card,) = found["quickstart-reward-love"].manifest.contents
    assert Path(card.local_path) == tmp_path / "cards" / "love.json"
    (weights,) = found["quickstart-policy"].manifest.contents
    assert weights.ref == (tmp_path / "policy" / "model.safetensors").as_uri()


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    settings = Settings()
    first, second, third = rows_of(settings, 3)
    with JsonlMetrics(tmp_path / "metrics.jsonl") as metrics:
        metrics.append(first)
        metrics.append(second)
    seen = []
    for row in (second, third):
        with Tracker(settings, tmp_path) as tracker:
            tracker.log(int(row["step"]), row)
        (part,) = set(tmp_path.glob("wandb/offline-run-*")) - {path for path, _ in seen}
        seen.append((part, history(part)[0]))
        time.sleep(1.1)  # the folder's name has the second in it
    assert [(row["step"], row["samples"]) for _, row in seen] == [(2, 96), (3, 144)]
    assert len({path.name.rpartition("-")[2] for path, _ in seen}) == 1


def test_off_writes_nothing(tmp_path: Path) -> None:
    with Tracker(Settings(tracking=TrackingSettings(wandb="off")), tmp_path) as tracker:
        tracker.log(1, {"love": 0.5})
    assert not tracker.active
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_folder_is_one_warning_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(Settings(), tmp_path / "file" / "run", "broken", {})
        tracker.log(1, {"love": 0.5})
        tracker.log_samples([SAMPLE])
        tracker.finish()
    assert not tracker.active
    assert len([one for one in caplog.records if one.name == "rluf.tracking.background"]) == 1


ONLINE = """
import logging, pathlib, sys
import rluf.tracking.wandb as module
from rluf.config.settings import Settings

logging.basicConfig(stream=sys.stdout, format="%(message)s")
module.START_TIMEOUT_S = 1.0
tracker = module.Tracker(Settings(), pathlib.Path(sys.argv[1]))
tracker.log(7, {"love": 0.5})
logging.warning("%s %s", tracker.mode, tracker.active)
tracker.finish()
"""


def test_online_without_a_reachable_server_goes_on_offline(tmp_path: Path) -> None:
    # Its own process, since W&B reads its environment once: nothing listens on port 9 of this machine.
    environment = {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", ONLINE, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "W&B could not start online (CommError" in done.stdout
    assert "offline True" in done.stdout
    assert history(next(tmp_path.glob("wandb/offline-run-*"))) == [
        {"step": 7, "samples": 0, "tokens": 0, "version": 0, "objectives/love": 0.5}
    ]


CUT_OFF = """
import os, pathlib, signal, sys
import rluf.tracking.wandb as module
from rluf.config.settings import Settings

module.START_TIMEOUT_S, module.FINISH_TIMEOUT_S = 10.0, 2.0
tracker = module.Tracker(Settings(), pathlib.Path(sys.argv[1]))
tracker.log(1, {"love": 0.5})
os.kill(int(sys.argv[2]), signal.SIGKILL)
for step in range(2, 40):
    tracker.log(step, {"love": 0.5})
print(tracker.mode)
tracker.finish()
print("the run ended")
"""


def serve(*log: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """A server of its own process, and the environment in which W&B goes there."""
    command = [sys.executable, str(Path(__file__).with_name("wandb_server.py")), *log]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = f"http://127.0.0.1:{int(server.stdout.readline())}"
    return server, {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}


@pytest.mark.slow
def test_a_network_that_dies_in_mid_run_costs_no_metric_and_stops_nothing(tmp_path: Path) -> None:
    server, environment = serve()
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, str(tmp_path), str(server.pid)],
        env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    server.wait(10)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["online", "the run ended"], done.stdout + done.stderr
    kept = history(next(tmp_path.glob("wandb/run-*")))
    assert [row["step"] for row in kept if "objectives/love" in row] == list(range(1, 40))


def run(command: list[str], environment: dict[str, str]) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LINEAGE = """
import pathlib, sys
import rluf.tracking.wandb as module
from rluf.config.settings import Settings
from rluf.utils.cache import Stage

module.START_TIMEOUT_S = 10.0
stage = pathlib.Path(sys.argv[1])
tracker = module.Tracker(Settings(), stage)
tracker.log_stages(Stage("data", stage, "aaa", True), {"love": Stage("reward-love", stage, "bbb", False)})
tracker.log(1, {"kl": 0.25})
tracker.finish()
print(tracker.mode)
"""


@pytest.mark.slow
@pytest.mark.parametrize("later", [False, True], ids=["online", "wandb sync"])
def test_the_server_is_told_what_a_run_took_and_what_it_gave(tmp_path: Path, *, later: bool) -> None:
    write_json(tmp_path / "data_card.json", {"sources": [], "counts": {}})
    for name in ("data", "love"):
        write_json(tmp_path / "cards" / f"{name}.json", {"name": name})
    log = tmp_path / "asked.jsonl"
    server, online = serve(str(log))
    wandb = str(Path(sys.executable).with_name("wandb"))
    try:
        told = run([sys.executable, "-c", LINEAGE, str(tmp_path)], dict(os.environ) if later else online)
        assert told.split() == ["offline" if later else "online"]
        if later:
            run([wandb, "sync", *map(str, tmp_path.glob("wandb/offline-run-*"))], online)
    finally:
        server.kill()
        server.wait(10)
    asked = [json.loads(line)["asked"] for line in log.read_text().splitlines()]
    assert sum("mutation CreateArtifact " in one for one in asked) == 3
    assert sum("mutation UseArtifact " in one for one in asked) == 2
    assert any("learning/kl" in one for one in asked)
