"""Terminal output of the evaluation commands: aligned plain-text tables and the sentences around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format columns two spaces apart, the first aligned left and the others right; ends with a line break."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    formatted = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        formatted.append("  ".join(cells).rstrip())
    formatted.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(formatted) + "\n"


def format_percent(value: float | None, digits: int = 1) -> str:
    """Format a share or lift as a signed percentage; None and nan become a dash."""
    # value != value is true for nan only.
    return "-" if value is None or value != value else f"{value:+.{digits}%}"


def format_p_value(p_value: float) -> str:
    """Format a p-value with three digits, or as <0.001."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def format_interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """Format [low, high]; None becomes a dash."""
    return "-" if low is None or high is None else f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def format_correlation_report(report: Mapping[str, Any]) -> str:
    """Format the report of correlate_policies()."""
    rows = []
    for name, group in report["groups"].items():
        cells = [name.replace("_", " "), str(group["policies"])]
        for measure, key in (("pearson", "r"), ("disattenuated", "r"), ("spearman", "rho")):
            estimate = group[measure]
            cells.append(
                f"{estimate[key]:.2f} {format_interval(estimate['low'], estimate['high'], 2)}" if estimate else "-"
            )
        leave_one_out = group["leave_one_out"]
        cells.append(f"{leave_one_out['low']:.2f} to {leave_one_out['high']:.2f}" if leave_one_out else "-")
        cells.append(_format_share(group["sign_agreement"]))
        lift_range = group["range_of_lifts"]
        cells.append(f"{format_percent(lift_range[0])} to {format_percent(lift_range[1])}" if lift_range else "-")
        rows.append(cells)
    header = ["policies", "n", "Pearson", "disattenuated", "Spearman", "leave one out", "same sign", "lifts"]
    gate_rows = [
        [name.replace("_", " "), _format_share(gate["recall_of_regressions"]), _format_share(gate["false_blocks"]),
         str(gate["unclear"])]
        for name, gate in report["gate"].items()
    ]  # fmt: skip
    verdict = report["verdict"]
    return (
        f"{format_table(header, rows)}\n"
        + format_table(
            ["gate blocks when offline is", "regressions blocked", "others blocked", "lift unclear"], gate_rows
        )
        + f"\n{'passes' if verdict['passed'] else 'does not pass'}: {verdict['rule']}\n\n"
    )


def _format_share(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "none"
    return f"{share['hits']} of {share['of']} [{share['low']:.0%}, {share['high']:.0%}]"
