"""Freed host memory of a process that runs on jemalloc."""

from __future__ import annotations

import ctypes

JEMALLOC_ALL_ARENAS = 4096
"""jemalloc's MALLCTL_ARENAS_ALL."""
KEEP_FREED_MALLOC_CONF = "dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:2"
"""MALLOC_CONF of a process that calls release_freed_memory: until then the next micro-batch reuses freed memory."""


def release_freed_memory() -> bool:
    """Return freed memory to the system if the process runs on jemalloc; returns whether it does."""
    # jemalloc is preloaded, so its symbols are in the process itself; without it the lookup fails.
    mallctl = getattr(ctypes.CDLL(None), "mallctl", None)
    return mallctl is not None and mallctl(b"arena.%d.purge" % JEMALLOC_ALL_ARENAS, None, None, None, 0) == 0
