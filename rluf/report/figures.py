"""Plotly figures of reports and cards as plain dictionaries; plotly.js draws them in the reader's browser.

Colors are names such as "@aligned", which the page replaces by the colors of its light or dark style.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rluf.config.objectives import PRIMARY_OBJECTIVE, find_objective_spec
from rluf.tracking.metric_registry import MetricSpec, format_objective_title

Figure = dict[str, Any]

PHASE_COLORS = ("@phase1", "@phase2", "@phase3", "@phase4")
LEGEND_LAYOUT: Figure = {
    "orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "traceorder": "normal",
    "entrywidth": 0, "itemsizing": "constant",
}  # fmt: skip
SMOOTH_FROM_STEPS = 60
"""Number of steps from which a curve shows its running mean in front of the raw points."""
SMOOTHING_WEIGHT = 0.1
"""Weight of a new value in the running mean."""
AXIS_TITLE_STYLE: Figure = {"standoff": 6, "font": {"size": 12}}

STEP_PHASE_TITLES = {"generate_s": "generate", "score_s": "score", "learn_s": "learn", "weight_sync_s": "sync weights"}
JOB_PHASE_TITLES = {
    "model": "convert model", "ray": "start Ray", "prepare": "prepare data", "reward": "reward models",
    "start": "start actors", "evaluate_base": "evaluate base", "evaluate_aligned": "evaluate aligned",
    "train": "train policy", "compare": "compare policies", "save": "save policy", "stop": "stop actors",
}  # fmt: skip
"""Display names of the phases of a job."""


def build_layout(**overrides: Any) -> Figure:
    """Build a figure's layout in the style of the report."""
    return {
        "margin": {"l": 48, "r": 12, "t": 8, "b": 36},
        "paper_bgcolor": "@clear",
        "plot_bgcolor": "@clear",
        "font": {"family": "@font", "size": 13, "color": "@muted"},
        "hoverlabel": {"font": {"family": "@font"}},
        "showlegend": False,
        **overrides,
    }


def build_axis(**overrides: Any) -> Figure:
    """Build an axis in the style of the report. It cannot be zoomed: on a phone that would block scrolling."""
    return {"gridcolor": "@grid", "zerolinecolor": "@grid", "linecolor": "@grid", "fixedrange": True, **overrides}


def build_error_bars(estimates: Sequence[Mapping[str, float]]) -> Figure:
    """Build error bars from the means to both ends of the intervals {mean, low, high}."""
    return {
        "type": "data",
        "symmetric": False,
        # Plotly expects distances from the point, not the ends of the interval.
        "array": [estimate["high"] - estimate["mean"] for estimate in estimates],
        "arrayminus": [estimate["mean"] - estimate["low"] for estimate in estimates],
        "thickness": 2,
        "width": 5,
    }


def build_arms_figure(estimate_by_arm: Mapping[str, Any]) -> Figure:
    """Base and aligned as two points with intervals on one percent axis."""
    traces = []
    for arm in ("base", "aligned"):
        estimate = estimate_by_arm[arm]
        traces.append({
            "type": "scatter", "mode": "markers", "x": [estimate["mean"]], "y": [arm], "name": arm,
            "marker": {"size": 12, "color": f"@{arm}"},
            "error_x": build_error_bars([estimate]) | {"color": f"@{arm}"},
            "hovertemplate": f"{arm} %{{x:.2%}}<extra></extra>",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": build_layout(
            height=120,
            margin={"l": 58, "r": 12, "t": 4, "b": 28},
            xaxis=build_axis(tickformat=".1~%", nticks=4, tickangle=0, zeroline=False),
            # Reversed, so that base is above aligned as in the list below the figure.
            yaxis=build_axis(range=[1.6, -0.6], showgrid=False),
        ),
    }


AXIS_LABELS_SHARE = 0.4
"""Share of the height of a measure in the lifts figure that the labels of its axis take."""


def build_lifts_figure(lift_rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> Figure:
    """Relative lifts with intervals: rows of (measure, judged by, estimate), one color per judge.

    Each measure has an axis of its own: next to a lift of +300%, one of +2% would be a dot on the zero line.
    """
    judge_names = list(dict.fromkeys(judge_name for _, judge_name, _ in lift_rows))
    measure_names = list(dict.fromkeys(measure_name for measure_name, _, _ in lift_rows))
    traces: list[Figure] = []
    axes: dict[str, Figure] = {}
    for measure_index, measure_name in enumerate(measure_names):
        # Plotly names the first axis x, the others x2, x3 ...; the first measure is on top.
        suffix = "" if measure_index == 0 else str(measure_index + 1)
        bottom = 1 - (measure_index + 1) / len(measure_names)
        estimates_by_judge = {judge: estimate for name, judge, estimate in lift_rows if name == measure_name}
        for judge_name, estimate in estimates_by_judge.items():
            judge_index = judge_names.index(judge_name)
            is_first = judge_index == 0
            trace_color = "@aligned" if is_first else "@muted"
            traces.append({
                "type": "scatter", "mode": "markers", "name": judge_name, "legendgroup": judge_name,
                "showlegend": judge_name not in {trace["name"] for trace in traces},
                "x": [estimate["mean"]], "y": [0.15 - 0.3 * judge_index if len(judge_names) > 1 else 0.0],
                "xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "cliponaxis": False,
                "marker": {"size": 12 if is_first else 9, "color": trace_color,
                           "symbol": "circle" if is_first else "diamond"},
                "error_x": build_error_bars([estimate]) | {"color": trace_color},
                "text": [measure_name], "hovertemplate": f"%{{text}}, {judge_name}: %{{x:+.1%}}<extra></extra>",
            })  # fmt: skip
        low, high = _find_lift_range(list(estimates_by_judge.values()))
        axes[f"xaxis{suffix}"] = build_axis(
            range=[low, high], **_choose_lift_ticks(low, high), zeroline=False, tickangle=0, anchor=f"y{suffix}",
        )  # fmt: skip
        axes[f"yaxis{suffix}"] = build_axis(
            tickvals=[0], ticktext=[measure_name], range=[-0.6, 0.6], showgrid=False, zeroline=False,
            domain=[bottom + AXIS_LABELS_SHARE / len(measure_names), bottom + 1 / len(measure_names)],
            anchor=f"x{suffix}",
        )  # fmt: skip
    zero_lines = [
        {"type": "line", "x0": 0, "x1": 0, "y0": -0.6, "y1": 0.6, "xref": trace["xaxis"], "yref": trace["yaxis"],
         "line": {"color": "@muted", "width": 1.5, "dash": "dot"}}
        for trace in {trace["xaxis"]: trace for trace in traces}.values()
    ]  # fmt: skip
    return {
        "data": traces,
        "layout": build_layout(
            height=40 + 92 * len(measure_names),
            margin={"l": 96, "r": 22, "t": 8, "b": 8},
            shapes=zero_lines,
            showlegend=len(judge_names) > 1,
            legend=LEGEND_LAYOUT,
            **axes,
        ),
    }


def _find_lift_range(estimates: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Axis range of one measure's lifts: zero and all intervals, with room for the markers."""
    low = min(0.0, *(estimate["low"] for estimate in estimates))
    high = max(0.0, *(estimate["high"] for estimate in estimates))
    room = 0.08 * max(high - low, 0.01)
    return low - room, high + room


def _choose_lift_ticks(low: float, high: float) -> Figure:
    """At most five round ticks with a sign; Plotly's own format would label zero with +0%."""
    size = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(size))
    distance = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= size)
    ticks = [index * distance for index in range(math.ceil(low / distance), math.floor(high / distance) + 1)]
    return {
        "tickvals": ticks,
        "ticktext": [f"{tick * 100:+.6g}%".replace("-", "−") if tick else "0%" for tick in ticks],
    }


def build_curve_figure(metric_spec: MetricSpec, step_rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """One metric over the steps; None when no step has it."""
    points = [
        (step_row["step"], step_row[metric_spec.key])
        for step_row in step_rows
        if step_row.get(metric_spec.key) is not None and "step" in step_row
    ]
    if not points:
        return None
    steps, metric_values = [step for step, _ in points], [float(value) for _, value in points]
    number_format = ".2%" if metric_spec.is_percent else ".4~r"
    is_smoothed = len(metric_values) >= SMOOTH_FROM_STEPS
    # Raw points stay visible behind the running mean: the mean alone would hide the noise of single steps.
    raw_trace = {
        "type": "scatter", "mode": "markers" if is_smoothed else "lines+markers", "x": steps, "y": metric_values,
        "line": {"color": "@aligned", "width": 2}, "opacity": 0.35 if is_smoothed else 1.0,
        "marker": {"color": "@aligned", "size": 4 if is_smoothed else 5},
        "hovertemplate": f"step %{{x}}: %{{y:{number_format}}}<extra></extra>",
    }  # fmt: skip
    traces = [raw_trace]
    if is_smoothed:
        traces.append({
            "type": "scatter", "mode": "lines", "x": steps, "y": compute_running_mean(metric_values),
            "hoverinfo": "skip", "line": {"color": "@aligned", "width": 2.5},
        })  # fmt: skip
    return {
        "data": traces,
        "layout": build_layout(
            height=190,
            xaxis=build_axis(
                title={"text": "step", "standoff": 4, "font": {"size": 12}},
                **_choose_integer_ticks(steps),
                zeroline=False,
            ),
            yaxis=build_axis(
                **_choose_value_range(metric_values, is_percent=metric_spec.is_percent),
                nticks=5,
                zeroline=False,
                exponentformat="power",
            ),
        ),
    }


def _choose_integer_ticks(steps: Sequence[float]) -> dict[str, Any]:
    """Ticks of a step axis at integers, also for a run of a few steps."""
    # With nticks alone, Plotly labels a run of three steps with 1.5 and 2.5.
    return {"nticks": 6} if max(steps) - min(steps) > 6 else {"dtick": 1}


def _choose_value_range(metric_values: Sequence[float], *, is_percent: bool) -> dict[str, Any]:
    """Tick format and range of a value axis."""
    axis_settings: dict[str, Any] = {"tickformat": ".2~%"} if is_percent else {}
    # Plotly would zoom into the rounding noise of a constant; a range from 0 shows it as a level line.
    if min(metric_values) == max(metric_values):
        axis_settings["range"] = [
            min(0.0, 2 * metric_values[0]),
            max(0.01 if is_percent else 1.0, 2 * metric_values[0]),
        ]
    return axis_settings


def compute_running_mean(values: Sequence[float], new_value_weight: float = SMOOTHING_WEIGHT) -> list[float]:
    """Exponential running mean; `new_value_weight` is that of each new value."""
    means: list[float] = []
    for value in values:
        means.append(value if not means else means[-1] + new_value_weight * (value - means[-1]))
    return means


def build_job_phases_figure(phase_seconds: Mapping[str, float]) -> Figure:
    """Phases of the job as one bar each, from start to end, in seconds since the start of the job."""
    phase_titles = [format_job_phase(name) for name in phase_seconds]
    phase_durations = [float(value) for value in phase_seconds.values()]
    # The phases run one after another, so each starts at the sum of the earlier ones.
    phase_starts = list(itertools.accumulate(phase_durations, initial=0.0))
    return {
        "data": [{
            "type": "bar", "orientation": "h", "x": phase_durations, "base": phase_starts[:-1], "y": phase_titles,
            "marker": {"color": "@aligned"}, "customdata": phase_durations,
            "hovertemplate": "%{y}: %{customdata:.1f} s<extra></extra>",
        }],
        "layout": build_layout(
            height=60 + 30 * len(phase_titles),
            margin={"l": 116, "r": 60, "t": 8, "b": 36},
            bargap=0.35,
            annotations=[
                {"x": end, "y": name, "text": format_duration(value), "showarrow": False, "xanchor": "left",
                 "xshift": 5, "font": {"size": 12}}
                for name, end, value in zip(phase_titles, phase_starts[1:], phase_durations, strict=True)
            ],
            xaxis=build_axis(title={"text": "seconds since the start", "standoff": 4, "font": {"size": 12}}, nticks=4,
                        tickangle=0, zeroline=False, rangemode="tozero"),
            yaxis=build_axis(autorange="reversed", showgrid=False),
        ),
    }  # fmt: skip


def format_job_phase(phase: str) -> str:
    """Display name of a phase of the job."""
    return JOB_PHASE_TITLES.get(phase, phase.replace("_", " "))


def build_step_phases_figure(step_rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Seconds of each phase of every step, stacked; None when no step has them."""
    traces = []
    for (phase_key, phase_title), color in zip(STEP_PHASE_TITLES.items(), PHASE_COLORS, strict=True):
        points = [
            (step_row["step"], step_row[phase_key])
            for step_row in step_rows
            if step_row.get(phase_key) is not None and "step" in step_row
        ]
        if points:
            traces.append({
                "type": "bar", "name": phase_title,
                "x": [step for step, _ in points], "y": [value for _, value in points],
                "marker": {"color": color}, "hovertemplate": f"step %{{x}} {phase_title}: %{{y:.1f}} s<extra></extra>",
            })  # fmt: skip
    if not traces:
        return None
    return {
        "data": traces,
        "layout": build_layout(
            height=300,
            barmode="stack",
            bargap=0.2,
            showlegend=True,
            legend=LEGEND_LAYOUT,
            xaxis=build_axis(title={"text": "step", "standoff": 4, "font": {"size": 12}}, nticks=10),
            yaxis=build_axis(title={"text": "seconds", "standoff": 6, "font": {"size": 12}}, nticks=6),
        ),
    }


def build_pareto_figure(
    step_rows: Sequence[Mapping[str, Any]],
    offline_scores: Mapping[str, Mapping[str, Any]],
    other_objective: str,
    objective_names: Sequence[str],
) -> Figure | None:
    """P[Love] against another objective: one point per step, and base and aligned on the test prompts with intervals.

    Steps that are Pareto optimal in `objective_names` are filled. None when neither the steps nor `offline_scores`
    have both objectives.
    """
    scored_rows = [
        step_row
        for step_row in step_rows
        if all(step_row.get(name) is not None for name in (*objective_names, PRIMARY_OBJECTIVE, other_objective))
    ]
    # Optimal in all objectives of the run, although the plot shows two of them.
    is_optimal = find_pareto_optimal([[float(step_row[name]) for name in objective_names] for step_row in scored_rows])
    traces: list[dict[str, Any]] = []
    if scored_rows:
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": "steps",
            "x": [step_row[other_objective] for step_row in scored_rows],
            "y": [step_row[PRIMARY_OBJECTIVE] for step_row in scored_rows],
            "text": [f"step {step_row['step']}" + (", Pareto optimal" if optimal else "")
                     for step_row, optimal in zip(scored_rows, is_optimal, strict=True)],
            "line": {"color": "@grid", "width": 1},
            "marker": {"size": 7, "color": ["@phase2" if optimal else "@card" for optimal in is_optimal],
                       "line": {"color": "@phase2", "width": 1.5}},
            "hovertemplate": f"%{{text}}: {PRIMARY_OBJECTIVE} %{{y:.1%}}, {other_objective} %{{x:.1%}}<extra></extra>",
        })  # fmt: skip
    # Separate traces: the arms are means over test prompts, the steps over training prompts.
    love_scores, other_scores = (
        offline_scores.get(find_objective_spec(name).offline_key) for name in (PRIMARY_OBJECTIVE, other_objective)
    )
    for arm in ("base", "aligned") if love_scores and other_scores else ():
        y, x = love_scores[arm], other_scores[arm]  # type: ignore[index]
        traces.append({
            "type": "scatter", "mode": "markers", "name": arm, "x": [x["mean"]], "y": [y["mean"]],
            "error_x": build_error_bars([x]) | {"color": f"@{arm}"},
            "error_y": build_error_bars([y]) | {"color": f"@{arm}"},
            "marker": {"size": 13, "color": f"@{arm}", "symbol": "square" if arm == "base" else "circle"},
            "hovertemplate": f"{arm}: {PRIMARY_OBJECTIVE} %{{y:.1%}}, {other_objective} %{{x:.1%}}<extra></extra>",
        })  # fmt: skip
    if not traces:
        return None
    return {
        "data": traces,
        "layout": build_layout(
            height=330,
            margin={"l": 56, "r": 14, "t": 8, "b": 44},
            showlegend=True,
            legend=LEGEND_LAYOUT,
            xaxis=build_axis(
                title={"text": format_objective_title(other_objective), **AXIS_TITLE_STYLE},
                tickformat=".1~%",
                nticks=5,
                zeroline=False,
            ),
            yaxis=build_axis(
                title={"text": format_objective_title(PRIMARY_OBJECTIVE), **AXIS_TITLE_STYLE},
                tickformat=".1~%",
                nticks=5,
                zeroline=False,
            ),
        ),
    }


def find_pareto_optimal(points: Sequence[Sequence[float]]) -> list[bool]:
    """Mask of the Pareto optimal points [N][objectives]: no other is at least as good in all and better in one."""
    # Not rluf.sweep.analysis.is_pareto_optimal: the report is below the sweep in the import layers.
    return [
        not any(other != point and all(b >= a for a, b in zip(point, other, strict=True)) for other in points)
        for point in points
    ]


def build_reliability_figure(bins: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted against observed share of `presentation.read_reliability_bins`, with intervals and the diagonal."""
    predicted_shares = [float(reliability_bin["predicted"]) for reliability_bin in bins]
    # Both axes end at the largest value, not at 1: love rates are a few percent.
    axis_values = [
        float(reliability_bin[key]) for reliability_bin in bins for key in ("predicted", "low", "high", "observed")
    ]
    axis_end = min(1.0, 1.05 * max(axis_values))
    # Room on both sides: a point at 0% or 100% is a whole one.
    axis_range = [-0.04 * axis_end, 1.04 * axis_end]
    diagonal_trace = {"type": "scatter", "mode": "lines", "x": [0, axis_end], "y": [0, axis_end], "hoverinfo": "skip",
                "line": {"color": "@muted", "width": 1.5, "dash": "dot"}}  # fmt: skip
    error_bars = build_error_bars(
        [{**reliability_bin, "mean": reliability_bin["observed"]} for reliability_bin in bins]
    )
    bin_trace = {
        "type": "scatter", "mode": "markers", "x": predicted_shares,
        "y": [float(reliability_bin["observed"]) for reliability_bin in bins],
        "error_y": error_bars | {"color": "@aligned", "thickness": 1.5},
        "marker": {"size": 9, "color": "@aligned"},
        "customdata": [reliability_bin.get("n") for reliability_bin in bins],
        "hovertemplate": "predicted %{x:.1%}, observed %{y:.1%} of %{customdata:,} rows<extra></extra>",
    }  # fmt: skip
    return {
        "data": [diagonal_trace, bin_trace],
        "layout": build_layout(
            height=270,
            margin={"l": 56, "r": 14, "t": 8, "b": 44},
            xaxis=build_axis(
                title={"text": "predicted", **AXIS_TITLE_STYLE}, tickformat=".1~%", range=axis_range, nticks=5
            ),
            yaxis=build_axis(
                title={"text": "observed", **AXIS_TITLE_STYLE}, tickformat=".1~%", range=axis_range, nticks=5
            ),
        ),
    }


def build_funnel_figure(counts_by_kind: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Kept, dropped and quarantined rows of each kind of data, as shares of its input rows."""
    data_kinds = [data_kind for data_kind, counts in counts_by_kind.items() if counts.get("in")]
    # Shares instead of counts: the kinds differ in size by orders of magnitude.
    traces = []
    for outcome, color in (("kept", "@aligned"), ("dropped", "@base"), ("quarantined", "@warn")):
        row_counts = [count_rows(counts_by_kind[data_kind].get(outcome, 0)) for data_kind in data_kinds]
        traces.append({
            "type": "bar", "orientation": "h", "name": outcome, "y": data_kinds,
            "x": [row_count / counts_by_kind[data_kind]["in"]
                  for row_count, data_kind in zip(row_counts, data_kinds, strict=True)],
            "customdata": row_counts, "marker": {"color": color},
            "hovertemplate": f"%{{y}}: %{{customdata:,}} {outcome} (%{{x:.1%}})<extra></extra>",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": build_layout(
            height=110 + 36 * len(data_kinds),
            margin={"l": 96, "r": 28, "t": 8, "b": 32},
            barmode="stack",
            bargap=0.4,
            showlegend=True,
            legend=LEGEND_LAYOUT,
            xaxis=build_axis(tickformat=".0%", range=[0, 1.001], dtick=0.2, zeroline=False),
            yaxis=build_axis(autorange="reversed", showgrid=False),
        ),
    }


def count_rows(outcome_rows: int | Mapping[str, int]) -> int:
    """Sum the rows of one outcome, which may be split by reason."""
    return sum(outcome_rows.values()) if isinstance(outcome_rows, Mapping) else int(outcome_rows)


def format_duration(seconds: float) -> str:
    """Format a duration: 8 s, 2 min 5 s, 1 h 3 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, remaining_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {remaining_seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
