"""Step metrics on Ray's Prometheus endpoint, and the Grafana dashboard for them.

Ray exports them from the driver's node as ray_rluf_...; the label `run` distinguishes runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rluf.tracking import metric_registry

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

GAUGE_PREFIX = "rluf_"
EXTRA_GAUGES = {
    "objective": "mean calibrated score of the step's samples, by objective",
    "phase_seconds": "seconds of the step, by phase",
    "step": "finished optimizer steps",
    "version": "weight version of the engines",
    "samples": "responses of the step",
}
"""Gauges that do not correspond to one metric of the registry, with their descriptions."""
GRAFANA_UNITS: Mapping[metric_registry.MetricUnit, str] = {
    "number": "short", "share": "percentunit", "seconds": "s", "nats": "suffix: nats", "tokens": "short",
    "tokens/s": "suffix: tokens/s",
}  # fmt: skip
"""Unit of a metric -> Grafana's id of it."""
GAUGE_LABELS = {"objective": "objective", "phase_seconds": "phase"}
"""Label name of the gauges that have one series per objective or phase."""


def parse_metric_key(metric_key: str, objective_names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Gauge name and labels of a metric, without prefix.

    kl is the gauge kl, love is objective{objective=love}, learn_s is phase_seconds{phase=learn}. One gauge for all
    objectives keeps the dashboard independent of their names.
    """
    if metric_key in objective_names:
        return "objective", {"objective": metric_key}
    if metric_key in metric_registry.PHASE_KEYS:
        return "phase_seconds", {"phase": metric_key.removesuffix("_s")}
    return metric_key, {}


class RunGauges:
    """Gauges of one run, set by the driver once per step; requires a connected Ray."""

    def __init__(self, run_name: str, objective_names: Iterable[str]) -> None:
        """`run_name` labels every value; `objective_names` are the objectives with scores."""
        from ray.util.metrics import Gauge

        self._objective_names = tuple(objective_names)
        self._run_tag = {"run": run_name}
        descriptions = {
            metric_spec.key: f"{metric_spec.title}: {metric_spec.description}"
            for metric_spec in metric_registry.STEP_METRICS
        }
        metric_keys = (*descriptions, *self._objective_names)
        gauge_names = {parse_metric_key(key, self._objective_names)[0] for key in metric_keys} | set(EXTRA_GAUGES)
        self._gauges_by_name: dict[str, Gauge] = {
            gauge_name: Gauge(
                f"{GAUGE_PREFIX}{gauge_name}",
                description=EXTRA_GAUGES.get(gauge_name) or descriptions[gauge_name],
                tag_keys=("run", *([GAUGE_LABELS[gauge_name]] if gauge_name in GAUGE_LABELS else [])),
            )
            for gauge_name in sorted(gauge_names)
        }

    def set_step(self, step_metrics: Mapping[str, float | None]) -> None:
        """Set the gauges to a step's metrics; missing and non-finite values leave their gauge unchanged."""
        for metric_key, value in step_metrics.items():
            gauge_name, labels = parse_metric_key(metric_key, self._objective_names)
            gauge = self._gauges_by_name.get(gauge_name)
            # A metric of a plug-in algorithm is unknown before the first step, so it has no gauge.
            if gauge is not None and value is not None and math.isfinite(value):
                gauge.set(float(value), tags={**self._run_tag, **labels})


def build_dashboard() -> dict[str, Any]:
    """Build the Grafana dashboard of these gauges, with variables for data source and run."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row_title, row_panels in _list_dashboard_rows():
        row_position = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append({"id": len(panels) + 1, "type": "row", "title": row_title, "collapsed": False,
                       "gridPos": row_position, "panels": []})  # fmt: skip
        for panel_index, (title, unit, series) in enumerate(row_panels):
            position = {"h": 8, "w": 8, "x": 8 * (panel_index % 3), "y": top + 1 + 8 * (panel_index // 3)}
            panels.append({
                "id": len(panels) + 1, "type": "timeseries", "title": title, "datasource": "${datasource}",
                "gridPos": position, "fieldConfig": {"defaults": {"unit": GRAFANA_UNITS[unit]}, "overrides": []},
                "targets": [
                    {
                        "refId": chr(ord("A") + series_index),
                        "expr": f'ray_{GAUGE_PREFIX}{gauge_name}{{run=~"$run"}}',
                        "legendFormat": legend,
                    }
                    for series_index, (gauge_name, legend) in enumerate(series)
                ],
            })  # fmt: skip
        top += 1 + 8 * math.ceil(len(row_panels) / 3)
    run_query = f"label_values(ray_{GAUGE_PREFIX}step, run)"
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {"name": "run", "type": "query", "datasource": "${datasource}", "query": run_query, "label": "Run",
         "multi": True,
         "includeAll": True, "refresh": 2},
    ]  # fmt: skip
    return {
        "uid": "rluf", "title": "rluf: training", "tags": ["rluf"], "timezone": "browser", "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"}, "schemaVersion": 39, "templating": {"list": variables},
        "panels": panels,
    }  # fmt: skip


DashboardPanel = tuple[str, metric_registry.MetricUnit, list[tuple[str, str]]]
"""Title, unit and [(gauge, legend)] of a panel."""


def _list_dashboard_rows() -> list[tuple[str, list[DashboardPanel]]]:
    """Rows of the dashboard: one for each group of metrics, with the panels that combine several series first."""
    combined_panels: dict[str, list[DashboardPanel]] = {
        "objectives": [("Objectives", "share", [("objective", "{{run}} {{objective}}")])],
        # The phases share one panel, where they can be compared.
        "throughput": [("Seconds per step by phase", "seconds", [("phase_seconds", "{{run}} {{phase}}")])],
        "weight_sync": [
            ("Steps and weight version", "number", [("step", "{{run}} step"), ("version", "{{run}} version")])
        ],
    }
    return [
        (
            title,
            combined_panels.get(group, [])
            + [
                (spec.title, spec.unit, [(spec.key, "{{run}}")])
                for spec in metric_registry.STEP_METRICS
                if spec.group == group and spec.key not in metric_registry.PHASE_KEYS
            ],
        )
        for group, title in metric_registry.GROUP_TITLES.items()
    ]
