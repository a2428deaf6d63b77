"""A sweep as a user runs it: two runs of the main job under Ray Tune, then again, when nothing is left to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable, "-m", "rluf.sweep", "--config", "configs/tiny.yaml", "--weights", "0", "0.3", "--seeds", "1",
    "algorithm.steps=1",
]  # fmt: skip


def swept(base: Path, *more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RLUF_RUNS": str(base / "runs"), "RLUF_CACHE": str(base / "cache"), "RAY_AUTH_MODE": "token"}
    env.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [*COMMAND, *more], cwd=ROOT, env=env, capture_output=True, text=True, timeout=800, check=False
    )


def test_a_sweep_runs_every_point_once_and_tells_the_front(tmp_path: Path) -> None:
    first = swept(tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    found = json.loads(first.stdout.splitlines()[-1])
    assert [(one["weight"], one["kl_coef"], one["seeds"]) for one in found["settings"]] == [
        (0.0, 0.02, 1),
        (0.3, 0.02, 1),
    ]
    assert found["failed"] == {}
    assert found["front"]
    folder = tmp_path / "runs" / "tiny-sweep"
    assert json.loads((folder / "sweep.json").read_text("utf-8"))["rule"] == found["rule"]
    weights = [
        json.loads((folder / f"love{w}-kl0.02-seed1" / "latest" / "config.json").read_text("utf-8"))["objectives"]
        for w in ("0", "0.3")
    ]
    assert [(one["love"]["weight"], one["helpfulness"]["weight"]) for one in weights] == [(0.0, 0.8), (0.3, 0.5)]

    again = swept(tmp_path)
    assert "2 of them are there already" in again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["settings"] == found["settings"]


def test_a_sweep_whose_runs_fail_tells_them_after_its_result_and_exits_with_8(tmp_path: Path) -> None:
    ended = swept(tmp_path, "model.path=no/such/model/here")
    assert ended.returncode == 8, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert (found["settings"], found["recommended"], len(found["failed"])) == ([], None, 2)
    assert "love0.3-kl0.02-seed1.log" in ended.stderr.splitlines()[-1]
    assert all("no/such/model/here" in Path(log).read_text("utf-8") for log in found["failed"].values())
