"""Ray options, process environment and placement groups of each role."""

from __future__ import annotations

import os

import pytest

from cluster.placement import (
    SHARED_GROUP_NAME,
    PlacementGroups,
    actor_environment,
    actor_options,
    compute_threads,
    placement_bundles,
)
from rluf.config.derived import plan_actor_pools
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import DeadlineError


def make_settings(*overrides: str) -> Settings:
    return load_settings(None, overrides).settings


def test_options_of_each_role() -> None:
    settings = make_settings(
        "cluster.gpus_per_engine=1",
        "cluster.gpus_per_reward=0.25",
    )
    options = {role: actor_options(settings, role) for role in ("rollout", "reward", "learner")}
    resources = {role: (value["num_cpus"], value["num_gpus"]) for role, value in options.items()}
    assert resources == {"rollout": (1, 1), "reward": (0.25, 0.25), "learner": (0.5, 0)}
    assert options["learner"]["max_restarts"] == 0


def test_environment_of_each_role() -> None:
    settings = make_settings("cluster.threads_per_actor=3")
    rollout, learner, reward = (actor_environment(settings, role) for role in ("rollout", "learner", "reward"))
    for environment in (rollout, learner, reward):
        assert (environment["OMP_NUM_THREADS"], environment["KMP_BLOCKTIME"]) == ("3", "0")
        assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert rollout["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_KVCACHE_SPACE" not in rollout
    on_gpu = make_settings("cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in actor_environment(on_gpu, "rollout")


@pytest.mark.parametrize("role", ["rollout", "learner", "reward"])
@pytest.mark.parametrize("gpus", [0, 0.25, 0.5, 1])
def test_only_actors_with_gpus_see_them_and_only_their_own(role: str, gpus: float) -> None:
    setting = {"rollout": "gpus_per_engine", "learner": "gpus_per_learner", "reward": "gpus_per_reward"}[role]
    settings = Settings()
    settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={setting: gpus})})
    environment = actor_environment(settings, role)
    if gpus == 0:
        assert (environment["CUDA_VISIBLE_DEVICES"], environment["DS_ACCELERATOR"]) == ("", "cpu")
    else:
        assert "CUDA_VISIBLE_DEVICES" not in environment and "DS_ACCELERATOR" not in environment
        # Where a cluster tells Ray not to assign GPUs, every rank of a node would take cuda:0.
        assert environment["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize(
    ("objective", "gpus"),
    [("{source: judge, path: length}", 0), ("{source: serve, path: 'http://host:8000'}", 0), ("{replicas: 1}", 1)],
)
def test_a_reward_actor_without_a_model_reserves_no_gpu_as_planned(objective: str, gpus: float) -> None:
    settings = make_settings("cluster.gpus_per_reward=1", f"objectives.safety={objective}")
    options = actor_options(settings, "reward", "safety")
    (pool,) = (pool for pool in plan_actor_pools(settings) if pool.name == "safety reward")
    assert (options["num_cpus"], options["num_gpus"]) == (pool.cpus_per_actor, pool.gpus_per_actor)
    assert options["num_gpus"] == gpus
    visible = options["runtime_env"]["env_vars"].get("CUDA_VISIBLE_DEVICES", "those that Ray assigns")
    assert visible == ("" if gpus == 0 else "those that Ray assigns")
    assert actor_options(settings, "reward", "love")["num_gpus"] == 1


def test_threads_share_the_cores_among_learner_ranks() -> None:
    assert compute_threads(make_settings(), cores=8) == 8
    assert compute_threads(make_settings("learner.workers=3"), cores=8) == 2
    assert compute_threads(make_settings("learner.workers=16"), cores=8) == 1
    assert compute_threads(make_settings("cluster.threads_per_actor=5", "learner.workers=3"), cores=8) == 5
    assert compute_threads(make_settings()) == len(os.sched_getaffinity(0))


def test_engines_and_learners_have_groups_of_their_own_or_share_bundles() -> None:
    pools = ["rollout.engines=2", "learner.workers=2"]
    separate = make_settings(*pools, "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1")
    assert placement_bundles(separate, with_learners=True) == {
        "engine 0": ([{"CPU": 1, "GPU": 1}], "STRICT_PACK"),
        "engine 1": ([{"CPU": 1, "GPU": 1}], "STRICT_PACK"),
        "learners": ([{"CPU": 1, "GPU": 1}] * 2, "PACK"),
    }
    halves = ("cluster.gpus_per_engine=0.5", "cluster.gpus_per_learner=0.5", "weight_sync.transport=cuda_ipc")
    shared = make_settings(*pools, *halves)
    assert placement_bundles(shared, with_learners=True) == {SHARED_GROUP_NAME: ([{"CPU": 1, "GPU": 1}] * 2, "PACK")}
    # Without learners too, an engine of half a GPU has no second one next to it.
    alone = {f"engine {index}": ([{"CPU": 1, "GPU": 1}], "STRICT_PACK") for index in range(2)}
    assert placement_bundles(shared, with_learners=False) == alone


@pytest.mark.slow
async def test_groups_without_resources_are_named(local_ray: None) -> None:
    groups = PlacementGroups(make_settings("rollout.engines=5"), with_learners=False)
    try:
        with pytest.raises(DeadlineError, match=r"waited 2 s for resources for engine 4; the cluster has 0 CPU"):
            await groups.wait_until_ready(2.0)
    finally:
        groups.release()


@pytest.mark.nightly
@pytest.mark.slow
def test_ray_shows_each_actor_its_own_gpus_whatever_the_cluster_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declared GPUs, and the variable that verl's clusters often set for every process."""
    import ray

    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
    )

    class DeviceReporter:
        def visible_devices(self) -> str:
            return os.environ.get("CUDA_VISIBLE_DEVICES", "unset")

    def start_reporters(role: str, count: int, *overrides: str) -> list[str]:
        options = actor_options(make_settings(*overrides), role)
        actors = [ray.remote(DeviceReporter).options(**options).remote() for _ in range(count)]
        reported: list[str] = ray.get([actor.visible_devices.remote() for actor in actors], timeout=60)
        for actor in actors:
            ray.kill(actor)
        return reported

    try:
        for role in ("rollout", "learner", "reward"):
            assert start_reporters(role, 1) == [""]
        assert sorted(start_reporters("learner", 2, "cluster.gpus_per_learner=1")) == ["0", "1"]
        (engine_devices,) = start_reporters("rollout", 1, "cluster.gpus_per_engine=2")
        assert len(engine_devices.split(",")) == 2
        assert len(start_reporters("reward", 1, "cluster.gpus_per_reward=0.5")[0].split(",")) == 1
    finally:
        ray.shutdown()


@pytest.mark.nightly
@pytest.mark.slow
async def test_groups_without_labels_leave_the_labeled_nodes_to_the_others() -> None:
    """Three nodes of one GPU: engines are not placed on the learners' node, reward actors follow their own label."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for node_index in range(3):
        labels = {"kind": "learn"} if node_index == 1 else {"kind": "score"} if node_index == 2 else {}
        cluster.add_node(num_cpus=2, num_gpus=1, labels=labels, object_store_memory=80 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    nodes = {node["NodeID"]: node["Labels"].get("kind") for node in ray.nodes()}
    settings = make_settings(
        "rollout.engines=2", "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1",
        "cluster.node_labels={learner: {kind: learn}, reward: {kind: score}}",
    )  # fmt: skip
    groups = PlacementGroups(settings, with_learners=True)

    class NodeReporter:
        def node_id(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    try:
        await groups.wait_until_ready(60.0)
        node_kinds = {}
        for role, index in (("rollout", 0), ("rollout", 1), ("learner", 0), ("reward", 0)):
            options = {**actor_options(settings, role), **groups.scheduling_options(role, index), "runtime_env": {}}
            node_kinds[role, index] = nodes[await ray.remote(NodeReporter).options(**options).remote().node_id.remote()]
        assert node_kinds["learner", 0] == "learn" and node_kinds["reward", 0] == "score"
        assert "learn" not in [node_kinds["rollout", index] for index in range(2)]
    finally:
        groups.release()
        ray.shutdown()
        cluster.shutdown()
