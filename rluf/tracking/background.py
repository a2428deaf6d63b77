"""Calls to a guest, a service that a run can do without: in order, on a thread of their own, and never in the way.

A call returns at once. What the guest refuses is told once and ends its stay; a guest that hangs or whose thread dies
of something unforeseen is left behind. The run waits for it only where it says so, and only so long.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

WAITING = 2000
"""Calls that may wait for a slow guest before new ones are dropped."""


@dataclass(slots=True)
class Call:
    """One call: what it is for, the work, and whether it was done."""

    what: str
    action: Callable[[], object]
    over: threading.Event = field(default_factory=threading.Event)
    worked: bool = False


class Guest:
    """Runs calls to the guest `name` one after the other. After a refused call the later ones do nothing."""

    def __init__(self, name: str, refusals: tuple[type[Exception], ...]) -> None:
        """`refusals` are the errors that the guest is known to raise."""
        self._name, self._refusals = name, refusals
        self._calls: queue.Queue[Call] = queue.Queue(WAITING)
        self._gone = False
        self._full = False
        self._thread = threading.Thread(target=self._work, name=f"rluf-{name}", daemon=True)
        self._thread.start()

    @property
    def gone(self) -> bool:
        """Whether the guest's stay has ended."""
        return self._gone or not self._thread.is_alive()

    def ask(self, what: str, action: Callable[[], object]) -> Call:
        """Have `action` run; returns at once. `what` completes the sentence "it could not ..."."""
        call = Call(what, action)
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            call.over.set()
            if not self._full:
                self._full = True
                logger.warning("%s is too slow to %s; what it cannot take is left out", self._name, what)
        return call

    def wait(self, call: Call, seconds: float) -> bool:
        """Wait at most `seconds` for a call; whether it worked."""
        deadline = time.monotonic() + seconds
        while not call.over.wait(0.02) and self._thread.is_alive() and time.monotonic() < deadline:
            pass
        if not call.over.is_set():
            self._gone = True
            logger.warning("%s did not %s within %g s; the run goes on without it", self._name, call.what, seconds)
        return call.worked

    def welcome(self) -> None:
        """Forget a refusal: the next calls are made again."""
        self._gone = False

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if not self._gone:
                self._run(call)
            call.over.set()

    def _run(self, call: Call) -> None:
        try:
            call.action()
            call.worked = True
        except self._refusals as error:
            told = str(error).split("\n")[0]
            logger.warning(
                "%s could not %s (%s: %s); the run goes on", self._name, call.what, type(error).__name__, told
            )
        finally:
            self._gone = not call.worked
