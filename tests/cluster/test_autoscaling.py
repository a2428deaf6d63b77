"""What the autoscaler is asked for, and that nothing is asked for once a run is over."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get

from cluster import autoscaling as growth
from cluster.autoscaling import capacity
from cluster.plan import Plan, plan
from rluf.config.derived import Pool
from rluf.config.load import load_settings
from rluf.errors import ResourceError

AMOUNTS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 4.0])
POOLS = st.lists(
    st.builds(Pool, st.just("learner"), st.just("some"), st.integers(1, 9), AMOUNTS, AMOUNTS, st.just({})), max_size=3
)


@given(POOLS.filter(bool), POOLS)
def test_what_is_asked_for_holds_either_phase(align: list[Pool], train: list[Pool]) -> None:
    planned = Plan(tuple(align), tuple(train), 0)
    asked = [bundle for bundle, _ in planned.asked]
    assert asked[: len(planned.bundles)] == list(planned.bundles)
    for kind, amounts in (
        ("CPU", [sum(pool.count * pool.cpus for pool in pools) for pools in (align, train)]),
        ("GPU", [sum(pool.count * pool.gpus for pool in pools) for pools in (align, train)]),
    ):
        assert sum(bundle.get(kind, 0.0) for bundle in asked) == pytest.approx(max(amounts))
    for bundle in asked[len(planned.bundles) :]:
        assert any(bundle.get("CPU", 0.0) <= p.cpus and bundle.get("GPU", 0.0) <= p.gpus for p in train)


def test_labels_go_with_the_actors_that_have_them() -> None:
    chosen = ["reward.workers=20", "cluster.labels=[learner:market=on-demand]"]
    asked = plan(load_settings(None, chosen).settings).asked
    assert [labels for _, labels in asked].count({"market": "on-demand"}) == 1
    assert sum(bundle["CPU"] for bundle, _ in asked) == pytest.approx(20 * 0.2)


def requested() -> list[dict[str, float]]:
    """What Ray's autoscaler reads."""
    told = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    found: list[dict[str, float]] = json.loads(told) if told else []
    return found


@pytest.mark.usefixtures("local_ray")
def test_what_was_asked_for_is_withdrawn_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(load_settings(None, ["reward.workers=20"]).settings)
    with (
        pytest.raises(ResourceError, match=r"did not grow within cluster\.grow_deadline_s=0\.1"),
        capacity(planned, 0.1),
    ):
        pass
    assert requested() == []
    seen: list[list[dict[str, float]]] = []

    def grown(*_: Any) -> None:
        """Too small at the first look, large enough at the second."""
        seen.append(requested())
        if len(seen) < 2:
            raise ResourceError("too small")

    monkeypatch.setattr(growth, "check", grown)
    with capacity(planned, 5.0):
        assert requested() == [bundle for bundle, _ in planned.asked]
    assert requested() == []


@pytest.mark.usefixtures("local_ray")
def test_a_run_that_asked_for_nothing_takes_nothing_back() -> None:
    request_resources(bundles=[{"CPU": 7.0}])  # another run's
    with capacity(plan(load_settings(None, []).settings), 5.0):
        pass
    assert requested() == [{"CPU": 7.0}]
