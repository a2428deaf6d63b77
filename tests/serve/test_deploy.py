"""`serve deploy` of a configuration file on a Ray head with token authentication: the application behind proxies."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rluf.serve.client import RewardClient
from tests.e2e.test_job import descendant_pids
from tests.serve.conftest import OBJECTIVES, TOKEN, find_free_port, make_items, score_offline, write_models

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ITEMS = make_items(6)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of nodes and commands."""
    environment = {
        **os.environ, "RLUF_RUNS": str(tmp_path_factory.mktemp("runs")), "RAY_AUTH_MODE": "token",
        "RLUF_SERVE_TOKEN": TOKEN, "RLUF_USER_SALT": "a-salt", "PATH": f"{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    return environment


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """Start a Ray head; yields the address of its dashboard, which accepts deployments."""
    port = find_free_port()
    folder = tempfile.mkdtemp(prefix="ray-")  # not Ray's own, where it would leave the address of a killed cluster
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={find_free_port()}", f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={find_free_port()}", "--num-cpus=2", "--object-store-memory=200000000",
        "--disable-usage-stats", f"--temp-dir={folder}",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    yield f"http://127.0.0.1:{port}"
    for pid in (process.pid, *descendant_pids(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def make_serve_config(port: int, folder: Path, log_folder: Path) -> dict[str, Any]:
    """Load cluster/launch/serve.yaml and replace its addresses and paths."""
    serve_config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "launch" / "serve.yaml").read_text())
    serve_config["http_options"] |= {"port": port, "host": "127.0.0.1"}
    serve_config["applications"][0]["args"]["overrides"] = [
        "serve.host=0.0.0.0", f"serve.feedback_path={log_folder}", "cluster.threads_per_actor=1",
        *(f"objectives.{name}.path={folder / name}" for name in OBJECTIVES),
    ]  # fmt: skip
    return serve_config


def deploy_config(path: Path, serve_config: dict[str, Any], dashboard: str, environment: dict[str, str]) -> None:
    path.write_text(yaml.safe_dump(serve_config))
    deadline = time.monotonic() + 120
    while True:
        command = [str(BIN / "serve"), "deploy", str(path), "--address", dashboard]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if result.returncode == 0:
            return
        assert time.monotonic() < deadline, result.stdout + result.stderr
        time.sleep(1)


def is_healthy(url: str) -> bool:
    """Whether the application responds; first the port is closed, then the proxy returns 404."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz").status_code == 200
    return False


def score_love(client: RewardClient) -> list[float]:
    return [reply.scores["love"].value for reply in client.score_batch(ITEMS)]


def test_deploying_a_configuration_file_again_replaces_the_models(
    model_folder: Path, environment: dict[str, str], dashboard: str, tmp_path: Path
) -> None:
    port, other_folder = find_free_port(), write_models(tmp_path / "other", 7)
    expected_values = {
        folder: [scores["love"][0] for scores in score_offline(folder, ITEMS)]
        for folder in (model_folder, other_folder)
    }
    url = f"http://127.0.0.1:{port}"
    for folder in (model_folder, other_folder):
        deploy_config(
            tmp_path / "serve.yaml", make_serve_config(port, folder, tmp_path / "log"), dashboard, environment
        )
        deadline = time.monotonic() + 150
        while not is_healthy(url):
            assert time.monotonic() < deadline
            time.sleep(0.3)
        with RewardClient(url, token=TOKEN) as client:
            while (values := score_love(client)) != pytest.approx(expected_values[folder], abs=1e-4):
                assert folder is other_folder, values
                assert values == pytest.approx(expected_values[model_folder], abs=1e-4)
                assert time.monotonic() < deadline
                time.sleep(0.3)
    body = {"messages": [{"role": "user", "content": "Hi"}], "response": "Hello"}
    assert httpx.post(f"{url}/v1/score", json=body).status_code == 401
