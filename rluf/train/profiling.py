"""Profiles a few steps of a run: a torch profiler trace of each learner rank, and when every actor was busy."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.tracking.timeline import idle_shares, write_trace
from rluf.train.actor_groups import everyone

if TYPE_CHECKING:
    from rluf.train.controller import Pipeline

logger = logging.getLogger(__name__)


def pump(name: str) -> AbstractContextManager[object]:
    """An event on Ray's own timeline (`ray timeline`), in the driver's row, beside the tasks of the actors.

    Nothing where this process is not connected to a Ray: there is no timeline to be on.
    """
    from ray._private.worker import global_worker  # Ray's own way in, ray._private.profiling, works with a variable set

    if not global_worker.connected:
        return nullcontext()
    event: AbstractContextManager[object] = global_worker.core_worker.profile_event(b"pump", {"name": name})
    return event


class Profiler:
    """Calls around each step: profiles `run.profile_steps` of them into <folder>/profile.

    The first step of a run, or after it went on, warms everything up and would hide what a usual one costs: it is left
    out, unless it is the only one.
    """

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        """Does nothing where `run.profile_steps` is 0."""
        self._pipeline, self._folder = pipeline, folder / "profile"
        settings = pipeline.settings
        self._deadline, self._steps = settings.learner.deadline_s, settings.algorithm.steps
        self._wanted, self._first = settings.run.profile_steps, 0

    async def before(self, step: int) -> None:
        """Start with the first of the steps to profile."""
        self._first = self._first or min(step + 1, self._steps)
        if self._wanted and step == self._first:
            self._pipeline.timeline.on = True
            calls = [(m, m.handle.begin_profile.remote()) for m in self._pipeline.crew.learners]
            await everyone(calls, self._deadline, "starting its profiler")

    async def after(self, step: int) -> None:
        """Write the traces after the last of the steps, or after the run's last where that comes first."""
        if not self._pipeline.timeline.on or step < min(self._first + self._wanted - 1, self._steps):
            return
        self._pipeline.timeline.on = False
        spans = self._pipeline.timeline.spans
        self._folder.mkdir(parents=True, exist_ok=True)
        write_trace(self._folder / "pumps.json.gz", spans)
        calls = [
            (m, m.handle.end_profile.remote(str(self._folder / f"learner-{m.index}.json.gz")))
            for m in self._pipeline.crew.learners
        ]
        await everyone(calls, self._deadline, "writing its profile")
        for row, shares in idle_shares(spans).items():
            told = ", ".join(f"{name.removeprefix('idle: ')} {share:.0%}" for name, share in shares.items())
            logger.info("profile: %s idle %.0f%% (%s)", row, 100 * sum(shares.values()), told)
        logger.info("profile of steps %d to %d: %s", self._first, step, self._folder)
