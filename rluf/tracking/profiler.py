"""torch's profiler around a few steps of one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rluf.errors import RlufError

if TYPE_CHECKING:
    from torch.profiler import profile


class TorchProfiler:
    """Start, do the work, stop: one Chrome trace of its operators on the CPU and, where there is one, the GPU."""

    def __init__(self) -> None:
        """Nothing runs until `start`."""
        self._running: profile | None = None

    def start(self) -> None:
        """Record from here on; a start while it runs changes nothing."""
        from torch.profiler import ProfilerActivity, profile, supported_activities

        if self._running is None:
            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
            self._running = profile(activities=sorted(wanted, key=lambda one: one.value))
            self._running.start()

    def stop(self, path: Path) -> None:
        """Stop and write the trace to `path` (gzipped where it ends in .gz). RlufError when it was not started."""
        if self._running is None:
            raise RlufError("the profiler was stopped before it was started; call start first")
        running, self._running = self._running, None
        running.stop()
        path.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(path))
