"""Resolution of `dtype: auto` from the instructions of this machine's CPU."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal

Dtype = Literal["bfloat16", "float32"]

AUTO_DTYPE = "auto"
CPU_INFO_PATH = Path("/proc/cpuinfo")
BFLOAT16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags (x86-64, x86-64, arm64) of instructions that multiply bfloat16."""


@cache
def detect_cpu_dtype(cpu_info_path: Path = CPU_INFO_PATH) -> Dtype:
    """bfloat16 if this machine's CPU multiplies it in hardware, else float32.

    Without such instructions bfloat16 is emulated: on a CPU with AVX2 only, its matrix products run at about a sixth of
    float32's rate. A machine whose flags cannot be read counts as one without.
    """
    try:
        lines = cpu_info_path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # x86-64 lists its flags in "flags", arm64 in "Features".
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return "bfloat16" if BFLOAT16_CPU_FLAGS & set(flags) else "float32"


def explain_auto_dtype(dtype: Dtype, *, gpu_count: float) -> str:
    """Why `auto` became `dtype`, in a few words for --dry-run and the log."""
    if gpu_count > 0:
        return f"{AUTO_DTYPE}: on GPUs"
    verb = "has" if dtype == "bfloat16" else "lacks"
    return f"{AUTO_DTYPE}: this {platform.machine() or 'unknown'} CPU {verb} bfloat16 instructions"
