"""benchmarks/jobs.py starts a Ray head of its own and ends nothing else; tried with a stand-in for `ray`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

ROOT = Path(__file__).parents[2]
FAKE_RAY = """\
#!{python}
import socket, subprocess, sys, time
options = dict(word.split("=", 1) for word in sys.argv if "=" in word)
if {fails}:
    raise SystemExit("no memory")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
listener = socket.create_server(("127.0.0.1", int(options["--dashboard-port"])))
print("child", child.pid, "in", options["--temp-dir"], flush=True)
time.sleep(60)
"""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("jobs")


def write_fake_ray(folder: Path, *, fails: bool) -> None:
    (folder / "ray").write_text(FAKE_RAY.format(python=sys.executable, fails=fails))
    (folder / "ray").chmod(0o755)


def test_only_the_processes_of_the_own_head_are_ended(
    jobs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fake_ray(tmp_path, fails=False)
    monkeypatch.setattr(jobs, "BIN_FOLDER", tmp_path)
    session = jobs.Session(tmp_path, dict(os.environ))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other_cluster:
        with jobs.run_ray_head(session) as address:
            (step,) = session.steps
            assert f"--dashboard-port={address.rpartition(':')[2]} " in step["command"]
            child = psutil.Process(int((tmp_path / "ray-start.log").read_text().split()[1]))
            assert child.is_running()
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert other_cluster.poll() is None
    assert "ray stop" not in "".join(step["command"] for step in session.steps)


def test_a_head_that_does_not_start_is_named(jobs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fake_ray(tmp_path, fails=True)
    monkeypatch.setattr(jobs, "BIN_FOLDER", tmp_path)
    with (
        pytest.raises(SystemExit, match="did not start:\nno memory"),
        jobs.run_ray_head(jobs.Session(tmp_path, dict(os.environ))),
    ):
        pass
