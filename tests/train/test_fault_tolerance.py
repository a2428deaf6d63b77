"""A run that is killed, stopped and resumed ends with the weights of one left alone, bit for bit. Real actors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
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


def fill(disk: Path, leave: int) -> Path:
    """Write a file until `leave` bytes are free; returns it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize) > leave:
            stream.write(bytes(min(1 << 20, free - leave)))
    return filler


def wait_for_line(process: Popen[str], folder: Path, words: str) -> None:
    """Until run.log says `words`."""
    deadline = time.monotonic() + SLOW
    while words not in ((folder / "run.log").read_text() if (folder / "run.log").exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "output.txt").read_text()[-3000:]
        time.sleep(0.02)


def errors(told: str) -> list[str]:
    """The lines that tell an error; within one the operating system may speak of an error, too."""
    return [line for line in told.splitlines() if line.startswith("error: ")]


def test_a_disk_that_fills_up_ends_the_run_with_one_message_and_costs_no_checkpoint(
    base: Path, cluster: chaos.Head, calm: Path, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """First there is room for metrics but not for a checkpoint, then for nothing at all."""
    disk = small_disk(64)
    with running(base, cluster, str(disk / "run")) as (process, folder):
        wait_for_line(process, folder, "checkpoint of step 2")
        filler = fill(disk, 200 << 10)
        assert process.wait(SLOW) == 5, (folder / "output.txt").read_text()[-3000:]
    told = (folder / "output.txt").read_text()
    assert "No space left" in told.strip().splitlines()[-1]
    assert "earlier checkpoints are kept" in told.strip().splitlines()[-1]
    assert len(errors(told)) == 1 and "Traceback" not in told
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    filler.unlink()
    (folder / "output.txt").unlink()
    (folder / "output.txt").symlink_to(tmp_path / "output.txt")  # a disk of its own: this one will have no room for it
    with running(base, cluster, str(folder), f"run.resume={folder}", "learner.save_every=0") as (process, _):
        chaos.wait_for_step(process, folder, 3, SLOW)
        filler = fill(disk, 0)
        assert process.wait(SLOW) == 5, (folder / "output.txt").read_text()[-3000:]
    filler.unlink()
    told = (folder / "output.txt").read_text()
    assert "No space left" in told and len(errors(told)) == 1 and "Traceback" not in told
    with running(base, cluster, str(folder), f"run.resume={folder}") as (process, _):
        assert process.wait(SLOW) == 0, (folder / "output.txt").read_text()[-3000:]
    assert content(folder) == content(calm)
    assert chaos.digest(folder) == chaos.digest(calm)


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.mark.skipif(not FAKETIME.exists(), reason="libfaketime is not installed (apt install libfaketime)")
def test_a_clock_that_jumps_hours_ahead_and_back_changes_nothing(
    base: Path, cluster: chaos.Head, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's clock, where deadlines and health checks are counted."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    for name, value in {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": clock, "FAKETIME_NO_CACHE": 1,
                        "FAKETIME_DONT_FAKE_MONOTONIC": 1, "DONT_FAKE_MONOTONIC": 1}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    with running(base, cluster, "jumping") as (process, folder):
        for step, offset in ((1, "+7200"), (2, "-7200"), (3, "+86400")):
            chaos.wait_for_step(process, folder, step, SLOW)
            clock.write_text(offset)
        assert process.wait(SLOW) == 0, (folder / "output.txt").read_text()[-3000:]
    log = (folder / "run.log").read_text()
    stamps = {line[:10] for line in log.splitlines()}
    assert len(stamps) > 1, "the clock did not jump"
    assert "missed" not in log and "starting it again" not in log
    assert content(folder) == content(calm)
    assert chaos.digest(folder) == chaos.digest(calm)
