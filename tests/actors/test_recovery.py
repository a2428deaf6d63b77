"""A run that is killed, stopped and resumed ends with the weights of one left alone, bit for bit. Real actors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from benchmarks import chaos

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 5
SLOW = 600
"""Seconds that a run may take on a machine that is busy with other things; alone it is a minute or two."""
TOLD = (f"algorithm.steps={STEPS}", "learner.save_every=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recovery")
    chaos.make_inputs(place)
    return place


@pytest.fixture(scope="module")
def cluster() -> Iterator[chaos.Head]:
    """One Ray for all runs of this module."""
    with chaos.head() as ray:
        yield ray


@contextlib.contextmanager
def running(base: Path, cluster: chaos.Head, name: str, *overrides: str) -> Iterator[tuple[Popen[str], Path]]:
    folder = base / name
    process = chaos.start(base, folder, *TOLD, f"cluster.address={cluster.address}", *overrides)
    try:
        yield process, folder
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def calm(base: Path, cluster: chaos.Head) -> Path:
    """A run that nothing happens to."""
    with running(base, cluster, "calm") as (process, folder):
        assert process.wait(SLOW) == 0, (folder / "output.txt").read_text()[-3000:]
    return folder


def content(folder: Path) -> list[dict[str, Any]]:
    """The metrics without timings."""
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in chaos.rows(folder)]


def test_killed_actors_come_back_and_nothing_is_lost_or_counted_twice(
    base: Path, cluster: chaos.Head, calm: Path
) -> None:
    with running(base, cluster, "killed") as (process, folder):
        for step, kind in ((1, "reward"), (2, "rollout"), (3, "learner")):
            chaos.wait_for_step(process, folder, step, SLOW)
            chaos.strike(process, kind, cluster.pid)
        assert process.wait(SLOW) == 0, (folder / "output.txt").read_text()[-3000:]
    log = (folder / "run.log").read_text()
    assert "love reward 0, start 2 is back" in log
    assert "rollout 0, start 2 is back" in log
    assert "all actors start again, the run goes on from the checkpoint of step 2" in log
    assert content(folder) == content(calm)
    assert chaos.digest(folder) == chaos.digest(calm)


def test_a_stopped_run_keeps_a_checkpoint_and_its_resumption_ends_the_same(
    base: Path, cluster: chaos.Head, calm: Path
) -> None:
    with running(base, cluster, "stopped", "learner.save_every=0") as (process, folder):
        chaos.wait_for_step(process, folder, 2, SLOW)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    told = (folder / "output.txt").read_text()
    assert "Traceback" not in told
    assert "add --resume to the same command to go on" in told.strip().splitlines()[-1]
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(kept) == 1 and 2 <= int(kept[0].removeprefix("step-")) < STEPS
    (folder / "checkpoints" / "step-9").mkdir()
    with running(base, cluster, "stopped", f"run.resume={folder}") as (process, _):
        assert process.wait(SLOW) == 0, (folder / "output.txt").read_text()[-3000:]
    log = (folder / "run.log").read_text()
    assert f"going on after step {kept[0].removeprefix('step-')}" in log
    assert "step-9 is left out: it has no complete.json" in log
    assert content(folder) == content(calm)
    assert chaos.digest(folder) == chaos.digest(calm)
    assert json.loads((folder / "outcome.json").read_text()) == {"base": 4, "aligned": 4}


def test_a_resumption_with_other_settings_is_refused_with_both_values(
    base: Path, cluster: chaos.Head, calm: Path
) -> None:
    with running(base, cluster, "calm", f"run.resume={calm}", "learner.learning_rate=1e-4") as (process, folder):
        assert process.wait(SLOW) == 2
    assert "learner.learning_rate (then 0.001, now 0.0001)" in (folder / "output.txt").read_text()
    assert os.listdir(folder / "checkpoints")
