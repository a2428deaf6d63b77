"""The run timeline: gaps are named, overlapping spans are on lanes of their own; torch.profiler writes a trace."""

from __future__ import annotations

import gzip
import itertools
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from rluf.errors import RlufError
from rluf.tracking.timeline import (
    STEPS_ROW,
    PhaseTimer,
    RunTimeline,
    TimelineSpan,
    TorchProfiler,
    build_chrome_trace,
    compute_idle_shares,
    find_gaps,
    write_trace,
)

SPANS = [
    TimelineSpan(STEPS_ROW, "generate", 0.0, 4.0),
    TimelineSpan(STEPS_ROW, "learn", 4.0, 9.0),
    TimelineSpan(STEPS_ROW, "weight_sync", 9.0, 10.0),
    TimelineSpan("rollout 0", "prompt a", 0.0, 3.0),
    TimelineSpan("rollout 0", "prompt b", 1.0, 4.0),
    TimelineSpan("learner 0", "step 2", 4.0, 9.0),
]


def test_gaps_are_named_after_the_phase_of_the_driver() -> None:
    assert find_gaps(SPANS) == [
        TimelineSpan("rollout 0", "idle: learn", 4.0, 10.0),
        TimelineSpan("learner 0", "idle: generate", 0.0, 4.0),
        TimelineSpan("learner 0", "idle: weight_sync", 9.0, 10.0),
    ]
    assert compute_idle_shares(SPANS) == {
        "rollout 0": {"idle: learn": 0.6},
        "learner 0": {"idle: generate": 0.4, "idle: weight_sync": 0.1},
    }
    assert find_gaps([TimelineSpan("rollout 0", "a", 0.0, 1.0), TimelineSpan("rollout 0", "b", 2.0, 3.0)]) == [
        TimelineSpan("rollout 0", "idle", 1.0, 2.0)
    ]
    assert find_gaps([]) == []
    assert compute_idle_shares([]) == {}


def test_the_trace_has_all_times_and_puts_overlaps_on_lanes(tmp_path: Path) -> None:
    events = build_chrome_trace(SPANS)["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(rows.values()) == [STEPS_ROW, "rollout 0", "rollout 0 (2)", "learner 0"]
    span_times = {
        (rows[event["tid"]], event["name"]): (event["ts"], event["dur"]) for event in events if event["ph"] == "X"
    }
    assert span_times["learner 0", "step 2"] == (4e6, 5e6)
    assert span_times["rollout 0 (2)", "prompt b"] == (1e6, 3e6)
    assert {event["name"] for event in events if event.get("cat") == "idle"} == {
        "idle: learn",
        "idle: generate",
        "idle: weight_sync",
    }
    for thread in rows:
        lane = sorted(
            (event["ts"], event["ts"] + event["dur"])
            for event in events
            if event["ph"] == "X" and event["tid"] == thread
        )
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(lane))
    write_trace(tmp_path / "profile" / "timeline.json.gz", SPANS)
    assert json.loads(gzip.decompress((tmp_path / "profile" / "timeline.json.gz").read_bytes())) == build_chrome_trace(
        SPANS
    )
    write_trace(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text())["traceEvents"] == []


def test_nothing_is_recorded_while_disabled() -> None:
    timeline = RunTimeline()
    timeline.add_span("rollout 0", "a", 0.0, 1.0)
    timeline.enabled = True
    timeline.add_span("rollout 0", "b", 1.0, 2.0)
    assert timeline.spans == [TimelineSpan("rollout 0", "b", 1.0, 2.0)]


def test_the_profiler_writes_a_trace(tmp_path: Path) -> None:
    profiler = TorchProfiler()
    with pytest.raises(RlufError, match="before it was started"):
        profiler.stop(tmp_path / "trace.json")
    profiler.start()
    torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.stop(tmp_path / "profile" / "learner-0.json.gz")
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "learner-0.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::matmul" for event in trace["traceEvents"])


def test_seconds_add_up_over_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0
    monkeypatch.setattr("rluf.tracking.timeline.time.monotonic", lambda: seconds)

    def run_attempt(phase_seconds: dict[str, float], *, fails: bool) -> dict[str, float]:
        nonlocal seconds
        timer = PhaseTimer()
        with suppress(KeyboardInterrupt), timer.add_up_attempts(tmp_path / "phases.json"):
            timer.add_seconds(phase_seconds)
            seconds += 1 + sum(phase_seconds.values())
            if fails:
                raise KeyboardInterrupt
        return timer.as_dict()

    run_attempt({"prepare": 2.0, "train": 40.0}, fails=True)
    total = run_attempt({"train": 10.0, "compare": 3.0}, fails=False)
    assert total == {"prepare": 2.0, "train": 50.0, "compare": 3.0, "total": 57.0}
    assert list(total)[-1] == "total"
    (tmp_path / "phases.json").write_text("[1]")
    assert run_attempt({"train": 1.0}, fails=False)["total"] == 2.0
