"""Run a coroutine to its end, also where an event loop is running, as in a notebook; keep its pauses short."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")
RARE_COLLECTION_THRESHOLDS = (200_000, 20, 10)
"""Net allocations before a collection, and collections before one of the next generation (Python: 700, 10, 10)."""


@contextmanager
def collect_garbage_rarely() -> Iterator[None]:
    """While the block runs, collect cycles rarely, and leave out the objects that exist already.

    With thousands of tasks the default thresholds start a collection every few milliseconds, and those that free tasks
    stop an event loop for up to 0.1 s: the 99th percentile of its delay (benchmarks/driver.py).
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*RARE_COLLECTION_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def run_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Result of `coroutine`; blocks. A running loop cannot run a second one, so a thread of its own does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1, thread_name_prefix="rluf-event-loop") as executor:
        return executor.submit(asyncio.run, coroutine).result()
