"""How the service is told to stop: signals, a second one, and actors that do not answer."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from rluf.serve.__main__ import answered, until_told

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class Response:
    """An answer that is there, or never comes; as Ray Serve's, its result has a deadline."""

    def __init__(self, value: int | None = None) -> None:
        self.future: Future[int] = Future()
        if value is not None:
            self.future.set_result(value)

    def result(self, *, timeout_s: float) -> int:
        return self.future.result(timeout_s)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The signals' handlers as they were, and one of SIGTERM's that a command has (see rluf.config.cli.guard)."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def terminated(number: int, _: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminated)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def sent(*numbers: signal.Signals) -> None:
    """Send this process the signals a moment later, one after another."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            threading.Event().wait(0.1)

    timer = threading.Timer(0.1, send)
    timer.daemon = True
    timer.start()


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_hang_up_changes_models_and_the_first_other_signal_ends_the_wait(told: signal.Signals) -> None:
    changes: list[int] = []
    sent(signal.SIGHUP, signal.SIGHUP, told)
    until_told(lambda: changes.append(1))
    assert len(changes) == 2


def test_a_second_ctrl_c_interrupts_the_wait_for_an_answer() -> None:
    sent(signal.SIGINT)
    until_told(lambda: None)
    sent(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        answered(Response(), 20, "draining")


def test_a_second_terminate_ends_the_command() -> None:
    sent(signal.SIGTERM)
    until_told(lambda: None)
    sent(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        answered(Response(), 20, "draining")


def test_an_actor_that_does_not_answer_is_told_and_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert answered(Response(3), 1, "draining") == 3
        assert caplog.messages == []
        assert answered(Response(), 0.1, "draining") is None
    assert caplog.messages == ["stopped without draining: no answer within 0.1 s"]
