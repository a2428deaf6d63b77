"""What this machine's processors multiply quickly, which decides what `dtype: auto` means."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal

Dtype = Literal["bfloat16", "float32"]

AUTO = "auto"
CPU_INFO = Path("/proc/cpuinfo")
UNITS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags (x86-64, x86-64, arm64) of instructions that multiply bfloat16."""


@cache
def cpu_dtype(info: Path = CPU_INFO) -> Dtype:
    """bfloat16 where this machine's CPU multiplies it in hardware, else float32.

    Without such instructions bfloat16 is emulated: on a CPU with AVX2 alone its matrix products run at about a sixth
    of float32's rate. A machine whose flags cannot be read counts as one without.
    """
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return "bfloat16" if UNITS & set(flags) else "float32"


def why(dtype: Dtype, *, gpus: float) -> str:
    """Why `auto` became `dtype`, in a few words for --dry-run and the log."""
    if gpus > 0:
        return f"{AUTO}: on GPUs"
    units = "has" if dtype == "bfloat16" else "lacks"
    return f"{AUTO}: this {platform.machine() or 'unknown'} CPU {units} bfloat16 instructions"
