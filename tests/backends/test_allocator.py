"""Freed memory is returned to the system on request, and not before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from rluf.utils.host_memory import KEEP_FREED_MALLOC_CONF

SCRIPT = """
import torch
from rluf.utils.host_memory import release_freed_memory

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

before = resident_mib()
blocks = [torch.ones(1 << 20) for _ in range(64)]
del blocks
after_free = resident_mib() - before
print(after_free, release_freed_memory(), resident_mib() - before)
"""


def run_script(**environment: str) -> list[str]:
    env = {**os.environ, **environment}
    process = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    return process.stdout.split()


def test_jemalloc_retains_freed_memory_until_it_is_released() -> None:
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not library.is_file():
        pytest.skip("this build of Ray has no jemalloc")
    after_free, released, after_release = run_script(LD_PRELOAD=str(library), MALLOC_CONF=KEEP_FREED_MALLOC_CONF)
    assert released == "True"
    assert int(after_free) >= 250 and int(after_release) < 50


def test_without_jemalloc_nothing_is_done() -> None:
    assert run_script(LD_PRELOAD="")[1] == "False"
