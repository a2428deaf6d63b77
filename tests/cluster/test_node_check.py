"""Nodes that lack storage, model, packages or GPU memory are refused before actors start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.node_check import NodeReport, check_gpus, check_node_report, check_nodes, inspect_node
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ResourceError

CONFIGS = Path(__file__).parents[2] / "configs"
VERSIONS = {"ray": "2.60.0", "vllm": "0.32.0"}
PATHS = {"/shared/hf/x/config.json": "the model", "/shared/runs/.mark": "/shared/runs", "/c/.mark": "/c"}


def load_config(name: str, *overrides: str) -> Settings:
    return load_settings(CONFIGS / name, overrides).settings


def test_a_node_reports_missing_paths_and_its_packages(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    report = inspect_node([str(tmp_path / "a"), str(tmp_path / "b")], reads_gpus=False)
    assert report.missing_paths == (str(tmp_path / "b"),)
    assert report.versions["ray"] == "2.60.0" and report.versions.keys() >= {"torch", "deepspeed"}
    check_node_report("n", inspect_node([str(tmp_path / "a")], reads_gpus=False), {}, report.versions)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("/shared/hf/x/config.json", r"node n2 does not see the model \(/shared/hf/x\).*HF_HOME"),
        ("/shared/runs/.mark", r"node n2 does not see the folder /shared/runs of the driver.*RLUF_RUNS"),
        ("/c/.mark", r"the folder /c of the driver.*RLUF_CACHE"),
    ],
)
def test_storage_that_a_node_does_not_see_is_named(missing: str, message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        check_node_report("n2", NodeReport((missing,), VERSIONS), PATHS, VERSIONS)


@pytest.mark.parametrize("versions", [{"ray": "2.59.0", "vllm": "0.32.0"}, {"ray": "2.60.0"}, {}])
def test_other_packages_are_named(versions: dict[str, str]) -> None:
    with pytest.raises(ResourceError, match=r"node n2 has other packages .*(2\.59\.0|none) instead of"):
        check_node_report("n2", NodeReport((), versions), PATHS, VERSIONS)


@pytest.mark.parametrize(
    ("config", "overrides", "gib", "refused"),
    [
        ("qwen-0.5b-1gpu.yaml", [], 22.4, ""),
        ("qwen-0.5b-1gpu.yaml", [], 15.8, "learner needs"),
        ("qwen-0.5b-1gpu.yaml", ["model.path=Qwen/Qwen2.5-7B-Instruct"], 19.5, "rollout needs"),
        ("llama3-8b-8gpu.yaml", [], 79.6, ""),
        ("llama3-8b-8gpu.yaml", [], 39.6, "learner needs"),
        ("llama3-8b-8gpu.yaml", ["algorithm.micro_batch_tokens=65536"], 79.6, "learner needs"),
        ("llama3-8b-8gpu.yaml", ["learner.gradient_checkpointing=false"], 79.6, "learner needs"),
        ("llama3-70b-64gpu.yaml", [], 79.6, ""),
        ("llama3-70b-64gpu.yaml", ["cluster.gpus_per_engine=1"], 79.6, "rollout needs"),
        ("llama3-70b-64gpu.yaml", ["learner.zero_stage=2"], 79.6, "learner needs"),
        ("llama3-70b-64gpu.yaml", ["learner.workers=16"], 79.6, "learner needs"),
        ("llama3-70b-64gpu.yaml", ["cluster.gpus_per_reward=0.1"], 79.6, "reward needs"),
    ],
)
def test_plans_that_do_not_fit_the_gpus_are_refused(
    config: str, overrides: list[str], gib: float, refused: str
) -> None:
    settings = load_config(config, *overrides)
    report = NodeReport((), {}, "580.65.06", (int(gib * 2**30),) * 8)
    if not refused:
        check_gpus(settings, "n", report, {})
        return
    with pytest.raises(ResourceError, match=rf"{refused} about .* GiB on each GPU, but a GPU of node n has"):
        check_gpus(settings, "n", report, {})


@pytest.mark.parametrize(("driver", "is_old"), [("570.86.15", True), ("535.104.05", True), ("580.65.06", False)])
def test_an_old_driver_is_named(driver: str, is_old: bool) -> None:
    report = NodeReport((), {}, driver, (80 << 30,))
    if not is_old:
        check_gpus(load_config("qwen-0.5b-1gpu.yaml"), "n", report, {})
        return
    with pytest.raises(ResourceError, match=rf"NVIDIA driver {driver}; CUDA 13 needs 580"):
        check_gpus(load_config("qwen-0.5b-1gpu.yaml"), "n", report, {})


LABELED_POOLS = "cluster.node_labels={rollout: {pool: big}, learner: {pool: big}, reward: {pool: small}}"


@pytest.mark.parametrize(
    ("overrides", "labels", "gib", "refused"),
    [
        ([LABELED_POOLS], {"pool": "small", "ray.io/node-id": "1"}, 23.6, ""),
        ([LABELED_POOLS], {"pool": "small"}, 11.6, "love reward"),
        ([LABELED_POOLS], {"pool": "big"}, 39.6, "learner"),
        ([LABELED_POOLS], {"pool": "other"}, 15.6, ""),
        # Nothing keeps the learners off a node without labels.
        ([], {}, 23.6, r"learner.*keep the pool to nodes with larger GPUs \(cluster\.node_labels\)"),
    ],
    ids=["small GPUs for rewards", "too small for rewards", "too small for learners", "no pool's", "no labels"],
)
def test_gpus_of_different_sizes_serve_the_pools_that_may_run_there(
    overrides: list[str], labels: dict[str, str], gib: float, refused: str
) -> None:
    settings = load_config("llama3-70b-64gpu.yaml", "cluster.gpus_per_reward_worker=0", *overrides)
    report = NodeReport((), {}, "580.65.06", (80 << 30, int(gib * 2**30)))
    if not refused:
        check_gpus(settings, "n", report, labels)
        return
    with pytest.raises(ResourceError, match=refused):
        check_gpus(settings, "n", report, labels)


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.65.06, 81559'\necho '580.65.06, 81559'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(shutil.which('sh') or '/bin/sh').parent}")
    report = inspect_node([], reads_gpus=True)
    assert (report.driver, report.gpu_bytes) == ("580.65.06", (81559 << 20,) * 2)
    program.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert inspect_node([], reads_gpus=True).gpu_bytes == ()


@pytest.mark.nightly
@pytest.mark.slow
def test_every_node_of_a_cluster_is_asked(tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for gpus in (0, 1):
        cluster.add_node(num_cpus=1, num_gpus=gpus, object_store_memory=80 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        (tmp_path / "model").mkdir()
        settings = load_config("qwen-0.5b-1gpu.yaml")
        folders = (tmp_path / "model", tmp_path / "runs", tmp_path / "cache")
        with pytest.raises(ResourceError, match="does not see the model"):
            check_nodes(settings, *folders)
        (tmp_path / "model" / "config.json").touch()
        check_nodes(settings, *folders)
        assert not list(tmp_path.glob("*/.rluf-node-check-*"))
    finally:
        ray.shutdown()
        cluster.shutdown()
