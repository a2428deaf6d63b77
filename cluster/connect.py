"""Connection to Ray: the cluster named by RAY_ADDRESS, which a submitted job has, or one started on this machine."""

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
from ray.exceptions import RayError

from rluf.errors import ResourceError, SettingsError

logger = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 1 << 30
PORT_CHECK_TIMEOUT_S = 5.0
RAY_DATA_READER_THREAD = "iter_threaded"
"""Name that Ray Data gives a thread that fetches blocks for an iteration in this process."""
READER_JOIN_TIMEOUT_S = 20.0


def read_ray_address() -> str | None:
    """Address of the cluster that RAY_ADDRESS names; None where Ray starts on this machine. Raises SettingsError."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address.startswith(("http://", "https://")):
        raise SettingsError(
            f"RAY_ADDRESS={address} is the address of a dashboard: run the command with ray job submit, or name the "
            "cluster as HOST:PORT, as ray start prints it"
        )
    return None if address in ("", "local") else address


@contextmanager
def ray_connection() -> Iterator[dict[str, float]]:
    """Connect to Ray and yield the cluster's total resources; disconnect (and end a local Ray) on leaving.

    Connects to RAY_ADDRESS, else starts Ray on this machine for this run alone. Token
    authentication stays on. Raises ResourceError when the named cluster does not answer or a local one cannot start
    (ports, memory, /tmp).
    """
    address = read_ray_address()
    common_options = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    if address:
        _check_port_open(address)
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        logger.warning(
            "ray: token authentication is off (RAY_AUTH_MODE is not token, or ray was imported before rluf): anyone "
            "who reaches this Ray cluster can run programs on it; set RAY_AUTH_MODE=token before ray is imported"
        )
    logger.info("ray: %s", f"connecting to {address}" if address else "starting on this machine")
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            context = ray.init(address=address, **common_options)
        else:
            context = ray.init(
                address="local",
                include_dashboard=True,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                **common_options,
            )
    except (ConnectionError, OSError, ValueError, RuntimeError, RayError) as error:
        if address:
            raise ResourceError(
                f"cannot reach the Ray cluster at {address}: {error}; check that its head runs and its token and ports "
                "are right (ray status), or unset RAY_ADDRESS to start one here"
            ) from error
        raise ResourceError(
            f"cannot start Ray on this machine: {error}; check that HOME (for Ray's token) and /tmp can be written, or "
            "that RAY_AUTH_TOKEN_PATH names a file with a token, and that memory is free"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # ray.init installs a handler that aborts without unwinding: no checkpoint, no upload, no cleanup.
        signal.signal(signal.SIGTERM, sigterm_handler)
    try:
        if context.dashboard_url:
            logger.info("ray: dashboard at http://%s", context.dashboard_url)
        yield {kind: float(amount) for kind, amount in ray.cluster_resources().items()}
    finally:
        _join_reader_threads()
        ray.shutdown()


def _join_reader_threads() -> None:
    """Wait for the threads of Ray Data iterations that ended early."""
    # A thread that requests a block after ray.shutdown() makes Ray end this process silently with exit code 1.
    deadline = time.monotonic() + READER_JOIN_TIMEOUT_S
    for thread in threading.enumerate():
        if thread.name == RAY_DATA_READER_THREAD:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("ray data: thread %s did not end within %g s", thread.name, READER_JOIN_TIMEOUT_S)


def _check_port_open(address: str) -> None:
    """Connect to host:port of a Ray address. Raises ResourceError when nothing listens there."""
    # Ray itself would wait for minutes. Addresses such as "auto" have no port to check.
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PORT_CHECK_TIMEOUT_S).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at {address} ({error}); check RAY_ADDRESS and that its head "
            "runs (ray status), or unset both to start one here"
        ) from error
