"""Wait for an autoscaling cluster to become large enough, with a deadline."""

from __future__ import annotations

import logging
import threading
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
RENEWAL_INTERVAL_S = 5.0
"""Seconds between two sendings of a request: Ray's autoscaler looks at it about as often."""


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

    The request is renewed until the context is left, then withdrawn, so that the cluster may shrink. Raises
    ResourceError naming what is missing and three ways out, at once when `timeout_s` is 0.
    """
    with ExitStack() as cleanup_stack:
        _poll_until_fits(resource_plan, timeout_s, cleanup_stack)
        yield


class RenewedRequest:
    """A request to the autoscaler that is sent again every RENEWAL_INTERVAL_S seconds until it is withdrawn.

    Ray stores one request per cluster, not per job. Ray Data's coordinator, which stays on a cluster after the first
    job that used it, replaces it every 20 s by those of Ray Data's jobs, often by none.
    """

    def __init__(self, bundles: list[dict[str, float]], labels: list[dict[str, str]]) -> None:
        self._bundles, self._labels = bundles, labels
        self._is_withdrawn = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="autoscaler request", daemon=True)

    def send(self) -> None:
        """Send the request and start to renew it."""
        request_resources(bundles=self._bundles, bundle_label_selectors=self._labels)
        self._thread.start()

    def withdraw(self) -> None:
        """Stop renewing and replace the request by an empty one; a failure is one warning."""
        self._is_withdrawn.set()
        if self._thread.is_alive():
            self._thread.join(RENEWAL_INTERVAL_S)  # it hangs where the cluster is gone
        try:
            request_resources(bundles=[])
        except (RayError, RuntimeError) as error:  # must not hide the result of the run
            logger.warning("autoscaler: cannot withdraw the request, nodes may stay up: %s", error)

    def _renew(self) -> None:
        while not self._is_withdrawn.wait(RENEWAL_INTERVAL_S):
            try:
                request_resources(bundles=self._bundles, bundle_label_selectors=self._labels)
            except (RayError, RuntimeError) as error:
                logger.warning("autoscaler: cannot renew the request, the cluster may shrink: %s", error)


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
                request = RenewedRequest(list(bundles), list(labels))
                # Pushed before the request: a failure in between must not leave the request behind.
                cleanup_stack.callback(request.withdraw)
                request.send()
                logger.info("autoscaler: requested resources, waiting at most %g s: %s", timeout_s, error)
                is_requested = True
        time.sleep(min(POLL_INTERVAL_S, timeout_s))
