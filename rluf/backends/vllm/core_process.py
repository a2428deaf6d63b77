"""Start vLLM's core process by a fork of the actor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OPEN_FILES = Path("/proc/self/fd")


@contextmanager
def fork_core_process() -> Iterator[None]:
    """Within the context, vLLM forks its core process also in a Ray actor, unless VLLM_WORKER_MULTIPROC_METHOD=spawn.

    In a Ray actor vLLM starts a new interpreter instead, which imports vLLM and torch a second time: about 10 CPU
    seconds on the way to the first token. For CPU engines only, since a CUDA context does not survive a fork. Nor does
    torch's thread pool: this process must not have computed anything in parallel yet.
    """
    from vllm.utils import system_utils

    is_active, is_in_ray_actor = True, system_utils.is_in_ray_actor

    def close_sockets() -> None:
        if is_active:
            close_inherited_sockets()

    os.register_at_fork(after_in_child=close_sockets)  # cannot be unregistered, so it acts within the context only
    system_utils.is_in_ray_actor = lambda: False
    try:
        yield
    finally:
        system_utils.is_in_ray_actor = is_in_ray_actor
        is_active = False


def close_inherited_sockets() -> None:
    """Close the sockets of the parent process.

    Ray learns from a closed socket that an actor has died: while a child has it open, the actor seems alive.
    """
    for entry in OPEN_FILES.iterdir():
        try:
            is_socket = os.readlink(entry).startswith("socket:")
        except FileNotFoundError:
            continue  # the descriptor of this listing
        if is_socket:
            os.close(int(entry.name))
