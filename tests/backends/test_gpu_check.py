"""The prepared check of a GPU: each part has a verdict, and its reduced form passes on CPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rluf.config.load import load_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def fail(module: ModuleType) -> Any:
    module.require(1 + 1 == 3, "gap 0.5")


@pytest.mark.parametrize(
    ("check", "verdict", "problem"),
    [
        (lambda module: {"mfu": 0.5}, "pass", None),
        (fail, "fail", "gap 0.5"),
        (lambda module: [][1], "error", "IndexError: list index out of range"),
        (lambda module: time.sleep(60), "timeout", None),
        (lambda module: os._exit(3), "error", "the process ended without a result"),
    ],
)
def test_each_part_ends_with_a_verdict(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, check: Any, verdict: str, problem: str | None
) -> None:
    """A crash or a hang of one part does not reach the others."""
    part = gpu_check.CheckPart(lambda on_gpu, folder: check(gpu_check), 0.5)
    monkeypatch.setattr(gpu_check, "PARTS", {"x": part})
    result = gpu_check.run_part("x", on_gpu=False)
    assert (result["verdict"], result.get("problem")) == (verdict, problem)
    assert 0 <= result["seconds"] < 10


def test_parts_fit_into_ten_minutes_on_a_gpu_in_the_order_of_a_first_run(gpu_check: ModuleType) -> None:
    assert [*gpu_check.PARTS][:2] == ["device", "attention"] and [*gpu_check.PARTS][-1] == "job"
    assert sum(part.limit_s for part in gpu_check.PARTS.values()) <= 900
    settings = load_settings(ROOT / gpu_check.JOB_CONFIG, gpu_check.JOB_OVERRIDES).settings
    assert settings.is_colocated and all(o.source == "judge" for o in settings.objectives.by_objective.values())


@pytest.mark.slow
def test_the_reduced_form_passes_on_the_cpu() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py"], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    result = json.loads(process.stdout.splitlines()[-1])
    verdicts = {name: part["verdict"] for name, part in result["parts"].items()}
    assert {"pass", "skipped"} >= set(verdicts.values()) and process.returncode == 0, result
    assert [name for name, verdict in verdicts.items() if verdict == "skipped"] == ["learner", "engine", "job"]
