"""A sweep as users run it: two training jobs under Ray Tune, then again, when nothing is left to run."""

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
    sys.executable, "-m", "rluf.sweep", "--config", "configs/tiny.yaml", "--weights", "0", "0.3", "--kl", "0.02",
    "--seeds", "1", "algorithm.steps=1",
]  # fmt: skip


def run_sweep(base_folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "RLUF_RUNS": str(base_folder / "runs"),
        "RLUF_CACHE": str(base_folder / "cache"),
        "RAY_AUTH_MODE": "token",
    }
    env.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [*COMMAND, *overrides], cwd=ROOT, env=env, capture_output=True, text=True, timeout=800, check=False
    )


def test_a_sweep_runs_every_point_once_and_reports_the_pareto_front(tmp_path: Path) -> None:
    first = run_sweep(tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    result = json.loads(first.stdout.splitlines()[-1])
    assert [(point["weight"], point["kl_coef"], point["seeds"]) for point in result["settings"]] == [
        (0.0, 0.02, 1),
        (0.3, 0.02, 1),
    ]
    assert result["failed"] == {}
    assert result["front"]
    folder = tmp_path / "runs" / "tiny-sweep"
    assert json.loads((folder / "sweep.json").read_text("utf-8"))["rule"] == result["rule"]
    objectives = [
        json.loads((folder / f"love{weight}-kl0.02-seed1" / "latest" / "config.json").read_text("utf-8"))["objectives"]
        for weight in ("0", "0.3")
    ]
    assert [(run["love"]["weight"], run["helpfulness"]["weight"]) for run in objectives] == [(0.0, 0.8), (0.3, 0.5)]

    second = run_sweep(tmp_path)
    assert "finished_before=2" in second.stderr
    assert json.loads(second.stdout.splitlines()[-1])["settings"] == result["settings"]


def test_a_sweep_with_failed_runs_lists_them_after_its_result_and_exits_with_8(tmp_path: Path) -> None:
    process = run_sweep(tmp_path, "model.path=no/such/model/here")
    assert process.returncode == 8, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert (result["settings"], result["recommended"], len(result["failed"])) == ([], None, 2)
    assert "love0.3-kl0.02-seed1.log" in process.stderr.splitlines()[-1]
    assert all("no/such/model/here" in Path(log_path).read_text("utf-8") for log_path in result["failed"].values())
