"""Terminal output of the evaluation commands: aligned plain-text tables and the sentences around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_TABLE_LOOKS = 10
"""Maximum number of looks in a table; of more looks, evenly spaced ones up to the last."""


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


def format_abtest_report(report: Mapping[str, Any]) -> str:
    """Format the report of analyze_experiment()."""
    srm, rows = report["srm"], []
    for metric, result in report["metrics"].items():
        effect, always_valid = result["cuped"] or result["effect"], result["always_valid"] or {}
        lift_limits = f"[{format_percent(effect['lift_low'])}, {format_percent(effect['lift_high'])}]"
        rows.append([
            metric, f"{result['effect']['control']:.4f}", f"{result['effect']['treatment']:.4f}",
            f"{effect['difference']:+.4f}", format_interval(effect["low"], effect["high"]),
            f"{format_percent(effect['lift'])} {lift_limits}",
            format_p_value(result["p"]), format_p_value(result["p_holm"]),
            format_interval(always_valid.get("low"), always_valid.get("high")),
            format_percent(-result["cuped"]["variance_cut"]) if result["cuped"] else "-",
            "yes" if result["significant"] else "no",
        ])  # fmt: skip
    header = ["metric", "control", "treatment", "difference", "interval", "lift", "p", "p (Holm)", "always-valid",
              "CUPED variance", "significant"]  # fmt: skip
    sections = [
        f"{report['control']} ({report['users'][0]} users, {report['responses'][0]} responses) vs "
        f"{report['treatment']} ({report['users'][1]} users, {report['responses'][1]} responses), {report['start']} to "
        f"{report['end']}",
        f"sample ratio: p = {format_p_value(srm['p'])}, " + (
            "matches the planned shares" if srm["ok"] else
            "does NOT match the planned shares: the assignment or the log is broken, do not trust any figure below"),
        f"users in both arms{'' if report['crossed'] else ', excluded'}: {report['crossed_users']}; duplicate rows: "
        f"{report['duplicate_rows']}; pre-period: " + ("yes" if report["pre_period"] else "no, so no CUPED"),
        "",
        format_table(header, rows),
    ]  # fmt: skip
    sections += [_format_looks(metric, looks) for metric, looks in list(report["looks"].items())[:1]]
    if "aa" in report:
        sections.append(_format_aa_check(report["aa"]))
    return "\n".join(sections) + "\n"


def _format_looks(metric: str, looks: Sequence[Mapping[str, Any]]) -> str:
    step = -(-len(looks) // MAX_TABLE_LOOKS)
    # Step backwards from the end, so that the last look is always in the table.
    selected_looks = [*looks[-1::-step]][::-1]
    rows = [
        [
            look["time"],
            str(look["users"]),
            f"{look['difference']:+.4f}",
            format_interval(look["low"], look["high"]),
            format_p_value(look["p"]),
        ]
        for look in selected_looks
    ]
    return f"{metric}, sequential looks (these intervals are valid at all looks together):\n" + format_table(
        ["until", "users", "difference", "always-valid", "p"], rows
    )


def _format_aa_check(aa_report: Mapping[str, Any]) -> str:
    rows = [[metric, f"{rate:.1%}"] for metric, rate in aa_report["false_positives"].items()]
    verdict = f"suspect: {', '.join(aa_report['suspect'])}" if aa_report["suspect"] else "all within the limits"
    return (
        f"A/A: {aa_report['splits']} random splits of {aa_report['users']} control users; limits of a valid test "
        f"{aa_report['low']:.1%} to {aa_report['high']:.1%}: {verdict}\n"
        + format_table(["metric", "false positives"], rows)
    )


def format_plan(plan: Mapping[str, Any]) -> str:
    """Format the result of plan_experiment()."""
    query = plan["question"]
    rows = [
        [name.replace("_", " "), f"{cost['control_users']:,}", f"{cost['treatment_users']:,}", f"{cost['responses']:,}",
         "-" if cost["days"] is None else f"{cost['days']} days, {cost['weeks']} weeks"]
        for name, cost in plan["designs"].items()
    ]  # fmt: skip
    return (
        f"to detect a change from {plan['rates'][0]:.3%} to {plan['rates'][1]:.3%} (lift {query['lift']:+.1%}) with "
        f"power {query['power']:.0%} at alpha {plan['alpha_each']:.3g}, {query['responses']:.1f} responses per user, "
        f"design effect {plan['design_effect']:.2f}, pre-period correlation {query['correlation']:.2f}:\n\n"
        + format_table(["design", "control users", "treatment users", "responses", "duration"], rows)
    )


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
