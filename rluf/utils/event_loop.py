"""Run a coroutine to its end, also where an event loop is running, as in a notebook."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Result of `coroutine`; blocks. A running loop cannot run a second one, so a thread of its own does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1, thread_name_prefix="rluf-event-loop") as executor:
        return executor.submit(asyncio.run, coroutine).result()
