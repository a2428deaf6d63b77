"""Run calls to an optional service (W&B) on a background thread; failures never stop training.

Calls return immediately and run in order. After the first failure, which is logged, later calls do nothing; a service
that hangs, or whose thread dies of an unexpected error, is abandoned. The run waits only in `wait_for_call`, with a
timeout.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

MAX_QUEUED_CALLS = 2000
"""Maximum number of queued calls of a slow service; further ones are dropped so that memory stays bounded."""


@dataclass(slots=True)
class BackgroundCall:
    """One call: its purpose, the work, and whether it has finished and succeeded."""

    description: str
    action: Callable[[], object]
    finished: threading.Event = field(default_factory=threading.Event)
    succeeded: bool = False


class BackgroundCaller:
    """Runs calls to one service one after the other. After a failed call, later ones do nothing until `reset`."""

    def __init__(self, service_name: str, expected_errors: tuple[type[Exception], ...]) -> None:
        """`expected_errors` are logged as a warning; any other exception ends the thread with its traceback."""
        self._service_name, self._expected_errors = service_name, expected_errors
        self._queued_calls: queue.Queue[BackgroundCall] = queue.Queue(MAX_QUEUED_CALLS)
        self._stopped = False
        self._full_queue_logged = False
        # A daemon thread, so that a hanging service cannot keep the process alive.
        self._thread = threading.Thread(target=self._run_calls, name=f"rluf-{service_name}", daemon=True)
        self._thread.start()

    @property
    def is_stopped(self) -> bool:
        """Whether calls do nothing any more, because one failed or the thread has died."""
        return self._stopped or not self._thread.is_alive()

    def submit(self, description: str, action: Callable[[], object]) -> BackgroundCall:
        """Queue `action` and return immediately. `description` completes the sentence "<service> could not ..."."""
        call = BackgroundCall(description, action)
        try:
            self._queued_calls.put_nowait(call)
        except queue.Full:
            call.finished.set()
            if not self._full_queue_logged:
                self._full_queue_logged = True
                logger.warning("%s is too slow to %s; further calls are dropped", self._service_name, description)
        return call

    def wait_for_call(self, call: BackgroundCall, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for a call and return whether it succeeded; a timeout stops the caller."""
        # Polling instead of one long wait: a thread that dies of an unexpected error never sets `finished`.
        deadline = time.monotonic() + timeout_s
        while not call.finished.wait(0.02) and self._thread.is_alive() and time.monotonic() < deadline:
            pass
        if not call.finished.is_set():
            self._stopped = True
            logger.warning(
                "%s did not %s within %g s; continuing without it", self._service_name, call.description, timeout_s
            )
        return call.succeeded

    def reset(self) -> None:
        """Clear an earlier failure: the next calls run again."""
        self._stopped = False

    def _run_calls(self) -> None:
        while True:
            call = self._queued_calls.get()
            # After a failure the queue is still emptied, so that waiters return and its calls free their data.
            if not self._stopped:
                self._run_call(call)
            call.finished.set()

    def _run_call(self, call: BackgroundCall) -> None:
        try:
            call.action()
            call.succeeded = True
        except self._expected_errors as error:
            first_line = str(error).split("\n")[0]
            logger.warning(
                "%s could not %s (%s: %s); continuing without it", self._service_name, call.description,
                type(error).__name__, first_line,
            )  # fmt: skip
        finally:
            self._stopped = not call.succeeded
