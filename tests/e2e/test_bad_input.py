"""Invalid input ends with one message and the exit code of its error, before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.model_cache import link_models

ROOT = Path(__file__).parents[2]
RUN_CASES = """
import contextlib, io, json, os, sys

from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster

from rluf.train.__main__ import main

def run(arguments, runs_folder, ray_address):
    os.environ |= {"RLUF_RUNS": runs_folder, "RAY_ADDRESS": ray_address}
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            exit_code = main(["--config", "configs/tiny.yaml", *arguments])
        except SystemExit as end:
            exit_code = end.code
    return {"exit_code": exit_code, "stderr": stderr.getvalue()}

cases = json.load(sys.stdin)
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
reset_ray_address()  # its file is read by other tests' processes
try:
    addresses = {"address": "127.0.0.1:1"}
    results = {name: run(*case, addresses.get(name, cluster.address)) for name, case in cases.items()}
finally:
    cluster.shutdown()
print(json.dumps(results))
"""
"""Runs the command once per case on one Ray cluster without GPUs, and the case "address" where none answers. A process
per case would import torch and start Ray each time."""


@dataclass(frozen=True)
class CommandEnd:
    """How a run of the command ended."""

    exit_code: int
    stderr: str

    @property
    def last_line(self) -> str:
        assert "Traceback" not in self.stderr, self.stderr
        return self.stderr.strip().splitlines()[-1]


def build_environment(folder: Path) -> dict[str, str]:
    base = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**base, "RLUF_RUNS": str(folder / "runs"), "RLUF_CACHE": str(link_models(folder / "cache"))}


def run_train(folder: Path, *arguments: str) -> CommandEnd:
    command = [sys.executable, "-m", "rluf.train", "--config", "configs/tiny.yaml", *arguments]
    process = subprocess.run(
        command, cwd=ROOT, env=build_environment(folder), capture_output=True, text=True, timeout=120
    )
    return CommandEnd(process.returncode, process.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["algorithm.stepz=3"], "algorithm.steps", id="key"),
        pytest.param(["algorithm.steps=many"], "algorithm.steps", id="value"),
        pytest.param(["--config", "nowhere.yaml"], "nowhere.yaml", id="config"),
    ],
)
def test_an_invalid_setting_is_one_message_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    end = run_train(tmp_path, *arguments)
    assert message in end.last_line
    assert end.exit_code == 2
    assert not (tmp_path / "runs").exists()


EMPTY_LOG = "empty.jsonl"
CASES = {
    "log": (["data.feedback=nowhere.jsonl"], 3, "error: data.feedback: no such file: 'nowhere.jsonl'"),
    "reader": (["data.feedback={reader: convai, path: x.jsonl}"], 3, "did you mean convai2"),
    "model": (["model.path=./nowhere"], 4, "error: model './nowhere' is neither"),
    "reward": (["objectives.love.path=nowhere"], 4, "objectives.love.path=nowhere: model 'nowhere' is neither"),
    "root": (["run.root=pyproject.toml"], 5, "pyproject.toml"),
    "address": ([], 5, "no Ray cluster answers at 127.0.0.1:1"),
    "cpus": (["rollout.engines=200"], 5, "CPUs, but the cluster has"),
    "gpus": (["cluster.gpus_per_engine=1"], 5, "GPUs, but the cluster has 0"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, CommandEnd]:
    """How the command ended in each case, and with an empty log, run one after the other in one process."""
    log_path = folder / EMPTY_LOG
    log_path.write_text("")
    overrides = {**{name: case[0] for name, case in CASES.items()}, EMPTY_LOG: [f"data.feedback={log_path}"]}
    cases = {name: (arguments, str(folder / "runs" / name)) for name, arguments in overrides.items()}
    process = subprocess.run(
        [sys.executable, "-c", RUN_CASES], input=json.dumps(cases), cwd=ROOT, env=build_environment(folder),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return {name: CommandEnd(**end) for name, end in json.loads(process.stdout.splitlines()[-1]).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_invalid_input_is_one_message_and_nothing_is_written(
    folder: Path, ends: dict[str, CommandEnd], name: str
) -> None:
    _, exit_code, message = CASES[name]
    assert message in ends[name].last_line
    assert ends[name].exit_code == exit_code
    assert not (folder / "runs" / name).exists()


@pytest.mark.slow
def test_an_empty_log_is_one_message(folder: Path, ends: dict[str, CommandEnd]) -> None:
    last_line = ends[EMPTY_LOG].last_line
    assert str(folder / EMPTY_LOG) in last_line or "feedback" in last_line
    assert ends[EMPTY_LOG].exit_code == 3
    assert not list((folder / "cache" / "artifacts").iterdir())
