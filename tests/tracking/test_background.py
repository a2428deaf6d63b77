"""Calls to an optional service never block for longer than their timeout: it may fail, hang, be slow or die."""

from __future__ import annotations

import logging
import threading

import pytest

from rluf.tracking import background
from rluf.tracking.background import BackgroundCaller


def fail() -> None:
    raise ValueError("no\nand a long traceback")


def test_calls_run_in_order_on_their_own_thread() -> None:
    calls: list[tuple[int, int]] = []
    caller = BackgroundCaller("it", (ValueError,))
    for number in range(20):
        caller.submit("count", lambda number=number: calls.append((number, threading.get_ident())))
    assert caller.wait_for_call(caller.submit("end", lambda: None), 10.0)
    assert [number for number, _ in calls] == list(range(20))
    assert {thread for _, thread in calls} != {threading.get_ident()}


def test_a_failure_is_logged_once_and_stops_later_calls(caplog: pytest.LogCaptureFixture) -> None:
    caller = BackgroundCaller("it", (ValueError,))
    assert not caller.wait_for_call(caller.submit("help", fail), 10.0)
    counts: list[int] = []
    assert not caller.wait_for_call(caller.submit("count", lambda: counts.append(1)), 10.0)
    assert caller.is_stopped and counts == []
    assert caplog.messages == ["it could not help (ValueError: no); continuing without it"]
    caller.reset()
    assert caller.wait_for_call(caller.submit("count", lambda: counts.append(1)), 10.0)
    assert counts == [1]


def test_a_service_that_hangs_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    caller = BackgroundCaller("it", ())
    assert not caller.wait_for_call(caller.submit("come back", release.wait), 0.05)
    assert caller.is_stopped
    release.set()
    assert "it did not come back within 0.05 s; continuing without it" in caplog.text


def test_calls_beyond_the_queue_of_a_slow_service_are_dropped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MAX_QUEUED_CALLS", 2)
    release = threading.Event()
    caller = BackgroundCaller("it", ())
    calls = [caller.submit("keep up", release.wait) for _ in range(8)]
    release.set()
    assert all(call.finished.wait(10.0) for call in calls)
    assert 2 <= sum(call.succeeded for call in calls) < 8
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unexpected_error_stops_the_caller_and_nothing_else() -> None:
    caller = BackgroundCaller("it", (ValueError,))

    def raise_unexpected() -> None:
        raise LookupError("unexpected")

    assert not caller.wait_for_call(caller.submit("live", raise_unexpected), 10.0)
    assert caller.is_stopped
    assert not caller.wait_for_call(caller.submit("live", lambda: None), 0.1)
