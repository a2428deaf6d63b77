"""Console: plain lines where there is no terminal, a run.log beside them, and quiet guests."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
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
import logging
from rluf.tracking.console import Progress, setup_logging

setup_logging()
with Progress("train", total=2) as progress:
    logging.getLogger("rluf.train").info("between")
    progress.advance(2, love=0.061)
"""


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", ON_TERMINAL], stderr=theirs, env=environment) as child:
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
    assert "\u2501" in shown


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
