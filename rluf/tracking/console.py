"""What a person reads while a run goes on: log lines, and a progress bar where there is a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

logger = logging.getLogger(__name__)

LINE_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
QUIET = (
    "asyncio", "datasets", "deepspeed", "filelock", "fsspec", "git", "httpcore", "httpx", "huggingface_hub",
    "matplotlib", "numba", "ray", "sentry_sdk", "torch", "transformers", "urllib3", "vllm", "wandb",
)  # fmt: skip
"""Loggers of other packages that only speak from warnings upwards."""
PLAIN_LINE_EVERY_S = 10.0

_console = Console(stderr=True)
_ours: list[logging.Handler] = []


def setup_logging(run_log: Path | None = None, *, level: int = logging.INFO) -> None:
    """Send log lines to stderr (rich on a terminal, plain time-stamped lines elsewhere) and to `run_log` too.

    May be called again, for instance once the run folder is known: handlers of an earlier call are replaced.
    """
    root = logging.getLogger()
    for handler in _ours:
        root.removeHandler(handler)
        handler.close()
    _ours.clear()
    plain = logging.Formatter(LINE_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
    screen: logging.Handler
    if _on_terminal():
        screen = RichHandler(console=_console, show_path=False, log_time_format="%H:%M:%S", markup=False)
    else:
        screen = logging.StreamHandler()
        screen.setFormatter(plain)
    _ours.append(screen)
    if run_log is not None:
        run_log.parent.mkdir(parents=True, exist_ok=True)
        file = _RunLog(run_log, encoding="utf-8")
        file.setFormatter(plain)
        _ours.append(file)
    for handler in _ours:
        root.addHandler(handler)
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


class _RunLog(logging.FileHandler):
    """run.log. A disk that refuses it is told once on the screen, where every line is all the same."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say that the disk refuses, without a traceback for each line; other errors are logging's own."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            sys.stderr.write(f"warning: {self.baseFilename} lacks lines from here on: {error.strerror or error}\n")

    def close(self) -> None:
        """Close the file; lines that the disk has refused are let go."""
        with contextlib.suppress(OSError):
            super().close()


def _on_terminal() -> bool:
    return sys.stderr.isatty()


class Progress:
    """Progress of one phase: a bar on a terminal; elsewhere a log line at most every ten seconds. Both end in a line.

    >>> with Progress("train", total=14, unit="step") as progress:
    ...     progress.advance(love=0.07, kl=0.004)
    """

    def __init__(self, title: str, total: int | None = None, *, unit: str = "step", every_step: bool = False) -> None:
        """`total` in units, None when unknown; `every_step` writes a line for each advance, above the bar.

        Lines go to run.log too, which the bar does not.
        """
        self._title, self._total, self._unit = title, total, unit
        self._each = every_step
        self._done = 0
        self._shown = -1
        self._notes = ""
        self._started = self._spoke = time.monotonic()
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what the terminal has left beside the bar
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[notes]}", style="dim", table_column=rest),
            console=_console, disable=not _on_terminal(), transient=True, expand=True,
        )  # fmt: skip
        self._task = self._bars.add_task(title, total=total, notes="")

    def __enter__(self) -> Progress:
        """Start the clock and, on a terminal, the bar."""
        self._started = self._spoke = time.monotonic()
        self._bars.start()
        return self

    def advance(self, count: int = 1, /, **notes: float | int | str) -> None:
        """`count` more units are done; `notes` are shown beside the bar, numbers with four digits."""
        self._done += count
        if notes:
            self._notes = "  ".join(f"{key} {_short(value)}" for key, value in notes.items())
        self._bars.update(self._task, advance=count, notes="" if self._each else self._notes)
        if self._each or (self._bars.disable and time.monotonic() - self._spoke >= PLAIN_LINE_EVERY_S):
            self._line()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away; a line tells the end, unless an error speaks for itself."""
        self._bars.stop()
        if kind is None and self._shown != self._done:
            self._line()

    def _line(self) -> None:
        self._spoke, self._shown = time.monotonic(), self._done
        of = f"/{self._total}" if self._total is not None else ""
        seconds = self._spoke - self._started
        logger.info("%s: %s%s %s in %.0f s  %s", self._title, self._done, of, self._unit, seconds, self._notes)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
