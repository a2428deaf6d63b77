"""Waiting for an autoscaling cluster to become large enough, with a deadline and a reason."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

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


@contextmanager
def capacity(planned: Plan, seconds: float) -> Iterator[None]:
    """A cluster that holds the plan: ask the autoscaler for what is missing and wait for at most `seconds`.

    On leaving, what was asked for is withdrawn, so that the cluster may shrink; Ray keeps one such request for all jobs
    of a cluster. Raises ResourceError naming what is missing and three ways out, at once when `seconds` is 0.
    """
    with ExitStack() as asked:
        _await(planned, seconds, asked)
        yield


def _await(planned: Plan, seconds: float, asked: ExitStack) -> None:
    """Return once the cluster holds the plan; the first request puts its withdrawal on `asked`."""
    begun, waiting = time.monotonic(), False
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
            if not waiting:
                bundles, labels = zip(*planned.asked, strict=True)
                asked.callback(_withdraw)
                request_resources(bundles=list(bundles), bundle_label_selectors=list(labels))
                logger.info("asked the autoscaler for more, waiting for at most %g s: %s", seconds, error)
                waiting = True
        time.sleep(min(LOOK_EVERY_S, seconds))


def _withdraw() -> None:
    try:
        request_resources(bundles=[])
    except (RayError, RuntimeError) as error:  # the run's own outcome counts
        logger.warning("the autoscaler may go on holding what this run asked for: %s", error)
