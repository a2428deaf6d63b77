"""Prometheus: metrics are scraped from a real Ray; the Grafana dashboard plots every exported metric."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rluf.config.objectives import BUILTIN_OBJECTIVES
from rluf.tracking import gauges, metric_registry

DASHBOARD_FILE = Path(gauges.__file__).with_name("grafana.json")


@pytest.fixture
def quick_ray() -> Iterator[str]:
    """A Ray that exports its metrics every second; yields the address of its Prometheus endpoint."""
    report = {"metrics_report_interval_ms": 1000}
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20,
        _system_config=report,
    )  # fmt: skip
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def scrape_until(url: str, key: str) -> dict[str, float]:
    """rluf's values by name and labels, scraped until `key` is among them."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
        except OSError as error:
            text = str(error)
        values = {}
        for name, labels, value in re.findall(r"^ray_rluf_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            label_values = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            tags = ",".join(label_values[label] for label in ("run", "objective", "phase") if label in label_values)
            values[f"{name} {tags}"] = float(value)
        if key in values:
            return values
        assert time.monotonic() < deadline, text[-2000:]
        time.sleep(0.2)


@pytest.mark.slow
def test_step_metrics_are_scraped_from_ray(quick_ray: str) -> None:
    run_gauges = gauges.RunGauges("tiny", ["love", "safety"])
    run_gauges.set_step({"step": 1, "love": 0.06, "kl": float("nan"), "of_a_new_algorithm": 1.0})
    run_gauges.set_step({"step": 2, "love": 0.07, "safety": 0.9, "learn_s": 7.5, "tokens_per_s": 120.0, "version": 2,
               "reward": None})  # fmt: skip
    assert scrape_until(quick_ray, "step tiny") == {
        "step tiny": 2.0, "version tiny": 2.0, "objective tiny,love": 0.07, "objective tiny,safety": 0.9,
        "phase_seconds tiny,learn": 7.5, "tokens_per_s tiny": 120.0,
    }  # fmt: skip


def test_the_dashboard_file_is_current_and_plots_every_metric() -> None:
    dashboard = gauges.build_dashboard()
    assert json.loads(DASHBOARD_FILE.read_text()) == dashboard, (
        "write rluf/tracking/grafana.json again from gauges.build_dashboard()"
    )
    expressions = {target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())}
    gauge_names = {
        gauges.parse_metric_key(spec.key, BUILTIN_OBJECTIVES)[0]
        for spec in metric_registry.list_metric_specs(BUILTIN_OBJECTIVES)
    }
    assert {f'ray_rluf_{name}{{run=~"$run"}}' for name in gauge_names} <= expressions
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    corners = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(corners) == len(dashboard["panels"])


def test_every_panel_has_the_unit_of_its_metric_and_the_row_of_its_group() -> None:
    """The unit as the description of the metric says it, not as its name ends: a rate is not a duration."""
    panels, rows, row = {}, {}, ""
    for panel in gauges.build_dashboard()["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            panels[panel["title"]], rows[panel["title"]] = panel["fieldConfig"]["defaults"]["unit"], row
    words = {"percentunit": "share", "s": "second", "suffix: nats": "nats", "suffix: tokens/s": "per second"}
    specs = [spec for spec in metric_registry.STEP_METRICS if spec.key not in metric_registry.PHASE_KEYS]
    assert len(specs) > 25
    for spec in specs:
        unit = panels[spec.title]
        assert rows[spec.title] == metric_registry.GROUP_TITLES[spec.group]
        assert words.get(unit, "") in f"{spec.title} {spec.description}", spec.key
        # The other way round: a description that names a unit has a panel of that unit.
        if spec.description.startswith("share"):
            assert unit == "percentunit", spec.key
        if "nats" in spec.description:
            assert unit == "suffix: nats", spec.key
        if "seconds" in spec.description:
            assert unit == "s", spec.key
    assert panels["Response tokens per second"] == panels["Learner tokens per second"] == "suffix: tokens/s"
    assert panels["Step"] == panels["Seconds per step by phase"] == "s"
    assert panels["Objectives"] == "percentunit"


def test_the_dashboard_has_the_format_of_rays_own_dashboards() -> None:
    """Grafana loads every dashboard of the folder that Ray provisions: by uid, over Ray's own data source."""
    factory = pytest.importorskip("ray.dashboard.modules.metrics.grafana_dashboard_factory")
    generated = [
        getattr(factory, name)() for name in dir(factory) if re.fullmatch(r"generate_\w+_grafana_dashboard", name)
    ]
    ray_dashboards = [json.loads(content) for content, _ in generated]
    dashboard = json.loads(DASHBOARD_FILE.read_text())
    assert len(ray_dashboards) > 3 and dashboard["uid"] not in [other["uid"] for other in ray_dashboards]
    assert set(dashboard) <= set(ray_dashboards[0])
    panels = [panel for other in ray_dashboards for panel in other["panels"] if panel["type"] != "row"]
    ray_rows = [panel for other in ray_dashboards for panel in other["panels"] if panel["type"] == "row"]
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            assert set(panel) <= {key for row in ray_rows for key in row}
            continue
        assert set(panel) <= {key for ray_panel in panels for key in ray_panel}
        assert panel["datasource"] == panels[0]["datasource"]
        assert all(set(target) <= set(panels[0]["targets"][0]) for target in panel["targets"])
    ray_variables = {variable["name"]: variable for variable in ray_dashboards[0]["templating"]["list"]}
    source, run = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == (
        ray_variables["datasource"]["type"],
        ray_variables["datasource"]["query"],
    )
    assert run["type"] in {variable["type"] for variable in ray_variables.values()}
