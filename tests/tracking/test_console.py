"""Console: plain lines where there is no terminal, a run.log beside them, and quiet guests."""

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

from rluf.tracking.console import Progress, setup_logging


def test_lines_reach_screen_and_run_log_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging(tmp_path / "run" / "run.log")
    logging.getLogger("rluf.train").info("step %d", 3)
    logging.getLogger("urllib3").info("chatter")
    logging.getLogger("urllib3").warning("trouble")
    for text in (capsys.readouterr().err, (tmp_path / "run" / "run.log").read_text()):
        assert text.count("INFO    step 3") == 1
        assert "chatter" not in text
        assert "trouble" in text


def test_progress_speaks_in_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("train", total=3) as progress:
        for step in range(3):
            progress.advance(love=0.0612345, step=step)
    assert [one.getMessage() for one in caplog.records] == ["train: 3/3 step in 0 s  love 0.06123  step 2"]


ON_TERMINAL = """
import logging, pathlib, sys
from rluf.tracking.console import Progress, setup_logging

setup_logging(pathlib.Path(sys.argv[1]))
with Progress("answers", total=2, unit="prompt") as progress:
    logging.getLogger("rluf.train").info("between")
    progress.advance(2, love=0.061)
many = {f"objective_{number}": 0.25 for number in range(9)}
with Progress("align", total=3, every_step=True) as progress:
    for _ in range(3):
        progress.advance(**many)
"""


def test_a_terminal_gets_a_bar_and_run_log_the_lines(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", ON_TERMINAL, str(tmp_path / "run.log")]
    with subprocess.Popen(command, stderr=theirs, env=environment) as child:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal is gone when the child has ended
            while piece := os.read(ours, 4096):
                seen += piece
    os.close(ours)
    assert child.returncode == 0
    shown = seen.decode()
    assert "2/2" in shown
    assert "love 0.061" in shown
    assert "between" in shown
    bars = re.findall(r"align \S*\u2501\S* (\d/3)", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    assert bars and bars[-1] == "3/3"  # however much there is to tell of a step, the bar has its place
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split("INFO")[1].split(" in ")[0].strip() for line in lines] == [
        "between", "answers: 2/2 prompt", "align: 1/3 step", "align: 2/3 step", "align: 3/3 step",
    ]  # fmt: skip
    assert all("objective_8 0.25" in line for line in lines[2:])


def test_progress_can_speak_at_each_step_and_is_silent_on_errors(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("score", unit="groups", every_step=True) as progress:
        progress.advance(2)
        progress.advance()
    assert [one.getMessage() for one in caplog.records] == ["score: 2 groups in 0 s  ", "score: 3 groups in 0 s  "]
    caplog.clear()
    with caplog.at_level(logging.INFO), pytest.raises(KeyError), Progress("score", total=9):
        raise KeyError
    assert caplog.records == []


def test_a_full_disk_is_told_once_and_the_screen_still_has_every_line(
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
    told = capsys.readouterr().err
    assert told.count("lacks lines from here on: No space left on device") == 1
    assert "Traceback" not in told
    assert all(f"line {number} " in told for number in range(40))
