"""Sweep: which finished runs are reused, and the error for failed runs; tests/e2e/test_sweep.py runs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ActorError
from rluf.sweep.__main__ import parse_arguments
from rluf.sweep.runs import find_finished_run, raise_for_failed_runs


def load_overrides(*overrides: str) -> Settings:
    return load_settings(None, overrides).settings


def write_run(folder: Path, settings: Settings | None, **summary: Any) -> None:
    folder.mkdir(parents=True)
    if settings is not None:
        (folder / "config.json").write_text(settings.model_dump_json(), "utf-8")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary), "utf-8")


def test_overrides_may_follow_the_grid() -> None:
    args = parse_arguments(["a=1", "--seeds", "4", "5", "b=[2, 3]", "--weights", "0.2", "c.d=x", "--config=f.yaml"])
    assert (args.seeds, args.weights, args.overrides) == ([4, 5], [0.2], ["a=1", "b=[2, 3]", "c.d=x"])
    assert args.config == Path("f.yaml")


def test_a_run_with_other_settings_is_not_reused(tmp_path: Path) -> None:
    write_run(tmp_path / "20260101-000000", load_overrides("algorithm.steps=5", "seed=2"), love=0.1)
    assert find_finished_run(tmp_path, load_overrides("algorithm.steps=5", "seed=2")) == {"love": 0.1}
    assert find_finished_run(tmp_path, load_overrides("algorithm.steps=6", "seed=2")) is None
    assert find_finished_run(tmp_path, load_overrides("algorithm.steps=5", "seed=2", "run.deterministic=true")) is None


def test_location_settings_do_not_prevent_reuse(tmp_path: Path) -> None:
    write_run(tmp_path / "20260101-000000", load_overrides("run.root=/elsewhere", "tracking.wandb=off"), love=0.1)
    assert find_finished_run(tmp_path, load_overrides("name=here", "cluster.max_restarts_per_hour=1")) == {"love": 0.1}


def test_the_newest_finished_run_with_the_settings_is_used(tmp_path: Path) -> None:
    write_run(tmp_path / "20260101-000000", load_overrides(), love=0.1)
    write_run(tmp_path / "20260102-000000", load_overrides(), love=0.2)
    write_run(tmp_path / "20260103-000000", load_overrides("seed=9"), love=0.3)
    write_run(tmp_path / "20260104-000000", load_overrides())
    (tmp_path / "latest").symlink_to("20260104-000000")
    assert find_finished_run(tmp_path, load_overrides()) == {"love": 0.2}


def test_a_run_with_missing_or_unknown_settings_is_repeated(tmp_path: Path) -> None:
    write_run(tmp_path / "a", None, love=0.1)
    write_run(tmp_path / "b", load_overrides(), love=0.1)
    run_config = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    (tmp_path / "b" / "config.json").write_text(json.dumps({**run_config, "gone": 1}), "utf-8")
    assert find_finished_run(tmp_path, load_overrides()) is None
    assert find_finished_run(tmp_path / "nowhere", load_overrides()) is None


def test_failed_runs_are_named_with_their_logs() -> None:
    raise_for_failed_runs({"failed": {}})
    with pytest.raises(ActorError, match=r"2 runs .* a \(see a\.log\), b \(see b\.log\)"):
        raise_for_failed_runs({"failed": {"a": "a.log", "b": "b.log"}})
