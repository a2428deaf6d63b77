"""Run a command and measure the memory of all its processes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MEMORY_SAMPLE_S = 1.0


@dataclass(frozen=True)
class CommandCost:
    """Wall-clock seconds, peak memory, and what the command wrote to stdout and stderr."""

    seconds: float
    peak_bytes: int
    output: str


def measure_memory(process: psutil.Process) -> int:
    """Bytes of the process and its descendants, shared pages counted in proportion (PSS)."""
    total_bytes = 0
    for child in (process, *process.children(recursive=True)):
        try:
            total_bytes += child.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total_bytes


def run_command(command: Sequence[str], cwd: Path | None = None) -> CommandCost:
    """Run a command to its end, sampling the memory of its processes every second.

    Raises CalledProcessError, with the output, if the command fails.
    """
    started, peak_bytes, output = time.monotonic(), 0, ""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    psutil_process = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak_bytes = max(peak_bytes, measure_memory(psutil_process))
        except psutil.NoSuchProcess:
            break
        try:
            # communicate() also drains the pipe, so a full pipe cannot block the command.
            output, _ = process.communicate(timeout=MEMORY_SAMPLE_S)
        except subprocess.TimeoutExpired:
            continue
    if not output and process.stdout is not None and not process.stdout.closed:
        output, _ = process.communicate()
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, output=output)
    return CommandCost(time.monotonic() - started, peak_bytes, output)
