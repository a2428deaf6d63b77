"""data_card.html: the data card as one self-contained page with plots, in the style of the run report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rluf.prepare.row_samples import sample_training_rows
from rluf.report.figures import build_axis, build_error_bars, build_funnel_figure, build_layout
from rluf.report.page import render_html_page

CARD_PAGE_NAME = "data_card.html"

_MAX_PLOT_LEVELS = 20
"""Topics, versions or locales per plot."""

PlotlyFigure = dict[str, Any]


def write_card_page(card: Mapping[str, Any], folder: Path) -> Path:
    """Write the page of a card to `folder` and return its path. It needs no network and no other file."""
    context = {"package": "rluf.prepare", "figures": build_figures(card), **build_page_context(card)}
    # From the files, not from the card: after an erasure the page has no row of the user.
    samples = sample_training_rows(folder, card)
    context["samples"] = [(s.output_name, s.source, s.label, s.prompt, s.response) for s in samples]
    page = render_html_page("card.html.j2", **context)
    path = folder / CARD_PAGE_NAME
    path.write_text(page, encoding="utf-8")
    return path


def format_percent(value: float) -> str:
    """A share as a percentage with two or three significant digits."""
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"


def _format_interval(rate: Mapping[str, float]) -> str:
    return f"{format_percent(rate['mean'])} ({format_percent(rate['low'])} to {format_percent(rate['high'])})"


def build_page_context(card: Mapping[str, Any]) -> dict[str, Any]:
    """Texts and table rows of the page, by name in the template."""
    love = card.get("love") or {}
    counts = card["counts"]
    rows_in = sum(kind_counts["in"] for kind_counts in counts.values())
    rows_kept = sum(kind_counts["kept"] for kind_counts in counts.values())
    facts = [("Rows in", f"{rows_in:,}"), ("Rows kept", f"{rows_kept:,}"), ("Created", card["created"])]
    if love:
        facts[2:2] = [("Users", f"{love['users']:,}"), ("Love rate", _format_interval(love["base_rate"]))]
    return {
        "headline": f"{rows_kept:,} of {rows_in:,} rows became training data", "facts": facts,
        "funnel": build_funnel_rows(counts),
        "splits": [
            (name, split, f"{entry['rows']:,}", _format_unit_count(entry))
            for name, splits in card["splits"].items()
            for split, entry in splits.items()
        ],
        "rules": _build_abuse_rule_rows(love), "trusted": format_percent(love["base_rate_trusted"]) if love else "",
        "sampling": _describe_sampling(love),
        "times": [(split, *(time_range or ("", ""))) for split, time_range in love["time"].items()] if love else [],
        "time_note": _describe_time_split(love), "redacted": sorted(card.get("redacted", {}).items()),
        "user_ids": card.get("user_ids", ""), "forgotten": len(card.get("forgotten", [])),
        "drift": _build_drift_rows(card.get("drift") or {}),
        "scripts": [
            (name, script, f"{rows:,}", format_percent(rows / sum(scripts.values())))
            for name, scripts in card.get("scripts", {}).items()
            for script, rows in scripts.items()
        ],
        "duplicates": [
            (f"data.{kind}", *(f"{counts.get(name, 0):,}" for name in ("exact", "near", "contradictory")))
            for kind, counts in card.get("duplicates", {}).items()
        ],
        "sources": [
            (source["kind"], source["file"], source["reader"] or "", f"{source['rows']:,}")
            for source in card["sources"]
        ],
        "settings": json.dumps(card["settings"], indent=2), "warnings": card.get("warnings", []),
        **_build_entry_rows(card.get("entries", [])),
    }  # fmt: skip


def _build_entry_rows(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, ...]]]:
    """Table rows of reactions, paths and notes of each entry of data.*."""
    rows: dict[str, list[tuple[str, ...]]] = {"reactions": [], "paths": [], "notes": []}
    for entry in entries:
        name = f"{entry['kind']} ({entry['path']})"
        rows["reactions"] += [(name, item["name"], item["label"], f"{item['rows']:,}") for item in entry["reactions"]]
        rows["paths"] += [
            (name, field, item["path"], format_percent(item["share"])) for field, item in entry["paths"].items()
        ]
        rows["notes"] += [(name, note, f"{count:,}") for note, count in entry["notes"].items()]
    return rows


def _format_unit_count(split_entry: Mapping[str, int]) -> str:
    """Users (love) or prompt groups of a split; empty for prompts, which have neither."""
    unit_count = split_entry.get("users", split_entry.get("groups"))
    return "" if unit_count is None else f"{unit_count:,}"


def build_funnel_rows(
    counts: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, str, str, str, str, list[tuple[str, str]]]]:
    """Kind, in, kept, dropped, quarantined, and every reason with its rows."""
    rows = []
    for kind, kind_counts in counts.items():
        dropped, quarantined = kind_counts["dropped"], kind_counts["quarantined"]
        reasons = [(f"dropped: {reason}", f"{count:,}") for reason, count in dropped.items()]
        reasons += [(f"quarantined: {reason}", f"{count:,}") for reason, count in quarantined.items()]
        totals = (kind_counts["in"], kind_counts["kept"], sum(dropped.values()), sum(quarantined.values()))
        rows.append((kind, *(f"{total:,}" for total in totals), reasons))
    return rows  # type: ignore[return-value]


def _build_abuse_rule_rows(love: Mapping[str, Any]) -> list[tuple[str, ...]]:
    from rluf.prepare.abuse import ABUSE_RULES

    return [
        (
            name,
            " ".join((ABUSE_RULES[name].__doc__ or "").split()),
            f"{rule['rows']:,}",
            f"{rule['users']:,}",
            f"{rule['weight_taken']:,.1f}",
            f"{rule['loved_weight_taken']:,.1f}",
        )
        for name, rule in love.get("abuse", {}).items()
    ]


def _describe_sampling(love: Mapping[str, Any]) -> str:
    if not love:
        return ""
    sampling = love["sampling"]
    loved, unloved = sampling["loved"], sampling["unloved"]
    return (
        f"Of the training rows, {loved['kept']:,} of {loved['rows']:,} loved and {unloved['kept']:,} of "
        f"{unloved['rows']:,} unloved ones were sampled, so {sampling['train_share']:.0%} are loved; an unloved row "
        f"weighs {sampling['factor']:.2f} times a loved one, which restores the natural rate."
    )


def _describe_time_split(love: Mapping[str, Any]) -> str:
    if not love:
        return ""
    if love["test_later_than_train"]:
        return "Every test row is later than every training row."
    return "Splits share no user but overlap in time (prepare.split=strict makes test later than train)."


def _build_drift_rows(drift: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not drift:
        return []
    previous_rate, current_rate = drift["base_rate"]
    rows = [
        ("previous data set created", f"{drift['created']}"),
        ("previous love rate", _format_interval(previous_rate)),
        ("current love rate", _format_interval(current_rate)),
        ("intervals", "disjoint" if drift["base_rate_differs"] else "overlap"),
    ]
    for name in ("topic", "locale", "model"):
        if f"{name}_psi" in drift:
            psi = drift[f"{name}_psi"]
            # Usual thresholds of the population stability index.
            note = "large shift: investigate" if psi > 0.2 else "moderate shift" if psi > 0.1 else "stable"
            rows.append((f"population stability index by {name}", f"{psi:.3f}, {note}"))
    return rows


def build_figures(card: Mapping[str, Any]) -> dict[str, PlotlyFigure]:
    """Every plot of the page by its id."""
    figures = {"funnel": build_funnel_figure(card["counts"])}
    love = card.get("love")
    if love:
        overall_rate = love["base_rate"]["mean"]
        for name in ("model", "topic", "locale"):
            rates = list(love[f"base_rate_by_{name}"].items())[:_MAX_PLOT_LEVELS]
            if rates:
                figures[f"by_{name}"] = build_rate_figure(rates, overall_rate)
        if len(love["base_rate_by_day"]) > 1:
            figures["by_day"] = _build_day_figure(love["base_rate_by_day"])
        weight_by_rule = {name: rule["weight_taken"] for name, rule in love["abuse"].items()}
        if any(weight_by_rule.values()):
            figures["abuse"] = _build_abuse_figure(weight_by_rule)
    return figures


def _build_rate_layout(height: int, **overrides: Any) -> PlotlyFigure:
    # The wide left margin is for the names of topics, versions and rules.
    return build_layout(height=height, margin={"l": 120, "r": 16, "t": 8, "b": 36}) | overrides


def _build_rate_error_bars(rates: Sequence[Mapping[str, float]]) -> PlotlyFigure:
    return build_error_bars(rates) | {"color": "@aligned", "width": 4}


def build_rate_figure(rates: Sequence[tuple[str, Mapping[str, float]]], overall_rate: float) -> PlotlyFigure:
    """Love rate of each level with its interval; the overall rate is a dotted line."""
    names = [name for name, _ in rates]
    dots: PlotlyFigure = {
        "type": "scatter", "mode": "markers", "y": names, "x": [rate["mean"] for _, rate in rates],
        "error_x": _build_rate_error_bars([rate for _, rate in rates]), "marker": {"color": "@aligned", "size": 9},
        "customdata": [rate["rows"] for _, rate in rates],
        "hovertemplate": "%{y}: %{x:.2%} of %{customdata:,} rows<extra></extra>",
    }  # fmt: skip
    line = {"type": "line", "x0": overall_rate, "x1": overall_rate, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"color": "@base", "width": 1, "dash": "dot"}}  # fmt: skip
    return {
        "data": [dots],
        "layout": _build_rate_layout(
            70 + 26 * len(names), shapes=[line],
            xaxis=build_axis(tickformat=".1~%", rangemode="tozero", zeroline=False),
            yaxis=build_axis(autorange="reversed", showgrid=False, type="category", automargin=True),
        ),
    }  # fmt: skip


def _build_day_figure(rates: Mapping[str, Mapping[str, float]]) -> PlotlyFigure:
    dots: PlotlyFigure = {
        "type": "scatter", "mode": "lines+markers", "x": list(rates), "y": [rate["mean"] for rate in rates.values()],
        "error_y": _build_rate_error_bars(list(rates.values())), "marker": {"color": "@aligned", "size": 6},
        "line": {"color": "@aligned", "width": 1}, "customdata": [rate["rows"] for rate in rates.values()],
        "hovertemplate": "%{x}: %{y:.2%} of %{customdata:,} rows<extra></extra>",
    }  # fmt: skip
    return {
        "data": [dots],
        "layout": _build_rate_layout(
            260, margin={"l": 56, "r": 16, "t": 8, "b": 40}, xaxis=build_axis(showgrid=False),
            yaxis=build_axis(tickformat=".1~%", rangemode="tozero"),
        ),
    }  # fmt: skip


def _build_abuse_figure(weight_by_rule: Mapping[str, float]) -> PlotlyFigure:
    return {
        "data": [
            {
                "type": "bar", "orientation": "h", "y": list(weight_by_rule), "x": list(weight_by_rule.values()),
                "marker": {"color": "@warn"}, "hovertemplate": "%{y}: %{x:,.1f} rows of weight<extra></extra>",
            }
        ],
        "layout": _build_rate_layout(
            60 + 26 * len(weight_by_rule), xaxis=build_axis(rangemode="tozero", zeroline=False),
            yaxis=build_axis(autorange="reversed", showgrid=False),
        ),
    }  # fmt: skip
