"""No terminal in tests; log handlers that a test installs are removed after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _restore_root_logger() -> Iterator[None]:
    root_logger = logging.getLogger()
    level, handlers = root_logger.level, list(root_logger.handlers)
    yield
    root_logger.setLevel(level)
    for handler in list(root_logger.handlers):
        if handler not in handlers:
            root_logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rluf.tracking.console._is_terminal", lambda: False)
