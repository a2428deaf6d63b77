"""The numbers of a step on Ray's own Prometheus endpoint, and the Grafana dashboard that draws them.

Ray exports them from the driver's node as ray_rluf_...; `run` tells runs apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rluf.tracking import metric_registry as catalogue

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

PREFIX = "rluf_"
SPECIAL = {
    "objective": "mean calibrated score of the step's samples, by objective",
    "phase_seconds": "seconds of the step, by phase",
    "step": "optimiser steps done",
    "version": "weight version that the engines hold",
    "samples": "responses of the step",
}
"""Gauges that are not one metric of the catalogue each, and what they are."""
LABELS = {"objective": "objective", "phase_seconds": "phase"}
"""The label that tells the values of such a gauge apart."""


def place(key: str, objectives: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Gauge and label of a metric: kl is rluf_kl, love is rluf_objective{objective=love}, learn_s a phase_seconds."""
    if key in objectives:
        return "objective", {"objective": key}
    if key in catalogue.PHASES:
        return "phase_seconds", {"phase": key.removesuffix("_s")}
    return key, {}


class Gauges:
    """Gauges of one run, set once a step by the driver; needs a Ray that is connected."""

    def __init__(self, run: str, objectives: Iterable[str]) -> None:
        """`run` labels every value; `objectives` are the names that have scores."""
        from ray.util.metrics import Gauge

        self._objectives = tuple(objectives)
        self._run = {"run": run}
        about = {spec.key: f"{spec.title}: {spec.about}" for spec in catalogue.METRICS}
        names = {place(key, self._objectives)[0] for key in (*about, *self._objectives)} | set(SPECIAL)
        self._gauges: dict[str, Gauge] = {
            name: Gauge(
                f"{PREFIX}{name}",
                description=SPECIAL.get(name) or about[name],
                tag_keys=("run", *([LABELS[name]] if name in LABELS else [])),
            )
            for name in sorted(names)
        }

    def set(self, row: Mapping[str, float | None]) -> None:
        """Show a step's numbers; those that are missing or not finite keep what they showed."""
        for key, value in row.items():
            name, labels = place(key, self._objectives)
            gauge = self._gauges.get(name)
            if gauge is not None and value is not None and math.isfinite(value):
                gauge.set(float(value), tags={**self._run, **labels})


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard over these gauges, with a choice of the data source and of the run."""
    panels: list[dict[str, Any]] = []
    for title, unit, names in _drawn():
        number = len(panels)
        panels.append(
            {
                "id": number + 1,
                "type": "timeseries",
                "title": title,
                "datasource": "${datasource}",
                "gridPos": {"h": 8, "w": 8, "x": 8 * (number % 3), "y": 8 * (number // 3)},
                "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + place), "expr": f'ray_{PREFIX}{name}{{run=~"$run"}}', "legendFormat": legend}
                    for place, (name, legend) in enumerate(names)
                ],
            }
        )
    query = f"label_values(ray_{PREFIX}step, run)"
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {"name": "run", "type": "query", "datasource": "${datasource}", "query": query, "label": "Run", "multi": True,
         "includeAll": True, "refresh": 2},
    ]  # fmt: skip
    return {
        "uid": "rluf",
        "title": "rluf: training",
        "tags": ["rluf"],
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "schemaVersion": 39,
        "templating": {"list": variables},
        "panels": panels,
    }


def _drawn() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(title, unit, [(gauge, legend)]) of each panel."""
    alone = [
        (spec.title, "percentunit" if spec.percent else "s" if spec.key.endswith("_s") else "short",
         [(spec.key, "{{run}}")])
        for spec in catalogue.METRICS
        if spec.key not in catalogue.PHASES
    ]  # fmt: skip
    return [
        ("Objectives", "percentunit", [("objective", "{{run}} {{objective}}")]),
        ("Seconds of a step by phase", "s", [("phase_seconds", "{{run}} {{phase}}")]),
        ("Steps and weight version", "short", [("step", "{{run}} step"), ("version", "{{run}} version")]),
        *alone,
    ]
