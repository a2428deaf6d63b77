"""Shared by all tests: no access to the network, no writes outside temporary folders."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.shared_ray import SharedRay

TEST_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "OPENBLAS_NUM_THREADS": "1",  # matrices of tests are small; a second thread waits more than it computes
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}
for _name, _value in TEST_ENVIRONMENT.items():  # not in a fixture: OpenMP and Ray read their variables at import
    os.environ.setdefault(_name, _value)


# The gate draws the same examples each time, so that a change fails for its own faults only; `make nightly` draws new
# ones. Without a time limit per example: on a busy machine a slow example is not a failure.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile("fixed")

LONGEST_FILES = (
    "tests/e2e/test_job.py",
    "tests/e2e/test_wheel.py",
    "tests/serve/test_serve.py",
    "tests/train/test_training_modes.py",
    "tests/train/test_controller.py",
    "tests/simulate/test_reader_agreement.py",
    "tests/reward/test_shared_backbone.py",
    "tests/reward/test_fit.py",
    "tests/reward/test_reward_training.py",
    "tests/actors/test_learner.py",
    "tests/train/test_resume_equivalence.py",
    "tests/e2e/test_bad_input.py",
    "tests/train/test_prompts.py",
    "tests/prepare/test_dataset.py",
    "tests/docs/test_walks.py",
    "tests/evaluate/test_score.py",
    "tests/algorithms/test_learning.py",
    "tests/backends/test_lora_transfer.py",
    "tests/docs/test_site_check.py",
    "tests/actors/test_rollout.py",
    "tests/report/test_report.py",
    "tests/backends/test_gpu_check.py",
    "tests/tracking/test_wandb.py",
    "tests/backends/test_sharded_learners.py",
)
"""Run first, so that no worker starts a long file when the others are done (--no-loadscope-reorder)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. Skip tests marked gpu, with a reason, where no NVIDIA GPU is visible."""
    rank_by_file = {file: rank for rank, file in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank_by_file.get(item.nodeid.partition("::")[0], len(LONGEST_FILES)))
    if shutil.which("nvidia-smi") and Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, none is visible"))


def pytest_collection_finish() -> None:
    """Exempt the modules that collection imported from garbage collection."""
    # They are a million objects, which a full collection takes 0.2 s to visit. DeepSpeed makes four per engine.
    gc.freeze()


def pytest_unconfigure() -> None:
    """Collect everything at the end; extension modules report what is left as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_runs_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write runs to a temporary folder unless a test sets another one."""
    if "RLUF_RUNS" not in os.environ:
        monkeypatch.setenv("RLUF_RUNS", str(tmp_path_factory.getbasetemp() / "runs"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of a few MiB that a test can fill; skips where mounting is not permitted."""
    mount_points: list[Path] = []

    def mount(mib: int) -> Path:
        mount_point = tmp_path / f"disk{len(mount_points)}"
        mount_point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(mount_point)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if process.returncode:
            pytest.skip(f"mounting a small disk is not permitted here: {process.stderr.strip()}")
        mount_points.append(mount_point)
        return mount_point

    yield mount
    for mount_point in mount_points:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True, timeout=30)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[SharedRay]:
    """The Ray cluster of this test process. Modules that need other options start one of their own."""
    from tests.shared_ray import SharedRay  # loads Ray, which most modules do without

    cluster = SharedRay()
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def local_ray(shared_ray: SharedRay) -> Iterator[None]:
    """A connection to Ray with 2 CPUs on this machine, for the tests of one module."""
    with shared_ray.connect():
        yield


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A process group with this process as its only rank, like that of a learner or reward worker, for one module."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401

    from rluf.backends.deepspeed import join_process_group, leave_process_group

    gc.freeze()  # as above, for the modules of DeepSpeed

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    join_process_group(rank=0, world_size=1, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60)
    yield
    leave_process_group()
