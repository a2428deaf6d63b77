from pathlib import Path

import pytest

from cluster.plan import cache_need, check, check_host, check_space, disk_need, plan, table
from rluf.config.load import load_settings
from rluf.config.settings import Settings
from rluf.errors import ResourceError

CONFIGS = Path(__file__).parents[2] / "configs"


def settings(*overrides: str, config: str | None = None) -> Settings:
    return load_settings(CONFIGS / config if config else None, ["model.dtype=bfloat16", *overrides]).settings


def test_quickstart_fits_two_cores() -> None:
    planned = plan(settings())
    check(planned, {"CPU": 2.0})
    assert planned.cpus == pytest.approx(1.6)
    assert planned.gpus == 0
    assert len(planned.bundles) == 5
    assert planned.host_bytes < 12 * 2**30


@pytest.mark.parametrize(
    ("config", "gpus", "actors"), [("llama3-8b-8gpu.yaml", 8, 14), ("llama3-70b-64gpu.yaml", 64, 42)]
)
def test_gpu_configs_use_their_cluster_to_the_last_gpu(config: str, gpus: int, actors: int) -> None:
    planned = plan(settings(config=config))
    assert (planned.gpus, len(planned.bundles)) == (gpus, actors)
    check(planned, {"CPU": 1000.0, "GPU": float(gpus)}, [{"CPU": 128.0, "GPU": 8.0}] * (gpus // 8))
    with pytest.raises(ResourceError):
        check(planned, {"CPU": 1000.0, "GPU": gpus - 1.0})


def test_a_shortage_names_who_asks_and_three_ways_out() -> None:
    with pytest.raises(ResourceError) as caught:
        check(plan(settings("rollout.engines=8")), {"CPU": 2.0})
    message = str(caught.value)
    assert "needs 5.1 CPUs, but the cluster has 2" in message
    assert "rollout 8 x 0.5" in message
    assert message.count("; ") == 3
    for key in ("rollout.engines", "cluster.cpus_per_engine", "cluster.address"):
        assert key in message


def test_gpus_that_are_not_there() -> None:
    wanted = plan(settings("cluster.gpus_per_engine=1", "cluster.gpus_per_reward=1"))
    with pytest.raises(ResourceError, match=r"cluster\.gpus_per_engine=0"):
        check(wanted, {"CPU": 8.0})
    with pytest.raises(ResourceError, match=r"cluster\.gpus_per_reward=0\.1 or 0"):
        check(wanted, {"CPU": 8.0, "GPU": 2.0})
    check(wanted, {"CPU": 8.0, "GPU": 4.0})


def test_reward_training_counts_where_it_is_the_hungrier_phase() -> None:
    with pytest.raises(ResourceError, match=r"reward training 20 x 0\.2"):
        check(plan(settings("reward.workers=20")), {"CPU": 2.0})


def test_an_actor_must_fit_one_node() -> None:
    planned = plan(settings(config="llama3-70b-64gpu.yaml"))
    with pytest.raises(ResourceError, match="8 GPU on one node, but the largest node has 4"):
        check(planned, {"CPU": 1000.0, "GPU": 64.0}, [{"CPU": 128.0, "GPU": 4.0}] * 16)


def test_little_memory_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check(plan(settings()), {"CPU": 2.0, "memory": 1e9})
    assert "954 MiB" in caplog.text


def test_table_is_plain_without_a_terminal() -> None:
    planned = plan(settings())
    plain, fancy = table(planned, fancy=False), table(planned, fancy=True)
    assert plain.isascii()
    assert "\x1b" not in plain
    assert "love reward" in plain
    assert "at once: 1.6 CPU, 0 GPU" in plain
    assert "\x1b" in fancy


def test_space_needs() -> None:
    small = settings()
    policy, state = 2 * 134_515_008, 12 * 134_515_008
    small_need = disk_need(small)
    assert disk_need(settings("learner.save_every=7")) - small_need == 2 * (policy + state)
    assert disk_need(settings("learner.save_every=1")) - small_need == 4 * (policy + state)
    assert disk_need(settings("learner.save_every=1", "learner.keep_checkpoints=0")) - small_need == 14 * (
        policy + state
    )
    assert cache_need(small) > policy
    check_space(Path("/data"), 10, 10, "run.root")
    with pytest.raises(ResourceError, match=r"/data has 9 B free, but the run may need 10 B.*run\.root"):
        check_space(Path("/data"), 10, 9, "run.root")


def test_check_host_reads_this_machine(tmp_path: Path) -> None:
    check_host(settings(config="tiny.yaml"), tmp_path / "not" / "yet", tmp_path / "cache")
    with pytest.raises(ResourceError, match=r"run\.root"):
        check_host(settings("model.path=org/huge-9000000b"), tmp_path / "not" / "yet", tmp_path / "cache")


def test_labels_are_looked_for_on_nodes_that_are_large_enough() -> None:
    planned = plan(settings("cluster.labels=[learner:market=on-demand]", config="llama3-8b-8gpu.yaml"))
    spot, firm = (
        {"CPU": 48.0, "GPU": gpus, "market=" + kind: 1.0} for kind, gpus in (("spot", 4.0), ("on-demand", 4.0))
    )
    total = {"CPU": 96.0, "GPU": 8.0}
    check(planned, total, [spot, firm])
    with pytest.raises(ResourceError) as caught:
        check(planned, total, [spot, spot])
    assert "the label market=on-demand but no node has it (there are: market=spot)" in str(caught.value)
    assert str(caught.value).count(", or ") == 2
    bare = {"CPU": 48.0, "market=on-demand": 1.0}
    with pytest.raises(ResourceError, match="largest node with the label market=on-demand has 0 GPU"):
        check(planned, total, [spot | {"GPU": 8.0}, bare])


def test_labelled_actors_must_fit_the_labelled_nodes_together() -> None:
    planned = plan(settings("cluster.labels=[learner:kind=learn]", config="llama3-70b-64gpu.yaml"))
    plain, marked = {"CPU": 96.0, "GPU": 8.0}, {"CPU": 96.0, "GPU": 8.0, "kind=learn": 1.0}
    total = {"CPU": 768.0, "GPU": 64.0}
    check(planned, total, [marked] * 4 + [plain] * 4)
    with pytest.raises(ResourceError, match=r"need 32 GPUs on nodes with the label kind=learn .*which have 24"):
        check(planned, total, [marked] * 3 + [plain] * 5)
