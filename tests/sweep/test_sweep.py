"""What a sweep takes for a finished run of its own, and how it ends when runs failed; e2e/test_sweep.py runs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ActorError
from rluf.sweep.__main__ import check_all_ended, finished, parsed


def settings(*overrides: str) -> Settings:
    return load_settings(None, overrides).settings


def run(folder: Path, ran: Settings | None, **summary: Any) -> None:
    folder.mkdir(parents=True)
    if ran is not None:
        (folder / "config.json").write_text(ran.model_dump_json(), "utf-8")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary), "utf-8")


def test_overrides_may_follow_the_grid() -> None:
    given = parsed(["a=1", "--seeds", "4", "5", "b=[2, 3]", "--weights", "0.2", "c.d=x", "--config=f.yaml"])
    assert (given.seeds, given.weights, given.overrides) == ([4, 5], [0.2], ["a=1", "b=[2, 3]", "c.d=x"])
    assert given.config == Path("f.yaml")


def test_a_run_with_other_settings_is_none_of_the_sweeps(tmp_path: Path) -> None:
    run(tmp_path / "20260101-000000", settings("algorithm.steps=5", "seed=2"), love=0.1)
    assert finished(tmp_path, settings("algorithm.steps=5", "seed=2")) == {"love": 0.1}
    assert finished(tmp_path, settings("algorithm.steps=6", "seed=2")) is None
    assert finished(tmp_path, settings("algorithm.steps=5", "seed=2", "run.deterministic=true")) is None


def test_where_a_run_was_made_is_no_matter(tmp_path: Path) -> None:
    run(tmp_path / "20260101-000000", settings("run.root=/elsewhere", "tracking.wandb=off"), love=0.1)
    assert finished(tmp_path, settings("name=here", "run.reuse=false", "cluster.restarts_per_hour=1")) == {"love": 0.1}


def test_the_newest_finished_run_with_the_settings_counts(tmp_path: Path) -> None:
    run(tmp_path / "20260101-000000", settings(), love=0.1)
    run(tmp_path / "20260102-000000", settings(), love=0.2)
    run(tmp_path / "20260103-000000", settings("seed=9"), love=0.3)
    run(tmp_path / "20260104-000000", settings())
    (tmp_path / "latest").symlink_to("20260104-000000")
    assert finished(tmp_path, settings()) == {"love": 0.2}


def test_a_run_that_does_not_tell_its_settings_or_tells_unknown_ones_is_made_again(tmp_path: Path) -> None:
    run(tmp_path / "a", None, love=0.1)
    run(tmp_path / "b", settings(), love=0.1)
    told = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    (tmp_path / "b" / "config.json").write_text(json.dumps({**told, "gone": 1}), "utf-8")
    assert finished(tmp_path, settings()) is None
    assert finished(tmp_path / "nowhere", settings()) is None


def test_failed_runs_are_named_with_their_logs() -> None:
    check_all_ended({"failed": {}})
    with pytest.raises(ActorError, match=r"2 runs .* a \(see a\.log\), b \(see b\.log\)"):
        check_all_ended({"failed": {"a": "a.log", "b": "b.log"}})
