"""Wait for an autoscaling cluster to become large enough, with a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from cluster.plan import ResourcePlan, check_plan
from rluf.errors import ResourceError

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 2.0


def list_node_resources() -> list[dict[str, float]]:
    """CPUs and GPUs of each living node, and its labels as key=value: 1."""
    return [
        {kind: float(node["Resources"].get(kind, 0.0)) for kind in ("CPU", "GPU")}
        | {f"{key}={value}": 1.0 for key, value in node["Labels"].items()}
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextmanager
def ensure_capacity(resource_plan: ResourcePlan, timeout_s: float) -> Iterator[None]:
    """Request missing resources from the autoscaler and wait at most `timeout_s` seconds until the plan fits.

    On leaving, the request is withdrawn, so that the cluster may shrink. Raises ResourceError naming what is missing
    and three ways out, at once when `timeout_s` is 0.
    """
    with ExitStack() as cleanup_stack:
        _poll_until_fits(resource_plan, timeout_s, cleanup_stack)
        yield


def _poll_until_fits(resource_plan: ResourcePlan, timeout_s: float, cleanup_stack: ExitStack) -> None:
    """Return once the plan fits; the withdrawal of a request is pushed to `cleanup_stack`."""
    start_time, is_requested = time.monotonic(), False
    while True:
        cluster_resources = {kind: float(amount) for kind, amount in ray.cluster_resources().items()}
        try:
            check_plan(resource_plan, cluster_resources, list_node_resources())
            return
        except ResourceError as error:
            if timeout_s == 0:
                raise
            if time.monotonic() - start_time >= timeout_s:
                raise ResourceError(
                    f"the cluster did not grow within timeouts.autoscale_s={timeout_s:g}: {error}; `ray status` shows "
                    "what the autoscaler is waiting for"
                ) from None
            if not is_requested:
                bundles, labels = zip(*resource_plan.autoscaler_bundles, strict=True)
                # Pushed before the request: a failure in between must not leave the request behind.
                cleanup_stack.callback(_withdraw_request)
                request_resources(bundles=list(bundles), bundle_label_selectors=list(labels))
                logger.info("autoscaler: requested resources, waiting at most %g s: %s", timeout_s, error)
                is_requested = True
        time.sleep(min(POLL_INTERVAL_S, timeout_s))


def _withdraw_request() -> None:
    # Ray stores one such request per cluster, not per job: an empty one replaces it.
    try:
        request_resources(bundles=[])
    except (RayError, RuntimeError) as error:  # must not hide the result of the run
        logger.warning("autoscaler: cannot withdraw the request, nodes may stay up: %s", error)
