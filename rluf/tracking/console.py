"""Console output of a run: log lines, and a progress bar on a terminal."""

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
from rich.progress import Progress as RichProgress
from rich.table import Column

logger = logging.getLogger(__name__)

LOG_LINE_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
QUIET_LOGGERS = (
    "asyncio", "datasets", "deepspeed", "filelock", "fsspec", "git", "httpcore", "httpx", "huggingface_hub",
    "matplotlib", "numba", "ray", "sentry_sdk", "torch", "transformers", "urllib3", "vllm", "wandb",
)  # fmt: skip
"""Loggers of other packages that are limited to warnings."""
PLAIN_LINE_INTERVAL_S = 10.0
"""Seconds between two progress lines without a terminal: a log file should not grow with the number of steps."""

_stderr_console = Console(stderr=True)
_installed_handlers: list[logging.Handler] = []


def setup_logging(run_log: Path | None = None, *, level: int = logging.INFO) -> None:
    """Send log lines to stderr (rich on a terminal, plain lines with a time stamp elsewhere) and to `run_log`.

    May be called again, for example once the run folder is known; it replaces the handlers of the earlier call.
    """
    root_logger = logging.getLogger()
    # Only rluf's own handlers are removed: Ray and pytest have theirs on the root logger too.
    for handler in _installed_handlers:
        root_logger.removeHandler(handler)
        handler.close()
    _installed_handlers.clear()
    plain_formatter = logging.Formatter(LOG_LINE_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
    stderr_handler: logging.Handler
    if _is_terminal():
        stderr_handler = RichHandler(console=_stderr_console, show_path=False, log_time_format="%H:%M:%S", markup=False)
    else:
        stderr_handler = logging.StreamHandler()
        stderr_handler.setFormatter(plain_formatter)
    _installed_handlers.append(stderr_handler)
    if run_log is not None:
        run_log.parent.mkdir(parents=True, exist_ok=True)
        file_handler = _RunLogHandler(run_log, encoding="utf-8")
        file_handler.setFormatter(plain_formatter)
        _installed_handlers.append(file_handler)
    for handler in _installed_handlers:
        root_logger.addHandler(handler)
    root_logger.setLevel(level)
    for logger_name in QUIET_LOGGERS:
        logging.getLogger(logger_name).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_no_device_guess)


def _is_no_device_guess(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warning that it found no GPU.

    transformers imports it in every process, such as the driver, which trains nothing. The learners name their device,
    and refuse another one. A filter, because DeepSpeed sets the level of its logger when it is imported.
    """
    return not record.getMessage().startswith("Setting accelerator to CPU")


class _RunLogHandler(logging.FileHandler):
    """Handler of run.log. A disk error is reported once on stderr, which gets every line anyway."""

    _disk_error_reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Report a disk error once, without a traceback per line; other errors are handled by logging."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._disk_error_reported:
            self._disk_error_reported = True
            sys.stderr.write(f"warning: {self.baseFilename} misses lines from here on: {error.strerror or error}\n")

    def close(self) -> None:
        """Close the file and ignore disk errors: closing flushes lines that were reported as lost already."""
        with contextlib.suppress(OSError):
            super().close()


def _is_terminal() -> bool:
    return sys.stderr.isatty()


class PhaseProgress:
    """Progress of one phase: a bar on a terminal, otherwise a log line every ten seconds; a final line in both cases.

    >>> with PhaseProgress("train", total=14, unit="step") as progress:
    ...     progress.advance(love=0.07, kl=0.004)
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        *,
        unit: str = "step",
        log_every_step: bool = False,
        done_count: int = 0,
    ) -> None:
        """`total` is in units, None when unknown; `log_every_step` logs a line per advance, above the bar.

        The lines go to run.log as well; the bar does not. `done_count` units were finished by an earlier attempt.
        """
        self._title, self._total, self._unit = title, total, unit
        self._log_every_step = log_every_step
        self._done_count = self._start_count = done_count
        self._logged_count = -1
        self._note_text = ""
        self._started_at = self._logged_at = time.monotonic()
        notes_column = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # the rest of the terminal's width
        self._progress_bars = RichProgress(
            TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[notes]}", style="dim", table_column=notes_column),
            console=_stderr_console, disable=not _is_terminal(), transient=True, expand=True,
        )  # fmt: skip
        self._task_id = self._progress_bars.add_task(title, total=total, completed=done_count, notes="")

    def __enter__(self) -> PhaseProgress:
        """Start the clock and, on a terminal, the bar."""
        self._started_at = self._logged_at = time.monotonic()
        self._progress_bars.start()
        return self

    def advance(self, count: int = 1, /, **notes: float | int | str) -> None:
        """Record `count` finished units; `notes` appear next to the bar, numbers with four digits."""
        self._done_count += count
        if notes:
            self._note_text = "  ".join(f"{key} {_format_note(value)}" for key, value in notes.items())
        self._progress_bars.update(self._task_id, advance=count, notes="" if self._log_every_step else self._note_text)
        if self._log_every_step or (
            self._progress_bars.disable and time.monotonic() - self._logged_at >= PLAIN_LINE_INTERVAL_S
        ):
            self._log_line()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar and log a final line, unless the phase ended with an error."""
        self._progress_bars.stop()
        # After an error the last line is the error message, not a count.
        if kind is None and self._logged_count != self._done_count:
            self._log_line()

    def _log_line(self) -> None:
        self._logged_at, self._logged_count = time.monotonic(), self._done_count
        total_text = f"/{self._total}" if self._total is not None else ""
        elapsed_s = self._logged_at - self._started_at
        logger.info(
            "%s: %s%s %s in %.0f s%s  %s",
            self._title,
            self._done_count,
            total_text,
            self._unit,
            elapsed_s,
            self._format_remaining_time(elapsed_s),
            self._note_text,
        )

    def _format_remaining_time(self, elapsed_s: float) -> str:
        """Remaining time at the mean pace of this attempt; empty before the first unit and at the end."""
        finished_count = self._done_count - self._start_count
        if self._total is None or finished_count <= 0 or self._done_count >= self._total:
            return ""
        remaining_s = elapsed_s / finished_count * (self._total - self._done_count)
        return f", about {remaining_s / 60:.0f} min left" if remaining_s >= 90 else f", about {remaining_s:.0f} s left"


def _format_note(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
