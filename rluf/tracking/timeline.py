"""When each actor was busy, as a Chrome trace: one row an actor, with its idle gaps named after what it waited for.

Open it at chrome://tracing or ui.perfetto.dev. Times are `time.monotonic` of the driver, in seconds.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = "steps"
"""The row of the driver's own phases; the gaps of the other rows are named after them."""
SMALLEST_GAP_S = 0.001


@dataclass(frozen=True, slots=True)
class Span:
    """`row` did `name` from `start` to `end`, seconds."""

    row: str
    name: str
    start: float
    end: float


@dataclass(slots=True)
class Timeline:
    """Collects spans while `on`; adding one costs next to nothing while off."""

    on: bool = False
    spans: list[Span] = field(default_factory=list)

    def add(self, row: str, name: str, start: float, end: float) -> None:
        """Remember that `row` did `name` from `start` to `end`."""
        if self.on:
            self.spans.append(Span(row, name, start, end))


def gaps(spans: Sequence[Span]) -> list[Span]:
    """Idle spans of every row but the driver's: where none of its spans runs, between the first start and last end.

    A gap is named after the phase of the driver that takes up most of it: "idle: learn".
    """
    if not spans:
        return []
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    phases = [span for span in spans if span.row == STEPS]
    found = []
    for row in dict.fromkeys(span.row for span in spans if span.row != STEPS):
        at = first
        for span in sorted((span for span in spans if span.row == row), key=lambda span: span.start):
            if span.start - at > SMALLEST_GAP_S:
                found.append(Span(row, _reason(phases, at, span.start), at, span.start))
            at = max(at, span.end)
        if last - at > SMALLEST_GAP_S:
            found.append(Span(row, _reason(phases, at, last), at, last))
    return found


def _reason(phases: Iterable[Span], start: float, end: float) -> str:
    shares: dict[str, float] = {}
    for phase in phases:
        shares[phase.name] = shares.get(phase.name, 0.0) + max(0.0, min(end, phase.end) - max(start, phase.start))
    longest = max(shares, key=lambda name: shares[name], default="")
    return f"idle: {longest}" if longest and shares[longest] > 0 else "idle"


def idle_shares(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Share of the whole time that each row was idle, by the name of its gaps."""
    if not spans:
        return {}
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    shares: dict[str, dict[str, float]] = {}
    for gap in gaps(spans):
        row = shares.setdefault(gap.row, {})
        row[gap.name] = row.get(gap.name, 0.0) + (gap.end - gap.start) / whole
    return shares


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans and their gaps in the Trace Event Format: complete events, microseconds since the first start.

    Spans of one row that overlap (an engine answers several prompts at once) lie on lanes below each other.
    """
    everything = [*spans, *gaps(spans)]
    begin = min((span.start for span in everything), default=0.0)
    events: list[dict[str, Any]] = []
    thread = 0
    for row in dict.fromkeys(span.row for span in [*(s for s in spans if s.row == STEPS), *everything]):
        free: list[float] = []
        base = thread
        for span in sorted((span for span in everything if span.row == row), key=lambda span: (span.start, span.end)):
            lane = next((number for number, end in enumerate(free) if end <= span.start), len(free))
            free[lane : lane + 1] = [span.end]
            kind = "idle" if span.name.startswith("idle") else "work"
            start, length = (span.start - begin) * 1e6, (span.end - span.start) * 1e6
            events.append(
                {"name": span.name, "cat": kind, "ph": "X", "ts": start, "dur": length, "pid": 1, "tid": base + lane}
            )
        thread += len(free)
        events += [_name(base + lane, row if not lane else f"{row} ({lane + 1})") for lane in range(len(free))]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(thread: int, name: str) -> dict[str, Any]:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """Write the Chrome trace of `spans`, gzipped where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(chrome_trace(spans)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
