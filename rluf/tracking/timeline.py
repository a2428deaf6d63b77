"""Chrome trace of the actors' busy times: one row per actor, idle gaps named after the phase they overlap.

Open it at chrome://tracing or ui.perfetto.dev. Times are `time.monotonic` of the driver, in seconds. TorchProfiler
records the operators of one process, PhaseTimer the seconds of a run's phases.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from rluf.errors import DataError, RlufError
from rluf.utils.files import read_json, write_json

if TYPE_CHECKING:
    from torch.profiler import profile


STEPS_ROW = "steps"
"""Row of the driver's phases; the gaps of the other rows are named after these."""
MIN_GAP_S = 0.001


@dataclass(frozen=True, slots=True)
class TimelineSpan:
    """Activity `name` of `row` from `start` to `end`, in seconds."""

    row: str
    name: str
    start: float
    end: float


@dataclass(slots=True)
class RunTimeline:
    """Collects spans while `enabled`; `add_span` costs almost nothing otherwise."""

    enabled: bool = False
    spans: list[TimelineSpan] = field(default_factory=list)

    def add_span(self, row: str, name: str, start: float, end: float) -> None:
        """Record activity `name` of `row` from `start` to `end`."""
        if self.enabled:
            self.spans.append(TimelineSpan(row, name, start, end))


def find_gaps(spans: Sequence[TimelineSpan]) -> list[TimelineSpan]:
    """Find the idle gaps of every row except the driver's, between the first start and the last end of all spans.

    A gap is named after the driver phase that overlaps most of it: "idle: learn".
    """
    if not spans:
        return []
    first_start, last_end = min(span.start for span in spans), max(span.end for span in spans)
    driver_phases = [span for span in spans if span.row == STEPS_ROW]
    gaps = []
    for row in dict.fromkeys(span.row for span in spans if span.row != STEPS_ROW):
        busy_until = first_start
        for span in sorted((span for span in spans if span.row == row), key=lambda span: span.start):
            if span.start - busy_until > MIN_GAP_S:
                gaps.append(TimelineSpan(row, _name_gap(driver_phases, busy_until, span.start), busy_until, span.start))
            # max, because spans of one row may overlap: an engine answers several prompts at once.
            busy_until = max(busy_until, span.end)
        if last_end - busy_until > MIN_GAP_S:
            gaps.append(TimelineSpan(row, _name_gap(driver_phases, busy_until, last_end), busy_until, last_end))
    return gaps


def _name_gap(driver_phases: Iterable[TimelineSpan], gap_start: float, gap_end: float) -> str:
    overlap_s: dict[str, float] = {}
    for phase in driver_phases:
        overlap = max(0.0, min(gap_end, phase.end) - max(gap_start, phase.start))
        overlap_s[phase.name] = overlap_s.get(phase.name, 0.0) + overlap
    longest_phase = max(overlap_s, key=lambda phase_name: overlap_s[phase_name], default="")
    return f"idle: {longest_phase}" if longest_phase and overlap_s[longest_phase] > 0 else "idle"


def compute_idle_shares(spans: Sequence[TimelineSpan]) -> dict[str, dict[str, float]]:
    """Share of the total time that each row was idle, by gap name."""
    if not spans:
        return {}
    total_s = max(span.end for span in spans) - min(span.start for span in spans)
    shares_by_row: dict[str, dict[str, float]] = {}
    for gap in find_gaps(spans):
        row_shares = shares_by_row.setdefault(gap.row, {})
        row_shares[gap.name] = row_shares.get(gap.name, 0.0) + (gap.end - gap.start) / total_s
    return shares_by_row


def build_chrome_trace(spans: Sequence[TimelineSpan]) -> dict[str, Any]:
    """Convert spans and their gaps to the Trace Event Format: complete events, microseconds since the first start.

    Overlapping spans of one row (an engine answers several prompts at once) are put on separate lanes.
    """
    all_spans = [*spans, *find_gaps(spans)]
    first_start = min((span.start for span in all_spans), default=0.0)
    trace_events: list[dict[str, Any]] = []
    next_thread = 0
    # The driver's phases come first, so that viewers show them on top.
    for row in dict.fromkeys(span.row for span in [*(span for span in spans if span.row == STEPS_ROW), *all_spans]):
        lane_ends: list[float] = []
        first_thread = next_thread
        for span in sorted((span for span in all_spans if span.row == row), key=lambda span: (span.start, span.end)):
            lane = next((index for index, lane_end in enumerate(lane_ends) if lane_end <= span.start), len(lane_ends))
            lane_ends[lane : lane + 1] = [span.end]
            category = "idle" if span.name.startswith("idle") else "work"
            start_us, duration_us = (span.start - first_start) * 1e6, (span.end - span.start) * 1e6
            trace_events.append({
                "name": span.name, "cat": category, "ph": "X", "ts": start_us, "dur": duration_us, "pid": 1,
                "tid": first_thread + lane,
            })  # fmt: skip
        next_thread += len(lane_ends)
        trace_events += [
            _build_thread_name_event(first_thread + lane, row if not lane else f"{row} ({lane + 1})")
            for lane in range(len(lane_ends))
        ]
    return {"traceEvents": trace_events, "displayTimeUnit": "ms"}


def _build_thread_name_event(thread_id: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread_id, "args": {"name": name}}


def write_trace(trace_path: Path, spans: Sequence[TimelineSpan]) -> None:
    """Write the Chrome trace of `spans`, gzipped if the name ends in .gz."""
    trace_path.parent.mkdir(parents=True, exist_ok=True)
    trace_json = json.dumps(build_chrome_trace(spans)).encode()
    trace_path.write_bytes(gzip.compress(trace_json) if trace_path.suffix == ".gz" else trace_json)


class TorchProfiler:
    """Records a Chrome trace of the operators between `start` and `stop`, on the CPU and, if present, the GPU."""

    def __init__(self) -> None:
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


P = ParamSpec("P")
R = TypeVar("R")


class PhaseTimer:
    """Collects elapsed seconds by phase name; the total counts from construction, plus earlier attempts of the run."""

    def __init__(self) -> None:
        self._start_time = time.monotonic()  # not time.time: the system clock may be set during a run
        self._seconds_by_phase: dict[str, float] = {}
        self._earlier_seconds: dict[str, float] = {}

    @contextmanager
    def add_up_attempts(self, path: Path) -> Iterator[None]:
        """Add the seconds of earlier attempts, saved in `path`; save the sum there on leaving, also by an exception."""
        with suppress(DataError):  # a damaged file must not stop a run
            self._earlier_seconds = {name: float(seconds) for name, seconds in read_json(path).items()}
        try:
            yield
        finally:
            write_json(path, self.as_dict())

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
        """Seconds by phase, in order, and their `total` since construction, with those of earlier attempts."""
        seconds = {**self._seconds_by_phase, "total": time.monotonic() - self._start_time}
        phase_names = [name for name in dict.fromkeys((*self._earlier_seconds, *seconds)) if name != "total"]
        return {name: self._earlier_seconds.get(name, 0.0) + seconds.get(name, 0.0) for name in (*phase_names, "total")}


def record_ray_span(span_name: str) -> AbstractContextManager[object]:
    """An event on Ray's own timeline (`ray timeline`), in the driver's row, next to the tasks of the actors.

    No event where this process is not connected to Ray.
    """
    # Ray's own wrapper, ray._private.profiling, records only when an environment variable is set.
    from ray._private.worker import global_worker

    if not global_worker.connected:
        return nullcontext()
    event: AbstractContextManager[object] = global_worker.core_worker.profile_event(b"step", {"name": span_name})
    return event
