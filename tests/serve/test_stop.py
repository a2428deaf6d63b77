"""How the service stops: signals, a second signal, and actors that do not respond."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from rluf.serve.__main__ import wait_for_result, wait_for_stop_signal

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class StubResponse:
    """A deployment response that is ready or never arrives; like Ray Serve's, its result has a timeout."""

    def __init__(self, value: int | None = None) -> None:
        self.future: Future[int] = Future()
        if value is not None:
            self.future.set_result(value)

    def result(self, *, timeout_s: float) -> int:
        return self.future.result(timeout_s)


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    """Restore the handlers afterwards; SIGTERM has that of a command (see rluf.config.cli.run_command)."""
    previous_handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def raise_exit(number: int, _: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, raise_exit)
    yield
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)


def send_signals(*numbers: signal.Signals) -> None:
    """Send the signals to this process after a short delay, one after another."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            threading.Event().wait(0.1)

    timer = threading.Timer(0.1, send)
    timer.daemon = True
    timer.start()


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_sighup_reloads_and_the_first_other_signal_ends_the_wait(stop_signal: signal.Signals) -> None:
    reloads: list[int] = []
    send_signals(signal.SIGHUP, signal.SIGHUP, stop_signal)
    wait_for_stop_signal(lambda: reloads.append(1))
    assert len(reloads) == 2


def test_a_second_ctrl_c_interrupts_the_wait_for_a_result() -> None:
    send_signals(signal.SIGINT)
    wait_for_stop_signal(lambda: None)
    send_signals(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        wait_for_result(StubResponse(), 20, "draining")


def test_a_second_sigterm_ends_the_command() -> None:
    send_signals(signal.SIGTERM)
    wait_for_stop_signal(lambda: None)
    send_signals(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        wait_for_result(StubResponse(), 20, "draining")


def test_an_actor_that_does_not_respond_is_logged_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert wait_for_result(StubResponse(3), 1, "draining") == 3
        assert caplog.messages == []
        assert wait_for_result(StubResponse(), 0.1, "draining") is None
    assert caplog.messages == ["service: stopped without draining: no result within 0.1 s"]
