"""What a user gets wrong ends in one clear message and the error's own exit code, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RLUF_RUNS": str(tmp_path / "runs"), "RLUF_CACHE": str(tmp_path / "cache"), **environment}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "rluf.train", "--config", "configs/tiny.yaml", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


CASES = [
    pytest.param(["data.feedback=nowhere.jsonl"], 3, "error: data.feedback: no such file: 'nowhere.jsonl'", id="log"),
    pytest.param(["data.feedback=convai:x.jsonl"], 3, "did you mean convai2", id="reader"),
    pytest.param(["model.path=./nowhere"], 4, "error: model './nowhere' is neither", id="model"),
    pytest.param(["objectives.love.path=nowhere"], 4, "objectives.love.path=nowhere holds no config.json", id="reward"),
    pytest.param(["algorithm.stepz=3"], 2, "algorithm.steps", id="key"),
    pytest.param(["algorithm.steps=many"], 2, "algorithm.steps", id="value"),
    pytest.param(["--config", "nowhere.yaml"], 2, "nowhere.yaml", id="config"),
    pytest.param(["run.root=pyproject.toml"], 5, "pyproject.toml", id="root"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), CASES)
def test_one_message_and_nothing_written(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    done = run(tmp_path, *arguments)
    assert message in last_line(done)
    assert done.returncode == code
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        pytest.param(["cluster.cpus_per_engine=64"], "CPUs, but the cluster has", id="cpus"),
        pytest.param(["cluster.gpus_per_engine=1"], "GPUs, but the cluster has 0", id="gpus"),
    ],
)
def test_too_few_resources(tmp_path: Path, arguments: list[str], missing: str) -> None:
    done = run(tmp_path, *arguments)
    assert missing in last_line(done)
    assert done.returncode == 5
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    done = run(tmp_path, "cluster.address=127.0.0.1:1")
    assert "no Ray cluster answers at 127.0.0.1:1" in last_line(done)
    assert done.returncode == 5


@pytest.mark.slow
def test_an_empty_log(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    done = run(tmp_path, f"data.feedback={empty}")
    assert str(empty) in last_line(done) or "feedback" in last_line(done)
    assert done.returncode == 3
    assert not list((tmp_path / "cache" / "stages").iterdir())
