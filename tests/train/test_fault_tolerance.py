"""A run that is killed, stopped and resumed ends with the weights of an undisturbed run, bit for bit. Real actors."""

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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import chaos

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 5
RUN_TIMEOUT_S = 600
"""Seconds a run may take on a busy machine; on an idle one it takes a minute or two."""
OVERRIDES = (f"algorithm.steps={STEPS}", "learner.checkpoint_every_steps=2")


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    chaos.make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def ray_head() -> Iterator[chaos.RayHead]:
    """One Ray for all runs of this module."""
    with chaos.ray_head() as head:
        yield head


@contextlib.contextmanager
def start_run(
    work_folder: Path, ray_head: chaos.RayHead, name: str, *overrides: str
) -> Iterator[tuple[Popen[str], Path]]:
    run_folder = work_folder / name
    process = chaos.start_run(work_folder, run_folder, ray_head.address, *OVERRIDES, *overrides)
    try:
        yield process, run_folder
    finally:
        process.kill()
        process.wait(30)


def read_output(run_folder: Path) -> str:
    return (run_folder / "output.txt").read_text()


def wait_for_success(process: Popen[str], run_folder: Path) -> None:
    assert process.wait(RUN_TIMEOUT_S) == 0, read_output(run_folder)[-3000:]


@pytest.fixture(scope="module")
def undisturbed(work_folder: Path, ray_head: chaos.RayHead) -> Path:
    """The folder of an undisturbed run."""
    with start_run(work_folder, ray_head, "undisturbed") as (process, run_folder):
        wait_for_success(process, run_folder)
    return run_folder


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Metrics without timings."""
    rows = chaos.read_metrics(run_folder)
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def assert_same_result(run_folder: Path, undisturbed: Path) -> None:
    assert read_metrics(run_folder) == read_metrics(undisturbed)
    assert chaos.hash_policy(run_folder) == chaos.hash_policy(undisturbed)


def test_killed_actors_are_restarted_and_nothing_is_lost_or_counted_twice(
    work_folder: Path, ray_head: chaos.RayHead, undisturbed: Path
) -> None:
    with start_run(work_folder, ray_head, "killed") as (process, run_folder):
        for step, kind in ((1, "reward"), (2, "rollout"), (3, "learner")):
            chaos.wait_for_step(process, run_folder, step, RUN_TIMEOUT_S)
            chaos.kill_process(process, kind, ray_head.pid)
        wait_for_success(process, run_folder)
    log = (run_folder / "run.log").read_text()
    assert "love reward 0, start 2: restarted" in log
    assert "rollout 0, start 2: restarted" in log
    assert "restarting all actors, resuming from the checkpoint of step 2" in log
    assert_same_result(run_folder, undisturbed)


def test_a_stopped_run_saves_a_checkpoint_and_ends_the_same_when_resumed(
    work_folder: Path, ray_head: chaos.RayHead, undisturbed: Path
) -> None:
    with start_run(work_folder, ray_head, "stopped", "learner.checkpoint_every_steps=0") as (process, run_folder):
        chaos.wait_for_step(process, run_folder, 2, RUN_TIMEOUT_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    output = read_output(run_folder)
    assert "Traceback" not in output
    assert "add --resume to the same command to continue" in output.strip().splitlines()[-1]
    checkpoints = sorted(path.name for path in (run_folder / "checkpoints").iterdir())
    assert len(checkpoints) == 1
    checkpoint_step = int(checkpoints[0].removeprefix("step-"))
    assert 2 <= checkpoint_step < STEPS
    (run_folder / "checkpoints" / "step-9").mkdir()
    with start_run(work_folder, ray_head, "stopped", f"run.resume={run_folder}") as (process, _):
        wait_for_success(process, run_folder)
    log = (run_folder / "run.log").read_text()
    assert f"resuming after step {checkpoint_step}" in log
    assert "step-9" in log and "no complete.json" in log
    assert_same_result(run_folder, undisturbed)
    outcome, expected = (json.loads((folder / "outcome.json").read_text()) for folder in (run_folder, undisturbed))
    assert outcome == expected and outcome["base"] == outcome["aligned"] >= 4


def write_logged_rows(data_folder: Path) -> None:
    """Reactions and pairs for the algorithms that train on the log alone."""
    rows = [
        {"id": f"r{i}", "topic": "chat", "messages": [{"role": "user", "content": f"Question {i}?"}], "label": i % 2,
         "response": f"Answer {i}", "chosen": f"Yes, {i}", "rejected": f"No, {i}"}
        for i in range(24)
    ]  # fmt: skip
    for objective in ("love", "helpfulness"):
        (data_folder / objective).mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), data_folder / objective / "train.parquet")


@pytest.mark.parametrize("name", ["kto", "sft", "dpo"])
def test_a_stopped_run_on_the_log_alone_ends_the_same_when_resumed(
    work_folder: Path, ray_head: chaos.RayHead, name: str
) -> None:
    write_logged_rows(work_folder / "data")
    overrides = (f"algorithm.name={name}", "algorithm.steps=8", "rollout.max_response_tokens=24")
    with start_run(work_folder, ray_head, f"{name}-undisturbed", *overrides) as (process, undisturbed):
        wait_for_success(process, undisturbed)
    with start_run(work_folder, ray_head, f"{name}-stopped", *overrides) as (process, run_folder):
        chaos.wait_for_step(process, run_folder, 2, RUN_TIMEOUT_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, read_output(run_folder)[-3000:]
    steps_done = len(read_metrics(run_folder))
    assert 2 <= steps_done < 8
    with start_run(work_folder, ray_head, f"{name}-stopped", *overrides, f"run.resume={run_folder}") as (process, _):
        wait_for_success(process, run_folder)
    assert f"resuming after step {steps_done}" in (run_folder / "run.log").read_text()
    assert_same_result(run_folder, undisturbed)


def test_resuming_with_other_settings_is_refused_with_both_values(
    work_folder: Path, ray_head: chaos.RayHead, undisturbed: Path
) -> None:
    overrides = (f"run.resume={undisturbed}", "learner.learning_rate=1e-4")
    with start_run(work_folder, ray_head, "undisturbed", *overrides) as (process, run_folder):
        assert process.wait(RUN_TIMEOUT_S) == 2
    assert "learner.learning_rate (then 0.001, now 0.0001)" in read_output(run_folder)
    assert os.listdir(run_folder / "checkpoints")


def fill_disk(disk: Path, free_bytes_left: int) -> Path:
    """Write a file until `free_bytes_left` bytes are free; returns it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        while (free_bytes := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize) > free_bytes_left:
            stream.write(bytes(min(1 << 20, free_bytes - free_bytes_left)))
    return filler


def wait_for_log(process: Popen[str], run_folder: Path, text: str) -> None:
    """Wait until run.log contains `text`."""
    deadline, log_path = time.monotonic() + RUN_TIMEOUT_S, run_folder / "run.log"
    while text not in (log_path.read_text() if log_path.exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline, read_output(run_folder)[-3000:]
        time.sleep(0.02)


def count_errors(output: str) -> int:
    """Number of error messages; the text of one may contain the word again, from the operating system."""
    return sum(line.startswith("error: ") for line in output.splitlines())


def test_a_full_disk_ends_the_run_with_one_message_and_costs_no_checkpoint(
    work_folder: Path, ray_head: chaos.RayHead, undisturbed: Path, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """First there is room for metrics but not for a checkpoint, then for nothing at all."""
    disk = small_disk(64)
    with start_run(work_folder, ray_head, str(disk / "run")) as (process, run_folder):
        wait_for_log(process, run_folder, "checkpoint of step 2")
        filler = fill_disk(disk, 200 << 10)
        assert process.wait(RUN_TIMEOUT_S) == 5, read_output(run_folder)[-3000:]
    output = read_output(run_folder)
    assert "No space left" in output.strip().splitlines()[-1]
    assert "earlier checkpoints are" in output.strip().splitlines()[-1]
    assert count_errors(output) == 1 and "Traceback" not in output
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["step-2"]
    filler.unlink()
    # The output needs another disk: this one will have no room for it.
    (run_folder / "output.txt").unlink()
    (run_folder / "output.txt").symlink_to(tmp_path / "output.txt")
    overrides = (f"run.resume={run_folder}", "learner.checkpoint_every_steps=0")
    with start_run(work_folder, ray_head, str(run_folder), *overrides) as (process, _):
        chaos.wait_for_step(process, run_folder, 3, RUN_TIMEOUT_S)
        filler = fill_disk(disk, 0)
        assert process.wait(RUN_TIMEOUT_S) == 5, read_output(run_folder)[-3000:]
    filler.unlink()
    output = read_output(run_folder)
    assert "No space left" in output and count_errors(output) == 1 and "Traceback" not in output
    with start_run(work_folder, ray_head, str(run_folder), f"run.resume={run_folder}") as (process, _):
        wait_for_success(process, run_folder)
    assert_same_result(run_folder, undisturbed)


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.mark.skipif(not FAKETIME.exists(), reason="libfaketime is not installed (apt install libfaketime)")
def test_a_clock_that_jumps_hours_ahead_and_back_changes_nothing(
    work_folder: Path, ray_head: chaos.RayHead, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's clock, which deadlines and health checks would use."""
    clock_file = tmp_path / "clock"
    clock_file.write_text("+0")
    for name, value in {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": clock_file, "FAKETIME_NO_CACHE": 1,
                        "FAKETIME_DONT_FAKE_MONOTONIC": 1, "DONT_FAKE_MONOTONIC": 1}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    with start_run(work_folder, ray_head, "jumping") as (process, run_folder):
        for step, offset in ((1, "+7200"), (2, "-7200"), (3, "+86400")):
            chaos.wait_for_step(process, run_folder, step, RUN_TIMEOUT_S)
            clock_file.write_text(offset)
        wait_for_success(process, run_folder)
    log = (run_folder / "run.log").read_text()
    dates = {line[:10] for line in log.splitlines()}
    assert len(dates) > 1, "the clock did not jump"
    assert "missed" not in log and "restarting it" not in log
    assert_same_result(run_folder, undisturbed)
