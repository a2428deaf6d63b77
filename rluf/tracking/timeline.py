"""Chrome trace of the actors' busy times: one row per actor, idle gaps named after the phase they overlap.

Open it at chrome://tracing or ui.perfetto.dev. Times are `time.monotonic` of the driver, in seconds.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    phases = [span for span in spans if span.row == STEPS_ROW]
    gaps = []
    for row in dict.fromkeys(span.row for span in spans if span.row != STEPS_ROW):
        busy_until = first_start
        for span in sorted((span for span in spans if span.row == row), key=lambda span: span.start):
            if span.start - busy_until > MIN_GAP_S:
                gaps.append(TimelineSpan(row, _gap_name(phases, busy_until, span.start), busy_until, span.start))
            # max, because spans of one row may overlap: an engine answers several prompts at once.
            busy_until = max(busy_until, span.end)
        if last_end - busy_until > MIN_GAP_S:
            gaps.append(TimelineSpan(row, _gap_name(phases, busy_until, last_end), busy_until, last_end))
    return gaps


def _gap_name(phases: Iterable[TimelineSpan], start: float, end: float) -> str:
    overlap_s: dict[str, float] = {}
    for phase in phases:
        overlap = max(0.0, min(end, phase.end) - max(start, phase.start))
        overlap_s[phase.name] = overlap_s.get(phase.name, 0.0) + overlap
    longest = max(overlap_s, key=lambda name: overlap_s[name], default="")
    return f"idle: {longest}" if longest and overlap_s[longest] > 0 else "idle"


def idle_shares_by_row(spans: Sequence[TimelineSpan]) -> dict[str, dict[str, float]]:
    """Share of the total time that each row was idle, by gap name."""
    if not spans:
        return {}
    total_s = max(span.end for span in spans) - min(span.start for span in spans)
    shares: dict[str, dict[str, float]] = {}
    for gap in find_gaps(spans):
        row_shares = shares.setdefault(gap.row, {})
        row_shares[gap.name] = row_shares.get(gap.name, 0.0) + (gap.end - gap.start) / total_s
    return shares


def build_chrome_trace(spans: Sequence[TimelineSpan]) -> dict[str, Any]:
    """Convert spans and their gaps to the Trace Event Format: complete events, microseconds since the first start.

    Overlapping spans of one row (an engine answers several prompts at once) are put on separate lanes.
    """
    all_spans = [*spans, *find_gaps(spans)]
    first_start = min((span.start for span in all_spans), default=0.0)
    events: list[dict[str, Any]] = []
    next_thread = 0
    # The driver's phases come first, so that viewers show them on top.
    for row in dict.fromkeys(span.row for span in [*(span for span in spans if span.row == STEPS_ROW), *all_spans]):
        lane_ends: list[float] = []
        first_thread = next_thread
        for span in sorted((span for span in all_spans if span.row == row), key=lambda span: (span.start, span.end)):
            lane = next((index for index, end in enumerate(lane_ends) if end <= span.start), len(lane_ends))
            lane_ends[lane : lane + 1] = [span.end]
            category = "idle" if span.name.startswith("idle") else "work"
            start_us, duration_us = (span.start - first_start) * 1e6, (span.end - span.start) * 1e6
            events.append({
                "name": span.name, "cat": category, "ph": "X", "ts": start_us, "dur": duration_us, "pid": 1,
                "tid": first_thread + lane,
            })  # fmt: skip
        next_thread += len(lane_ends)
        events += [
            _thread_name_event(first_thread + lane, row if not lane else f"{row} ({lane + 1})")
            for lane in range(len(lane_ends))
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _thread_name_event(thread_id: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread_id, "args": {"name": name}}


def write_trace(path: Path, spans: Sequence[TimelineSpan]) -> None:
    """Write the Chrome trace of `spans`, gzipped if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(build_chrome_trace(spans)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
