"""Sweep report: lifts of each setting over seeds, Pareto front, hypervolume, recommended setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rluf.config.objectives import BUILTIN_OBJECTIVES, PRIMARY_OBJECTIVE, find_objective_spec
from rluf.evaluate.tables import format_table
from rluf.sweep.pareto import SweepSetting, compute_hypervolume, is_pareto_optimal, recommend_setting

REFERENCE_LIFT_BY_GATE = {"must_rise": 0.0, "must_hold": -0.1}
"""Reference point of the hypervolume: no gain in what must rise, 10% less of what must hold."""
GridPoint = tuple[float, float, int]


def build_sweep_report(summaries: Mapping[GridPoint, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Build the report from summary.json by (love weight, KL coefficient, seed); None for a failed run.

    Lifts are those that the run's own gates used. A run with an undefined lift counts as not passed, and so does a
    failed run, whose result is unknown. A setting without a finished run has no figures and is dropped.
    """
    gates = _collect_gates([summary for summary in summaries.values() if summary is not None])
    reference_lifts = [REFERENCE_LIFT_BY_GATE[gate] for gate in gates.values()]
    rule = _format_recommendation_rule([name for name in gates if name != PRIMARY_OBJECTIVE])
    runs_by_setting: dict[tuple[float, float], list[tuple[tuple[float, ...], bool]]] = {}
    failed_counts = Counter((weight, kl) for (weight, kl, _), summary in summaries.items() if summary is None)
    for (weight, kl, _), summary in sorted(
        (point, summary) for point, summary in summaries.items() if summary is not None
    ):
        checks = {check["name"]: check for check in summary["gates"]["checks"]}
        # A setting is accepted on the other objectives here; love is judged over all seeds by recommend_setting.
        lifts = [(checks.get(name) or {}).get("lift") for name in gates]
        passed = summary["gates"]["verdict"] != "fail" or all(
            checks[name]["passed"] for name in gates if name in checks and name != PRIMARY_OBJECTIVE
        )
        is_defined = all(lift is not None for lift in lifts)
        run_lifts = tuple(0.0 if lift is None else float(lift["mean"]) for lift in lifts)
        passed = passed and is_defined and not summary["gates"]["alarms"]
        runs_by_setting.setdefault((weight, kl), []).append((run_lifts, passed))
    if not runs_by_setting:
        return {"settings": [], "front": [], "hypervolume": 0.0, "recommended": None, "rule": rule}
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
             **dict(zip(gates, setting.mean_lifts, strict=True)),
             "by_seed": [dict(zip(gates, lifts, strict=True)) for lifts in setting.seed_lifts]}
            for setting, key, on_front in zip(settings, runs_by_setting, is_on_front, strict=True)
        ],
        "front": [setting.name for setting, on_front in zip(settings, is_on_front, strict=True) if on_front],
        "objectives": list(gates),
        "reference": reference_lifts,
        "hypervolume": compute_hypervolume([setting.mean_lifts for setting in settings], reference_lifts),
        "recommended": None if recommended is None else recommended.name,
        "rule": rule,
    }  # fmt: skip


def _collect_gates(summaries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Gate of each objective that a run was checked on, love first."""
    checks = [check for summary in summaries for check in summary["gates"]["checks"]]
    # Runs of earlier releases do not say the gates and were always checked on the built-in objectives.
    has_gates = bool(checks) and all("gate" in check for check in checks)
    names = [PRIMARY_OBJECTIVE] if has_gates else list(BUILTIN_OBJECTIVES)
    gates: dict[str, str] = {name: BUILTIN_OBJECTIVES[name].gate for name in names}
    for check in checks:
        gates[check["name"]] = check.get("gate", find_objective_spec(check["name"]).gate)
    return gates


def _format_recommendation_rule(other_objectives: Sequence[str]) -> str:
    names = " and ".join(filter(None, [", ".join(other_objectives[:-1]), *other_objectives[-1:]]))
    other_condition = f" whose {names} passed the gates on every seed," if names else ""
    return (
        f"highest mean {PRIMARY_OBJECTIVE} lift among the settings whose {PRIMARY_OBJECTIVE} rose on every seed,"
        f"{other_condition} and that raised no alarm"
    )


def format_sweep_report(report: Mapping[str, Any]) -> str:
    """Format the report of build_sweep_report() as a table."""
    names = report.get("objectives", list(BUILTIN_OBJECTIVES))
    rows = [
        [setting["name"], f"{setting['passed']} of {setting['seeds']}",
         *(f"{setting[objective]:+.1%}" for objective in names), "yes" if setting["front"] else "no"]
        for setting in report["settings"]
    ]  # fmt: skip
    lines = [format_table(["setting", "passed", *names, "front"], rows)] if rows else ["no run finished"]
    reference_lifts = tuple(report.get("reference", ()))
    lines.append(f"hypervolume above {reference_lifts}: {report['hypervolume']:.4g}")
    lines.append(f"recommended: {report['recommended'] or 'none'} ({report['rule']})")
    lines += [f"failed: {name}, see {log_path}" for name, log_path in report.get("failed", {}).items()]
    return "\n".join(lines) + "\n"
