"""A worker killed in mid-epoch: Ray Train starts the workers again, and they read what nobody had read yet."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from rluf.config.settings import Settings
from tests.reward.test_reward_training import write_data

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]
ROWS, EPOCHS, DEADLINE = 900, 2, 480.0


def _stands(folder: Path) -> dict[str, dict[str, Any]]:
    """What the workers kept and Ray still has, by checkpoint, oldest first."""
    found = {}
    for file in sorted(folder.glob(".ray-train-*/reward/checkpoint_*/stand.json")):
        try:
            found[file.parent.name] = json.loads(file.read_text())
        except (OSError, ValueError):  # Ray is just replacing it
            continue
    return found


def _workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_worker_killed_in_mid_epoch_costs_no_example(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Two heads on one backbone, one to two workers; kill -9 to one of them once some of epoch 1 is kept."""
    from rluf.reward.ray_trainer import train_rewards as train

    data = write_data(tmp_path / "data", rows=ROWS)
    model = {
        "backbone": "tiny-encoder",
        "max_tokens": 80,
        "epochs": EPOCHS,
        "patience": 0,
        "learning_rate": 3e-3,
        "batch_rows": 8,
    }
    settings = Settings.model_validate(
        {
            "run": {"cache": str(tmp_path / "cache")},
            "reward": {
                "love": model,
                "helpfulness": {**model, "loss": "bradley_terry"},
                "heads": ["love", "helpfulness"],
                "workers": [1, 2],
                "retries": 2,
                "dtype": "float32",
                "deadline_s": DEADLINE,
            },
        }
    )
    jobs = {head: (data, tmp_path / "models" / head) for head in ("love", "helpfulness")}
    cards: dict[str, dict[str, Any]] = {}
    with caplog.at_level(logging.INFO, logger="rluf"):
        thread = threading.Thread(target=lambda: cards.update(train(settings, jobs, save_s=0.0)))
        thread.start()
        end = time.monotonic() + DEADLINE
        seen: dict[str, dict[str, Any]] = {}
        while time.monotonic() < end and thread.is_alive() and len(seen) < 4:  # Ray goes back to one it has taken in
            seen |= _stands(tmp_path / "models")
            time.sleep(0.05)
        workers = _workers()
        assert all((stand["epoch"], stand["read"]) == (0, 2) for stand in seen.values())
        assert len(workers) == 2
        os.kill(workers[-1].pid, signal.SIGKILL)
        thread.join(timeout=max(1.0, end - time.monotonic()))
    assert "goes on in epoch" in caplog.text
    assert {head: card["training"]["examples"] for head, card in cards.items()} == dict.fromkeys(jobs, ROWS * EPOCHS)
    assert cards["love"]["heads"] == ["love", "helpfulness"]
    assert cards["love"]["auroc"]["low"] > 0.6
    assert not list((tmp_path / "models").glob(".*"))
