"""Resources requested from the autoscaler, and that none stay requested after a run."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get

from cluster import autoscaling
from cluster.autoscaling import ensure_capacity
from cluster.plan import ResourcePlan, plan_resources
from rluf.config.derived import ActorPoolPlan
from rluf.config.load import load_settings
from rluf.errors import ResourceError

AMOUNTS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 4.0])
POOLS = st.lists(
    st.builds(ActorPoolPlan, st.just("learner"), st.just("some"), st.integers(1, 9), AMOUNTS, AMOUNTS, st.just({})),
    max_size=3,
)


@given(POOLS.filter(bool), POOLS)
def test_requested_bundles_hold_either_phase(
    training_pools: list[ActorPoolPlan], reward_pools: list[ActorPoolPlan]
) -> None:
    resource_plan = ResourcePlan(tuple(training_pools), tuple(reward_pools), 0)
    requested = [bundle for bundle, _ in resource_plan.autoscaler_bundles]
    assert requested[: len(resource_plan.bundles)] == list(resource_plan.bundles)

    def total(pools: Sequence[ActorPoolPlan], kind: str) -> float:
        amounts = {"CPU": "cpus_per_actor", "GPU": "gpus_per_actor"}
        return sum(pool.actor_count * float(getattr(pool, amounts[kind])) for pool in pools)

    for kind in ("CPU", "GPU"):
        expected = max(total(training_pools, kind), total(reward_pools, kind))
        assert sum(bundle.get(kind, 0.0) for bundle in requested) == pytest.approx(expected)
    for bundle in requested[len(resource_plan.bundles) :]:
        assert any(
            bundle.get("CPU", 0.0) <= pool.cpus_per_actor and bundle.get("GPU", 0.0) <= pool.gpus_per_actor
            for pool in reward_pools
        )


def test_labels_are_requested_with_the_actors_that_have_them() -> None:
    overrides = ["reward.workers=20", "cluster.node_labels={learner: {market: on-demand}}"]
    requested = plan_resources(load_settings(None, overrides).settings).autoscaler_bundles
    assert [labels for _, labels in requested].count({"market": "on-demand"}) == 1
    assert sum(bundle["CPU"] for bundle, _ in requested) == pytest.approx(20 * 0.2)


def read_request() -> list[dict[str, float]]:
    """The request that Ray's autoscaler reads."""
    content = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    bundles: list[dict[str, float]] = json.loads(content) if content else []
    return bundles


@pytest.fixture
def ray_without_coordinator(local_ray: None) -> None:
    """Ray without the actor of Ray Data that replaces requests every 20 s: another module may have started it."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator"))


@pytest.mark.usefixtures("ray_without_coordinator")
def test_a_request_that_another_one_replaces_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaling, "RENEWAL_INTERVAL_S", 0.05)
    resource_plan = plan_resources(load_settings(None, ["reward.workers=20"]).settings)
    expected = [bundle for bundle, _ in resource_plan.autoscaler_bundles]
    checks = iter([ResourceError("too small"), None])

    def fits_at_second_check(*_: Any) -> None:
        if (error := next(checks)) is not None:
            raise error

    monkeypatch.setattr(autoscaling, "check_plan", fits_at_second_check)
    with ensure_capacity(resource_plan, 5.0):
        request_resources(bundles=[])  # as Ray Data's coordinator does
        deadline = time.monotonic() + 10
        while read_request() != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_request() == expected
    time.sleep(0.2)
    assert read_request() == []


@pytest.mark.usefixtures("ray_without_coordinator")
def test_a_request_is_withdrawn_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    resource_plan = plan_resources(load_settings(None, ["reward.workers=20"]).settings)
    with (
        pytest.raises(ResourceError, match=r"did not grow within timeouts\.autoscale_s=0\.1"),
        ensure_capacity(resource_plan, 0.1),
    ):
        pass
    assert read_request() == []
    requests: list[list[dict[str, float]]] = []

    def fits_at_second_check(*_: Any) -> None:
        requests.append(read_request())
        if len(requests) < 2:
            raise ResourceError("too small")

    monkeypatch.setattr(autoscaling, "check_plan", fits_at_second_check)
    with ensure_capacity(resource_plan, 5.0):
        assert read_request() == [bundle for bundle, _ in resource_plan.autoscaler_bundles]
    assert read_request() == []


@pytest.mark.usefixtures("ray_without_coordinator")
def test_a_run_without_a_request_withdraws_nothing() -> None:
    request_resources(bundles=[{"CPU": 7.0}])  # another run's
    try:
        with ensure_capacity(plan_resources(load_settings(None, []).settings), 5.0):
            pass
        assert read_request() == [{"CPU": 7.0}]
    finally:
        request_resources(bundles=[])  # other modules use this cluster
