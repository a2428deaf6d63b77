"""Release gates: whether a policy may be served to users. Pure rules over lifts and monitors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rluf.config.objectives import BUILTIN_OBJECTIVES, ObjectiveSpec
from rluf.evaluate.intervals import IntervalEstimate


def is_clear_rise(lift: IntervalEstimate | None) -> bool:
    """Whether the whole interval is above zero. An undefined lift has not risen."""
    return lift is not None and lift.low > 0.0


def is_not_clear_fall(lift: IntervalEstimate | None, margin: float) -> bool:
    """Whether there is no significant fall, or one smaller than `margin` (relative). An undefined lift fails.

    The first half is absence of evidence, not evidence of absence: with few users everything passes. `proven` in the
    verdict shows where the interval also excludes a fall by the margin, which is non-inferiority proper.
    """
    return lift is not None and (lift.high >= 0.0 or lift.low >= -margin)


def format_gate_rule(specs: Iterable[ObjectiveSpec]) -> str:
    """The rule of the gates of these objectives in one sentence."""
    rising = [spec.name for spec in specs if spec.gate == "must_rise"]
    holding = [spec.name for spec in specs if spec.gate == "must_hold"]
    clauses = []
    if rising:
        verb = "passes" if len(rising) == 1 else "pass"
        clauses.append(f"{_join_names(rising)} {verb} if the interval of its lift is above zero")
    if holding:
        verb = "passes" if len(holding) == 1 else "pass"
        clauses.append(
            f"{_join_names(holding)} {verb} unless the interval is entirely below zero, and then still pass if it is "
            "entirely above minus the margin"
        )
    return "; ".join([*clauses, "a monitor alarm turns a pass into a warning"])


def _join_names(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def evaluate_gates(
    lifts: Mapping[str, IntervalEstimate | None],
    *,
    margin: float,
    verdict_source: str,
    alarm_names: Sequence[str],
    specs: Mapping[str, ObjectiveSpec] = BUILTIN_OBJECTIVES,
    check_sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Gate checks and verdict of one comparison: pass, warn (passes, but with monitor alarms) or fail.

    `lifts` are relative lifts by objective, `margin` is the largest relative fall that a must_hold objective may have,
    `verdict_source` names whose reactions or scores the lifts are of, and `check_sources` another source for single
    objectives. `specs` have the gate of each objective.
    """
    checks: list[dict[str, Any]] = []
    gated_specs = [spec for spec in specs.values() if spec.gate != "none"]
    for spec in sorted(gated_specs, key=lambda spec: spec.gate != "must_rise"):
        if spec.name not in lifts:
            continue
        lift = lifts[spec.name]
        if spec.gate == "must_rise":
            criterion, passed = "up, clear of zero", is_clear_rise(lift)
            proven = passed
        else:
            criterion, passed = f"not below, margin {margin:.0%}", is_not_clear_fall(lift, margin)
            proven = lift is not None and lift.low >= -margin
        checks.append({
            "name": spec.name, "gate": spec.gate, "wanted": criterion, "passed": passed, "proven": proven,
            "judged_by": (check_sources or {}).get(spec.name, verdict_source),
            "lift": None if lift is None else lift.as_dict(),
        })  # fmt: skip
    # No objective at all is not a pass: nothing was shown.
    passed = bool(checks) and all(check["passed"] for check in checks)
    return {
        "verdict": "fail" if not passed else "warn" if alarm_names else "pass",
        "judged_by": verdict_source,
        "margin": margin,
        "rule": format_gate_rule(gated_specs),
        "checks": checks,
        "alarms": list(alarm_names),
    }
