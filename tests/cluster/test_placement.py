import os
from typing import Any

import pytest

from cluster.placement import (
    SHARED,
    Places,
    compute_threads,
    role_environment,
    role_options,
    wait_for_placement,
    wanted_room,
)
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ActorError, StallError


def settings(*overrides: str) -> Settings:
    return load_settings(None, overrides).settings


def test_options_of_each_role() -> None:
    told = settings(
        "cluster.cpus_per_engine=2",
        "cluster.gpus_per_engine=1",
        "cluster.cpus_per_reward=0.3",
        "cluster.gpus_per_reward=0.25",
    )
    assert (role_options(told, "rollout")["num_cpus"], role_options(told, "rollout")["num_gpus"]) == (2, 1)
    assert (role_options(told, "reward")["num_cpus"], role_options(told, "reward")["num_gpus"]) == (0.3, 0.25)
    assert role_options(told, "learner")["num_gpus"] == 0
    assert role_options(told, "learner")["max_restarts"] == 0


def test_environment_of_each_role() -> None:
    told = settings("cluster.threads=3")
    rollout, learner, reward = (role_environment(told, role) for role in ("rollout", "learner", "reward"))
    for names in (rollout, learner, reward):
        assert (names["OMP_NUM_THREADS"], names["KMP_BLOCKTIME"], names["OMP_WAIT_POLICY"]) == ("3", "0", "PASSIVE")
    assert rollout["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert learner["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in reward
    assert "VLLM_CPU_KVCACHE_SPACE" not in rollout
    on_gpu = settings("cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in role_environment(on_gpu, "rollout")
    assert "DS_ACCELERATOR" not in role_environment(on_gpu, "learner")


def test_threads_share_the_cores_among_learner_ranks() -> None:
    assert compute_threads(settings(), cores=8) == 8
    assert compute_threads(settings("learner.ranks=3"), cores=8) == 2
    assert compute_threads(settings("learner.ranks=16"), cores=8) == 1
    assert compute_threads(settings("cluster.threads=5", "learner.ranks=3"), cores=8) == 5
    assert compute_threads(settings()) == len(os.sched_getaffinity(0))


def test_engines_and_learners_have_groups_of_their_own_or_share_bundles() -> None:
    pools = ["rollout.engines=2", "learner.ranks=2", "cluster.cpus_per_engine=3", "cluster.cpus_per_learner=1"]
    apart = settings(*pools, "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1")
    assert wanted_room(apart, learners=True) == {
        "engine 0": ([{"CPU": 3, "GPU": 1}], "STRICT_PACK"),
        "engine 1": ([{"CPU": 3, "GPU": 1}], "STRICT_PACK"),
        "learners": ([{"CPU": 1, "GPU": 1}] * 2, "PACK"),
    }
    halves = ("cluster.gpus_per_engine=0.5", "cluster.gpus_per_learner=0.5", "publish.engine=ipc")
    shared = settings(*pools, *halves)
    assert wanted_room(shared, learners=True) == {SHARED: ([{"CPU": 4, "GPU": 1}] * 2, "PACK")}
    assert list(wanted_room(shared, learners=False)) == ["engine 0", "engine 1"]


@pytest.mark.slow
async def test_waiting_names_who_is_missing_and_who_died(local_ray: None) -> None:
    import ray

    class Small:
        def number(self) -> int:
            return int(os.environ["OMP_NUM_THREADS"])

    class Broken:
        def __init__(self) -> None:
            raise ValueError("no such model")

    def started(kind: type, **options: Any) -> Any:
        return ray.remote(kind).options(**options).remote()

    first = started(Small, **role_options(settings("cluster.threads=3", "cluster.cpus_per_learner=1"), "learner"))
    await wait_for_placement({"learner 0": first}, 60.0)
    assert await first.number.remote() == 3
    late = started(Small, num_cpus=2)
    with pytest.raises(StallError, match=r"waited 1 s for a place for rollout 1; the cluster has 1 CPU"):
        await wait_for_placement({"learner 0": first, "rollout 1": late}, 1.0)
    with pytest.raises(ActorError, match="love reward 0 died while starting"):
        await wait_for_placement({"love reward 0": started(Broken, num_cpus=0.1)}, 60.0)
    ray.kill(late)
    ray.kill(first)


@pytest.mark.nightly
@pytest.mark.slow
async def test_whoever_may_go_anywhere_leaves_the_labelled_nodes_to_those_who_need_them() -> None:
    """Three nodes of one GPU, one of them labelled: engines go elsewhere, reward actors follow their own label."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for number in range(3):
        labels = {"kind": "learn"} if number == 1 else {"kind": "score"} if number == 2 else {}
        cluster.add_node(num_cpus=2, num_gpus=1, labels=labels, object_store_memory=80 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    nodes = {node["NodeID"]: node["Labels"].get("kind") for node in ray.nodes()}
    told = settings(
        "rollout.engines=2", "cluster.gpus_per_engine=1", "cluster.gpus_per_learner=1",
        "cluster.labels=[learner:kind=learn, reward:kind=score]",
    )  # fmt: skip
    places = Places(told, learners=True)

    class Where:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    try:
        await places.ready(60.0)
        found = {}
        for role, index in (("rollout", 0), ("rollout", 1), ("learner", 0), ("reward", 0)):
            options = {**role_options(told, role), **places.options(role, index), "runtime_env": {}}
            found[role, index] = nodes[await ray.remote(Where).options(**options).remote().node.remote()]
        assert found["learner", 0] == "learn" and found["reward", 0] == "score"
        assert "learn" not in [found["rollout", index] for index in range(2)]
    finally:
        places.release()
        ray.shutdown()
        cluster.shutdown()
