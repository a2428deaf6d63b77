"""Connecting to Ray: the cluster named in the settings, the one this job runs on, or one started on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rluf.config.settings import Settings
from rluf.errors import ResourceError

logger = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 1 << 30
KNOCK_SECONDS = 5.0
READER = "iter_threaded"
"""Name that Ray Data gives a thread that fetches blocks for an iteration in this process."""
READERS_SECONDS = 20.0


@contextmanager
def connected(settings: Settings) -> Iterator[dict[str, float]]:
    """Connect to Ray and yield the cluster's total resources; disconnect (and end a local Ray) on leaving.

    `cluster.address`, else RAY_ADDRESS, else a Ray started on this machine for this run alone. Ray's token
    authentication is its default and stays on. Raises ResourceError when the named cluster does not answer or a local
    one cannot start (ports, memory, /tmp).
    """
    address = settings.cluster.address or os.environ.get("RAY_ADDRESS")
    common = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    if address:
        _check_port(address)
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        logger.warning("RAY_AUTH_MODE=disabled: anybody who reaches this Ray cluster can run programs on it; unset it")
    logger.info("ray: %s", f"connecting to {address}" if address else "starting on this machine")
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            context = ray.init(address=address, **common)
        else:
            context = ray.init(
                address="local", include_dashboard=True, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **common
            )
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        where = f"the Ray cluster at {address}" if address else "a Ray on this machine"
        raise ResourceError(
            f"cannot reach or start {where}: {error}; check that its head runs and its token and ports are right "
            "(ray status), or unset cluster.address and RAY_ADDRESS to start one here"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init has put one there that aborts without unwinding
    try:
        if context.dashboard_url:
            logger.info("ray dashboard: http://%s", context.dashboard_url)
        yield {name: float(amount) for name, amount in ray.cluster_resources().items()}
    finally:
        _end_readers()
        ray.shutdown()


def _end_readers() -> None:
    """Wait for the threads of a Ray Data iteration that was left early.

    One that still asks for a block after ray.shutdown() makes Ray end this process at once with exit code 1, silently.
    """
    deadline = time.monotonic() + READERS_SECONDS
    for thread in threading.enumerate():
        if thread.name == READER:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("ray data: its thread %s did not end within %g s", thread.name, READERS_SECONDS)


def _check_port(address: str) -> None:
    """Knock at host:port first: Ray itself would wait for minutes. Addresses such as auto have no port to knock at."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address} ({error}); check cluster.address or RAY_ADDRESS and that its head "
            "runs (ray status), or unset both to start one here"
        ) from error
