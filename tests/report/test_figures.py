"""Figures of the report: every measure is legible on its own axis, labels are level, points are whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import pytest

from rluf.report.figures import build_job_phases_figure, build_lifts_figure, build_reliability_figure


def validate_figure(figure: Mapping[str, Any]) -> None:
    """Let plotly check every key and value, with the colors that the page fills in."""
    text = json.dumps(figure)
    for name in ("aligned", "muted", "grid", "clear", "base", "ink", "card", "line"):
        text = text.replace(f'"@{name}"', '"#123456"')
    go.Figure(json.loads(text.replace('"@font"', '"Arial"')))


def estimate(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


@pytest.mark.parametrize(
    "lifts",
    [
        {"Love": (3.39, 3.08, 3.71), "Helpfulness": (0.023, 0.019, 0.027), "Safety": (-0.004, -0.01, 0.002)},
        {"Love": (-0.6, -0.7, -0.5), "Safety": (0.0, 0.0, 0.0)},
        {"Love": (0.1, -0.2, 0.4)},
        {f"objective {i}": (0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05) for i in range(9)},
    ],
    ids=["large and small", "negative and zero", "one", "many"],
)
def test_every_measure_has_an_axis_on_which_its_interval_is_visible(lifts: dict[str, tuple[float, ...]]) -> None:
    rows = [(name, "simulated users", estimate(*values)) for name, values in lifts.items()]
    rows += [(name, "reward models", estimate(*values)) for name, values in list(lifts.items())[:1]]
    figure = build_lifts_figure(rows)
    validate_figure(figure)
    layout, domains = figure["layout"], []
    for trace in figure["data"]:
        x_axis = layout[trace["xaxis"].replace("x", "xaxis")]
        y_axis = layout[trace["yaxis"].replace("y", "yaxis")]
        low, high = x_axis["range"]
        (name,) = trace["text"]
        assert y_axis["ticktext"] == [name]
        assert low < min(0, lifts[name][1]) and max(0, lifts[name][2]) < high
        largest = max(abs(lifts[name][1]), abs(lifts[name][2]))
        # The interval and zero fill the axis: at least 80% of it, unless all of them are zero.
        assert largest == 0 or high - low < (max(0, lifts[name][2]) - min(0, lifts[name][1])) * 1.25
        domains.append(tuple(y_axis["domain"]))
    ordered = sorted(set(domains))
    assert len(ordered) == len(lifts)
    assert ordered[0][0] > 0 and ordered[-1][1] == pytest.approx(1)
    assert all(lower[1] < upper[0] for lower, upper in pairwise(ordered))
    assert len(layout["shapes"]) == len(lifts)
    assert sum(trace["showlegend"] for trace in figure["data"]) == 2


def test_labels_of_the_job_are_level_and_few_enough_for_a_phone() -> None:
    figure = build_job_phases_figure({"prepare": 20.0, "reward": 700.0, "train": 900.0})
    validate_figure(figure)
    assert figure["layout"]["xaxis"]["tickangle"] == 0
    assert figure["layout"]["xaxis"]["nticks"] <= 4


@pytest.mark.parametrize("observed", [0.0, 0.5, 1.0])
def test_points_at_the_ends_of_the_reliability_plot_are_whole(observed: float) -> None:
    bins = [{"predicted": observed, "observed": observed, "low": observed, "high": max(observed, 0.3), "n": 9}]
    figure = build_reliability_figure(bins)
    validate_figure(figure)
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < observed < high
    assert low < 0


@pytest.mark.parametrize("ends", [(0.02, 0.03), (0.48, 1.42), (-0.7, -0.5), (-0.01, 0.002), (3.1, 3.7), (0.0, 0.0)])
def test_the_ticks_of_a_lift_are_few_and_zero_has_no_sign(ends: tuple[float, float]) -> None:
    axis = build_lifts_figure([("Love", "users", estimate(sum(ends) / 2, *ends))])["layout"]["xaxis"]
    low, high = axis["range"]
    assert 2 <= len(axis["tickvals"]) <= 6 and all(low <= tick <= high for tick in axis["tickvals"])
    for value, text in zip(axis["tickvals"], axis["ticktext"], strict=True):
        assert text == "0%" if value == 0 else text[0] == ("+" if value > 0 else "−")
        assert float(text.rstrip("%").replace("−", "-")) == pytest.approx(value * 100)
