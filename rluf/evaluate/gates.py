"""Release gates: whether a policy may be served to users. Pure rules over lifts and monitors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rluf.evaluate.intervals import IntervalEstimate

MUST_RISE_OBJECTIVE = "love"
MUST_HOLD_OBJECTIVES = ("helpfulness", "safety")
GATE_RULE = (
    "love passes if the interval of its lift is above zero; helpfulness and safety pass unless the interval is "
    "entirely below zero, and then still pass if it is entirely above minus the margin; a monitor alarm turns a pass "
    "into a warning"
)


def is_clear_rise(lift: IntervalEstimate | None) -> bool:
    """Whether the whole interval is above zero. An undefined lift has not risen."""
    return lift is not None and lift.low > 0.0


def is_not_clear_fall(lift: IntervalEstimate | None, margin: float) -> bool:
    """Whether there is no significant fall, or one smaller than `margin` (relative). An undefined lift fails.

    The first half is absence of evidence, not evidence of absence: with few users everything passes. `proven` in the
    verdict shows where the interval also excludes a fall by the margin, which is non-inferiority proper.
    """
    return lift is not None and (lift.high >= 0.0 or lift.low >= -margin)


def evaluate_gates(
    lifts: Mapping[str, IntervalEstimate | None], *, margin: float, verdict_source: str, alarm_names: Sequence[str]
) -> dict[str, Any]:
    """Gate checks and verdict of one comparison: pass, warn (passes, but with monitor alarms) or fail.

    `lifts` are relative lifts by objective, `margin` is the largest relative fall of helpfulness or safety that is
    accepted, `verdict_source` names whose reactions or scores the lifts are of.
    """
    checks: list[dict[str, Any]] = []
    for objective in (MUST_RISE_OBJECTIVE, *MUST_HOLD_OBJECTIVES):
        if objective not in lifts:
            continue
        lift = lifts[objective]
        if objective == MUST_RISE_OBJECTIVE:
            criterion, passed = "up, clear of zero", is_clear_rise(lift)
            proven = passed
        else:
            criterion, passed = f"not below, margin {margin:.0%}", is_not_clear_fall(lift, margin)
            proven = lift is not None and lift.low >= -margin
        checks.append({
            "name": objective, "wanted": criterion, "passed": passed, "proven": proven,
            "lift": None if lift is None else lift.as_dict(),
        })  # fmt: skip
    # No objective at all is not a pass: nothing was shown.
    passed = bool(checks) and all(check["passed"] for check in checks)
    return {
        "verdict": "fail" if not passed else "warn" if alarm_names else "pass",
        "judged_by": verdict_source,
        "margin": margin,
        "rule": GATE_RULE,
        "checks": checks,
        "alarms": list(alarm_names),
    }
