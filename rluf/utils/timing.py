"""Seconds spent in each phase of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Phases:
    """Collects wall-clock seconds by phase name; `total` counts from construction."""

    def __init__(self) -> None:
        """Start the total."""
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}

    def time(self, name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` and add its seconds to phase `name`."""
        started = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add phases that were timed elsewhere."""
        self._seconds |= seconds

    def as_dict(self) -> dict[str, float]:
        """Seconds by phase, in order, and their `total` since construction."""
        return {**self._seconds, "total": time.monotonic() - self._started}
