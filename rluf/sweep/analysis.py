"""Sweep report: lifts of each setting over seeds, Pareto front, hypervolume, recommended setting.

Points are [P, objectives], more is better in every column. A point dominates another if it is at least as good in every
objective and better in one. Hypervolume is the volume that the points dominate above a reference point (Zitzler and
Thiele 1999), computed by slicing along the last objective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rluf.config.objectives import BUILTIN_OBJECTIVES, PRIMARY_OBJECTIVE, find_objective_spec
from rluf.errors import DataError
from rluf.evaluate.tables import format_table
from rluf.sweep.grid import GridPoint
from rluf.utils.stats import Bools, Floats


def is_pareto_optimal(points: ArrayLike) -> Bools:
    """Whether each point [P] is not dominated by another; equal points do not dominate each other."""
    values = _validate_points(points)
    # Compare every point (axis 0) with every other (axis 1).
    is_at_least = (values[:, None, :] >= values[None, :, :]).all(-1)
    is_better = (values[:, None, :] > values[None, :, :]).any(-1)
    return np.asarray(~(is_at_least & is_better).any(axis=0), dtype=np.bool_)


def compute_hypervolume(points: ArrayLike, reference_point: Sequence[float]) -> float:
    """Volume dominated above the reference point; points that are not above it in every objective add nothing.

    Only volumes with the same reference point are comparable.
    """
    values = _validate_points(points)
    reference = np.asarray(reference_point, dtype=np.float64)
    if reference.shape != values.shape[1:]:
        raise DataError(
            f"expected a reference point with {values.shape[1]} objectives like the points, got {reference.size}"
        )
    return _compute_volume(values[(values > reference).all(1)], reference)


def _compute_volume(values: Floats, reference_point: Floats) -> float:
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(values.max() - reference_point[0])
    # Between two levels of the last objective the dominated slice is constant: the volume of the points at or above
    # the upper level, without the last objective, times the height of the slice.
    total = 0.0
    levels = np.unique(values[:, -1])
    for low, high in zip(np.concatenate([reference_point[-1:], levels[:-1]]), levels, strict=True):
        total += (high - low) * _compute_volume(values[values[:, -1] >= high][:, :-1], reference_point[:-1])
    return float(total)


@dataclass(frozen=True, slots=True)
class SweepSetting:
    """One setting of a sweep: `seed_lifts` [seeds, objectives], love first, and whether each seed passed the gates.

    A seed whose run failed has no lifts and did not pass.
    """

    name: str
    seed_lifts: tuple[tuple[float, ...], ...]
    passed_gates: tuple[bool, ...]

    @property
    def mean_lifts(self) -> tuple[float, ...]:
        """Mean lift of each objective over the seeds."""
        return tuple(float(value) for value in np.mean(np.asarray(self.seed_lifts, dtype=np.float64), axis=0))


def recommend_setting(settings: Sequence[SweepSetting]) -> SweepSetting | None:
    """Setting with the highest mean love lift among those that passed, with love up, on every seed; None if none did.

    The rule depends on the worst seed, so a single lucky run is not enough.
    """
    candidates = [
        setting
        for setting in settings
        if all(setting.passed_gates) and min(lifts[0] for lifts in setting.seed_lifts) > 0.0
    ]
    return max(candidates, key=lambda setting: setting.mean_lifts[0], default=None)


def _validate_points(points: ArrayLike) -> Floats:
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise DataError(f"a front needs one row of finite numbers per policy, got an array of shape {values.shape}")
    return values


REFERENCE_LIFT_BY_GATE = {"must_rise": 0.0, "must_hold": -0.1}
"""Reference point of the hypervolume: no gain in what must rise, 10% less of what must hold."""


def build_sweep_report(summary_by_point: Mapping[GridPoint, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Build the report from summary.json by point of the grid, in the order of the report; None for a failed run.

    Lifts are those that the run's own gates used. A run with an undefined lift counts as not passed, and so does a
    failed run, whose result is unknown. A setting without a finished run has no figures and is dropped.
    """
    gates = _collect_gates([summary for summary in summary_by_point.values() if summary is not None])
    reference_lifts = [REFERENCE_LIFT_BY_GATE[gate] for gate in gates.values()]
    rule = _format_recommendation_rule([name for name in gates if name != PRIMARY_OBJECTIVE])
    runs_by_setting: dict[GridPoint, list[tuple[tuple[float, ...], bool]]] = {}
    # All seeds of a setting are one point of seed 0.
    failed_counts = Counter(point._replace(seed=0) for point, summary in summary_by_point.items() if summary is None)
    for grid_point, run_summary in summary_by_point.items():
        if run_summary is None:
            continue
        check_by_name = {check["name"]: check for check in run_summary["gates"]["checks"]}
        # A setting is accepted on the other objectives here; love is judged over all seeds by recommend_setting.
        objective_lifts = [(check_by_name.get(name) or {}).get("lift") for name in gates]
        # Summaries of earlier releases have no status, and passed without evidence.
        gates_passed = all(
            check_by_name[name].get("status") == "pass"
            for name in gates
            if name in check_by_name and name != PRIMARY_OBJECTIVE
        )
        is_defined = all(lift is not None for lift in objective_lifts)
        run_lifts = tuple(0.0 if lift is None else float(lift["mean"]) for lift in objective_lifts)
        gates_passed = gates_passed and is_defined and not run_summary["gates"]["alarms"]
        runs_by_setting.setdefault(grid_point._replace(seed=0), []).append((run_lifts, gates_passed))
    if not runs_by_setting:
        return {"settings": [], "front": [], "hypervolume": 0.0, "recommended": None, "rule": rule}
    sweep_settings = [
        SweepSetting(
            setting_key.setting_name,
            tuple(run_lifts for run_lifts, _ in setting_runs),
            (*(gates_passed for _, gates_passed in setting_runs), *[False] * failed_counts[setting_key]),
        )
        for setting_key, setting_runs in runs_by_setting.items()
    ]
    is_on_front = is_pareto_optimal([setting.mean_lifts for setting in sweep_settings])
    recommended = recommend_setting(sweep_settings)
    return {
        "settings": [
            {"name": setting.name, "weight": setting_key.love_weight, "kl_coef": setting_key.kl_coef,
             "overrides": list(setting_key.grid_overrides),
             "seeds": len(setting.passed_gates), "failed": failed_counts[setting_key],
             "passed": sum(setting.passed_gates), "front": bool(on_front),
             **dict(zip(gates, setting.mean_lifts, strict=True)),
             "by_seed": [dict(zip(gates, objective_lifts, strict=True)) for objective_lifts in setting.seed_lifts]}
            for setting, setting_key, on_front in zip(sweep_settings, runs_by_setting, is_on_front, strict=True)
        ],
        "front": [setting.name for setting, on_front in zip(sweep_settings, is_on_front, strict=True) if on_front],
        "objectives": list(gates),
        "reference": reference_lifts,
        "hypervolume": compute_hypervolume([setting.mean_lifts for setting in sweep_settings], reference_lifts),
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
        f"{other_condition} and that raised no alarm; measured only, so read its responses blind before you use it"
    )


def format_sweep_report(report: Mapping[str, Any]) -> str:
    """Format the report of build_sweep_report() as a table."""
    objective_names = report.get("objectives", list(BUILTIN_OBJECTIVES))
    table_rows = [
        [setting["name"], f"{setting['passed']} of {setting['seeds']}",
         *(f"{setting[objective]:+.1%}" for objective in objective_names), "yes" if setting["front"] else "no"]
        for setting in report["settings"]
    ]  # fmt: skip
    header = ["setting", "passed", *objective_names, "front"]
    report_lines = [format_table(header, table_rows)] if table_rows else ["no run finished"]
    reference_lifts = tuple(report.get("reference", ()))
    report_lines.append(f"hypervolume above {reference_lifts}: {report['hypervolume']:.4g}")
    report_lines.append(f"recommended: {report['recommended'] or 'none'} ({report['rule']})")
    report_lines += [f"failed: {name}, see {log_path}" for name, log_path in report.get("failed", {}).items()]
    return "\n".join(report_lines) + "\n"
