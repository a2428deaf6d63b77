"""Sweep report: lifts of each setting over seeds, Pareto front, hypervolume, recommended setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rluf.evaluate.tables import format_table
from rluf.sweep.pareto import SweepSetting, compute_hypervolume, is_pareto_optimal, recommend_setting

OBJECTIVES = ("love", "helpfulness", "safety")
REFERENCE_LIFTS = (0.0, -0.1, -0.1)
"""Reference point of the hypervolume: no gain in love, helpfulness and safety each 10% lower."""
RECOMMENDATION_RULE = (
    "highest mean love lift among the settings whose love rose on every seed, whose helpfulness and safety passed the "
    "gates on every seed, and that raised no alarm"
)
GridPoint = tuple[float, float, int]


def build_sweep_report(summaries: Mapping[GridPoint, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Build the report from summary.json by (love weight, KL coefficient, seed); None for a failed run.

    Lifts are those that the run's own gates used. A run with an undefined lift counts as not passed, and so does a
    failed run, whose result is unknown. A setting without a finished run has no figures and is dropped.
    """
    runs_by_setting: dict[tuple[float, float], list[tuple[tuple[float, ...], bool]]] = {}
    failed_counts = Counter((weight, kl) for (weight, kl, _), summary in summaries.items() if summary is None)
    for (weight, kl, _), summary in sorted(
        (point, summary) for point, summary in summaries.items() if summary is not None
    ):
        checks = {check["name"]: check for check in summary["gates"]["checks"]}
        # A setting is accepted on helpfulness and safety here; love is judged over all seeds by recommend_setting.
        lifts = [(checks.get(name) or {}).get("lift") for name in OBJECTIVES]
        passed = summary["gates"]["verdict"] != "fail" or all(
            checks[name]["passed"] for name in OBJECTIVES[1:] if name in checks
        )
        is_defined = all(lift is not None for lift in lifts)
        run_lifts = tuple(0.0 if lift is None else float(lift["mean"]) for lift in lifts)
        passed = passed and is_defined and not summary["gates"]["alarms"]
        runs_by_setting.setdefault((weight, kl), []).append((run_lifts, passed))
    if not runs_by_setting:
        return {"settings": [], "front": [], "hypervolume": 0.0, "recommended": None, "rule": RECOMMENDATION_RULE}
    settings = [
        SweepSetting(
            f"love {key[0]:g}, KL {key[1]:g}",
            tuple(run_lifts for run_lifts, _ in runs),
            (*(passed for _, passed in runs), *[False] * failed_counts[key]),
        )
        for key, runs in runs_by_setting.items()
    ]
    is_on_front = is_pareto_optimal([setting.mean_lifts for setting in settings])
    recommended = recommend_setting(settings)
    return {
        "settings": [
            {"name": setting.name, "weight": key[0], "kl_coef": key[1], "seeds": len(setting.passed_gates),
             "failed": failed_counts[key], "passed": sum(setting.passed_gates), "front": bool(on_front),
             **dict(zip(OBJECTIVES, setting.mean_lifts, strict=True)),
             "by_seed": [dict(zip(OBJECTIVES, lifts, strict=True)) for lifts in setting.seed_lifts]}
            for setting, key, on_front in zip(settings, runs_by_setting, is_on_front, strict=True)
        ],
        "front": [setting.name for setting, on_front in zip(settings, is_on_front, strict=True) if on_front],
        "reference": list(REFERENCE_LIFTS),
        "hypervolume": compute_hypervolume([setting.mean_lifts for setting in settings], REFERENCE_LIFTS),
        "recommended": None if recommended is None else recommended.name,
        "rule": RECOMMENDATION_RULE,
    }  # fmt: skip


def format_sweep_report(report: Mapping[str, Any]) -> str:
    """Format the report of build_sweep_report() as a table."""
    rows = [
        [setting["name"], f"{setting['passed']} of {setting['seeds']}",
         *(f"{setting[objective]:+.1%}" for objective in OBJECTIVES), "yes" if setting["front"] else "no"]
        for setting in report["settings"]
    ]  # fmt: skip
    lines = [format_table(["setting", "passed", *OBJECTIVES, "front"], rows)] if rows else ["no run finished"]
    lines.append(f"hypervolume above {REFERENCE_LIFTS}: {report['hypervolume']:.4g}")
    lines.append(f"recommended: {report['recommended'] or 'none'} ({report['rule']})")
    lines += [f"failed: {name}, see {log_path}" for name, log_path in report.get("failed", {}).items()]
    return "\n".join(lines) + "\n"
