"""A guest is never waited for longer than said, whatever it does: refuses, hangs, is slow, or dies."""

from __future__ import annotations

import logging
import threading

import pytest

from rluf.tracking import background as module
from rluf.tracking.background import Guest


def refuse() -> None:
    raise ValueError("no\nand a long tale")


def test_calls_run_in_order_on_one_thread_of_their_own() -> None:
    done: list[tuple[int, int]] = []
    guest = Guest("it", (ValueError,))
    for number in range(20):
        guest.ask("count", lambda number=number: done.append((number, threading.get_ident())))
    assert guest.wait(guest.ask("end", lambda: None), 10.0)
    assert [number for number, _ in done] == list(range(20))
    assert {thread for _, thread in done} != {threading.get_ident()}


def test_a_refusal_is_told_once_and_ends_the_stay(caplog: pytest.LogCaptureFixture) -> None:
    guest = Guest("it", (ValueError,))
    assert not guest.wait(guest.ask("help", refuse), 10.0)
    seen: list[int] = []
    assert not guest.wait(guest.ask("count", lambda: seen.append(1)), 10.0)
    assert guest.gone and seen == []
    assert [one.getMessage() for one in caplog.records] == ["it could not help (ValueError: no); the run goes on"]
    guest.welcome()
    assert guest.wait(guest.ask("count", lambda: seen.append(1)), 10.0)
    assert seen == [1]


def test_a_guest_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    hold = threading.Event()
    guest = Guest("it", ())
    assert not guest.wait(guest.ask("come back", hold.wait), 0.05)
    assert guest.gone
    hold.set()
    assert "it did not come back within 0.05 s; the run goes on without it" in caplog.text


def test_what_a_slow_guest_cannot_take_is_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING", 2)
    hold = threading.Event()
    guest = Guest("it", ())
    calls = [guest.ask("keep up", hold.wait) for _ in range(8)]
    hold.set()
    assert all(call.over.wait(10.0) for call in calls)
    assert 2 <= sum(call.worked for call in calls) < 8
    assert len([one for one in caplog.records if one.levelno == logging.WARNING]) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unforeseen_error_ends_the_guest_and_nothing_else() -> None:
    guest = Guest("it", (ValueError,))

    def burst() -> None:
        raise LookupError("unforeseen")

    assert not guest.wait(guest.ask("live", burst), 10.0)
    assert guest.gone
    assert not guest.wait(guest.ask("live", lambda: None), 0.1)
