"""Start vLLM's core process by a fork of the actor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OPEN_FILES = Path("/proc/self/fd")


METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"


@contextmanager
def fork_core_process(chosen_method: str | None) -> Iterator[None]:
    """Within the context, vLLM in a Ray actor forks its core process, unless `chosen_method` is spawn.

    Else vLLM starts a new interpreter, which imports vLLM and torch a second time: about 9 CPU seconds on the way to
    the first token. `chosen_method` is METHOD_VARIABLE before vLLM configured the engine, which sets it to spawn on
    CPUs. For CPU engines only, since a CUDA context does not survive a fork. Nor does torch's thread pool: the actor
    must not have computed anything in parallel yet. Other processes may have, so vLLM does not fork them.
    """
    from vllm.utils import system_utils

    is_active, is_in_ray_actor = True, system_utils.is_in_ray_actor
    if chosen_method == "spawn" or not is_in_ray_actor():
        yield
        return

    def close_sockets() -> None:
        if is_active:
            close_inherited_sockets()

    os.register_at_fork(after_in_child=close_sockets)  # cannot be unregistered, so it acts within the context only
    system_utils.is_in_ray_actor = lambda: False
    configured_method, os.environ[METHOD_VARIABLE] = os.environ.get(METHOD_VARIABLE, "fork"), "fork"
    try:
        yield
    finally:
        system_utils.is_in_ray_actor = is_in_ray_actor
        os.environ[METHOD_VARIABLE] = configured_method
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
