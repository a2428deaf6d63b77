"""A worker killed in the middle of an epoch: Ray Train restarts the workers, and they read only the unread rows."""

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
from rluf.reward.checkpoint import PROGRESS_FILE
from tests.reward.test_reward_training import write_prepared_data

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]
ROW_COUNT, EPOCHS, DEADLINE_S = 900, 2, 480.0


def read_saved_progress(folder: Path) -> dict[str, dict[str, Any]]:
    """Progress records that the workers saved and Ray still has, by checkpoint, oldest first."""
    progress_by_checkpoint = {}
    for path in sorted(folder.glob(f".ray-train-*/reward/checkpoint_*/{PROGRESS_FILE}")):
        try:
            progress_by_checkpoint[path.parent.name] = json.loads(path.read_text())
        except (OSError, ValueError):  # Ray is replacing it at this moment
            continue
    return progress_by_checkpoint


def find_worker_processes() -> list[psutil.Process]:
    workers = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                workers.append(process)
        except psutil.Error:
            continue
    return workers


def test_a_worker_killed_in_the_middle_of_an_epoch_costs_no_example(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Two heads on one backbone, one to two workers; one of them gets SIGKILL after a save in epoch 1."""
    from rluf.reward.ray_trainer import train_reward_models

    data_folder = write_prepared_data(tmp_path / "data", row_count=ROW_COUNT)
    section = {
        "backbone": "tiny-encoder",
        "max_tokens": 80,
        "epochs": EPOCHS,
        "learning_rate": 3e-3,
        "batch_rows": 8,
    }
    reward = {
        "love": section,
        "helpfulness": {**section, "loss": "bradley_terry"},
        "shared_backbone_heads": ["love", "helpfulness"],
        "workers": [1, 2],
    }
    tree = {
        "run": {"cache": str(tmp_path / "cache")},
        "model": {"dtype": "float32"},
        "reward": reward,
        "timeouts": {"reward_training_s": DEADLINE_S},
    }
    settings = Settings.model_validate(tree)
    jobs = {head: (data_folder, tmp_path / "models" / head) for head in ("love", "helpfulness")}
    cards: dict[str, dict[str, Any]] = {}
    with caplog.at_level(logging.INFO, logger="rluf"):
        thread = threading.Thread(target=lambda: cards.update(train_reward_models(settings, jobs, save_interval_s=0.0)))
        thread.start()
        end_time = time.monotonic() + DEADLINE_S
        saved_progress: dict[str, dict[str, Any]] = {}
        # Several saves: Ray restarts from a checkpoint that it has registered, which may not be the newest one.
        while time.monotonic() < end_time and thread.is_alive() and len(saved_progress) < 4:
            saved_progress |= read_saved_progress(tmp_path / "models")
            time.sleep(0.05)
        workers = find_worker_processes()
        assert all((record["epoch"], record["read_key_arrays"]) == (0, 2) for record in saved_progress.values())
        assert len(workers) == 2
        os.kill(workers[-1].pid, signal.SIGKILL)
        thread.join(timeout=max(1.0, end_time - time.monotonic()))
    assert "resuming epoch" in caplog.text
    examples = {head: card["training"]["examples"] for head, card in cards.items()}
    assert examples == dict.fromkeys(jobs, ROW_COUNT * EPOCHS)
    assert cards["love"]["heads"] == ["love", "helpfulness"]
    assert cards["love"]["auroc"]["low"] > 0.6
    assert not list((tmp_path / "models").glob(".*"))
