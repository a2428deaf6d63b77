"""Terminal output of the A/B test command: the header, the verdicts, tables of effects, looks, segments and plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rluf.evaluate.ab_design import USER_LEVEL_METRICS
from rluf.evaluate.sequential import MIN_LOOK_EVENTS
from rluf.evaluate.tables import format_interval, format_p_value, format_percent, format_table
from rluf.evaluate.verdicts import UNDECIDED

MAX_TABLE_LOOKS = 10
"""Maximum number of looks in a table; of more looks, evenly spaced ones up to the last."""
MAX_LISTED_NAMES = 8


def format_abtest_report(report: Mapping[str, Any]) -> str:
    """Format the report of analyze_experiment()."""
    sections = [_format_header(report), ""]
    for treatment, comparison in report["comparisons"].items():
        metrics = comparison["metrics"]
        if len(report["comparisons"]) > 1:
            sections.append(f"{treatment} against {report['control']}:")
        sections += [_format_verdicts(metrics, report["alpha"]), _format_effects(metrics)]
        if comparison["looks"]:
            metric = next((name for name in report["primary"] if name in comparison["looks"]), "")
            metric = metric or next(iter(comparison["looks"]))
            sections.append(_format_looks(metric, comparison["looks"][metric]))
        for segment, by_metric in comparison.get("segments", {}).items():
            sections += [_format_segment(segment, metric, result) for metric, result in by_metric.items()]
    if "aa" in report:
        sections.append(_format_aa_check(report["aa"]))
    return "\n".join(sections) + "\n"


def _format_header(report: Mapping[str, Any]) -> str:
    srm = report["srm"]
    arms = " vs ".join(
        f"{name} ({users} users, {responses} responses)"
        for name, users, responses in zip(report["arms"], report["users"], report["responses"], strict=True)
    )
    dropped = [
        f"{report['duplicate_rows']} duplicates", f"{report['missing_user_responses']} without a user id",
        f"{report['crossed_responses']} of {report['crossed_users']} users in several arms",
        f"{report['other_responses']} of other arms"
        + (f" ({', '.join(report['other_arms'][:MAX_LISTED_NAMES])})" if report["other_responses"] else ""),
    ]  # fmt: skip
    lines = [
        f"{arms}, {report['start']} to {report['end']}",
        f"sample ratio: p = {format_p_value(srm['p'])}, " + (
            "matches the planned shares" if srm["ok"] else
            "does NOT match the planned shares: the assignment or the log is broken, do not trust any figure below"),
        f"responses dropped: {', '.join(dropped)}",
        f"users in several arms{'' if report['crossed'] else ', excluded'}: {report['crossed_users']}; pre-period: "
        + ("yes" if report["pre_period"] else "no, so no CUPED"),
        _format_reactions(report),
        *(f"note: {note}" for note in report["notes"]),
    ]  # fmt: skip
    return "\n".join(line for line in lines if line)


def _format_reactions(report: Mapping[str, Any]) -> str:
    if not report["reactions"]:
        return "reactions: the log has no column reaction, so love is not measured"
    spellings = ", ".join(f"{name!r} ({count})" for name, count in report["love_spellings"].items())
    others = [f"{name!r} ({count})" for name, count in report["reactions"].items() if name != "love" and count]
    rest = len(others) - MAX_LISTED_NAMES
    return (
        f"reactions: love is {spellings or 'given by no response'}"
        + (f"; not love: {', '.join(others[:MAX_LISTED_NAMES])}" if others else "")
        + (f" and {rest} more" if rest > 0 else "")
    )


def _format_verdicts(metrics: Mapping[str, Any], alpha: float) -> str:
    """One line for each primary metric and guardrail."""
    lines = []
    for name, result in metrics.items():
        effect = result["cuped"] or result["effect"]
        if "primary" in result:
            lines.append(
                f"{name}: {_format_verdict(result['primary'])} (primary, lift {_format_metric_lift(effect)}, "
                f"p {format_p_value(result['p_holm'])})"
            )
        if "guardrail" in result:
            guard = result["guardrail"]
            margin = format_percent(guard["margin"]) if guard["is_relative"] else f"{guard['margin']:+g}"
            limits = (
                f"[{format_percent(guard['low'])}, {format_percent(guard['high'])}]" if guard["is_relative"]
                else format_interval(guard["low"], guard["high"])
            )  # fmt: skip
            lines.append(
                f"{name}: {_format_verdict(guard)} (guardrail, margin {margin}, {1.0 - alpha:.0%} interval {limits}, p "
                f"of harm beyond the margin {format_p_value(guard['p'])}; passes below {alpha / 2.0:.3g})"
            )
    return "\n".join(lines) + "\n"


def _format_verdict(judged: Mapping[str, Any]) -> str:
    if judged["verdict"] != UNDECIDED:
        return str(judged["verdict"])
    if judged["more_users"] is None:
        return "undecided; there are too few events to say how many more users are needed"
    return f"undecided, about {judged['more_users']:,} more users needed" if judged["more_users"] else (
        "undecided, though there are enough users for an effect of the planned size"
    )  # fmt: skip


def _format_metric_lift(effect: Mapping[str, Any]) -> str:
    limits = f"[{format_percent(effect['lift_low'])}, {format_percent(effect['lift_high'])}]"
    return f"{format_percent(effect['lift'])} {limits}"


def _format_effects(metrics: Mapping[str, Any]) -> str:
    rows = []
    for metric, result in metrics.items():
        effect, always_valid = result["cuped"] or result["effect"], result["always_valid"]
        events = result["expected_events"]
        is_rare = (
            always_valid is None and events is not None and events < MIN_LOOK_EVENTS
            and metric not in USER_LEVEL_METRICS
        )  # fmt: skip
        rows.append([
            metric, result["role"], f"{result['effect']['control']:.4f}", f"{result['effect']['treatment']:.4f}",
            f"{effect['difference']:+.4f}", format_interval(effect["low"], effect["high"]), _format_metric_lift(effect),
            format_p_value(result["p"]), format_p_value(result["p_holm"]),
            "too few events" if is_rare else
            format_interval(always_valid["low"], always_valid["high"]) if always_valid else "-",
            format_percent(-result["cuped"]["variance_cut"]) if result["cuped"] else "-",
            ("higher" if effect["difference"] > 0 else "lower") if result["significant"] else "undecided",
        ])  # fmt: skip
    header = ["metric", "role", "control", "treatment", "difference", "interval", "lift", "p", "p (Holm)",
              "always-valid", "CUPED variance", "differs"]  # fmt: skip
    return format_table(header, rows)


def _format_segment(segment: str, metric: str, result: Mapping[str, Any]) -> str:
    rows = [
        [str(group["group"]), f"{group['users'][0]}, {group['users'][1]}", f"{group['control']:.4f}",
         f"{group['difference']:+.4f}", f"{group['shrunken']:+.4f}", format_interval(group["low"], group["high"])]
        for group in result["groups"]
    ]  # fmt: skip
    worst = result["worst"]
    return (
        f"{metric} by {segment}: spread of the effects {result['between_sd']:.4f} (p {format_p_value(result['p'])}); "
        f"worst group {worst['group']}, at least {worst['limit']:+.4f}; {result['too_small']} groups are too small\n"
        + format_table([segment, "users", "control", "difference", "shrunken", "interval"], rows)
    )


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
        f"A/A: {aa_report['splits']} random splits of the control into {aa_report['users'][0]} and "
        f"{aa_report['users'][1]} users; limits of a valid test "
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
        f"power {query['power']:.0%} at alpha {plan['alpha_each']:.3g}, {query['responses']:.1f} responses per user "
        f"(coefficient of variation {query['activity_cv']:.2f}), "
        f"design effect {plan['design_effect']:.2f}, pre-period correlation {query['correlation']:.2f}:\n\n"
        + format_table(["design", "control users", "treatment users", "responses", "duration"], rows)
    )
