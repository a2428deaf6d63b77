"""Serve reward models and policies over HTTP on Ray Serve, and take reactions in.

On this machine's own Ray it runs until it is told to stop (Ctrl-C; a second one does not wait for running requests),
and takes changed models on SIGHUP; on a named Ray cluster it deploys and leaves. Run it again there to change models
without a failed request.

    python -m rluf.serve --config configs/serve.yaml
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from rluf.config.cli import guard, parse
from rluf.errors import RlufError

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.serve")
GRACE_S = 10.0
"""Seconds that an answer may take at the end beyond serve.deadline_s, in which running requests end."""


def models_for(settings: Settings) -> dict[str, Path | None]:
    """Reward model folders of the served objectives: given by path, else reused or trained from the log.

    Ray must be initialised where one has to be trained.
    """
    from rluf.artifacts import model_folders, prepared, rewarded
    from rluf.serve.application import given_folders

    given = given_folders(settings)
    if set(given) == set(settings.serve.objectives):
        return given
    found = model_folders(rewarded(settings, prepared(settings)))
    return {name: found[name] for name in settings.serve.objectives}


def serve(settings: Settings) -> Any:
    """Deploy the service on the connected Ray; returns the gateway's handle. Raises RlufError."""
    from rluf.serve.application import deploy, feedback_root

    handle = deploy(settings, models_for(settings))
    chosen = settings.serve
    logger.info("serving %s at http://%s:%d (docs at /docs)", ", ".join(chosen.objectives), chosen.host, chosen.port)
    logger.info("feedback log: %s", feedback_root(settings))
    return handle


def change(arguments: Sequence[str] | None) -> None:
    """Read the settings again and deploy what they say now; what cannot be deployed leaves the service as it is."""
    logger.info("SIGHUP: reading the settings again")
    try:
        serve(parse("rluf.serve", __doc__ or "", arguments).settings)
    except (RlufError, SystemExit) as error:
        logger.error("nothing changed: %s", error)


def until_told(changed: Callable[[], None]) -> None:
    """Wait for SIGINT or SIGTERM, calling `changed` at each SIGHUP. From then on both end the program where it is."""
    heard: SimpleQueue[int] = SimpleQueue()
    before = {
        number: signal.signal(number, lambda number, _: heard.put(number))
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    }
    while heard.get() == signal.SIGHUP:
        changed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def stop(settings: Settings, handle: Any) -> None:
    """Refuse new requests, let running ones end, write settled feedback, end the service.

    Neither an actor that does not answer nor a second signal leaves the service running.
    """
    from ray import serve as ray_serve

    from rluf.serve.deployments import NAME

    seconds = settings.serve.deadline_s
    try:
        left = answered(handle.drain.remote(seconds), seconds + GRACE_S, "draining")
        if left is not None:
            logger.info("drained: %d requests were still running", left)
        ledger = ray_serve.get_deployment_handle("ledger", NAME)
        answered(ledger.rotate.remote(), seconds + GRACE_S, "writing settled feedback, which the next start does")
    except (KeyboardInterrupt, SystemExit):
        logger.warning("stopped before draining was done: a second signal came")
        raise
    finally:
        ray_serve.shutdown()


def answered(response: Any, seconds: float, missed: str) -> Any:
    """The answer of a deployment; None, with a warning that names what was `missed`, after `seconds` without one."""
    try:
        return response.result(timeout_s=seconds)
    except TimeoutError:
        logger.warning("stopped without %s: no answer within %g s", missed, seconds)
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; errors of the user's are one clear message (see rluf.config.cli.guard)."""
    loaded = parse("rluf.serve", __doc__ or "", arguments)
    settings = loaded.settings

    def run() -> None:
        from cluster.connect import connected
        from rluf.serve.application import check_secrets, on_this_machine
        from rluf.tracking.console import setup_logging

        setup_logging()
        check_secrets(settings)
        with connected(settings):
            handle = serve(settings)
            if not on_this_machine(settings):
                return  # the cluster keeps it running
            until_told(lambda: change(arguments))
            stop(settings, handle)

    return guard(run)


if __name__ == "__main__":
    raise SystemExit(main())
