"""Plotly figures of the report, as plain dictionaries.

Colours are names such as "@aligned": the page replaces them by the colours of its light or dark style, so that one file
suits both. Nothing here draws; plotly.js does, in the reader's browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]

PHASE_COLOURS = ("@phase1", "@phase2", "@phase3", "@phase4", "@phase5", "@phase6")
LEGEND: Figure = {
    "orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "traceorder": "normal",
    "entrywidth": 0, "itemsizing": "constant",
}  # fmt: skip
SMOOTH_FROM = 60
"""Steps from which a curve shows its running mean in front of the raw points."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One number of metrics.jsonl over the steps."""

    key: str
    title: str
    about: str
    percent: bool = False


CURVES = (
    Curve("love", "P[Love]", "mean calibrated score of the step's samples", percent=True),
    Curve("helpfulness", "Helpfulness", "mean calibrated score of the step's samples", percent=True),
    Curve("safety", "Safety", "mean calibrated score of the step's samples", percent=True),
    Curve("reward", "Combined reward", "weighted, standardised on the base policy"),
    Curve("kl", "KL to the base policy", "nats per token"),
    Curve("ratio_mean", "Importance ratio", "learner over engine, mean per token; 1 is no mismatch"),
    Curve("ratio_max", "Largest ratio", "learner over engine, before truncation"),
    Curve("ess", "Effective samples", "share left after importance weighting", percent=True),
    Curve("clip_share", "Clipped tokens", "share of tokens held back by the clip", percent=True),
    Curve("entropy", "Entropy", "nats per token"),
    Curve("grad_norm", "Gradient norm", "before clipping"),
    Curve("response_tokens", "Response length", "mean tokens"),
    Curve("probe", "Publish probe", "mean log-probability gap between learner and engine, nats per token"),
)

PHASES = (
    ("generate_s", "generate"),
    ("score_s", "score"),
    ("learn_s", "learn"),
    ("publish_s", "publish"),
    ("idle_s", "idle"),
)


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


def curve(spec: Curve, metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
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
            xaxis=_axis(title={"text": "step", "standoff": 4, "font": {"size": 12}}, nticks=6, zeroline=False),
            yaxis=_axis(**({"tickformat": ".2~%"} if spec.percent else {}), nticks=5, zeroline=False),
        ),
    }


def running_mean(values: Sequence[float], weight: float = 0.1) -> list[float]:
    """Exponential running mean; each new value counts `weight`."""
    means: list[float] = []
    for value in values:
        means.append(value if not means else means[-1] + weight * (value - means[-1]))
    return means


def stages(phases: Mapping[str, float]) -> Figure:
    """Seconds of each phase of the job, as one bar a phase in the order they ran."""
    names, seconds = list(phases), [float(value) for value in phases.values()]
    return {
        "data": [{
            "type": "bar", "orientation": "h", "x": seconds, "y": names, "marker": {"color": "@aligned"},
            "text": [duration(value) for value in seconds], "textposition": "auto", "cliponaxis": False,
            "insidetextfont": {"color": "@paper"}, "outsidetextfont": {"color": "@muted"},
            "hovertemplate": "%{y}: %{x:.1f} s<extra></extra>",
        }],
        "layout": _layout(
            height=60 + 34 * len(names),
            margin={"l": 96, "r": 40, "t": 8, "b": 36},
            bargap=0.35,
            xaxis=_axis(title={"text": "seconds", "standoff": 4, "font": {"size": 12}}, nticks=6, zeroline=False),
            yaxis=_axis(autorange="reversed", showgrid=False),
        ),
    }  # fmt: skip


def timeline(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Seconds of each phase of every step, stacked; None when no step tells them."""
    traces = []
    for (key, name), colour in zip(PHASES, PHASE_COLOURS, strict=False):
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
