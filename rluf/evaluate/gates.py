"""Release gates: each check of a comparison is pass, undecided or fail, and so is the verdict.

Every limit and the margin are set before the run. All checks must pass, so no correction for their number is needed
(intersection-union test, Berger 1982). Absence of evidence never passes: a check that its interval does not decide is
undecided, with the number of prompts or users that would decide it.

The last check is a blind reading by people (rluf.evaluate.blind). Simulated users and reward models share blind spots
with the rewards that the policy was trained on, so what they measure (`measured_verdict`) does not pass by itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from rluf.config.cli import CommandParser, run_command
from rluf.config.objectives import BUILTIN_OBJECTIVES, ObjectiveSpec
from rluf.errors import DataError
from rluf.evaluate.intervals import CONFIDENCE_LEVEL
from rluf.evaluate.two_way import MAX_DATA_FACTOR, MoreData, PolicyComparison, plan_more_data
from rluf.report.headline import UNREAD_REASON, check_status, list_alarm_labels, read_gates
from rluf.types import ALIGNED_ARM, BASE_ARM
from rluf.utils.files import read_json
from rluf.utils.paths import suggest_run_folder

GateStatus = Literal["pass", "undecided", "fail"]

NON_INFERIORITY_MARGIN = 0.05
"""Largest relative fall that the gates accept of an objective that must hold."""
MAX_TRUNCATED_SHARE = 0.1
"""With more of the aligned responses cut at the token limit, how they end is unknown: no pass."""
MAX_PAIRS = 1000
"""More pairs than this are not asked of readers: such a preference is too weak for them to confirm."""
GATE_EXIT_CODES: Mapping[str, int] = {"pass": 0, "fail": 10, "undecided": 11}
"""Exit codes of `python -m rluf.evaluate gate`."""


@dataclass(frozen=True, slots=True)
class GateEvidence:
    """What the gates judge: comparisons by objective and their source, alarms, and the truncated share of aligned."""

    comparisons: Mapping[str, PolicyComparison]
    judged_by: Mapping[str, str]
    """Source of the verdicts by objective: simulated users or reward models."""
    alarm_labels: Mapping[str, str] = field(default_factory=dict)
    """Display names of the monitors that raised an alarm, by name."""
    truncated_share: float | None = None
    """None where it is not known how the responses ended."""


def decide_check(comparison: PolicyComparison, limit: float) -> GateStatus:
    """Pass if the whole interval of the lift is above `limit` (relative), fail if it is below, else undecided."""
    lift = comparison.lift
    if lift is None:
        return "undecided"
    return "pass" if lift.low > limit else "fail" if lift.high < limit else "undecided"


def format_gate_rule(specs: Iterable[ObjectiveSpec], margin: float) -> str:
    """The rule of the gates of these objectives in one sentence."""
    rising = [spec.name for spec in specs if spec.gate == "must_rise"]
    holding = [spec.name for spec in specs if spec.gate == "must_hold"]
    clauses = []
    if rising:
        clauses.append(f"{_join_names(rising)} must rise (95% interval above zero)")
    if holding:
        clauses.append(f"{_join_names(holding)} must not fall by {margin:.0%}")
    return (
        f"{', '.join(clauses)}; an interval below its limit fails, one that includes it is undecided; a monitor alarm "
        f"fails; no run passes with more than {MAX_TRUNCATED_SHARE:.0%} of its responses cut at the token limit, or "
        "before blind readers prefer the aligned policy"
    )


def _join_names(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def evaluate_gates(evidence: GateEvidence, specs: Mapping[str, ObjectiveSpec] = BUILTIN_OBJECTIVES) -> dict[str, Any]:
    """Checks, verdict and reasons of one comparison without a blind reading. `specs` have the gate of each objective.

    `measured_verdict` is the verdict of checks, alarms and truncation. `verdict` includes the blind reading, so it is
    undecided or fail here. `reasons` are the sentences that report, log and W&B show.
    """
    margin = NON_INFERIORITY_MARGIN
    gated_specs = sorted(
        (spec for spec in specs.values() if spec.gate != "none"), key=lambda spec: spec.gate != "must_rise"
    )
    checks: list[dict[str, Any]] = []
    for spec in gated_specs:
        if (comparison := evidence.comparisons.get(spec.name)) is None:
            continue
        limit = 0.0 if spec.gate == "must_rise" else -margin
        status = decide_check(comparison, limit)
        more_data = plan_more_data(comparison, limit) if status == "undecided" else MoreData()
        checks.append({
            "name": spec.name, "gate": spec.gate, "status": status, "limit": limit,
            "judged_by": evidence.judged_by[spec.name],
            "lift": None if comparison.lift is None else comparison.lift.as_dict(),
            "more_prompts": more_data.prompts, "more_users": more_data.users, "more_data_factor": more_data.factor,
        })  # fmt: skip
    gates: dict[str, Any] = {
        "margin": margin, "rule": format_gate_rule(gated_specs, margin), "checks": checks,
        "alarms": list(evidence.alarm_labels), "alarm_labels": list(evidence.alarm_labels.values()),
        "truncated_share": evidence.truncated_share,
        "judged_by": " and ".join(dict.fromkeys(check["judged_by"] for check in checks)) or "nothing",
    }  # fmt: skip
    return gates | decide_verdict(gates)


def decide_verdict(gates: Mapping[str, Any], blind_result: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Verdicts and reasons from checks, alarms, truncation and, if there was one, the blind reading.

    Keys: `measured_verdict` without the reading, `reading` with its status and reason; `verdict` and `reasons` with it.

    Measured fail: a check fails or a monitor raised an alarm. Measured undecided: a check is, or too many responses are
    truncated, or there is no check. The reading passes if readers prefer aligned (the interval of the sign test is
    above one half), fails if they prefer the base, and is else undecided. Any fail fails; a pass needs both.
    """
    checks, alarm_labels = gates["checks"], list_alarm_labels(gates)
    truncated_share = gates.get("truncated_share")
    is_truncated = truncated_share is not None and truncated_share > MAX_TRUNCATED_SHARE
    statuses = {check_status(check) for check in checks}
    measured: GateStatus = "pass"
    if "fail" in statuses or alarm_labels:
        measured = "fail"
    elif "undecided" in statuses or not checks or is_truncated:
        measured = "undecided"
    reading_status, reading_reason = _judge_reading(blind_result)
    verdicts = {measured, reading_status}
    # Before the measured checks pass, a missing reading is not what the run waits for.
    is_reading_due = blind_result is not None or measured == "pass"
    reasons = [reading_reason] if reading_reason and is_reading_due else []
    reasons += (
        [f"monitor alarm{'s' if len(alarm_labels) > 1 else ''}: {', '.join(alarm_labels)}"] if alarm_labels else []
    )
    reasons += [_check_reason(check) for check in checks if check_status(check) != "pass"]
    if is_truncated:
        reasons.append(
            f"{truncated_share:.0%} of the aligned responses are cut at the token limit; raise "
            "rollout.max_response_tokens"
        )
    return {
        "measured_verdict": measured,
        "reading": {"status": reading_status, "reason": reading_reason},
        "verdict": "fail" if "fail" in verdicts else "undecided" if "undecided" in verdicts else "pass",
        "reasons": reasons,
    }


def _judge_reading(blind_result: Mapping[str, Any] | None) -> tuple[GateStatus, str | None]:
    """Status of the blind reading, and why it does not pass."""
    if blind_result is None:
        return "undecided", UNREAD_REASON
    aligned, base, pairs = (blind_result[key] for key in (ALIGNED_ARM, BASE_ARM, "pairs"))
    # Who may stop early can stop when the result pleases; results of earlier releases do not say how many were planned.
    if pairs < (planned := blind_result.get("planned", pairs)):
        return "undecided", f"only {pairs} of {planned} pairs to read blind are rated"
    if blind_result["preferred"] is not None:
        is_base = blind_result["preferred"] == BASE_ARM
        return ("fail", "blind readers prefer the base") if is_base else ("pass", None)
    needed = _count_needed_pairs(aligned, base, pairs)
    outlook = "too close to decide by reading" if needed is None else f"a new reading needs about {needed:,} pairs"
    return (
        "undecided", f"blind readers undecided: {aligned} for aligned, {base} for the base in {pairs} pairs; {outlook}"
    )  # fmt: skip


def _count_needed_pairs(aligned: int, base: int, pairs: int) -> int | None:
    """Pairs of a new reading whose exact interval would exclude one half at these shares; None if too many."""
    decided = aligned + base
    if aligned == base:
        return None
    counts = np.arange(1, MAX_PAIRS + 1)
    preferred = np.floor(counts * (max(aligned, base) / decided))
    lows = stats.beta.ppf((1 - CONFIDENCE_LEVEL) / 2, preferred, counts - preferred + 1)
    excludes_half = np.flatnonzero(lows > 0.5)
    if not excludes_half.size:
        return None
    needed = math.ceil(int(counts[excludes_half[0]]) * pairs / decided)
    return needed if needed <= MAX_PAIRS else None


def _check_reason(check: Mapping[str, Any]) -> str:
    """Why a check does not pass, and what would decide it."""
    name, lift = check["name"], check["lift"]
    if lift is None:
        return f"{name} undecided: a mean is zero or below, so there is no relative lift"
    if check["status"] == "fail":
        return f"{name} fell" if check["gate"] == "must_rise" else f"{name} fell by more than {-check['limit']:.0%}"
    additions = [
        f"{check[key]:,} more {unit}"
        for key, unit in (("more_prompts", "prompts"), ("more_users", "users per arm"))
        if check[key] is not None
    ]
    if additions:
        return f"{name} undecided: needs about {' or '.join(additions)}"
    if (factor := check["more_data_factor"]) is not None:
        return f"{name} undecided: needs about {math.ceil(factor)} times as many prompts and users"
    return f"{name} undecided: too close to its limit to decide with {MAX_DATA_FACTOR:.0f} times the data"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict of an evaluated run; the exit code is that of GATE_EXIT_CODES."""
    parser = CommandParser(
        "rluf.evaluate gate",
        description="Verdict of the release gates of a run: exit code 0 for pass, 10 for fail, 11 for undecided.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder with summary.json")
    parser.add_argument(
        "--measured", action="store_true",
        help="verdict of checks and monitors alone, for scripts: without the blind reading, which a pass needs",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    verdicts: list[str] = []

    def print_verdict() -> None:
        summary = read_json(folder / "summary.json")
        gates = read_gates(summary)
        if "gates" not in summary or gates["verdict"] not in GATE_EXIT_CODES:
            raise DataError(
                f"{folder / 'summary.json'} has no verdict of pass, undecided or fail; name a run folder that "
                f"rluf.train or rluf.evaluate of this release wrote{suggest_run_folder(folder)}"
            )
        verdict, reasons = gates["verdict"], gates["reasons"]
        if options.measured:
            verdict = gates["measured_verdict"]
            reasons = [
                reason for reason in reasons if reason not in (UNREAD_REASON, gates.get("reading", {}).get("reason"))
            ]
        sys.stdout.write("".join(f"{line}\n" for line in (verdict, *reasons)))
        verdicts.append(verdict)

    return run_command(print_verdict) or GATE_EXIT_CODES[verdicts[0]]
