"""Profile a few steps of a run: a torch profiler trace per learner rank, and a timeline of when each actor was busy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.tracking.timeline import idle_shares_by_row, write_trace
from rluf.train.actor_calls import gather_calls

if TYPE_CHECKING:
    from rluf.train.controller import TrainController

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles some steps into <folder>/profile; called before and after each step.

    The first step after a start or a resume is left out, unless it is the only one: it warms everything up, and would
    hide what a usual step costs.
    """

    def __init__(self, controller: TrainController, folder: Path, profile_steps: int) -> None:
        """Do nothing where `profile_steps` is 0."""
        self._controller, self._profile_folder = controller, folder / "profile"
        settings = controller.settings
        self._timeout_s, self._last_step = settings.timeouts.call_s, settings.algorithm.steps
        self._profile_steps, self._first_step = profile_steps, 0

    async def start_if_due(self, step: int) -> None:
        """Start the profilers before the first of the steps to profile."""
        self._first_step = self._first_step or min(step + 1, self._last_step)
        if self._profile_steps and step == self._first_step:
            self._controller.timeline.enabled = True
            learners = self._controller.actor_groups.learner_actors
            calls = [(actor, actor.handle.start_profiler.remote()) for actor in learners]
            await gather_calls(calls, self._timeout_s, "starting its profiler")

    async def stop_if_due(self, step: int) -> None:
        """Write the traces after the last of the steps to profile, or after the last step of the run."""
        timeline = self._controller.timeline
        if not timeline.enabled or step < min(self._first_step + self._profile_steps - 1, self._last_step):
            return
        timeline.enabled = False
        self._profile_folder.mkdir(parents=True, exist_ok=True)
        write_trace(self._profile_folder / "timeline.json.gz", timeline.spans)
        calls = []
        for actor in self._controller.actor_groups.learner_actors:
            trace_path = self._profile_folder / f"learner-{actor.index}.json.gz"
            calls.append((actor, actor.handle.stop_profiler.remote(str(trace_path))))
        await gather_calls(calls, self._timeout_s, "writing its profile")
        for row, shares in idle_shares_by_row(timeline.spans).items():
            reasons = ", ".join(f"{name.removeprefix('idle: ')} {share:.0%}" for name, share in shares.items())
            logger.info("profile: %s idle %.0f%% (%s)", row, 100 * sum(shares.values()), reasons)
        logger.info("profile: steps %d to %d written to %s", self._first_step, step, self._profile_folder)
