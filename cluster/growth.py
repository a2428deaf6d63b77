"""Waiting for an autoscaling cluster to become large enough, with a deadline and a reason."""

from __future__ import annotations

import logging
import time

import ray
from ray.autoscaler.sdk import request_resources

from cluster.plan import Plan, check
from rluf.errors import ResourceError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0


def nodes() -> list[dict[str, float]]:
    """CPUs and GPUs of each living node, and its labels as key=value: 1."""
    return [
        {key: float(node["Resources"].get(key, 0.0)) for key in ("CPU", "GPU")}
        | {f"{key}={value}": 1.0 for key, value in node["Labels"].items()}
        for node in ray.nodes()
        if node["Alive"]
    ]


def await_capacity(planned: Plan, seconds: float) -> None:
    """Return once the cluster holds the plan; ask the autoscaler for what is missing and wait for at most `seconds`.

    Raises ResourceError naming what is missing and three ways out, at once when `seconds` is 0.
    """
    begun, asked = time.monotonic(), False
    while True:
        try:
            check(planned, {name: float(amount) for name, amount in ray.cluster_resources().items()}, nodes())
            return
        except ResourceError as error:
            if seconds == 0:
                raise
            waited = time.monotonic() - begun
            if waited >= seconds:
                raise ResourceError(
                    f"the cluster did not grow within cluster.grow_deadline_s={seconds:g}: {error}; `ray status` says "
                    "what the autoscaler is waiting for"
                ) from None
            if not asked:
                request_resources(bundles=list(planned.bundles), bundle_label_selectors=list(planned.labels))
                logger.info("asked the autoscaler for more, waiting for at most %g s: %s", seconds, error)
                asked = True
        time.sleep(min(LOOK_EVERY_S, seconds))
