"""Prometheus: what a real Ray exports is scraped; the Grafana dashboard draws only what is exported."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rluf.tracking import gauges
from rluf.tracking import metric_registry as catalogue

GRAFANA = Path(gauges.__file__).with_name("grafana.json")


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


def exported(url: str, wanted: str) -> dict[str, float]:
    """Values of rluf by name and labels, once `wanted` is among them."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
        except OSError as error:
            text = str(error)
        found = {}
        for name, labels, value in re.findall(r"^ray_rluf_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            kept = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            tags = ",".join(kept[key] for key in ("run", "objective", "phase") if key in kept)
            found[f"{name} {tags}"] = float(value)
        if wanted in found:
            return found
        assert time.monotonic() < deadline, text[-2000:]
        time.sleep(0.2)


@pytest.mark.slow
def test_a_steps_numbers_are_scraped_from_ray(quick_ray: str) -> None:
    shown = gauges.Gauges("tiny", ["love", "safety"])
    shown.set({"step": 1, "love": 0.06, "kl": float("nan"), "of_a_new_algorithm": 1.0})
    shown.set({"step": 2, "love": 0.07, "safety": 0.9, "learn_s": 7.5, "tokens_per_s": 120.0, "version": 2,
               "reward": None})  # fmt: skip
    assert exported(quick_ray, "step tiny") == {
        "step tiny": 2.0, "version tiny": 2.0, "objective tiny,love": 0.07, "objective tiny,safety": 0.9,
        "phase_seconds tiny,learn": 7.5, "tokens_per_s tiny": 120.0,
    }  # fmt: skip


def test_the_dashboard_is_that_of_the_code_and_draws_every_metric() -> None:
    drawn = gauges.dashboard()
    assert json.loads(GRAFANA.read_text()) == drawn, "write rluf/tracking/grafana.json again from gauges.dashboard()"
    asked = {target["expr"] for panel in drawn["panels"] for target in panel["targets"]}
    names = {gauges.place(spec.key, catalogue.OWN)[0] for spec in catalogue.catalogue(catalogue.OWN)}
    assert {f'ray_rluf_{name}{{run=~"$run"}}' for name in names} <= asked
    assert len({panel["id"] for panel in drawn["panels"]}) == len(drawn["panels"])
    corners = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in drawn["panels"]}
    assert len(corners) == len(drawn["panels"])


def test_rays_grafana_finds_in_it_what_it_finds_in_rays_own() -> None:
    """Grafana loads every dashboard of the folder that Ray provisions: by uid, over Ray's own data source."""
    factory = pytest.importorskip("ray.dashboard.modules.metrics.grafana_dashboard_factory")
    made = [getattr(factory, name)() for name in dir(factory) if re.fullmatch(r"generate_\w+_grafana_dashboard", name)]
    rays = [json.loads(content) for content, _ in made]
    ours = json.loads(GRAFANA.read_text())
    assert len(rays) > 3 and ours["uid"] not in [one["uid"] for one in rays]
    assert set(ours) <= set(rays[0])
    panels = [panel for one in rays for panel in one["panels"] if panel["type"] != "row"]
    for panel in ours["panels"]:
        assert set(panel) <= {key for one in panels for key in one}
        assert panel["datasource"] == panels[0]["datasource"]
        assert all(set(target) <= set(panels[0]["targets"][0]) for target in panel["targets"])
    theirs = {one["name"]: one for one in rays[0]["templating"]["list"]}
    source, run = ours["templating"]["list"]
    assert (source["type"], source["query"]) == (theirs["datasource"]["type"], theirs["datasource"]["query"])
    assert run["type"] in {one["type"] for one in theirs.values()}
