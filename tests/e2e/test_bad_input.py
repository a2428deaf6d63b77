"""Invalid input ends with one message and the exit code of its error, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_train(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env = {**base, "RLUF_RUNS": str(tmp_path / "runs"), "RLUF_CACHE": str(tmp_path / "cache"), **environment}
    command = [sys.executable, "-m", "rluf.train", "--config", "configs/tiny.yaml", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def get_last_line(process: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in process.stderr, process.stderr
    return process.stderr.strip().splitlines()[-1]


CASES = [
    pytest.param(["data.feedback=nowhere.jsonl"], 3, "error: data.feedback: no such file: 'nowhere.jsonl'", id="log"),
    pytest.param(["data.feedback={reader: convai, path: x.jsonl}"], 3, "did you mean convai2", id="reader"),
    pytest.param(["model.path=./nowhere"], 4, "error: model './nowhere' is neither", id="model"),
    pytest.param(
        ["objectives.love.path=nowhere"], 4, "objectives.love.path=nowhere: model 'nowhere' is neither", id="reward"
    ),
    pytest.param(["algorithm.stepz=3"], 2, "algorithm.steps", id="key"),
    pytest.param(["algorithm.steps=many"], 2, "algorithm.steps", id="value"),
    pytest.param(["--config", "nowhere.yaml"], 2, "nowhere.yaml", id="config"),
    pytest.param(["run.root=pyproject.toml"], 5, "pyproject.toml", id="root"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "message"), CASES)
def test_invalid_input_is_one_message_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    process = run_train(tmp_path, *arguments)
    assert message in get_last_line(process)
    assert process.returncode == exit_code
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["rollout.engines=200"], "CPUs, but the cluster has", id="cpus"),
        pytest.param(["cluster.gpus_per_engine=1"], "GPUs, but the cluster has 0", id="gpus"),
    ],
)
def test_too_few_resources_are_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    process = run_train(tmp_path, *arguments)
    assert message in get_last_line(process)
    assert process.returncode == 5
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_does_not_answer_is_one_message(tmp_path: Path) -> None:
    process = run_train(tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert "no Ray cluster answers at 127.0.0.1:1" in get_last_line(process)
    assert process.returncode == 5


@pytest.mark.slow
def test_an_empty_log_is_one_message(tmp_path: Path) -> None:
    log_path = tmp_path / "empty.jsonl"
    log_path.write_text("")
    process = run_train(tmp_path, f"data.feedback={log_path}")
    assert str(log_path) in get_last_line(process) or "feedback" in get_last_line(process)
    assert process.returncode == 3
    assert not list((tmp_path / "cache" / "artifacts").iterdir())
