"""torch.profiler around a few steps of one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rluf.errors import RlufError

if TYPE_CHECKING:
    from torch.profiler import profile


class TorchProfiler:
    """Records a Chrome trace of the operators between `start` and `stop`, on the CPU and, if present, the GPU."""

    def __init__(self) -> None:
        """Record nothing until `start`."""
        self._active_profile: profile | None = None

    def start(self) -> None:
        """Start recording; does nothing while a recording runs."""
        from torch.profiler import ProfilerActivity, profile, supported_activities

        if self._active_profile is None:
            activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
            self._active_profile = profile(activities=sorted(activities, key=lambda activity: activity.value))
            self._active_profile.start()

    def stop(self, path: Path) -> None:
        """Stop and write the trace to `path`, gzipped if it ends in .gz. Raises RlufError if it was not started."""
        if self._active_profile is None:
            raise RlufError("the profiler was stopped before it was started; call start first")
        # Cleared first, so that a failed export does not leave a stopped profile behind.
        recording, self._active_profile = self._active_profile, None
        recording.stop()
        path.parent.mkdir(parents=True, exist_ok=True)
        recording.export_chrome_trace(str(path))
