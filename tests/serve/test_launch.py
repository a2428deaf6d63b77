"""The launch files: Ray Serve's own schema takes them, and what they name exists."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rluf.config.load import load_settings

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "cluster" / "launch"


def serve_configs() -> dict[str, Any]:
    service = yaml.safe_load((LAUNCH / "rayservice.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((LAUNCH / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_serves_own_schema_takes_it_and_its_settings_load(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    (app,) = ServeDeploySchema.model_validate(serve_configs()[name]).applications
    module, _, function = app.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    settings = load_settings(ROOT / app.args["config"], app.args["overrides"]).settings
    assert not settings.serve.local
    assert settings.serve.port == 8000


def test_the_manifest_is_a_rayservice_of_our_ray_with_its_secrets_by_reference() -> None:
    service = yaml.safe_load((LAUNCH / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert f"ray[data,default,serve,train]=={cluster['rayVersion']}" in (ROOT / "pyproject.toml").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {entry["name"] for entry in container["env"]} == {"RLUF_SERVE_TOKEN", "RLUF_SERVE_SALT"}
        assert all("secretKeyRef" in entry["valueFrom"] for entry in container["env"])
