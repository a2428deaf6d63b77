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


def list_ray_clusters(node: Any) -> list[dict[str, Any]]:
    """Every RayCluster specification inside a manifest."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    clusters = [cluster for child in children for cluster in list_ray_clusters(child)]
    return clusters + ([node] if isinstance(node, dict) and "headGroupSpec" in node else [])


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_every_launch_file_that_starts_ray_turns_on_its_token_authentication(file: Path) -> None:
    text = file.read_text()
    content = yaml.safe_load(text) if file.suffix == ".yaml" else {}
    clusters = list_ray_clusters(content)
    assert all(cluster.get("authOptions") == {"mode": "token"} for cluster in clusters)
    # Without a Kubernetes operator the nodes are started by commands: the mode is exported first, or set in each.
    commands = [line for line in text.splitlines() if "ray start" in line and not line.lstrip().startswith("#")]
    exported = "export RAY_AUTH_MODE=token" in text
    assert all(exported or "RAY_AUTH_MODE=token" in command for command in commands)
    starts_ray = bool(clusters or commands)
    assert starts_ray == (file.name in ("aws.yaml", "raycluster.yaml", "rayjob.yaml", "rayservice.yaml", "slurm.sh"))
    assert starts_ray or file.name == "nginx.conf" or "RAY_AUTH_MODE=token" in text


def test_the_rayservice_scales_and_is_upgraded_in_place() -> None:
    spec = yaml.safe_load((LAUNCH / "rayservice.yaml").read_text())["spec"]
    assert spec["upgradeStrategy"] == {"type": "None"}
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"] is True


def test_the_reverse_proxy_has_the_limits_of_the_listener() -> None:
    from rluf.serve import listener
    from rluf.serve.middleware import BODY_TIMEOUT_S, MAX_BODY_BYTES

    lines = [line.partition("#")[0].strip().rstrip(";") for line in (LAUNCH / "nginx.conf").read_text().splitlines()]
    directives = dict(line.partition(" ")[::2] for line in lines if line)
    assert directives["client_header_timeout"] == f"{listener.HEADERS_TIMEOUT_S:g}s"
    assert directives["client_body_timeout"] == f"{BODY_TIMEOUT_S:g}s"
    assert directives["keepalive_timeout"] == f"{listener.KEEP_ALIVE_S}s"
    assert directives["send_timeout"] == f"{listener.WRITE_TIMEOUT_S:g}s"
    assert directives["client_max_body_size"] == f"{MAX_BODY_BYTES >> 20}m"
    buffer_count, buffer_kib = directives["large_client_header_buffers"].rstrip("k").split()
    assert int(buffer_count) * int(buffer_kib) << 10 == listener.MAX_HEADER_BYTES
    assert "proxy_set_header X-Forwarded-For $remote_addr" in lines
    assert any(line.startswith("limit_conn connections") for line in lines)
