"""Launch files against Ray's own validators, a schema of the KubeRay fields they use, and stand-ins of Slurm."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


STARTS_NO_RAY = {"networkpolicy.yaml", "nginx.conf", "serve_alerts.yaml", "serve_dashboard.json"}
"""Launch files that Kubernetes' network, Prometheus, Grafana and the reverse proxy read."""
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
            valueFrom={
                **closed_object(
                    [],
                    secretKeyRef=closed_object(["name", "key"], name=TEXT, key=TEXT, optional=FLAG),
                    fieldRef=closed_object(["fieldPath"], fieldPath=TEXT),
                ),
                "minProperties": 1,
                "maxProperties": 1,
            },
        ),
    },
    ports={"type": "array", "items": closed_object(["containerPort"], containerPort=COUNT, name=TEXT)},
    resources=closed_object(["requests", "limits"], requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts={
        "type": "array",
        "items": closed_object(["name", "mountPath"], name=TEXT, mountPath=TEXT, readOnly=FLAG),
    },
    securityContext=closed_object(
        [], capabilities=closed_object([], add={"type": "array", "items": TEXT}), runAsUser=COUNT, runAsGroup=COUNT
    ),
)
VOLUME = closed_object(
    ["name"],
    name=TEXT,
    persistentVolumeClaim=closed_object(["claimName"], claimName=TEXT, readOnly=FLAG),
    emptyDir=closed_object([], medium=TEXT, sizeLimit=QUANTITY),
)
TEMPLATE = closed_object(
    ["spec"],
    spec=closed_object(
        ["containers"],
        terminationGracePeriodSeconds=COUNT,
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array", "items": VOLUME},
        securityContext=closed_object([], runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT),
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
SERVICE = closed_object(
    ["serveConfigV2", "rayClusterConfig"],
    serveConfigV2=TEXT,
    upgradeStrategy=closed_object(["type"], type={"enum": ["None", "NewCluster"]}),
    rayClusterConfig=CLUSTER,
)
MANIFESTS = {
    "raycluster.yaml": ("RayCluster", CLUSTER),
    "rayjob.yaml": ("RayJob", JOB),
    "rayservice.yaml": ("RayService", SERVICE),
}


def read_manifest(name: str) -> dict[str, Any]:
    kind, spec = MANIFESTS[name]
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
    content = read_manifest("rayjob.yaml")["spec"]
    arguments = content["entrypoint"].split()
    assert arguments[:4] == ["python", "-m", "rluf.train", "--config"]
    total, nodes = read_capacity(content["rayClusterSpec"])
    check_plan(plan_resources(load_settings(ROOT / arguments[4]).settings), total, nodes)


def test_raycluster_is_valid_and_grows_to_64_gpus() -> None:
    content = read_manifest("raycluster.yaml")
    total, nodes = read_capacity(content["spec"])
    check_plan(plan_resources(load_settings(ROOT / "configs" / "llama3-70b-64gpu.yaml").settings), total, nodes)


def list_clusters() -> dict[str, dict[str, Any]]:
    """The RayCluster part of each Kubernetes manifest by file name."""
    specs = {name: read_manifest(name)["spec"] for name in MANIFESTS}
    return {name: spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec for name, spec in specs.items()}


def list_containers(cluster: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(pod spec, container) of the head and of each worker group."""
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [(pod, container) for pod in pods for container in pod["containers"]]


@pytest.mark.parametrize(
    ("name", "misspelled", "change"),
    [
        ("raycluster.yaml", "minReplica", lambda spec: spec["workerGroupSpecs"][0].update(minReplica=1)),
        ("raycluster.yaml", "authOption", lambda spec: spec.update(authOption={"mode": "token"})),
        ("raycluster.yaml", "hostpath", lambda spec: pod_of(spec)["volumes"][0].update(hostpath={"path": "/x"})),
        ("rayjob.yaml", "entryPoint", lambda spec: spec.update(entryPoint="python")),
        ("rayjob.yaml", "command", lambda spec: spec["rayClusterSpec"].update(command="x")),
        ("rayservice.yaml", "serveConfig", lambda spec: spec.update(serveConfig="x")),
        ("rayservice.yaml", "limit", lambda spec: pod_of(spec)["containers"][0]["resources"].update(limit={})),
    ],
)
def test_a_misspelled_field_is_refused(name: str, misspelled: str, change: Any) -> None:
    spec = yaml.safe_load((LAUNCH / name).read_text())["spec"]
    change(spec)
    with pytest.raises(jsonschema.ValidationError, match=misspelled):
        jsonschema.validate(spec, MANIFESTS[name][1])


def pod_of(spec: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = (spec.get("rayClusterConfig") or spec)["headGroupSpec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("mode", ["disabled", None])
@pytest.mark.parametrize("name", list(MANIFESTS))
def test_every_ray_cluster_requires_a_token(name: str, mode: str | None) -> None:
    cluster = list_clusters()[name]
    assert cluster["authOptions"] == {"mode": "token"}
    cluster = (
        {**cluster, "authOptions": {"mode": mode}}
        if mode
        else {key: value for key, value in cluster.items() if key != "authOptions"}
    )
    with pytest.raises(jsonschema.ValidationError, match=r"authOptions|token"):
        jsonschema.validate(cluster, CLUSTER)


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_every_launch_file_starts_ray_with_token_authentication(file: Path) -> None:
    if file.name in MANIFESTS:
        assert list_clusters()[file.name]["authOptions"]["mode"] == "token"
    elif file.suffix == ".sh":
        text = file.read_text()
        # The token exists before the first `ray start`, which does not create one.
        assert re.search("export .*RAY_AUTH_MODE=token", text)
        assert 0 < text.index("secrets.token_hex") < text.index(" ray start --head")
    elif file.name not in STARTS_NO_RAY:
        assert "import_path" in yaml.safe_load(file.read_text())["applications"][0], f"{file.name}: what starts Ray?"
        assert "RAY_AUTH_MODE=token" in file.read_text()


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_all_pods_of_training_share_model_cache_runs_and_secrets(name: str) -> None:
    environments = []
    for pod, container in list_containers(list_clusters()[name]):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        shared = [mounts[volume] for volume, value in volumes.items() if "persistentVolumeClaim" in value]
        environment = {entry["name"]: entry for entry in container["env"]}
        for variable in ("RLUF_RUNS", "RLUF_CACHE", "HF_HOME"):
            assert any(environment[variable]["value"].startswith(f"{path}/") for path in shared), variable
        assert all(environment[key]["valueFrom"]["secretKeyRef"]["optional"] for key in ("HF_TOKEN", "WANDB_API_KEY"))
        (memory,) = (volume["emptyDir"] for volume in volumes.values() if "emptyDir" in volume)
        assert mounts["memory"] == "/dev/shm" and memory["medium"] == "Memory"
        # Pages of a memory volume count towards the container's limit.
        limits = container["resources"]["limits"]
        assert 2 * int(memory["sizeLimit"].removesuffix("Gi")) < int(limits["memory"].removesuffix("Gi"))
        assert container["resources"]["requests"] == limits and pod["securityContext"]["fsGroup"] == 1000
        environments.append(container["env"])
    assert all(environment == environments[0] for environment in environments)


@pytest.mark.parametrize("name", list(MANIFESTS))
def test_the_user_of_the_image_may_write_every_claim(name: str) -> None:
    """A claim belongs to root; without fsGroup the user of the Dockerfile cannot write runs or feedback."""
    (uid,) = re.findall(r"useradd .*--uid (\d+)", (ROOT / "Dockerfile").read_text())
    for pod, _ in list_containers(list_clusters()[name]):
        assert pod["securityContext"] == dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), int(uid))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*gpu.yaml")), ids=lambda path: path.name)
def test_gpu_configs_wait_for_nodes_that_join_later(path: Path) -> None:
    """Worker pods and Slurm nodes join after the job has started."""
    assert load_settings(path).settings.timeouts.autoscale_s >= 600


def test_slurm_script_is_bash_and_requests_what_its_config_needs() -> None:
    file = LAUNCH / "slurm.sh"
    subprocess.run(["bash", "-n", str(file)], check=True, capture_output=True)
    directives = [line for line in file.read_text().splitlines() if line.startswith("#SBATCH") and "=" in line]
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in directives)
    node = {"CPU": float(options["cpus-per-task"]), "GPU": float(options["gpus-per-node"])}
    node_count = int(options["nodes"])
    resource_plan = plan_resources(load_settings(ROOT / "configs" / "llama3-70b-64gpu.yaml").settings)
    check_plan(resource_plan, {kind: amount * node_count for kind, amount in node.items()}, [node] * node_count)


SRUN = """#!/usr/bin/env bash
echo "srun gpus=${SLURM_GPUS-} $*" >> "$CALLS"
for argument in "$@"; do case $argument in --nodelist=*) export NODE="${argument#*=}" ;; esac; done
while [[ "$1" == --* ]]; do shift; done
[ "${SLURM_EXPORT_ENV-}" = NONE ] && exec env -i PATH="$PATH" CALLS="$CALLS" NODE="$NODE" "$@"
exec "$@"
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": '#!/usr/bin/env bash\n[ "$1 $2" = "show hostnames" ] && printf "n1\\nn2\\nn3\\n"\n',
    "ip": "#!/usr/bin/env bash\necho '192.0.2.1 via 10.0.0.1 dev eth0 src 10.0.0.7 uid 0'\n",
    "nvidia-smi": "#!/usr/bin/env bash\nexit 9\n",
    "ray": """#!/usr/bin/env bash
[ -s "$RAY_AUTH_TOKEN_PATH" ] || { echo "no authentication token" >&2; exit 1; }
echo "ray $NODE cpus=$SRUN_CPUS_PER_TASK mode=$RAY_AUTH_MODE hf=$HF_HOME home=$HOME: $*" >> "$CALLS"
""",
    "python": """#!/usr/bin/env bash
[[ "$2" == *find_spec* ]] && exit 0
[ "$1" = -c ] && exec "$REAL_PYTHON" -S "$@"
sleep 0.1
echo "python $RAY_ADDRESS runs=$RLUF_RUNS home=$HOME: $*" >> "$CALLS"
exit 7
""",
}
"""Commands that record how they are called; `srun` runs its command here."""


def run_slurm_script(
    folder: Path, *arguments: str, stand_ins: dict[str, str] | None = None, **variables: str | None
) -> tuple[int, list[str], str]:
    """Run slurm.sh in an empty folder and home with stand-ins of Slurm's commands; exit code, calls and messages."""
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    for name, script in (STAND_INS | (stand_ins or {})).items():
        (binaries / name).write_text(script)
        (binaries / name).chmod(0o755)
    (folder / "home").mkdir(exist_ok=True)
    (folder / "calls").touch()
    environment: dict[str, str | None] = {
        "PATH": os.environ["PATH"], "HOME": str(folder / "home"), "CALLS": str(folder / "calls"),
        "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_ID": "4007",
        "REAL_PYTHON": sys.executable, **variables,
    }  # fmt: skip
    set_variables = {name: value for name, value in environment.items() if value is not None}
    process = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), *arguments],
        cwd=folder, env=set_variables, capture_output=True, timeout=60, text=True,
    )  # fmt: skip
    return process.returncode, (folder / "calls").read_text().splitlines(), process.stderr


def list_ray_starts(calls: list[str]) -> dict[str, list[str]]:
    """Arguments of `ray start` by node."""
    starts = [call for call in calls if call.startswith("ray ") and ": start" in call]
    return {call.split()[1]: shlex.split(call.partition(": ")[2]) for call in starts}


def test_slurm_script_runs_from_a_fresh_checkout_and_an_empty_home(tmp_path: Path) -> None:
    code, calls, _ = run_slurm_script(tmp_path, "--config", "configs/llama3-70b-64gpu.yaml")
    assert code == 7  # that of the run
    starts = list_ray_starts(calls)
    assert starts.keys() == {"n1", "n2", "n3"}
    assert {"--head", "--node-ip-address=10.0.0.7", "--port=20021", "--num-cpus=64"} <= {*starts["n1"]}
    assert all({"--address=10.0.0.7:20021", "--num-cpus=64"} <= {*starts[node]} for node in ("n2", "n3"))
    ray_calls = [call for call in calls if call.startswith("ray ") and ": start" in call]
    assert all(f"cpus=64 mode=token hf={tmp_path}/cache/hf home={tmp_path}/home:" in call for call in ray_calls)
    run_call = f"python 10.0.0.7:20021 runs={tmp_path}/runs home={tmp_path}/home: -m rluf.train"
    assert f"{run_call} --config configs/llama3-70b-64gpu.yaml --resume" in calls
    token_file = tmp_path / "runs" / ".ray-auth-token"
    token = token_file.read_text().strip()
    assert len(token) == 64 and token_file.stat().st_mode & 0o077 == 0
    assert not any(token in call for call in calls)


def test_slurm_script_keeps_paths_that_the_user_set(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("a" * 64)
    paths = {name: str(tmp_path / name) for name in ("RLUF_RUNS", "RLUF_CACHE", "HF_HOME")}
    _, calls, _ = run_slurm_script(tmp_path, RAY_AUTH_TOKEN_PATH=str(token_file), **paths)
    assert any(f"hf={tmp_path}/HF_HOME" in call for call in calls)
    assert token_file.read_text() == "a" * 64 and not (tmp_path / "runs").exists()


def shell(*lines: str) -> str:
    return "\n".join(("#!/usr/bin/env bash", *lines, ""))


HET_HOSTNAMES = shell(
    'case $3 in cpu-head) echo cpu-head ;; "gpu-[1-2]") printf "gpu-1\\ngpu-2\\n" ;; *) exit 1 ;; esac'
)
HET_JOB = {
    "SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST": "cpu-head", "SLURM_JOB_NODELIST_HET_GROUP_0": "cpu-head",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu-[1-2]", "SLURM_CPUS_PER_TASK": None,
    "SLURM_CPUS_PER_TASK_HET_GROUP_0": "16", "SLURM_CPUS_PER_TASK_HET_GROUP_1": "96",
}  # fmt: skip
"""A head without GPUs and two nodes with GPUs, as sbatch gives them to the script."""
NO_ROUTE = shell('echo "RTNETLINK answers: Network is unreachable" >&2', "exit 2")


@pytest.mark.parametrize(
    ("stand_ins", "variables", "nodes", "expected_calls"),
    [
        ({"scontrol": shell("echo n1")}, {}, ["n1"], []),
        ({"scontrol": shell("printf 'r1-gpu[8]n%02d.hpc\\n' 8 9 10")}, {"SLURM_JOB_NODELIST": "r1-gpu[8]n[08-10].hpc"},
         [f"r1-gpu[8]n{i}.hpc" for i in ("08", "09", "10")], []),
        ({"ip": NO_ROUTE, "hostname": shell('[ "$1" = -I ] && echo "10.1.2.3 172.17.0.1 "')}, {}, None,
         ["--node-ip-address=10.1.2.3 --port=20021", "python 10.1.2.3:20021"]),
        ({"ip": shell("echo '192.0.2.1 dev ib0 src 10.9.9.9 uid 0 \\    cache'")}, {}, None, ["python 10.9.9.9:20021"]),
        ({}, {"HOME": None}, None, ["home={folder}/cache/home: start", "home={folder}/cache/home: -m rluf.train"]),
        ({}, {"HOME": "/proc/1/read-only"}, None, ["home={folder}/cache/home: -m rluf.train"]),
        ({}, {"SLURM_EXPORT_ENV": "NONE"}, None, ["ray n2 cpus=64 mode=token hf={folder}/cache/hf"]),
        ({}, {"SLURM_GPUS": "24"}, None, ["srun gpus= --nodes=1"]),
        ({}, {"SLURM_GPUS_ON_NODE": "4"}, None, ["--num-cpus=64"]),
        ({}, {"SLURM_CPUS_PER_TASK": None}, None, [f"--num-cpus={len(os.sched_getaffinity(0))}"]),
        ({}, {"SLURM_JOB_ID": "4008"}, None, ["--port=20024", "client-server-port=20025", "--dashboard-port=20026"]),
        ({}, {"SLURM_JOB_ID": "67043999"}, None, ["--port=31997", "--dashboard-port=31999"]),
        ({}, {"SLURM_JOB_ID": None}, None, ["--port=20000"]),
        ({"scontrol": HET_HOSTNAMES}, HET_JOB, ["cpu-head", "gpu-1", "gpu-2"],
         ["ray cpu-head cpus=16", "ray gpu-1 cpus=96", "ray gpu-2 cpus=96", "--het-group=0 --nodelist=cpu-head",
          "--het-group=1 --nodelist=gpu-2", "--num-cpus=96"]),
        ({"scontrol": HET_HOSTNAMES}, {**HET_JOB, "SLURM_JOB_NODELIST_HET_GROUP_0": "gpu-[1-2]"}, ["gpu-1", "gpu-2"],
         ["ray gpu-1 cpus=16"]),
        ({"ip": NO_ROUTE, "hostname": shell('[ "$1" = -I ] && echo "fd00::7 2001:db8::7 "')}, {}, None,
         ["--node-ip-address=fd00::7 --port=20021", "--address=[fd00::7]:20021", "python [fd00::7]:20021"]),
        ({"ip": NO_ROUTE, "hostname": shell('[ "$1" = -I ] && echo "fd00::7 10.1.2.3 172.17.0.1 "')}, {}, None,
         ["--node-ip-address=10.1.2.3", "python 10.1.2.3:20021"]),
        ({}, {"RLUF_RUNS": "out/runs", "RLUF_CACHE": "../c", "RAY_AUTH_TOKEN_PATH": "out/token"}, None,
         ["runs={folder}/out/runs home", "hf={folder.parent}/c/hf"]),
    ],
    ids=["one node", "names with brackets", "no default route", "InfiniBand", "no HOME", "HOME not writable",
         "--export=NONE", "--gpus", "other GPUs per node", "no CPUs per task", "next job", "large job id", "no job id",
         "heterogeneous job", "one node in two components", "IPv6 only", "IPv6 and IPv4", "relative paths"],
)  # fmt: skip
def test_slurm_script_runs_in_other_allocations(
    tmp_path: Path, stand_ins: dict[str, str], variables: dict[str, str | None], nodes: list[str] | None,
    expected_calls: list[str],
) -> None:  # fmt: skip
    folder = tmp_path / "a check out"
    folder.mkdir()
    code, calls, messages = run_slurm_script(folder, "steps=3", stand_ins=stand_ins, **variables)
    assert code == 7, messages
    assert list_ray_starts(calls).keys() == {*(nodes or ["n1", "n2", "n3"])}
    for expected in expected_calls:
        assert any(expected.format(folder=folder) in call for call in calls), (expected, calls)
    # The nodes count their own GPUs; none is assumed.
    assert not any("--num-gpus" in call or "gpus=24" in call for call in calls)


@pytest.mark.parametrize(
    ("stand_ins", "variables", "message"),
    [
        ({}, {"SLURM_JOB_NODELIST": None}, "submit this script with sbatch"),
        ({"python": shell("exit 1")}, {}, "submit from the checkout, after make setup EXTRA=gpu"),
        ({"scontrol": shell('echo "scontrol: error: Unable to contact slurm controller" >&2', "exit 1")}, {},
         "Unable to contact slurm controller"),
        ({"ip": NO_ROUTE, "hostname": shell("")}, {}, "node n1 has no address"),
        ({"ray": shell('[ "$1" = start ] && echo "Address in use" >&2', "exit 1")}, {},
         "Ray's head on n1 has ended; see its messages above"),
        ({}, {"RAY_AUTH_TOKEN_PATH": "empty"}, "empty has no token that you can read"),
    ],
    ids=["bash instead of sbatch", "another folder", "no controller", "no address", "port in use", "empty token"],
)  # fmt: skip
def test_slurm_script_stops_with_the_reason_before_the_run(
    tmp_path: Path, stand_ins: dict[str, str], variables: dict[str, str | None], message: str
) -> None:
    (tmp_path / "empty").touch()
    code, calls, messages = run_slurm_script(tmp_path, stand_ins=stand_ins, **variables)
    assert code not in (0, 7) and message in messages
    assert not any(call.startswith("python") for call in calls)


def test_slurm_jobs_that_start_together_from_one_checkout_share_one_token(tmp_path: Path) -> None:
    read_token = shell(
        '[[ "$2" == *find_spec* ]] && exit 0', '[ "$1" = -c ] || { cat "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"; exit 7; }',
        'sleep 0.3; exec "$REAL_PYTHON" -S "$@"',
    )  # fmt: skip
    folders = [tmp_path / str(job) for job in range(3)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(
            lambda folder: run_slurm_script(folder, stand_ins={"python": read_token}, RLUF_RUNS="../runs"), folders
        )
        tokens = [call for _, calls, _ in results for call in calls if len(call) == 64 and " " not in call]
    assert len(tokens) == 3 and len(set(tokens)) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".ray-auth-token"]


def test_ray_accepts_the_options_of_the_slurm_script() -> None:
    from ray.scripts.scripts import start

    script = (LAUNCH / "slurm.sh").read_text().replace("\\\n", " ")
    commands = [line.partition("ray start ")[2].rstrip(" &") for line in script.splitlines() if " ray start " in line]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(re.sub(r"\$\(\(.*?\)\)|\$\{cpus\[\w+\]\}|\$port", "1", command))
        start.make_context("start", words)


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_no_launch_file_contains_a_secret(file: Path) -> None:
    text = file.read_text()
    assert "TOKEN=" not in text and "KEY=" not in text
    assert "RAY_AUTH_MODE: disabled" not in text and "mode: disabled" not in text


def test_the_rayservice_scales_and_each_cluster_of_an_upgrade_writes_its_own_folder() -> None:
    spec = yaml.safe_load((LAUNCH / "rayservice.yaml").read_text())["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    groups = [spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]]
    for container in (container for group in groups for container in group["template"]["spec"]["containers"]):
        environment = {entry["name"]: entry for entry in container["env"]}
        writer_label = environment["RLUF_FEEDBACK_WRITER"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert writer_label == "metadata.labels['ray.io/cluster']"
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
