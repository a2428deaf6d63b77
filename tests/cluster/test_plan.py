"""Resource plans, their check against clusters and nodes, and disk space."""

from pathlib import Path

import pytest

from cluster.plan import (
    cache_disk_bytes,
    check_free_space,
    check_host_disk,
    check_plan,
    format_plan,
    plan_resources,
    run_disk_bytes,
)
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ResourceError

CONFIGS = Path(__file__).parents[2] / "configs"


def make_settings(*overrides: str, config: str | None = None) -> Settings:
    return load_settings(CONFIGS / config if config else None, ["model.dtype=bfloat16", *overrides]).settings


def test_quickstart_fits_two_cores() -> None:
    resource_plan = plan_resources(make_settings())
    check_plan(resource_plan, {"CPU": 2.0})
    assert resource_plan.cpu_count == pytest.approx(1.3)
    assert resource_plan.gpu_count == 0
    assert len(resource_plan.bundles) == 5
    assert resource_plan.host_bytes < 12 * 2**30


@pytest.mark.parametrize(
    ("config", "gpu_count", "bundle_count"), [("llama3-8b-8gpu.yaml", 8, 10), ("llama3-70b-64gpu.yaml", 64, 43)]
)
def test_gpu_configs_use_every_gpu_of_their_cluster(config: str, gpu_count: int, bundle_count: int) -> None:
    resource_plan = plan_resources(make_settings(config=config))
    assert (resource_plan.gpu_count, len(resource_plan.bundles)) == (gpu_count, bundle_count)
    check_plan(resource_plan, {"CPU": 1000.0, "GPU": float(gpu_count)}, [{"CPU": 128.0, "GPU": 8.0}] * (gpu_count // 8))
    with pytest.raises(ResourceError):
        check_plan(resource_plan, {"CPU": 1000.0, "GPU": gpu_count - 1.0})


def test_a_shortage_names_the_requesters_and_ways_out() -> None:
    with pytest.raises(ResourceError) as raised:
        check_plan(plan_resources(make_settings("rollout.engines=8")), {"CPU": 2.0})
    message = str(raised.value)
    assert "needs 4.8 CPUs, but the cluster has 2" in message
    assert "rollout 8 x 0.5" in message
    assert message.count("; ") == 2
    for key in ("rollout.engines", "learner.workers", "RAY_ADDRESS"):
        assert key in message


def test_missing_gpus() -> None:
    resource_plan = plan_resources(make_settings("cluster.gpus_per_engine=1", "cluster.gpus_per_reward=1"))
    with pytest.raises(ResourceError, match=r"cluster\.gpus_per_engine=0"):
        check_plan(resource_plan, {"CPU": 8.0})
    with pytest.raises(ResourceError, match=r"cluster\.gpus_per_reward=0\.1 or 0"):
        check_plan(resource_plan, {"CPU": 8.0, "GPU": 2.0})
    check_plan(resource_plan, {"CPU": 8.0, "GPU": 4.0})


@pytest.mark.parametrize(
    ("share", "replicas", "gpu_count"), [(0.6, 1, 3), (0.5, 1, 2), (0.4, 1, 2), (0.33, 1, 1), (0.1, 4, 2), (1, 1, 3)]
)
def test_a_share_of_a_gpu_lies_on_one_gpu(share: float, replicas: int, gpu_count: int) -> None:
    overrides = [f"objectives.{name}.replicas={replicas}" for name in ("love", "helpfulness", "safety")]
    resource_plan = plan_resources(
        make_settings(f"cluster.gpus_per_reward={share}", "cluster.gpus_per_reward_worker=0", *overrides)
    )
    assert resource_plan.gpu_count == gpu_count
    check_plan(resource_plan, {"CPU": 16.0, "GPU": float(gpu_count)}, [{"CPU": 16.0, "GPU": float(gpu_count)}])
    if gpu_count > 1:
        with pytest.raises(ResourceError, match=rf"needs {gpu_count} GPUs"):
            check_plan(resource_plan, {"CPU": 16.0, "GPU": gpu_count - 1.0})


def test_reward_training_counts_where_it_needs_more_than_training() -> None:
    with pytest.raises(ResourceError, match=r"reward training 20 x 0\.2"):
        check_plan(plan_resources(make_settings("reward.workers=20")), {"CPU": 2.0})


def test_an_actor_must_fit_one_node() -> None:
    resource_plan = plan_resources(make_settings(config="llama3-70b-64gpu.yaml"))
    with pytest.raises(ResourceError, match="8 GPU on one node, but the largest node has 4"):
        check_plan(resource_plan, {"CPU": 1000.0, "GPU": 64.0}, [{"CPU": 128.0, "GPU": 4.0}] * 16)


def test_little_memory_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_plan(plan_resources(make_settings()), {"CPU": 2.0, "memory": 1e9})
    assert "954 MiB" in caplog.text


def test_table_is_plain_without_a_terminal() -> None:
    resource_plan = plan_resources(make_settings())
    plain, colored = format_plan(resource_plan, use_rich=False), format_plan(resource_plan, use_rich=True)
    assert plain.isascii()
    assert "\x1b" not in plain
    assert "love reward" in plain
    assert "at once: 1.3 CPU, 0 GPU" in plain
    assert "\x1b" in colored


def test_disk_space_of_a_run() -> None:
    settings = make_settings()
    policy_bytes, optimizer_bytes = 2 * 134_515_008, 12 * 134_515_008
    bytes_without_checkpoints = run_disk_bytes(settings)

    def count_checkpoints(*overrides: str) -> float:
        checkpoint_bytes = run_disk_bytes(make_settings(*overrides)) - bytes_without_checkpoints
        return checkpoint_bytes / (policy_bytes + optimizer_bytes)

    assert count_checkpoints("learner.checkpoint_every_steps=7") == 2
    assert count_checkpoints("learner.checkpoint_every_steps=1") == 4
    assert count_checkpoints("learner.checkpoint_every_steps=1", "learner.keep_checkpoints=0") == 12
    assert cache_disk_bytes(settings) > policy_bytes
    check_free_space(Path("/data"), 10, 10, "run.root")
    with pytest.raises(ResourceError, match=r"/data has 9 B free, but the run may need 10 B.*run\.root"):
        check_free_space(Path("/data"), 10, 9, "run.root")


def test_check_host_disk_reads_this_machine(tmp_path: Path) -> None:
    check_host_disk(make_settings(config="tiny.yaml"), tmp_path / "not" / "yet", tmp_path / "cache")
    with pytest.raises(ResourceError, match=r"run\.root"):
        check_host_disk(make_settings("model.path=org/huge-9000000b"), tmp_path / "not" / "yet", tmp_path / "cache")


def test_a_labeled_node_must_be_large_enough() -> None:
    resource_plan = plan_resources(
        make_settings("cluster.node_labels={learner: {market: on-demand}}", config="llama3-8b-8gpu.yaml")
    )
    spot, on_demand = (
        {"CPU": 48.0, "GPU": gpus, "market=" + kind: 1.0} for kind, gpus in (("spot", 1.0), ("on-demand", 7.0))
    )
    total = {"CPU": 96.0, "GPU": 8.0}
    check_plan(resource_plan, total, [spot, on_demand])
    with pytest.raises(ResourceError, match="rollout with learner 7 x 1 need 7 GPUs on nodes with the label"):
        check_plan(resource_plan, total, [spot | {"GPU": 4.0}, on_demand | {"GPU": 4.0}])
    with pytest.raises(ResourceError) as raised:
        check_plan(resource_plan, total, [spot, spot])
    assert "the label market=on-demand but no node has it (existing labels: market=spot)" in str(raised.value)
    assert str(raised.value).count(", or ") == 2
    no_gpu = {"CPU": 48.0, "market=on-demand": 1.0}
    with pytest.raises(ResourceError, match="largest node with the label market=on-demand has 0 GPU"):
        check_plan(resource_plan, total, [spot | {"GPU": 8.0}, no_gpu])


def test_labeled_actors_must_fit_the_labeled_nodes_together() -> None:
    resource_plan = plan_resources(
        make_settings("cluster.node_labels={learner: {kind: learn}}", config="llama3-70b-64gpu.yaml")
    )
    plain, labeled = {"CPU": 96.0, "GPU": 8.0}, {"CPU": 96.0, "GPU": 8.0, "kind=learn": 1.0}
    total = {"CPU": 768.0, "GPU": 64.0}
    check_plan(resource_plan, total, [labeled] * 4 + [plain] * 4)
    with pytest.raises(ResourceError, match=r"need 32 GPUs on nodes with the label kind=learn .*which have 24"):
        check_plan(resource_plan, total, [labeled] * 3 + [plain] * 5)


TWO_GPU_ENGINES = ("cluster.gpus_per_engine=2", "rollout.engines=3")


@pytest.mark.parametrize(
    ("nodes", "overrides", "message"),
    [
        ([(8, 3), (8, 3)], TWO_GPU_ENGINES, "rollout: 3 actors of 2 CPU, 2 GPU each.*places for 2"),
        ([(8, 1), (8, 1), (8, 4)], TWO_GPU_ENGINES, "3 actors of 2 CPU, 2 GPU each.*places for 2"),
        ([(2, 1), (2, 1)], ("cluster.gpus_per_engine=0.6", "rollout.engines=3"), "places for 2"),
        ([(8, 2)], ("cluster.gpus_per_engine=0.6", "rollout.engines=3"), "places for 2"),
        (
            [(8, 4), (8, 3)],
            ("cluster.gpus_per_engine=0.4", "rollout.engines=15", "rollout.gpu_memory_share=0.4"),
            "places for 14",
        ),
        (
            [(1, 4), (30, 0)],
            ("cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1"),
            "rollout 1 x 1, learner 1 x 1 need 2 CPUs on nodes that can run them, which have 1",
        ),
    ],
)
def test_actors_that_fit_in_sum_but_not_on_the_nodes_are_refused(
    nodes: list[tuple[int, int]], overrides: tuple[str, ...], message: str
) -> None:
    node_resources = [{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus} for cpus, gpus in nodes]
    cluster = {kind: sum(node.get(kind, 0) for node in node_resources) for kind in ("CPU", "GPU")}
    resource_plan = plan_resources(load_settings(None, list(overrides)).settings)
    with pytest.raises(ResourceError, match=message):
        check_plan(resource_plan, cluster, node_resources)
    check_plan(resource_plan, {"CPU": 64, "GPU": 16}, [{"CPU": 32, "GPU": 8}, {"CPU": 32, "GPU": 8}])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [
                "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1", "learner.workers=2",
                "cluster.node_labels={rollout: {pool: a}, learner: {pool: a}}",
            ],
            "rollout 1 x 1, learner 2 x 1 need 3 GPUs on nodes with the label pool=a .*which have 2",
        ),
        (
            ["cluster.gpus_per_reward=1", "cluster.node_labels={reward: {pool: a}}"],
            "love reward 1 x 1, helpfulness reward 1 x 1, safety reward 1 x 1 need 3 GPUs on nodes with the label",
        ),
    ],
)  # fmt: skip
def test_pools_of_one_label_must_fit_together(overrides: list[str], message: str) -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0, "pool=a": 1.0}, {"CPU": 8.0, "GPU": 2.0}]
    with pytest.raises(ResourceError, match=message):
        check_plan(plan_resources(load_settings(None, overrides).settings), {"CPU": 16, "GPU": 4}, nodes)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.6, 0.3), (0.3, 0.3)])
def test_a_colocated_pair_has_a_gpu_to_itself_whatever_its_shares(shares: tuple[float, float]) -> None:
    overrides = [
        f"cluster.gpus_per_engine={shares[0]}", f"cluster.gpus_per_learner={shares[1]}",
        "weight_sync.transport=cuda_ipc", "rollout.engines=5", "learner.workers=5",
    ]  # fmt: skip
    resource_plan = plan_resources(make_settings(*overrides))
    assert resource_plan.gpu_count == 5 and [bundle.get("GPU") for bundle in resource_plan.bundles[:6]] == [1.0] * 5 + [
        None
    ]
    check_plan(resource_plan, {"CPU": 16.0, "GPU": 5.0}, [{"CPU": 16.0, "GPU": 5.0}])
    with pytest.raises(ResourceError, match="needs 5 GPUs, but the cluster has 4"):
        check_plan(resource_plan, {"CPU": 16.0, "GPU": 4.0})


def test_a_colocated_pair_runs_on_nodes_with_the_labels_of_both() -> None:
    overrides = [
        "cluster.gpus_per_engine=0.5", "cluster.gpus_per_learner=0.5", "weight_sync.transport=cuda_ipc",
        "cluster.node_labels={rollout: {pool: a}, learner: {market: on-demand}}",
    ]  # fmt: skip
    resource_plan = plan_resources(make_settings(*overrides))
    nodes = [{"CPU": 8.0, "GPU": 1.0, "pool=a": 1.0}, {"CPU": 8.0, "GPU": 1.0, "market=on-demand": 1.0}]
    with pytest.raises(ResourceError, match="pool=a with the label market=on-demand but no node has it"):
        check_plan(resource_plan, {"CPU": 16.0, "GPU": 2.0}, nodes)
    check_plan(resource_plan, {"CPU": 16.0, "GPU": 2.0}, [nodes[0] | nodes[1], nodes[0]])
