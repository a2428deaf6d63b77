"""The headline and the verdict of a run in words. They follow the gates and claim nothing that is undecided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rluf.config.objectives import BUILTIN_OBJECTIVES, PRIMARY_OBJECTIVE
from rluf.report.formats import format_change
from rluf.types import ALIGNED_ARM

VERDICT_TITLES = {"pass": "Pass", "undecided": "Undecided", "fail": "Fail"}
MAX_NAMED_ALARMS = 2
"""Alarms up to this number are named in the headline; more would bury the result."""
UNREAD_REASON = "no person has read the responses"
VERDICT_MARKS = {"pass": "✓", "undecided": "?", "fail": "✕"}


def report_headline(summary: Mapping[str, Any]) -> str:
    """Summarize the run in one sentence: verdict, love, the other objectives, control, alarms."""
    gates = read_gates(summary)
    checks = {check["name"]: check for check in gates.get("checks", [])}
    if not checks:
        return "This run has not been evaluated yet."
    has_users = has_user_verdicts(summary)
    # Love that only has to hold is one of the other objectives: its gate decides whether it fell, not zero.
    is_goal = checks.get(PRIMARY_OBJECTIVE, {}).get("gate", "must_rise") == "must_rise"
    love_check = checks.pop(PRIMARY_OBJECTIVE, None) if is_goal else None
    # What speaks against the policy comes first: a gain that a monitor explains is not one.
    labels = list_alarm_labels(gates)
    clauses = [_format_alarm_clause(labels)] if labels else []
    if is_too_truncated(gates):
        clauses.append(f"{gates['truncated_share']:.0%} of the aligned responses are cut at the token limit")
    if blind := summary.get("blind"):
        clauses.append(format_blind_sentence(blind))
    elif is_unread(summary):
        clauses.append(UNREAD_REASON)
    if love_check is not None:
        lift = love_check["lift"]
        has_risen = lift is not None and lift["low"] > 0
        clauses.append(
            _format_love_clause(lift, has_users=has_users) + (_format_control_clause(summary) if has_risen else "")
        )
    clauses += _format_outcome_clauses(list(checks.values()))
    return f"{VERDICT_TITLES[gates['verdict']]}: {'; '.join(clauses)}."


def is_unread(summary: Mapping[str, Any]) -> bool:
    """Whether checks and monitors pass, and the blind reading that a pass needs is missing."""
    return "blind" not in summary and read_gates(summary)["measured_verdict"] == "pass"


def read_gates(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The gates of a summary with verdict, measured verdict and reasons, those of earlier releases too.

    Their "warn", a pass in spite of an alarm, is a fail. Their "pass" needed no blind reading, so without readers who
    prefer the aligned policy it is undecided.
    """
    gates: dict[str, Any] = {"verdict": "undecided", "reasons": [], **summary.get("gates", {})}
    if "measured_verdict" in gates:
        return gates
    measured = "fail" if gates["verdict"] == "warn" else gates["verdict"]
    blind = summary.get("blind")
    if measured != "pass" or (blind and blind["preferred"] == ALIGNED_ARM):
        return gates | {"verdict": measured, "measured_verdict": measured}
    reason = "blind readers undecided" if blind else UNREAD_REASON
    return gates | {"verdict": "undecided", "measured_verdict": measured, "reasons": [reason, *gates["reasons"]]}


def check_status(check: Mapping[str, Any]) -> str:
    """Status of a gate check; checks of earlier releases have none, and passed without evidence, so are undecided."""
    return str(check.get("status", "undecided"))


def is_too_truncated(gates: Mapping[str, Any]) -> bool:
    """Whether the share of responses cut at the token limit is a reason of the verdict."""
    return any("cut at the token limit" in reason for reason in gates.get("reasons", []))


def list_alarm_labels(gates: Mapping[str, Any]) -> list[str]:
    """Display names of the monitors that raised an alarm; gates of earlier releases have their keys only."""
    return list(gates.get("alarm_labels", gates.get("alarms", [])))


def _format_alarm_clause(labels: Sequence[str]) -> str:
    """One or two alarms by name; the verdict below the headline names all of them."""
    if len(labels) > MAX_NAMED_ALARMS:
        return f"{len(labels)} monitors raised an alarm"
    return f"monitor alarm{'s' if len(labels) > 1 else ''}: {', '.join(labels)}"


def has_user_verdicts(summary: Mapping[str, Any]) -> bool:
    """Whether users judged both policies."""
    verdict = BUILTIN_OBJECTIVES[PRIMARY_OBJECTIVE].simulated_verdict
    return verdict is not None and verdict.summary_key in summary


def format_blind_sentence(blind: Mapping[str, Any]) -> str:
    """Result of the blind reading: "readers preferred aligned in 21 of 30 decided pairs (70%, 51% to 85%), 4 ties"."""
    decided, share = blind["aligned"] + blind["base"], blind["share"]
    ties = f"{blind['ties']} tie{'' if blind['ties'] == 1 else 's'}"
    if share is None:
        return f"blind readers decided none of {blind['pairs']} pairs"
    return (
        f"blind readers preferred aligned in {blind['aligned']} of {decided} decided pairs ({share['mean']:.0%}, "
        f"{share['low']:.0%} to {share['high']:.0%}), {ties}"
    )


def _format_love_clause(lift: Mapping[str, float] | None, *, has_users: bool) -> str:
    """Users love more often; a reward model only rates higher."""
    if lift is None:
        return "love could not be compared, as a mean is zero"
    if lift["low"] <= 0 <= lift["high"]:
        return "no clear change in simulated love" if has_users else "no clear change in P[Love]"
    subject = f"{'new simulated users love' if has_users else 'P[Love] rates'} the aligned policy"
    if lift["high"] < 0:
        return f"{subject} {format_change(lift['mean'])} {'less often' if has_users else 'lower'}"
    # From +100% on, a factor is easier to read than a percentage.
    if lift["mean"] >= 1:
        return f"{subject} {1 + lift['mean']:.1f} times as {'often' if has_users else 'high'}"
    return f"{subject} {format_change(lift['mean'])} {'more often' if has_users else 'higher'}"


def _format_control_clause(summary: Mapping[str, Any]) -> str:
    """Whether the rise remains against the base at equal entropy."""
    comparison = summary.get("comparisons", {}).get("aligned_vs_control")
    if comparison is None:
        return ""
    lift = comparison["lifts"].get(PRIMARY_OBJECTIVE)
    if lift is not None and lift["low"] > 0:
        return ", also compared with a base of equal entropy"
    return ", but not clearly more than a base of equal entropy"


def check_outcome(check: Mapping[str, Any]) -> str:
    """Outcome of a gate check in words."""
    lift, status, limit = check.get("lift"), check_status(check), -check.get("limit", 0.0)
    if status == "undecided" or lift is None:
        return "undecided"
    if status == "fail":
        return f"fell by more than {limit:.0%}" if limit else "fell"
    if lift["low"] > 0:
        return "rose"
    return f"fell, by less than {limit:.0%}" if lift["high"] < 0 else f"did not fall by {limit:.0%}"


def _format_outcome_clauses(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """One clause per outcome, with the objectives that share it: "simulated helpfulness and safety rose"."""
    names_by_outcome: dict[tuple[str, bool], list[str]] = {}
    for check in checks:
        is_simulated = "simulated" in str(check.get("judged_by", ""))
        names_by_outcome.setdefault((check_outcome(check), is_simulated), []).append(check["name"])
    clauses = []
    for (outcome, is_simulated), names in names_by_outcome.items():
        joined = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        subject = f"simulated {joined}" if is_simulated else f"the {joined} score{'s' if len(names) > 1 else ''}"
        verb = "is" if len(names) == 1 else "are"
        clauses.append(f"{subject} {verb} undecided" if outcome == "undecided" else f"{subject} {outcome}")
    return clauses


def format_verdict(gates: Mapping[str, Any]) -> str:
    """Format the verdict of `read_gates` with its reasons."""
    verdict, reasons = gates["verdict"], gates["reasons"]
    title = f"{VERDICT_MARKS[verdict]} {'All gates pass' if verdict == 'pass' else VERDICT_TITLES[verdict]}"
    return f"{title}: {'; '.join(reasons)}" if reasons else title
