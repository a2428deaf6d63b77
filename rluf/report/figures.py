"""Plotly figures of the report, as plain dictionaries.

Colours are names such as "@aligned": the page replaces them by the colours of its light or dark style, so that one file
suits both. Nothing here draws; plotly.js does, in the reader's browser.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rluf.tracking.metric_registry import Metric, title

Figure = dict[str, Any]

PHASE_COLOURS = ("@phase1", "@phase2", "@phase3", "@phase4")
LEGEND: Figure = {
    "orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "traceorder": "normal",
    "entrywidth": 0, "itemsizing": "constant",
}  # fmt: skip
SMOOTH_FROM = 60
"""Steps from which a curve shows its running mean in front of the raw points."""


PHASE_NAMES = {"generate_s": "generate", "score_s": "score", "learn_s": "learn", "publish_s": "publish"}
STAGE_NAMES = {
    "model": "convert model", "ray": "start Ray", "prepare": "prepare data", "reward": "reward models",
    "start": "start actors", "evaluate_base": "base answers", "evaluate_aligned": "aligned answers",
    "save": "save policy", "stop": "stop actors",
}  # fmt: skip
"""Phases of the job as people say them."""


def _layout(**more: Any) -> dict[str, Any]:
    return {
        "margin": {"l": 48, "r": 12, "t": 8, "b": 36},
        "paper_bgcolor": "@clear",
        "plot_bgcolor": "@clear",
        "font": {"family": "@font", "size": 13, "color": "@muted"},
        "hoverlabel": {"font": {"family": "@font"}},
        "showlegend": False,
        **more,
    }


def _axis(**more: Any) -> dict[str, Any]:
    return {"gridcolor": "@grid", "zerolinecolor": "@grid", "linecolor": "@grid", "fixedrange": True, **more}


def _bars(estimates: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Error bars that reach from the means to both ends of the intervals."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [one["high"] - one["mean"] for one in estimates],
        "arrayminus": [one["mean"] - one["low"] for one in estimates],
        "thickness": 2,
        "width": 5,
    }


def arms(measure: Mapping[str, Any]) -> Figure:
    """Base and aligned as two dots with their intervals on one percent axis."""
    traces = []
    for name in ("base", "aligned"):
        estimate = measure[name]
        traces.append({
            "type": "scatter", "mode": "markers", "x": [estimate["mean"]], "y": [name], "name": name,
            "marker": {"size": 12, "color": f"@{name}"},
            "error_x": _bars([estimate]) | {"color": f"@{name}"},
            "hovertemplate": f"{name} %{{x:.2%}}<extra></extra>",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": _layout(
            height=120,
            margin={"l": 58, "r": 12, "t": 4, "b": 28},
            xaxis=_axis(tickformat=".1~%", nticks=4, tickangle=0, zeroline=False),
            yaxis=_axis(range=[1.6, -0.6], showgrid=False),
        ),
    }


def lifts(rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> Figure:
    """Relative lifts with intervals: rows of (measure, judged by, estimate), one colour a judge."""
    judges = list(dict.fromkeys(judge for _, judge, _ in rows))
    measures = list(dict.fromkeys(measure for measure, _, _ in rows))
    traces = []
    for rank, judge in enumerate(judges):
        own = [(measure, estimate) for measure, by, estimate in rows if by == judge]
        colour = "@aligned" if rank == 0 else "@muted"
        shift = 0.0 if len(judges) == 1 else 0.15 - 0.3 * rank
        traces.append({
            "type": "scatter", "mode": "markers", "name": judge,
            "x": [estimate["mean"] for _, estimate in own],
            "y": [len(measures) - 1 - measures.index(measure) + shift for measure, _ in own],
            "marker": {"size": 12 if rank == 0 else 9, "color": colour, "symbol": "circle" if rank == 0 else "diamond"},
            "error_x": _bars([estimate for _, estimate in own]) | {"color": colour},
            "text": [measure for measure, _ in own],
            "hovertemplate": f"%{{text}}, {judge}: %{{x:+.1%}}<extra></extra>",
        })  # fmt: skip
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper",
            "line": {"color": "@muted", "width": 1.5, "dash": "dot"}}  # fmt: skip
    return {
        "data": traces,
        "layout": _layout(
            height=130 + 62 * len(measures),
            margin={"l": 96, "r": 16, "t": 8, "b": 40},
            shapes=[zero],
            showlegend=len(judges) > 1,
            legend=LEGEND,
            xaxis=_axis(tickformat="+.0%", zeroline=False, nticks=6, tickangle=0),
            yaxis=_axis(
                tickvals=list(range(len(measures))), ticktext=measures[::-1], range=[-0.6, len(measures) - 0.4],
                showgrid=False, zeroline=False,
            ),
        ),
    }  # fmt: skip


def curve(spec: Metric, metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """One number over the steps; None when no step has it."""
    points = [(row["step"], row[spec.key]) for row in metrics if row.get(spec.key) is not None and "step" in row]
    if not points:
        return None
    steps, values = [step for step, _ in points], [float(value) for _, value in points]
    form = ".2%" if spec.percent else ".4~r"
    smooth = len(values) >= SMOOTH_FROM
    raw = {
        "type": "scatter", "mode": "markers" if smooth else "lines+markers", "x": steps, "y": values,
        "line": {"color": "@aligned", "width": 2}, "opacity": 0.35 if smooth else 1.0,
        "marker": {"color": "@aligned", "size": 4 if smooth else 5},
        "hovertemplate": f"step %{{x}}: %{{y:{form}}}<extra></extra>",
    }  # fmt: skip
    traces = [raw]
    if smooth:
        traces.append({
            "type": "scatter", "mode": "lines", "x": steps, "y": running_mean(values), "hoverinfo": "skip",
            "line": {"color": "@aligned", "width": 2.5},
        })  # fmt: skip
    return {
        "data": traces,
        "layout": _layout(
            height=190,
            xaxis=_axis(title={"text": "step", "standoff": 4, "font": {"size": 12}}, **_whole(steps), zeroline=False),
            yaxis=_axis(**_reach(values, percent=spec.percent), nticks=5, zeroline=False, exponentformat="power"),
        ),
    }


def _whole(steps: Sequence[float]) -> dict[str, Any]:
    """Marks on a horizontal axis of steps: whole numbers, also where there are only a few."""
    return {"nticks": 6} if max(steps) - min(steps) > 6 else {"dtick": 1}


def _reach(values: Sequence[float], *, percent: bool) -> dict[str, Any]:
    """What a vertical axis shows: shares as percent; a number that never moves gets a range that shows it level."""
    form = {"tickformat": ".2~%"} if percent else {}
    if min(values) == max(values):
        return {**form, "range": [min(0.0, 2 * values[0]), max(0.01 if percent else 1.0, 2 * values[0])]}
    return form


def running_mean(values: Sequence[float], weight: float = 0.1) -> list[float]:
    """Exponential running mean; each new value counts `weight`."""
    means: list[float] = []
    for value in values:
        means.append(value if not means else means[-1] + weight * (value - means[-1]))
    return means


def stages(phases: Mapping[str, float]) -> Figure:
    """When each phase of the job ran: one bar a phase, from its start to its end, in seconds since the job's start."""
    names = [stage_name(name) for name in phases]
    seconds = [float(value) for value in phases.values()]
    starts = list(itertools.accumulate(seconds, initial=0.0))
    return {
        "data": [{
            "type": "bar", "orientation": "h", "x": seconds, "base": starts[:-1], "y": names,
            "marker": {"color": "@aligned"}, "customdata": seconds,
            "hovertemplate": "%{y}: %{customdata:.1f} s<extra></extra>",
        }],
        "layout": _layout(
            height=60 + 30 * len(names),
            margin={"l": 116, "r": 60, "t": 8, "b": 36},
            bargap=0.35,
            annotations=[
                {"x": end, "y": name, "text": duration(value), "showarrow": False, "xanchor": "left", "xshift": 5,
                 "font": {"size": 12}}
                for name, end, value in zip(names, starts[1:], seconds, strict=True)
            ],
            xaxis=_axis(title={"text": "seconds since the start", "standoff": 4, "font": {"size": 12}}, nticks=6,
                        zeroline=False, rangemode="tozero"),
            yaxis=_axis(autorange="reversed", showgrid=False),
        ),
    }  # fmt: skip


def stage_name(phase: str) -> str:
    """A phase of the job as people say it."""
    return STAGE_NAMES.get(phase, phase.replace("_", " "))


def timeline(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Seconds of each phase of every step, stacked; None when no step tells them."""
    traces = []
    for (key, name), colour in zip(PHASE_NAMES.items(), PHASE_COLOURS, strict=True):
        points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None and "step" in row]
        if points:
            traces.append({
                "type": "bar", "name": name, "x": [step for step, _ in points], "y": [value for _, value in points],
                "marker": {"color": colour}, "hovertemplate": f"step %{{x}} {name}: %{{y:.1f}} s<extra></extra>",
            })  # fmt: skip
    if not traces:
        return None
    return {
        "data": traces,
        "layout": _layout(
            height=300,
            barmode="stack",
            bargap=0.2,
            showlegend=True,
            legend=LEGEND,
            xaxis=_axis(title={"text": "step", "standoff": 4, "font": {"size": 12}}, nticks=10),
            yaxis=_axis(title={"text": "seconds", "standoff": 6, "font": {"size": 12}}, nticks=6),
        ),
    }


def pareto(
    metrics: Sequence[Mapping[str, Any]], offline: Mapping[str, Mapping[str, Any]], other: str, names: Sequence[str]
) -> Figure | None:
    """P[Love] against objective `other`: a point a step, and base and aligned on the test prompts with intervals.

    A step that no other step beats in all of `names` is filled. None when neither steps nor `offline` have both.
    """
    rows = [row for row in metrics if all(row.get(name) is not None for name in (*names, "love", other))]
    best = front([[float(row[name]) for name in names] for row in rows])
    traces: list[dict[str, Any]] = []
    if rows:
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": "steps",
            "x": [row[other] for row in rows], "y": [row["love"] for row in rows],
            "text": [f"step {row['step']}" + (", on the front" if top else "")
                     for row, top in zip(rows, best, strict=True)],
            "line": {"color": "@grid", "width": 1},
            "marker": {"size": 7, "color": ["@phase2" if top else "@card" for top in best],
                       "line": {"color": "@phase2", "width": 1.5}},
            "hovertemplate": "%{text}: love %{y:.1%}, " + other + " %{x:.1%}<extra></extra>",
        })  # fmt: skip
    love, beside = offline.get("p_love"), offline.get(other)
    for arm in ("base", "aligned") if love and beside else ():
        y, x = love[arm], beside[arm]  # type: ignore[index]
        traces.append({
            "type": "scatter", "mode": "markers", "name": arm, "x": [x["mean"]], "y": [y["mean"]],
            "error_x": _bars([x]) | {"color": f"@{arm}"}, "error_y": _bars([y]) | {"color": f"@{arm}"},
            "marker": {"size": 13, "color": f"@{arm}", "symbol": "square" if arm == "base" else "circle"},
            "hovertemplate": f"{arm}: love %{{y:.1%}}, {other} %{{x:.1%}}<extra></extra>",
        })  # fmt: skip
    if not traces:
        return None
    small = {"standoff": 6, "font": {"size": 12}}
    return {
        "data": traces,
        "layout": _layout(
            height=330,
            margin={"l": 56, "r": 14, "t": 8, "b": 44},
            showlegend=True,
            legend=LEGEND,
            xaxis=_axis(title={"text": title(other), **small}, tickformat=".1~%", nticks=5, zeroline=False),
            yaxis=_axis(title={"text": "P[Love]", **small}, tickformat=".1~%", nticks=5, zeroline=False),
        ),
    }


def front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points [N][objectives] no other point beats: none is at least as good in all and better in one."""
    return [
        not any(other != one and all(b >= a for a, b in zip(one, other, strict=True)) for other in points)
        for one in points
    ]


def reliability(bins: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted against observed share in `view.reliability_bins`, with intervals; on the diagonal words are true."""
    x = [float(one["predicted"]) for one in bins]
    ends = [float(one[key]) for one in bins for key in ("predicted", "low", "high", "observed")]
    top = min(1.0, 1.05 * max(ends))
    line = {"type": "scatter", "mode": "lines", "x": [0, top], "y": [0, top], "hoverinfo": "skip",
            "line": {"color": "@muted", "width": 1.5, "dash": "dot"}}  # fmt: skip
    points = {
        "type": "scatter", "mode": "markers", "x": x, "y": [float(one["observed"]) for one in bins],
        "error_y": _bars([{**one, "mean": one["observed"]} for one in bins]) | {"color": "@aligned", "thickness": 1.5},
        "marker": {"size": 9, "color": "@aligned"}, "customdata": [one.get("n") for one in bins],
        "hovertemplate": "predicted %{x:.1%}, observed %{y:.1%} of %{customdata:,} rows<extra></extra>",
    }  # fmt: skip
    small = {"standoff": 6, "font": {"size": 12}}
    return {
        "data": [line, points],
        "layout": _layout(
            height=270,
            margin={"l": 56, "r": 14, "t": 8, "b": 44},
            xaxis=_axis(title={"text": "predicted", **small}, tickformat=".1~%", range=[0, top], nticks=5),
            yaxis=_axis(title={"text": "observed", **small}, tickformat=".1~%", range=[0, top], nticks=5),
        ),
    }


def funnel(counts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Rows kept, dropped and quarantined of each kind of data, as shares of the rows that came in."""
    kinds = [kind for kind, count in counts.items() if count.get("in")]
    traces = []
    for part, colour in (("kept", "@aligned"), ("dropped", "@base"), ("quarantined", "@warn")):
        rows = [total(counts[kind].get(part, 0)) for kind in kinds]
        traces.append({
            "type": "bar", "orientation": "h", "name": part, "y": kinds,
            "x": [row / counts[kind]["in"] for row, kind in zip(rows, kinds, strict=True)],
            "customdata": rows, "marker": {"color": colour},
            "hovertemplate": f"%{{y}}: %{{customdata:,}} {part} (%{{x:.1%}})<extra></extra>",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": _layout(
            height=110 + 36 * len(kinds),
            margin={"l": 96, "r": 16, "t": 8, "b": 32},
            barmode="stack",
            bargap=0.4,
            showlegend=True,
            legend=LEGEND,
            xaxis=_axis(tickformat=".0%", range=[0, 1], nticks=6, zeroline=False),
            yaxis=_axis(autorange="reversed", showgrid=False),
        ),
    }


def total(count: int | Mapping[str, int]) -> int:
    """Rows of one part of the funnel, which may be split by reason."""
    return sum(count.values()) if isinstance(count, Mapping) else int(count)


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 2 min 5 s, 1 h 3 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
