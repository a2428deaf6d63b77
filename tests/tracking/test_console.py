"""Console: plain lines without a terminal, a run.log next to them, and quiet loggers of other packages."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rluf.tracking.console import PhaseProgress, setup_logging


def test_lines_reach_stderr_and_run_log_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging(tmp_path / "run" / "run.log")
    logging.getLogger("rluf.train").info("step %d", 3)
    logging.getLogger("urllib3").info("details")
    logging.getLogger("urllib3").warning("warning text")
    for text in (capsys.readouterr().err, (tmp_path / "run" / "run.log").read_text()):
        assert text.count("INFO    step 3") == 1
        assert "details" not in text
        assert "warning text" in text


def test_progress_logs_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), PhaseProgress("train", total=3) as progress:
        for step in range(3):
            progress.advance(love=0.0612345, step=step)
    assert caplog.messages == ["train: 3/3 step in 0 s  love 0.06123  step 2"]


def test_progress_lines_estimate_the_remaining_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    monkeypatch.setattr("rluf.tracking.console.time.monotonic", lambda: seconds)
    with (
        caplog.at_level(logging.INFO),
        PhaseProgress("train", total=10, log_every_step=True, done_count=4) as progress,
    ):
        for _ in range(6):
            seconds += 30.0
            progress.advance()
    texts = [message.split("  ")[0] for message in caplog.messages]
    assert texts[0] == "train: 5/10 step in 30 s, about 2 min left"
    assert texts[-2:] == ["train: 9/10 step in 150 s, about 30 s left", "train: 10/10 step in 180 s"]


TERMINAL_PROGRAM = """
import logging, pathlib, sys
from rluf.tracking.console import PhaseProgress, setup_logging

setup_logging(pathlib.Path(sys.argv[1]))
with PhaseProgress("answers", total=2, unit="prompt") as progress:
    logging.getLogger("rluf.train").info("between")
    progress.advance(2, love=0.061)
many = {f"objective_{number}": 0.25 for number in range(9)}
with PhaseProgress("train", total=3, log_every_step=True) as progress:
    for _ in range(3):
        progress.advance(**many)
"""


def test_a_terminal_gets_a_bar_and_run_log_the_lines(tmp_path: Path) -> None:
    controller_fd, terminal_fd = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", TERMINAL_PROGRAM, str(tmp_path / "run.log")]
    with subprocess.Popen(command, stderr=terminal_fd, env=environment) as child:
        os.close(terminal_fd)
        terminal_bytes = b""
        with contextlib.suppress(OSError):  # raised when the child has closed the terminal
            while chunk := os.read(controller_fd, 4096):
                terminal_bytes += chunk
    os.close(controller_fd)
    assert child.returncode == 0
    terminal_text = terminal_bytes.decode()
    assert "2/2" in terminal_text
    assert "love 0.061" in terminal_text
    assert "between" in terminal_text
    bar_counts = re.findall(r"train \S*\u2501\S* (\d/3)", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal_text))
    assert bar_counts and bar_counts[-1] == "3/3"  # the bar is visible however long the notes are
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split("INFO")[1].split(" in ")[0].strip() for line in lines] == [
        "between", "answers: 2/2 prompt", "train: 1/3 step", "train: 2/3 step", "train: 3/3 step",
    ]  # fmt: skip
    assert all("objective_8 0.25" in line for line in lines[2:])


def test_progress_can_log_each_step_and_logs_nothing_on_errors(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), PhaseProgress("score", unit="groups", log_every_step=True) as progress:
        progress.advance(2)
        progress.advance()
    assert caplog.messages == ["score: 2 groups in 0 s  ", "score: 3 groups in 0 s  "]
    caplog.clear()
    with caplog.at_level(logging.INFO), pytest.raises(KeyError), PhaseProgress("score", total=9):
        raise KeyError
    assert caplog.records == []


def test_a_full_disk_is_reported_once_and_stderr_has_every_line(
    small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(1)
    setup_logging(disk / "run.log")
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    for number in range(40):
        logging.getLogger("rluf.train").info("line %d %s", number, "x" * 300)
    setup_logging()
    stderr_text = capsys.readouterr().err
    assert stderr_text.count("misses lines from here on: No space left on device") == 1
    assert "Traceback" not in stderr_text
    assert all(f"line {number} " in stderr_text for number in range(40))


def test_saving_a_model_prints_no_progress_bar(tmp_path: Path) -> None:
    """In any process that imports rluf first, as actors do."""
    program = (
        "import rluf, sys; from transformers import BertConfig, BertModel; "
        "BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, "
        "intermediate_size=8)).save_pretrained(sys.argv[1])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert "it/s" not in completed.stderr and "%|" not in completed.stderr


def test_the_driver_does_not_print_that_deepspeed_found_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    deepspeed_logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)  # DeepSpeed's own writes to stdout too
    deepspeed_logger.addHandler(handler)
    try:
        setup_logging()
        deepspeed_logger.setLevel(logging.WARNING)  # as DeepSpeed's import does
        deepspeed_logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to")
        deepspeed_logger.warning("gradient overflow")
        deepspeed_logger.error("Setting up the accelerator failed")
    finally:
        deepspeed_logger.removeHandler(handler)
    assert capsys.readouterr().out == "gradient overflow\nSetting up the accelerator failed\n"


@pytest.mark.nightly
def test_a_new_process_that_loads_a_model_prints_nothing_of_deepspeed() -> None:
    program = (
        "from rluf.tracking.console import setup_logging; setup_logging()\n"
        "import accelerate; from deepspeed.accelerator import get_accelerator; print(get_accelerator().device_name())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "accelerator" not in done.stdout + done.stderr and done.stdout.split()[-1] in ("cpu", "cuda")
