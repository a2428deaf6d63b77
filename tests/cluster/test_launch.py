"""Launch files against Ray's own validators, a schema of the KubeRay fields they use, and bash."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.plan import check_plan, plan_resources
from rluf.config.load import load_settings

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "cluster" / "launch"


def closed_object(required: list[str], **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object that has these fields and no others."""
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = closed_object(
    ["name", "image", "resources"],
    name=TEXT,
    image=TEXT,
    env={
        "type": "array",
        "items": closed_object(
            ["name"],
            name=TEXT,
            value=TEXT,
            valueFrom=closed_object(
                ["secretKeyRef"], secretKeyRef=closed_object(["name", "key"], name=TEXT, key=TEXT, optional=FLAG)
            ),
        ),
    },
    ports={"type": "array", "items": closed_object(["containerPort"], containerPort=COUNT, name=TEXT)},
    resources=closed_object(["requests", "limits"], requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts={"type": "array", "items": closed_object(["name", "mountPath"], name=TEXT, mountPath=TEXT)},
)
VOLUME = closed_object(
    ["name"],
    name=TEXT,
    persistentVolumeClaim=closed_object(["claimName"], claimName=TEXT),
    emptyDir=closed_object([], medium=TEXT, sizeLimit=QUANTITY),
)
TEMPLATE = closed_object(
    ["spec"],
    spec=closed_object(
        ["containers"],
        terminationGracePeriodSeconds=COUNT,
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array", "items": VOLUME},
    ),
)
START = {"type": "object", "additionalProperties": TEXT}
CLUSTER = closed_object(
    ["rayVersion", "headGroupSpec", "workerGroupSpecs", "authOptions"],
    rayVersion=TEXT,
    authOptions=closed_object(["mode"], mode={"const": "token"}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed_object([], idleTimeoutSeconds=COUNT),
    headGroupSpec=closed_object(["template"], rayStartParams=START, template=TEMPLATE),
    workerGroupSpecs={
        "type": "array",
        "items": closed_object(
            ["groupName", "template"],
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=START,
            template=TEMPLATE,
        ),
    },
)
JOB = closed_object(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=TEXT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    rayClusterSpec=CLUSTER,
)


def read_manifest(name: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text())
    metadata = closed_object(["name"], name={"type": "string", "pattern": "^[a-z0-9-]+$"})
    schema = closed_object(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )
    jsonschema.validate(content, schema)
    return content


def read_capacity(cluster: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Total resources and nodes of a RayCluster at its maximum size, as Ray's autoscaler reads them."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    resource = {"metadata": {"name": "rluf", "namespace": "default"}, "spec": cluster}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    validate_config(config)
    nodes = []
    for type_name, node_type in config["available_node_types"].items():
        node_count = 1 if type_name == config["head_node_type"] else node_type["max_workers"]
        nodes += [{kind: float(node_type["resources"].get(kind, 0)) for kind in ("CPU", "GPU")}] * node_count
    return {kind: sum(node[kind] for node in nodes) for kind in ("CPU", "GPU")}, nodes


def test_rayjob_is_valid_and_its_cluster_holds_its_config() -> None:
    content = read_manifest("rayjob.yaml", "RayJob", JOB)["spec"]
    arguments = content["entrypoint"].split()
    assert arguments[:4] == ["python", "-m", "rluf.train", "--config"]
    total, nodes = read_capacity(content["rayClusterSpec"])
    check_plan(plan_resources(load_settings(ROOT / arguments[4]).settings), total, nodes)


def test_raycluster_is_valid_and_grows_to_64_gpus() -> None:
    content = read_manifest("raycluster.yaml", "RayCluster", CLUSTER)
    total, nodes = read_capacity(content["spec"])
    check_plan(plan_resources(load_settings(ROOT / "configs" / "llama3-70b-64gpu.yaml").settings), total, nodes)


def test_a_misspelled_field_is_refused() -> None:
    content = yaml.safe_load((LAUNCH / "raycluster.yaml").read_text())
    content["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(content["spec"], CLUSTER)


def test_ray_up_file_passes_rays_schema_and_grows_to_64_gpus() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((LAUNCH / "aws.yaml").read_text()))
    validate_config(config)
    node_types = config["available_node_types"].values()
    gpu_count = sum(node_type["resources"].get("GPU", 0) * node_type["max_workers"] for node_type in node_types)
    assert gpu_count == plan_resources(load_settings(ROOT / "configs" / "llama3-70b-64gpu.yaml").settings).gpu_count
    start_commands = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert start_commands and all("RAY_AUTH_MODE=token" in command for command in start_commands)


def test_slurm_script_is_bash_and_requests_what_its_config_needs() -> None:
    file = LAUNCH / "slurm.sh"
    subprocess.run(["bash", "-n", str(file)], check=True, capture_output=True)
    directives = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH") and "=" in line]
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in directives)
    node = {"CPU": float(options["cpus-per-task"]), "GPU": float(options["gpus-per-node"])}
    node_count = int(options["nodes"])
    resource_plan = plan_resources(load_settings(ROOT / "configs" / "llama3-70b-64gpu.yaml").settings)
    check_plan(resource_plan, {kind: amount * node_count for kind, amount in node.items()}, [node] * node_count)


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_no_launch_file_contains_a_secret(file: Path) -> None:
    text = file.read_text()
    assert "TOKEN=" not in text and "KEY=" not in text
    assert "RAY_AUTH_MODE: disabled" not in text and "mode: disabled" not in text
