"""Wall-clock seconds of the phases of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class PhaseTimer:
    """Collects wall-clock seconds by phase name; the total counts from construction."""

    def __init__(self) -> None:
        """Start the total."""
        self._start_time = time.monotonic()  # the wall clock may be set during a run
        self._seconds_by_phase: dict[str, float] = {}

    def time_call(self, phase_name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` and add its duration to the phase, even if it raises."""
        start_time = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            seconds = time.monotonic() - start_time
            self._seconds_by_phase[phase_name] = self._seconds_by_phase.get(phase_name, 0.0) + seconds

    def add_seconds(self, seconds_by_phase: Mapping[str, float]) -> None:
        """Add phases that were timed elsewhere."""
        self._seconds_by_phase |= seconds_by_phase

    def as_dict(self) -> dict[str, float]:
        """Seconds by phase, in order, and their `total` since construction."""
        return {**self._seconds_by_phase, "total": time.monotonic() - self._start_time}
