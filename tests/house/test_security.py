"""No pickle from outside is loaded, model code runs only when enabled, and Ray's token is on."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rluf.algorithms.policy_model import load_policy
from rluf.config.settings import Settings
from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import load_classifier

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["rluf", "actors", "cluster"])
def test_no_process_chooses_a_gpu_because_it_sees_one(package: str) -> None:
    """Devices follow from the settings: an actor that reserved none may run on a node that has some."""
    calls = [
        f"{file}:{number}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if re.search(r"(cuda|accelerator)\.(is_available|device_count)", line)
    ]
    assert not calls, f"pass the device instead: {calls}"


class Payload:
    """Writes `marker_file` when it is unpickled."""

    def __init__(self, marker_file: Path) -> None:
        self.marker_file = marker_file

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (Path(self.marker_file), "run")  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
def test_pickled_weights_are_refused_and_their_code_does_not_run(name: str, tmp_path: Path) -> None:
    folder = resolve_model(name, tmp_path)
    (folder / "model.safetensors").unlink()
    marker_file = tmp_path / "marker_file"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker_file)))
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker_file.read_text() == "run"
    marker_file.unlink()
    with pytest.raises(ModelError):
        if name == "tiny":
            load_policy(folder, dtype=torch.float32)
        else:
            load_classifier(folder, require_all_weights=False)
    with pytest.raises(ModelError, match="safetensors"):
        resolve_model(str(folder), tmp_path)
    assert not marker_file.exists()


NOTEBOOK_FUNCTION_FILES = ("rluf/api.py", "rluf/utils/plugins.py")
"""Functions of a notebook are stored and loaded as pickles; the loader refuses files that others can write."""


def test_the_library_unpickles_nothing_but_functions_of_a_notebook() -> None:
    violations = []
    for package in ("rluf", "actors", "cluster"):
        for file in (ROOT / package).rglob("*.py"):
            if re.search(
                r"torch\.load\(|pickle\.load|cloudpickle|joblib|np\.load\(|shelve|yaml\.(load_all|unsafe)",
                file.read_text(),
            ):
                violations.append(str(file.relative_to(ROOT)))
    assert sorted(violations) == sorted(NOTEBOOK_FUNCTION_FILES)


def test_code_shipped_with_a_model_is_off_by_default() -> None:
    assert Settings().model.trust_remote_code is False


@pytest.mark.parametrize("package", ["rluf", "cluster", "actors"])
def test_rays_token_is_on_before_ray_is_imported(package: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    program = f"import {package}, os, sys; print(os.environ['RAY_AUTH_MODE'], 'ray' in sys.modules)"
    completed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert completed.stdout.strip() == "token False"


def test_the_mode_of_a_ray_that_is_already_imported_is_not_changed() -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    program = "import ray, rluf, os; print('RAY_AUTH_MODE' in os.environ)"
    completed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert completed.stdout.strip() == "False"
