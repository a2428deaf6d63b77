"""W&B for real, offline: the files are read back record by record."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rluf.config.run import TrackingSettings
from rluf.config.settings import Settings
from rluf.tracking.metrics import SampleRow
from rluf.tracking.wandb import Tracker

BLOCK = 32_768
SAMPLE: SampleRow = {
    "prompt_id": "p1",
    "topic": "chat",
    "prompt": "hello",
    "base": {"text": "Hi.", "scores": {"love": 0.04}},
    "aligned": {"text": "Hi, how nice!", "scores": {"love": 0.09}},
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


def test_offline_run_is_written_and_read_back(tmp_path: Path) -> None:
    tracker = Tracker(Settings(), tmp_path, "quickstart-1", {"model": {"path": "tiny"}, "seed": 1})
    assert (tracker.mode, tracker.active) == ("offline", True)
    for step in range(3):
        tracker.log(step, {"love": 0.06 + step / 100, "kl": float("nan"), "probe": None})
    tracker.log_samples([SAMPLE])
    tracker.summarise({"love_rate": {"lift": {"mean": 0.21}}})
    tracker.finish()

    rows = history(tmp_path)
    assert [row["step"] for row in rows if "love" in row] == [0, 1, 2]
    assert [row["love"] for row in rows if "love" in row] == pytest.approx([0.06, 0.07, 0.08])
    assert all("kl" not in row and "probe" not in row for row in rows)
    found = list(records(tmp_path))
    (run,) = (one.run for one in found if one.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("rluf", "quickstart-1")
    assert {item.key: item.value_json for item in run.config.update}["model"] == '{"path":"tiny"}'
    axes = [one.metric for one in found if one.WhichOneof("record_type") == "metric"]
    assert any(axis.glob_name == "*" and axis.step_metric == "step" for axis in axes)
    summary = [str(one.summary) for one in found if one.WhichOneof("record_type") == "summary"]
    assert any("love_rate" in text and "0.21" in text for text in summary)
    (table,) = tmp_path.glob("wandb/*run-*/files/media/table/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["topic", "prompt", "base", "aligned", "love/base", "love/aligned"]
    assert content["data"] == [["chat", "hello", "Hi.", "Hi, how nice!", 0.04, 0.09]]


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
    assert len([one for one in caplog.records if one.name == "rluf.tracking.wandb"]) == 1


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
    assert history(next(tmp_path.glob("wandb/offline-run-*"))) == [{"step": 7, "love": 0.5}]
