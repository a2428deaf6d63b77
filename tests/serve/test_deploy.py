"""`serve deploy` of a configuration file on a Ray head with token authentication: our application behind proxies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rluf.serve.client import RewardClient
from tests.e2e.test_job import descendants
from tests.serve.conftest import OBJECTIVES, TOKEN, offline, some_items, write_models
from tests.serve.test_serve import free_port

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ITEMS = some_items(6)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What nodes and commands find in their environment."""
    made = {
        **os.environ, "RLUF_RUNS": str(tmp_path_factory.mktemp("runs")), "RAY_AUTH_MODE": "token",
        "RLUF_SERVE_TOKEN": TOKEN, "RLUF_SERVE_SALT": "a-salt", "PATH": f"{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    made.pop("RAY_ADDRESS", None)
    return made


@pytest.fixture(scope="module")
def dashboard(env: dict[str, str]) -> Iterator[str]:
    """A Ray head; yields its dashboard's address, which takes deployments."""
    port = free_port()
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=2", "--object-store-memory=200000000",
        "--disable-usage-stats",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    yield f"http://127.0.0.1:{port}"
    for pid in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


def config(port: int, folder: Path, log: Path) -> dict[str, Any]:
    """cluster/launch/serve.yaml with our places in the place of its own."""
    told: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "launch" / "serve.yaml").read_text())
    told["http_options"] |= {"port": port, "host": "127.0.0.1"}
    told["applications"][0]["args"]["overrides"] = [
        "serve.host=0.0.0.0", f"serve.feedback={log}", "cluster.threads=1",
        *(f"objectives.{name}.path={folder / name}" for name in OBJECTIVES),
    ]  # fmt: skip
    return told


def deployed(file: Path, told: dict[str, Any], dashboard: str, env: dict[str, str]) -> None:
    file.write_text(yaml.safe_dump(told))
    deadline = time.monotonic() + 120
    while True:
        command = [str(BIN / "serve"), "deploy", str(file), "--address", dashboard]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, done.stdout + done.stderr
        time.sleep(1)


def healthy(url: str) -> bool:
    """Whether our application answers; before it the proxy says 404, before that nobody listens."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz").status_code == 200
    return False


def answered(client: RewardClient) -> list[float]:
    return [reply.scores["love"].value for reply in client.score_batch(ITEMS)]


def test_a_configuration_file_deploys_and_deploying_it_again_changes_the_models(
    models: Path, env: dict[str, str], dashboard: str, tmp_path: Path
) -> None:
    port, other = free_port(), write_models(tmp_path / "other", 7)
    truth = {folder: [one["love"][0] for one in offline(folder, ITEMS)] for folder in (models, other)}
    url = f"http://127.0.0.1:{port}"
    for folder in (models, other):
        deployed(tmp_path / "serve.yaml", config(port, folder, tmp_path / "log"), dashboard, env)
        deadline = time.monotonic() + 150
        while not healthy(url):
            assert time.monotonic() < deadline
            time.sleep(0.3)
        with RewardClient(url, token=TOKEN) as client:
            while (found := answered(client)) != pytest.approx(truth[folder], abs=1e-4):
                assert folder is other, found
                assert found == pytest.approx(truth[models], abs=1e-4)
                assert time.monotonic() < deadline
                time.sleep(0.3)
    body = {"messages": [{"role": "user", "content": "Hi"}], "response": "Hello"}
    assert httpx.post(f"{url}/v1/score", json=body).status_code == 401
