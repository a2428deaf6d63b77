"""Writes data_card.html: the data card as one self-contained page with plots, in the style of the run report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rluf

PAGE = "data_card.html"

_LEVELS = 20
"""Levels of a topic, version or locale that a plot shows."""

Figure = dict[str, Any]


def write_page(card: Mapping[str, Any], folder: Path) -> Path:
    """Write the page of a card into `folder` and return its path. It needs no network and no other file."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    loader = ChoiceLoader([PackageLoader("rluf.prepare", ""), PackageLoader("rluf.report", "")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    path = folder / PAGE
    path.write_text(
        environment.get_template("card.html.j2").render(
            **story(card), figures=figures(card), plotly_js=get_plotlyjs(), rluf_version=rluf.__version__
        ),
        encoding="utf-8",
    )
    return path


def percent(value: float) -> str:
    """A share as a percentage with two digits that count."""
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def _interval(rate: Mapping[str, float]) -> str:
    return f"{percent(rate['mean'])} ({percent(rate['low'])} to {percent(rate['high'])})"


def story(card: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says in words and tables."""
    love = card.get("love") or {}
    counts = card["counts"]
    total = sum(count["in"] for count in counts.values())
    kept = sum(count["kept"] for count in counts.values())
    facts = [("Rows in", f"{total:,}"), ("Rows kept", f"{kept:,}"), ("Made", card["created"])]
    if love:
        facts[2:2] = [("Users", f"{love['users']:,}"), ("Love rate", _interval(love["base_rate"]))]
    return {
        "headline": f"{kept:,} of {total:,} rows became training data",
        "facts": facts,
        "funnel": funnel_rows(counts),
        "splits": [
            (name, side, f"{part['rows']:,}", f"{part.get('users', part.get('groups', '')):,}" if len(part) > 1 else "")
            for name, sides in card["splits"].items()
            for side, part in sides.items()
        ],
        "rules": _rule_rows(love),
        "trusted": percent(love["base_rate_trusted"]) if love else "",
        "sampling": _sampling(love),
        "times": [(side, *(span or ("", ""))) for side, span in love["time"].items()] if love else [],
        "time_note": _time_note(love),
        "redacted": sorted(card.get("redacted", {}).items()),
        "user_ids": card.get("user_ids", ""),
        "forgotten": len(card.get("forgotten", [])),
        "drift": _drift_rows(card.get("drift") or {}),
        "sources": [(s["kind"], s["file"], s["reader"] or "", f"{s['rows']:,}") for s in card["sources"]],
        "settings": json.dumps(card["settings"], indent=2),
    }


def funnel_rows(counts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, str, str, list[tuple[str, str]]]]:
    """Kind, in, kept, dropped, quarantined, and every reason with its rows."""
    rows = []
    for kind, count in counts.items():
        dropped, bad = count["dropped"], count["quarantined"]
        reasons = [(f"dropped: {reason}", f"{rows_:,}") for reason, rows_ in dropped.items()]
        reasons += [(f"quarantined: {reason}", f"{rows_:,}") for reason, rows_ in bad.items()]
        numbers = (count["in"], count["kept"], sum(dropped.values()), sum(bad.values()))
        rows.append((kind, *(f"{number:,}" for number in numbers), reasons))
    return rows  # type: ignore[return-value]


def _rule_rows(love: Mapping[str, Any]) -> list[tuple[str, ...]]:
    from rluf.prepare.abuse import RULES

    return [
        (name, " ".join((RULES[name].__doc__ or "").split()), f"{rule['rows']:,}", f"{rule['users']:,}",
         f"{rule['weight_taken']:,.1f}", f"{rule['loved_weight_taken']:,.1f}")
        for name, rule in love.get("abuse", {}).items()
    ]  # fmt: skip


def _sampling(love: Mapping[str, Any]) -> str:
    if not love:
        return ""
    found = love["sampling"]
    return (
        f"Of the training rows {found['loved']['kept']:,} of {found['loved']['rows']:,} loved and "
        f"{found['unloved']['kept']:,} of {found['unloved']['rows']:,} unloved ones were kept, so "
        f"{found['train_share']:.0%} are loved; an unloved row weighs {found['factor']:.2f} times a loved one, which "
        "gives the natural rate back."
    )


def _time_note(love: Mapping[str, Any]) -> str:
    if not love:
        return ""
    if love["test_later_than_train"]:
        return "Every test row is later than every training row."
    return "Users are apart, times overlap (prepare.split=strict keeps test later than train)."


def _drift_rows(change: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not change:
        return []
    before, now = change["base_rate"]
    rows = [
        ("made", f"{change['created']}"),
        ("love rate before", _interval(before)),
        ("love rate now", _interval(now)),
        ("intervals", "apart" if change["base_rate_differs"] else "overlap"),
    ]
    for name in ("topic", "locale", "model"):
        if f"{name}_psi" in change:
            value = change[f"{name}_psi"]
            note = "a shift worth a look" if value > 0.2 else "some shift" if value > 0.1 else "steady"
            rows.append((f"population stability index by {name}", f"{value:.3f}, {note}"))
    return rows


def figures(card: Mapping[str, Any]) -> dict[str, Figure]:
    """Every plot of the page by its id."""
    from rluf.report.figures import funnel

    found = {"funnel": funnel(card["counts"])}
    love = card.get("love")
    if love:
        for name in ("model", "topic", "locale"):
            rates = love[f"base_rate_by_{name}"]
            if rates:
                found[f"by_{name}"] = rate_figure(list(rates.items())[:_LEVELS], love["base_rate"]["mean"])
        if len(love["base_rate_by_day"]) > 1:
            found["by_day"] = _day_figure(love["base_rate_by_day"])
        taken = {name: rule["weight_taken"] for name, rule in love["abuse"].items()}
        if any(taken.values()):
            found["taken"] = _taken_figure(taken)
    return found


def _layout(height: int, **more: Any) -> Figure:
    return {
        "height": height, "margin": {"l": 120, "r": 16, "t": 8, "b": 36}, "paper_bgcolor": "@clear",
        "plot_bgcolor": "@clear", "font": {"family": "@font", "size": 13, "color": "@muted"}, "showlegend": False,
        **more,
    }  # fmt: skip


def _axis(**more: Any) -> Figure:
    return {"gridcolor": "@grid", "zerolinecolor": "@grid", "linecolor": "@grid", "fixedrange": True, **more}


def _bars(rates: Sequence[Mapping[str, float]]) -> Figure:
    return {
        "type": "data", "symmetric": False, "array": [rate["high"] - rate["mean"] for rate in rates],
        "arrayminus": [rate["mean"] - rate["low"] for rate in rates], "color": "@aligned", "thickness": 2, "width": 4,
    }  # fmt: skip


def rate_figure(rates: Sequence[tuple[str, Mapping[str, float]]], mean: float) -> Figure:
    """Love rate of each level with its interval, and the rate of all as a dotted line."""
    names = [name for name, _ in rates]
    dots: Figure = {
        "type": "scatter", "mode": "markers", "y": names, "x": [rate["mean"] for _, rate in rates],
        "error_x": _bars([rate for _, rate in rates]), "marker": {"color": "@aligned", "size": 9},
        "customdata": [rate["rows"] for _, rate in rates],
        "hovertemplate": "%{y}: %{x:.2%} of %{customdata:,} rows<extra></extra>",
    }  # fmt: skip
    line = {"type": "line", "x0": mean, "x1": mean, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"color": "@base", "width": 1, "dash": "dot"}}  # fmt: skip
    return {
        "data": [dots],
        "layout": _layout(
            70 + 26 * len(names), shapes=[line], xaxis=_axis(tickformat=".1~%", rangemode="tozero", zeroline=False),
            yaxis=_axis(autorange="reversed", showgrid=False, type="category", automargin=True),
        ),
    }  # fmt: skip


def _day_figure(rates: Mapping[str, Mapping[str, float]]) -> Figure:
    dots: Figure = {
        "type": "scatter", "mode": "lines+markers", "x": list(rates), "y": [rate["mean"] for rate in rates.values()],
        "error_y": _bars(list(rates.values())), "marker": {"color": "@aligned", "size": 6},
        "line": {"color": "@aligned", "width": 1}, "customdata": [rate["rows"] for rate in rates.values()],
        "hovertemplate": "%{x}: %{y:.2%} of %{customdata:,} rows<extra></extra>",
    }  # fmt: skip
    return {
        "data": [dots],
        "layout": _layout(
            260, margin={"l": 56, "r": 16, "t": 8, "b": 40}, xaxis=_axis(showgrid=False),
            yaxis=_axis(tickformat=".1~%", rangemode="tozero"),
        ),
    }  # fmt: skip


def _taken_figure(taken: Mapping[str, float]) -> Figure:
    return {
        "data": [
            {
                "type": "bar", "orientation": "h", "y": list(taken), "x": list(taken.values()),
                "marker": {"color": "@warn"}, "hovertemplate": "%{y}: %{x:,.1f} rows' weight<extra></extra>",
            }
        ],
        "layout": _layout(
            60 + 26 * len(taken), xaxis=_axis(rangemode="tozero", zeroline=False),
            yaxis=_axis(autorange="reversed", showgrid=False),
        ),
    }  # fmt: skip
