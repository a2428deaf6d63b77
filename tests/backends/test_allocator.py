"""Freed memory goes back to the system when it is asked for, and not before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from rluf.backends.allocator import KEEP_FREED

SCRIPT = """
import torch
from rluf.backends.allocator import release

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

before = held()
blocks = [torch.ones(1 << 20) for _ in range(64)]
del blocks
kept = held() - before
print(kept, release(), held() - before)
"""


def told(**environment: str) -> list[str]:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_jemalloc_keeps_what_is_freed_until_it_is_released() -> None:
    library = Path(ray.__file__).parent / "core" / "libjemalloc.so"
    if not library.is_file():
        pytest.skip("this build of Ray has no jemalloc")
    kept, released, left = told(LD_PRELOAD=str(library), MALLOC_CONF=KEEP_FREED)
    assert released == "True"
    assert int(kept) >= 250 and int(left) < 50


def test_without_jemalloc_nothing_is_done() -> None:
    assert told(LD_PRELOAD="")[1] == "False"
