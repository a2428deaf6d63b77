"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes

ALL_ARENAS = 4096
"""jemalloc's MALLCTL_ARENAS_ALL."""
KEEP_FREED = "dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:2"
"""MALLOC_CONF of a process that calls `release` itself: freed memory is kept for the next micro-batch until then."""


def release() -> bool:
    """Give freed memory back to the system where the process runs on jemalloc; returns whether it does."""
    control = getattr(ctypes.CDLL(None), "mallctl", None)
    return control is not None and control(b"arena.%d.purge" % ALL_ARENAS, None, None, None, 0) == 0
