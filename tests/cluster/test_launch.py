"""The launch files: read by Ray's own validators, by a schema of the KubeRay fields they use, and by bash."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.plan import check, plan
from rluf.config.load import load_settings

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "cluster" / "launch"


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object that has these fields and no others."""
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = closed(
    ["name", "image", "resources"],
    name=TEXT,
    image=TEXT,
    env={
        "type": "array",
        "items": closed(
            ["name"],
            name=TEXT,
            value=TEXT,
            valueFrom=closed(
                ["secretKeyRef"], secretKeyRef=closed(["name", "key"], name=TEXT, key=TEXT, optional=FLAG)
            ),
        ),
    },
    ports={"type": "array", "items": closed(["containerPort"], containerPort=COUNT, name=TEXT)},
    resources=closed(["requests", "limits"], requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts={"type": "array", "items": closed(["name", "mountPath"], name=TEXT, mountPath=TEXT)},
)
VOLUME = closed(
    ["name"],
    name=TEXT,
    persistentVolumeClaim=closed(["claimName"], claimName=TEXT),
    emptyDir=closed([], medium=TEXT, sizeLimit=QUANTITY),
)
TEMPLATE = closed(
    ["spec"],
    spec=closed(
        ["containers"],
        terminationGracePeriodSeconds=COUNT,
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array", "items": VOLUME},
    ),
)
START = {"type": "object", "additionalProperties": TEXT}
CLUSTER = closed(
    ["rayVersion", "headGroupSpec", "workerGroupSpecs", "authOptions"],
    rayVersion=TEXT,
    authOptions=closed(["mode"], mode={"const": "token"}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed([], idleTimeoutSeconds=COUNT),
    headGroupSpec=closed(["template"], rayStartParams=START, template=TEMPLATE),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
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
JOB = closed(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=TEXT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    rayClusterSpec=CLUSTER,
)


def manifest(name: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text())
    about = closed(["name"], name={"type": "string", "pattern": "^[a-z0-9-]+$"})
    whole = closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=about,
        spec=spec,
    )
    jsonschema.validate(content, whole)
    return content


def capacity(cluster: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Total resources and nodes of a RayCluster at its largest, as Ray's own reader of it sees them."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    whole = {"metadata": {"name": "rluf", "namespace": "default"}, "spec": cluster}
    told = _derive_autoscaling_config_from_ray_cr(whole)
    validate_config(told)
    nodes = []
    for name, kind in told["available_node_types"].items():
        count = 1 if name == told["head_node_type"] else kind["max_workers"]
        nodes += [{key: float(kind["resources"].get(key, 0)) for key in ("CPU", "GPU")}] * count
    return {key: sum(node[key] for node in nodes) for key in ("CPU", "GPU")}, nodes


def test_rayjob_is_valid_and_its_cluster_holds_its_config() -> None:
    content = manifest("rayjob.yaml", "RayJob", JOB)["spec"]
    words = content["entrypoint"].split()
    assert words[:4] == ["python", "-m", "rluf.train", "--config"]
    total, nodes = capacity(content["rayClusterSpec"])
    check(plan(load_settings(ROOT / words[4]).settings), total, nodes)


def test_raycluster_is_valid_and_grows_to_64_gpus() -> None:
    content = manifest("raycluster.yaml", "RayCluster", CLUSTER)
    total, nodes = capacity(content["spec"])
    check(plan(load_settings(ROOT / "configs" / "llama3-70b-64gpu.yaml").settings), total, nodes)


def test_a_wrong_field_is_seen() -> None:
    content = yaml.safe_load((LAUNCH / "raycluster.yaml").read_text())
    content["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.validate(content["spec"], CLUSTER)


def test_ray_up_file_passes_rays_schema_and_grows_to_64_gpus() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    told = prepare_config(yaml.safe_load((LAUNCH / "aws.yaml").read_text()))
    validate_config(told)
    kinds = told["available_node_types"]
    gpus = sum(kind["resources"].get("GPU", 0) * kind["max_workers"] for kind in kinds.values())
    assert gpus == plan(load_settings(ROOT / "configs" / "llama3-70b-64gpu.yaml").settings).gpus
    assert all("RAY_AUTH_MODE=token" in c for c in told["head_start_ray_commands"] if "ray start" in c)


def test_slurm_script_is_bash_and_asks_for_what_its_config_needs() -> None:
    file = LAUNCH / "slurm.sh"
    subprocess.run(["bash", "-n", str(file)], check=True, capture_output=True)
    told = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in file.read_text().splitlines()
                if line.startswith("#SBATCH") and "=" in line)  # fmt: skip
    node = {"CPU": float(told["cpus-per-task"]), "GPU": float(told["gpus-per-node"])}
    count = int(told["nodes"])
    planned = plan(load_settings(ROOT / "configs" / "llama3-70b-64gpu.yaml").settings)
    check(planned, {key: amount * count for key, amount in node.items()}, [node] * count)


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_no_launch_file_holds_a_secret(file: Path) -> None:
    text = file.read_text()
    assert "TOKEN=" not in text and "KEY=" not in text
    assert "RAY_AUTH_MODE: disabled" not in text and "mode: disabled" not in text
