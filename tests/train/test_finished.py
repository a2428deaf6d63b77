"""A finished run has nothing to resume; one with other settings, steps or files missing does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.train.checkpoint_manager import is_finished


def write_finished_run(folder: Path, settings: Settings) -> None:
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "config.json").write_text(settings.model_dump_json())
    (folder / "summary.json").write_text(json.dumps({"versions": {"weights": settings.algorithm.steps}}))


def change_nothing(folder: Path) -> None:
    """A run folder as it was written."""


def remove_policy(folder: Path) -> None:
    (folder / "policy" / "config.json").unlink()


def remove_summary(folder: Path) -> None:
    (folder / "summary.json").unlink()


def cut_summary(folder: Path) -> None:
    (folder / "summary.json").write_text("{")


def start_another_attempt(folder: Path) -> None:
    later = (folder / "summary.json").stat().st_mtime + 5
    os.utime(folder / "config.json", (later, later))


@pytest.mark.parametrize(
    ("overrides", "change", "finished"),
    [
        pytest.param([], change_nothing, True, id="same"),
        pytest.param(
            ["run.resume=latest", "tracking.wandb=off", "timeouts.call_s=9"], change_nothing, True, id="place"
        ),
        pytest.param(["algorithm.steps=99"], change_nothing, False, id="more steps"),
        pytest.param(["evaluate.prompts=7"], change_nothing, False, id="other comparison"),
        pytest.param([], remove_policy, False, id="no policy"),
        pytest.param([], remove_summary, False, id="no summary"),
        pytest.param([], cut_summary, False, id="cut summary"),
        pytest.param([], start_another_attempt, False, id="stale summary"),
    ],
)
def test_only_a_complete_run_of_the_same_settings_is_finished(
    overrides: list[str], change: Callable[[Path], None], finished: bool, tmp_path: Path
) -> None:
    write_finished_run(tmp_path, load_settings(None).settings)
    change(tmp_path)
    assert is_finished(load_settings(None, overrides).settings, tmp_path) is finished
