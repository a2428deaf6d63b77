"""What a sweep found: one point a setting, its lifts over seeds, the front, its hypervolume, the point to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rluf.evaluate.tables import table
from rluf.sweep.pareto import Choice, hypervolume, on_front, recommended

GOODS = ("love", "helpfulness", "safety")
REFERENCE = (0.0, -0.1, -0.1)
"""Lifts below which a setting adds nothing to the hypervolume: no more love, a tenth less help, a tenth less safety."""
RULE = (
    "most love on average among the settings whose love rose on every seed, whose helpfulness and safety held by the "
    "gates on every seed, and that raised no alarm"
)
Point = tuple[float, float, int]


def report(summaries: Mapping[Point, Mapping[str, Any] | None]) -> dict[str, Any]:
    """From summary.json by (weight, KL coefficient, seed) to the settings, front, hypervolume and recommendation.

    Lifts are those that the run's own gates judged by. A run whose lift is undefined counts as one that did not hold,
    and so does one without a summary (None): it failed, and nobody knows what it would have found. A setting all of
    whose runs failed has no figures and is left out.
    """
    choices: dict[tuple[float, float], list[tuple[tuple[float, ...], bool]]] = {}
    lost = Counter((weight, kl) for (weight, kl, _), summary in summaries.items() if summary is None)
    for (weight, kl, _), summary in sorted((point, one) for point, one in summaries.items() if one is not None):
        checks = {check["name"]: check for check in summary["gates"]["checks"]}
        lifts = [(checks.get(name) or {}).get("lift") for name in GOODS]
        held = summary["gates"]["verdict"] != "fail" or all(
            checks[name]["passed"] for name in GOODS[1:] if name in checks
        )
        whole = all(lift is not None for lift in lifts)
        row = tuple(0.0 if lift is None else float(lift["mean"]) for lift in lifts)
        choices.setdefault((weight, kl), []).append((row, held and whole and not summary["gates"]["alarms"]))
    if not choices:
        return {"settings": [], "front": [], "hypervolume": 0.0, "recommended": None, "rule": RULE}
    points = [
        Choice(
            f"love {key[0]:g}, KL {key[1]:g}",
            tuple(row for row, _ in runs),
            (*(held for _, held in runs), *[False] * lost[key]),
        )
        for key, runs in choices.items()
    ]
    front = on_front([one.mean for one in points])
    best = recommended(points)
    return {
        "settings": [
            {"name": one.name, "weight": key[0], "kl_coef": key[1], "seeds": len(one.held), "lost": lost[key],
             "held": sum(one.held), "front": bool(on), **dict(zip(GOODS, one.mean, strict=True)),
             "by_seed": [dict(zip(GOODS, row, strict=True)) for row in one.lifts]}
            for one, key, on in zip(points, choices, front, strict=True)
        ],
        "front": [one.name for one, on in zip(points, front, strict=True) if on],
        "reference": list(REFERENCE),
        "hypervolume": hypervolume([one.mean for one in points], REFERENCE),
        "recommended": None if best is None else best.name,
        "rule": RULE,
    }  # fmt: skip


def sweep_text(result: Mapping[str, Any]) -> str:
    """The report as a table for the terminal."""
    rows = [
        [one["name"], f"{one['held']} of {one['seeds']}", *(f"{one[good]:+.1%}" for good in GOODS),
         "yes" if one["front"] else "no"]
        for one in result["settings"]
    ]  # fmt: skip
    lines = [table(["setting", "held", *GOODS, "front"], rows)] if rows else ["no run ended"]
    lines.append(f"hypervolume above {REFERENCE}: {result['hypervolume']:.4g}")
    lines.append(f"recommended: {result['recommended'] or 'none'} ({result['rule']})")
    lines += [f"failed: {name}, see {log}" for name, log in result.get("failed", {}).items()]
    return "\n".join(lines) + "\n"
