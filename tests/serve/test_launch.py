"""The launch files: Ray Serve's own schema accepts them, and everything they name exists."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rluf.config.load import load_settings

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "cluster" / "launch"


def load_serve_configs() -> dict[str, Any]:
    manifest = yaml.safe_load((LAUNCH / "rayservice.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((LAUNCH / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(manifest["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_the_file_matches_ray_serves_schema_and_its_settings_load(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(load_serve_configs()[name]).applications
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    settings = load_settings(ROOT / application.args["config"], application.args["overrides"]).settings
    assert not settings.serve.is_local
    assert settings.serve.port == 8000


def test_only_proxy_operator_and_submitter_reach_the_pods_of_ray() -> None:
    policy = yaml.safe_load((LAUNCH / "networkpolicy.yaml").read_text())
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    ray_pods = policy["spec"]["podSelector"]
    assert ray_pods["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    of_ray, of_operator, of_submitter, of_proxy = policy["spec"]["ingress"]
    assert of_ray == {"from": [{"podSelector": ray_pods}]}
    assert all(peer["podSelector"]["matchLabels"] for rule in (of_operator, of_proxy) for peer in rule["from"])
    # KubeRay submits from a Job with the name of the RayJob, to the dashboard.
    job_name = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())["metadata"]["name"]
    submitter = {"podSelector": {"matchLabels": {"batch.kubernetes.io/job-name": job_name}}}
    assert of_submitter == {"from": [submitter], "ports": [{"port": 8265}]}
    http_port = load_serve_configs()["serve.yaml"]["http_options"]["port"]
    assert of_proxy["ports"] == [{"port": http_port}] and {"port": http_port} in of_operator["ports"]


def test_the_manifest_uses_the_pinned_ray_and_references_its_secrets() -> None:
    manifest = yaml.safe_load((LAUNCH / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    assert f"ray[data,default,serve,train]=={cluster['rayVersion']}" in (ROOT / "pyproject.toml").read_text()
    for node_group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = node_group["template"]["spec"]["containers"]
        sources = {entry["name"]: entry["valueFrom"] for entry in container["env"]}
        # The two clusters of an upgrade have different labels, so that each writes feedback to a folder of its own.
        assert sources.pop("RLUF_FEEDBACK_WRITER") == {"fieldRef": {"fieldPath": "metadata.labels['ray.io/cluster']"}}
        assert set(sources) == {"RLUF_SERVE_TOKEN", "RLUF_USER_SALT"}
        assert all("secretKeyRef" in source for source in sources.values())
