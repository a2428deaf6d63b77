"""Serve reward models and policies over HTTP on Ray Serve, and collect user feedback.

With a local Ray the command runs until Ctrl-C (press it twice to stop without waiting for running requests) and
reloads the settings on SIGHUP. On a Ray cluster it deploys and exits; run it again to update the models without a
failed request.

    python -m rluf.serve --config configs/serve.yaml
    python -m rluf.serve --config configs/serve.yaml --forget USER    # while the service is stopped
"""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from rluf.config.cli import CommandOptions, parse_command_line, run_command
from rluf.errors import RlufError

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.serve")
SHUTDOWN_GRACE_S = 10.0
"""Extra seconds beyond timeouts.serve_request_s for a shutdown call, which itself waits that long for requests."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forget", action="append", default=[], metavar="USER", help="erase a user from the log; exit")


def _check_settings(settings: Settings) -> None:
    from rluf.artifacts import check_service

    check_service(settings)


COMMAND_OPTIONS = CommandOptions(_add_options, check=_check_settings)


def resolve_reward_folders(settings: Settings) -> dict[str, Path | None]:
    """Reward model folders of the served objectives: of the settings, of the cache, or trained now (needs Ray)."""
    from rluf.artifacts import list_reward_model_folders, prepare_data_artifact, train_reward_artifacts
    from rluf.config.derived import list_configured_reward_folders

    configured_folders = list_configured_reward_folders(settings)
    if set(configured_folders) == set(settings.serve.objectives):
        return configured_folders
    trained_folders = list_reward_model_folders(train_reward_artifacts(settings, prepare_data_artifact(settings)))
    return {name: trained_folders[name] for name in settings.serve.objectives}


def start_service(settings: Settings) -> Any:
    """Deploy the service on the connected Ray; returns the gateway's handle. Raises RlufError."""
    from rluf.serve.application import deploy_service, get_feedback_root

    handle = deploy_service(settings, resolve_reward_folders(settings))
    objectives, host, port = ", ".join(settings.serve.objectives), settings.serve.host, settings.serve.port
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logger.info("service: serving %s at %s (docs at /docs)", objectives, url)
    logger.info("service: feedback log is %s", get_feedback_root(settings))
    return handle


def reload_settings(arguments: Sequence[str] | None) -> None:
    """Read the settings again and update the service; on an error the service stays as it is."""
    logger.info("service: SIGHUP, reloading the settings")
    try:
        start_service(parse_command_line("rluf.serve", __doc__ or "", arguments, COMMAND_OPTIONS).settings)
    except (RlufError, SystemExit) as error:
        logger.error("service: reload failed, nothing changed: %s", error)


def wait_for_stop_signal(on_reload: Callable[[], None]) -> None:
    """Wait for SIGINT or SIGTERM and call `on_reload` at each SIGHUP; then restore the handlers of both."""
    # SimpleQueue.put is reentrant, so a handler may call it; all work is done outside the handlers.
    received_signals: SimpleQueue[int] = SimpleQueue()
    previous_handlers = {
        signal_number: signal.signal(signal_number, lambda number, _: received_signals.put(number))
        for signal_number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    }
    while received_signals.get() == signal.SIGHUP:
        on_reload()
    # From here on a second signal interrupts the shutdown.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, previous_handlers[signal.SIGTERM])


def stop_service(settings: Settings, gateway_handle: Any) -> None:
    """Reject new requests, finish running ones, write settled feedback; then, or after a timeout, stop the service."""
    from ray import serve as ray_serve

    from rluf.serve.deployments import APPLICATION_NAME, FEEDBACK_WRITER_NAME

    drain_s = settings.timeouts.serve_request_s
    timeout_s = drain_s + SHUTDOWN_GRACE_S
    try:
        remaining = wait_for_result(gateway_handle.drain_requests.remote(drain_s), timeout_s, "draining")
        if remaining is not None:
            logger.info("service: drained, running_requests=%d", remaining)
        feedback_writer = ray_serve.get_deployment_handle(FEEDBACK_WRITER_NAME, APPLICATION_NAME)
        skipped_work = "writing settled feedback (the next start does it)"
        wait_for_result(feedback_writer.flush_settled.remote(), timeout_s, skipped_work)
    except (KeyboardInterrupt, SystemExit):
        logger.warning("service: stopped by a second signal before draining was done")
        raise
    finally:
        ray_serve.shutdown()


def wait_for_result(deployment_response: Any, timeout_s: float, skipped_work: str) -> Any:
    """Return a deployment's result, or None and log a warning about `skipped_work` after `timeout_s`."""
    try:
        return deployment_response.result(timeout_s=timeout_s)
    except TimeoutError:
        logger.warning("service: stopped without %s: no result within %g s", skipped_work, timeout_s)
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; user errors are one message on stderr (rluf.config.cli.run_command)."""
    loaded = parse_command_line("rluf.serve", __doc__ or "", arguments, COMMAND_OPTIONS)
    settings, forgotten_users = loaded.settings, loaded.options.forget

    def run_service() -> None:
        from cluster.connect import ray_connection, read_ray_address
        from rluf.serve.application import check_secrets, erase_users
        from rluf.tracking.console import setup_logging

        setup_logging()
        if forgotten_users:
            erase_users(settings, forgotten_users)
            return
        check_secrets(settings)
        with ray_connection():
            handle = start_service(settings)
            if read_ray_address() is not None:
                return  # the cluster keeps it running
            wait_for_stop_signal(lambda: reload_settings(arguments))
            stop_service(settings, handle)

    return run_command(run_service)


if __name__ == "__main__":
    raise SystemExit(main())
