"""Shared by all tests: nothing leaves the machine, nothing is written outside temporary folders."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}
for _name, _value in QUIET.items():  # at once: OpenMP and Ray read their variables when they are first imported
    os.environ.setdefault(_name, _value)


LONGEST = (
    "tests/e2e/test_job.py",
    "tests/actors/test_learner.py",
    "tests/reward/test_reward_training.py",
    "tests/serve/test_serve.py",
    "tests/train/test_controller.py",
    "tests/e2e/test_bad_input.py",
    "tests/evaluate/test_score.py",
    "tests/actors/test_rollout.py",
)
"""Begun first, so that of two workers neither is left with a long file at the end (--no-loadscope-reorder)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. Skip tests marked gpu where no NVIDIA GPU is seen, saying so."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))
    if shutil.which("nvidia-smi") and Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, none is here"))


@pytest.fixture(autouse=True)
def _own_runs_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to a temporary folder unless a test says otherwise."""
    if "RLUF_RUNS" not in os.environ:
        monkeypatch.setenv("RLUF_RUNS", str(tmp_path_factory.getbasetemp() / "runs"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of some MiB that can be filled for real; skips where mounting is not permitted."""
    mounted: list[Path] = []

    def mount(mib: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=30)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of 2 CPUs on this machine, for the tests of one module."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """This process as the one rank of a process group, as a learner's or a reward worker's is, for one module."""
    import torch

    from rluf.backends.deepspeed import join_group, leave_group

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_group(rank=0, world=1, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60)
    yield
    leave_group()
