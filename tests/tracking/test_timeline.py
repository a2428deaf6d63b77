"""The pump timeline: gaps are found and named, overlapping work lies on lanes, and torch's profiler writes a trace."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch

from rluf.errors import RlufError
from rluf.tracking.profiler import TorchProfiler
from rluf.tracking.timeline import STEPS, Span, Timeline, chrome_trace, gaps, idle_shares, write_trace

SPANS = [
    Span(STEPS, "generate", 0.0, 4.0),
    Span(STEPS, "learn", 4.0, 9.0),
    Span(STEPS, "publish", 9.0, 10.0),
    Span("rollout 0", "prompt a", 0.0, 3.0),
    Span("rollout 0", "prompt b", 1.0, 4.0),
    Span("learner 0", "step 2", 4.0, 9.0),
]


def test_gaps_are_named_after_what_the_driver_was_doing() -> None:
    assert gaps(SPANS) == [
        Span("rollout 0", "idle: learn", 4.0, 10.0),
        Span("learner 0", "idle: generate", 0.0, 4.0),
        Span("learner 0", "idle: publish", 9.0, 10.0),
    ]
    assert idle_shares(SPANS) == {
        "rollout 0": {"idle: learn": 0.6},
        "learner 0": {"idle: generate": 0.4, "idle: publish": 0.1},
    }
    assert gaps([Span("rollout 0", "a", 0.0, 1.0), Span("rollout 0", "b", 2.0, 3.0)]) == [
        Span("rollout 0", "idle", 1.0, 2.0)
    ]
    assert gaps([]) == []
    assert idle_shares([]) == {}


def test_the_trace_keeps_times_and_lays_overlaps_on_lanes(tmp_path: Path) -> None:
    events = chrome_trace(SPANS)["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(rows.values()) == [STEPS, "rollout 0", "rollout 0 (2)", "learner 0"]
    work = {(rows[e["tid"]], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert work["learner 0", "step 2"] == (4e6, 5e6)
    assert work["rollout 0 (2)", "prompt b"] == (1e6, 3e6)
    assert {e["name"] for e in events if e.get("cat") == "idle"} == {"idle: learn", "idle: generate", "idle: publish"}
    for thread in rows:
        lane = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == thread)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(lane))
    write_trace(tmp_path / "profile" / "pumps.json.gz", SPANS)
    assert json.loads(gzip.decompress((tmp_path / "profile" / "pumps.json.gz").read_bytes())) == chrome_trace(SPANS)
    write_trace(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text())["traceEvents"] == []


def test_nothing_is_remembered_while_off() -> None:
    timeline = Timeline()
    timeline.add("rollout 0", "a", 0.0, 1.0)
    timeline.on = True
    timeline.add("rollout 0", "b", 1.0, 2.0)
    assert timeline.spans == [Span("rollout 0", "b", 1.0, 2.0)]


def test_the_profiler_writes_torchs_trace(tmp_path: Path) -> None:
    profiler = TorchProfiler()
    with pytest.raises(RlufError, match="before it was started"):
        profiler.stop(tmp_path / "trace.json")
    profiler.start()
    torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.stop(tmp_path / "profile" / "learner-0.json.gz")
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "learner-0.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::matmul" for event in trace["traceEvents"])
