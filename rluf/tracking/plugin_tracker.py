"""A tracker of the user's own: step metrics and the summary, on a background thread, so that it never stops a run."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rluf.config.settings import Settings
from rluf.errors import SettingsError
from rluf.tracking.background import BackgroundCaller
from rluf.utils.files import to_jsonable
from rluf.utils.plugins import load_plugin

TRACKER_SIGNATURE = "a function (settings, run folder) -> tracker"
CALL_TIMEOUT_S = 60.0
"""Seconds that a tracker may take to finish; then the run ends without it."""


class Tracker(Protocol):
    """What a function of `tracking.trackers` returns; its methods are called one after the other on one thread.

    Only `log_step` is required.
    """

    def log_step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Record the metrics of an optimizer step. A step that is repeated after a restart comes again."""

    def update_summary(self, summary: Mapping[str, Any]) -> None:
        """Record the content of summary.json."""

    def finish(self, *, failed: bool) -> None:
        """Complete the record; `failed` where the run ended with an error."""


BUILTIN_TRACKERS: Mapping[str, tuple[str, str, str]] = {
    "tensorboard": ("rluf.tracking.tensorboard:TensorBoardTracker", "tensorboardX", "tensorboardx"),
    "mlflow": ("rluf.tracking.mlflow:MlflowTracker", "mlflow", "mlflow-skinny"),
}
"""Trackers by name: class, module that it needs, and what to install for it."""


def load_tracker(reference: str) -> Callable[[Settings, Path], Tracker]:
    """The factory of a tracker. Raises SettingsError if it, or the package of a built-in one, cannot be imported."""
    if reference == "wandb":
        raise SettingsError("tracking.trackers: W&B has a setting of its own, tracking.wandb; remove it from the list")
    if reference in BUILTIN_TRACKERS:
        reference, module_name, requirement = BUILTIN_TRACKERS[reference]
        if importlib.util.find_spec(module_name) is None:
            raise SettingsError(
                f"tracking.trackers: the tracker {module_name} needs a package that is not installed; run: "
                f"pip install '{requirement}', or remove it from tracking.trackers"
            )
    create_tracker: Callable[[Settings, Path], Tracker] = load_plugin(
        reference, kind="tracker", known_names=BUILTIN_TRACKERS, signature=TRACKER_SIGNATURE, argument_count=2
    )
    return create_tracker


class PluginTracker:
    """Calls one tracker in the background. After a failure it logs one warning, and later calls do nothing."""

    def __init__(self, reference: str, settings: Settings, run_folder: Path) -> None:
        """Load the factory `reference` (a built-in name or module:function) and call it in the background."""
        create_tracker = load_tracker(reference)
        # Any exception: what a tracker of the user's may raise is unknown, and none may end the run.
        self._background_caller = BackgroundCaller(f"tracker {reference}", (Exception,))
        # A list that the background thread fills: a constructor may wait for a server, and the run must not.
        self._trackers: list[Tracker] = []
        self._background_caller.submit("start", lambda: self._start(create_tracker(settings, run_folder)))

    def _start(self, tracker: Tracker) -> None:
        for name in ("log_step", "update_summary", "finish"):
            if inspect.iscoroutinefunction(getattr(tracker, name, None)):
                raise SettingsError(f"{name} is an async function, which nothing awaits; write a plain one")
        self._trackers.append(tracker)

    def log_step(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Queue the metrics of a step."""
        row = dict(metrics)
        self._background_caller.submit(f"log step {step}", lambda: self._trackers[0].log_step(step, row))

    def update_summary(self, summary: Mapping[str, Any]) -> None:
        """Queue the summary."""
        content = to_jsonable(summary)
        self._background_caller.submit("record the summary", lambda: self._call_optional("update_summary", content))

    def finish(self, *, failed: bool) -> None:
        """Let the tracker finish; wait for it at most CALL_TIMEOUT_S seconds."""
        call = self._background_caller.submit("finish", lambda: self._call_optional("finish", failed=failed))
        self._background_caller.wait_for_call(call, CALL_TIMEOUT_S)

    def _call_optional(self, method_name: str, *arguments: Any, **keywords: Any) -> None:
        method = getattr(self._trackers[0], method_name, None)
        if method is not None:
            method(*arguments, **keywords)
