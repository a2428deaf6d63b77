"""Weights & Biases, as a guest: offline without a key, inside the run folder, and never able to stop a run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from rluf.config.settings import Settings
from rluf.tracking.metrics import SampleRow, jsonable

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "off"]
OFFLINE: Mode = "offline"
START_TIMEOUT_S = 20.0
"""Seconds that an online run may take to answer before the run goes on offline."""
FINISH_TIMEOUT_S = 30.0
"""Seconds the last upload may take; what is not sent by then stays in the run folder for `wandb sync`."""


class Tracker:
    """One W&B run of one rluf run. After a failure it warns once and every later call does nothing.

    The files lie in <folder>/wandb. `wandb sync <folder>/wandb/offline-run-*` sends an offline run later.
    """

    def __init__(
        self, settings: Settings, folder: Path, run_name: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """Start the W&B run in `folder` by `tracking.wandb` and the key.

        `run_name` is "<configuration name>-<folder name>" if not given, `config` the whole settings tree.
        """
        self._run: Run | None = None
        self._project, self._folder = settings.tracking.project, folder
        self._name = run_name or f"{settings.name}-{folder.name}"
        config = settings.model_dump(mode="json") if config is None else config
        self.mode = _mode(settings.tracking.wandb)
        if self.mode == "off":
            return
        for mode in dict.fromkeys((self.mode, OFFLINE)):
            self.mode = mode
            if self._guard(f"start {mode}", partial(self._start, mode, config)):
                break

    def __enter__(self) -> Tracker:
        """Use as a context manager that finishes the W&B run, as failed when an error passes through."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the W&B run."""
        self.finish(failed=kind is not None)

    @property
    def active(self) -> bool:
        """Whether W&B still records."""
        return self._run is not None

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Record the numbers of one optimiser step; missing and non-finite ones are left out."""
        row = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
        self._do("log", lambda run: run.log({**row, "step": step}))

    def log_samples(self, rows: Iterable[SampleRow]) -> None:
        """Record a small table of prompts with both policies' responses and scores."""

        def record(run: Run) -> None:
            import wandb

            kept = list(rows)
            names = sorted({name for row in kept for arm in (row["base"], row["aligned"]) for name in arm["scores"]})
            arms: tuple[Literal["base", "aligned"], ...] = ("base", "aligned")
            columns = ["topic", "prompt", "base", "aligned", *(f"{name}/{arm}" for name in names for arm in arms)]
            data = [
                [row["topic"], row["prompt"], row["base"]["text"], row["aligned"]["text"]]
                + [row[arm]["scores"].get(name) for name in names for arm in arms]
                for row in kept
            ]
            run.log({"samples": wandb.Table(columns=columns, data=data)})

        self._do("log samples", record)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Put the content of summary.json on the run's summary, such as love_rate.lift.mean."""
        self._do("summarise", lambda run: run.summary.update(jsonable(summary)))

    def finish(self, *, failed: bool = False) -> None:
        """End the W&B run and wait until its files are whole; `failed` marks it so.

        W&B's own finish returns some milliseconds before its service has written the last records, so the service is
        shut down as well, which waits for it.
        """

        def end(run: Run) -> None:
            import wandb

            run.finish(exit_code=int(failed))
            wandb.teardown()

        self._do("finish", end)
        self._run = None

    def _start(self, mode: Mode, config: Mapping[str, Any]) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._project,
            name=self._name,
            dir=str(self._folder),
            mode="online" if mode == "online" else "offline",
            config=jsonable(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_job_creation=True,
                init_timeout=START_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=False,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _do(self, what: str, action: Callable[[Run], object]) -> None:
        run = self._run
        if run is not None and not self._guard(what, lambda: action(run)):
            self._run = None

    def _guard(self, what: str, action: Callable[[], object]) -> bool:
        """Run one W&B call; what W&B or the disk refuse is told once, and the run goes on without W&B."""
        import wandb

        try:
            action()
        except (wandb.errors.Error, OSError) as error:
            told = str(error).split("\n")[0]
            logger.warning("W&B could not %s (%s: %s); the run goes on", what, type(error).__name__, told)
            return False
        return True


def _mode(wanted: Literal["auto", "online", "offline", "off"]) -> Mode:
    """auto is online with a WANDB_API_KEY and offline without; WANDB_MODE, when set, rules over auto."""
    if wanted != "auto":
        return wanted
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("online", "offline"):
        return "online" if asked == "online" else "offline"
    if asked in ("disabled", "off"):
        return "off"
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"
