"""What the evaluation commands show on a terminal: plain aligned tables and the sentences around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MANY_LOOKS = 10
"""Looks shown in a table; of more only evenly spaced ones."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first aligned left and the others right; ends in a line break."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        shown.append("  ".join(cells).rstrip())
    shown.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(shown) + "\n"


def percent(value: float | None, digits: int = 1) -> str:
    """A share or lift as a signed percentage; a dash where there is none."""
    return "-" if value is None or value != value else f"{value:+.{digits}%}"


def p_text(p: float) -> str:
    """A p-value with three digits, or as below 0.001."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """[low, high]; a dash where there is none."""
    return "-" if low is None or high is None else f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def abtest_text(found: Mapping[str, Any]) -> str:
    """The A/B report."""
    srm, rows = found["srm"], []
    for name, one in found["metrics"].items():
        best, always = one["cuped"] or one["effect"], one["always_valid"] or {}
        rows.append([
            name, f"{one['effect']['control']:.4f}", f"{one['effect']['treatment']:.4f}",
            f"{best['difference']:+.4f}", interval(best["low"], best["high"]),
            f"{percent(best['lift'])} [{percent(best['lift_low'])}, {percent(best['lift_high'])}]",
            p_text(one["p"]), p_text(one["p_holm"]), interval(always.get("low"), always.get("high")),
            percent(-one["cuped"]["variance_cut"]) if one["cuped"] else "-", "yes" if one["significant"] else "no",
        ])  # fmt: skip
    header = ["metric", "control", "treatment", "difference", "interval", "lift", "p", "p (Holm)", "always-valid",
              "CUPED variance", "differs"]  # fmt: skip
    text = [
        f"{found['control']} ({found['users'][0]} users, {found['responses'][0]} responses) against "
        f"{found['treatment']} ({found['users'][1]} users, {found['responses'][1]} responses), {found['start']} to "
        f"{found['end']}",
        f"sample ratio: p = {p_text(srm['p'])}, " + (
            "as asked for" if srm["ok"] else
            "NOT as asked for: the assignment or the log is broken, and no figure below can be trusted"),
        f"users in both arms{'' if found['crossed'] else ', left out'}: {found['crossed_users']}; duplicate rows: "
        f"{found['duplicate_rows']}; pre-period: " + ("yes" if found["pre_period"] else "no, so no CUPED"),
        "",
        table(header, rows),
    ]  # fmt: skip
    text += [_looks_text(name, looks) for name, looks in list(found["looks"].items())[:1]]
    if "aa" in found:
        text.append(_aa_text(found["aa"]))
    return "\n".join(text) + "\n"


def _looks_text(name: str, looks: Sequence[Mapping[str, Any]]) -> str:
    step = -(-len(looks) // MANY_LOOKS)
    shown = [*looks[-1::-step]][::-1]
    rows = [
        [
            one["time"],
            str(one["users"]),
            f"{one['difference']:+.4f}",
            interval(one["low"], one["high"]),
            p_text(one["p"]),
        ]
        for one in shown
    ]
    return f"{name}, look by look (these intervals hold at all looks at once):\n" + table(
        ["until", "users", "difference", "always-valid", "p"], rows
    )


def _aa_text(found: Mapping[str, Any]) -> str:
    rows = [[name, f"{share:.1%}"] for name, share in found["false_positives"].items()]
    verdict = f"suspect: {', '.join(found['suspect'])}" if found["suspect"] else "all as they should be"
    return (
        f"A/A: {found['splits']} random splits of {found['users']} control users; chance allows {found['low']:.1%} to "
        f"{found['high']:.1%}: {verdict}\n" + table(["metric", "false positives"], rows)
    )


def plan_text(found: Mapping[str, Any]) -> str:
    """The planner's answer."""
    q = found["question"]
    rows = [
        [name.replace("_", " "), f"{one['control_users']:,}", f"{one['treatment_users']:,}", f"{one['responses']:,}",
         "-" if one["days"] is None else f"{one['days']} days, {one['weeks']} weeks"]
        for name, one in found["designs"].items()
    ]  # fmt: skip
    return (
        f"to see {found['rates'][0]:.3%} become {found['rates'][1]:.3%} (lift {q['lift']:+.1%}) with power "
        f"{q['power']:.0%} at alpha {found['alpha_each']:.3g}, {q['responses']:.1f} responses a user, design effect "
        f"{found['design_effect']:.2f}, pre-period correlation {q['correlation']:.2f}:\n\n"
        + table(["design", "control users", "treatment users", "responses", "takes"], rows)
    )


def correlate_text(found: Mapping[str, Any]) -> str:
    """The report of offline against online."""
    rows = []
    for name, one in found["groups"].items():
        cells = [name.replace("_", " "), str(one["policies"])]
        for part, key in (("pearson", "r"), ("disattenuated", "r"), ("spearman", "rho")):
            told = one[part]
            cells.append(f"{told[key]:.2f} {interval(told['low'], told['high'], 2)}" if told else "-")
        left = one["leave_one_out"]
        cells.append(f"{left['low']:.2f} to {left['high']:.2f}" if left else "-")
        cells.append(_share_text(one["sign_agreement"]))
        lifts = one["range_of_lifts"]
        cells.append(f"{percent(lifts[0])} to {percent(lifts[1])}" if lifts else "-")
        rows.append(cells)
    header = ["policies", "n", "Pearson", "without noise", "Spearman", "leave one out", "same sign", "lifts"]
    gates = [
        [name.replace("_", " "), _share_text(one["recall_of_regressions"]), _share_text(one["false_blocks"]),
         str(one["unclear"])]
        for name, one in found["gate"].items()
    ]  # fmt: skip
    verdict = found["verdict"]
    return (
        f"{table(header, rows)}\n"
        + table(["gate blocks when offline is", "regressions blocked", "others blocked", "lift unclear"], gates)
        + f"\n{'holds' if verdict['passed'] else 'does not hold'}: {verdict['rule']}\n\n"
    )


def _share_text(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "none"
    return f"{share['hits']} of {share['of']} [{share['low']:.0%}, {share['high']:.0%}]"
