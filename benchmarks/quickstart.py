"""Does the quickstart keep its word on every seed: love up, helpfulness and safety held, within time and memory?

Runs the main job once a seed and reads what it wrote. Memory is the sum of the proportional set sizes of the job and
all its processes, looked at every two seconds. Run: python benchmarks/quickstart.py 1 2 3 [key=value ...]; the last
line is JSON.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

LOOK_SECONDS = 2.0

logger = logging.getLogger("benchmarks.quickstart")


def memory(process: psutil.Process) -> int:
    """Bytes of the process and everything below it, shared pages counted in proportion (PSS)."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def run(seed: int, settings: list[str]) -> dict[str, Any]:
    """One job: its verdict, lifts with intervals, seconds and peak memory. Raises CalledProcessError when it fails."""
    name = f"quickstart-seed{seed}"
    command = [sys.executable, "-m", "rluf.train", f"seed={seed}", f"name={name}", *settings]
    started, peak, said = time.monotonic(), 0, ""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, memory(watched))
        except psutil.NoSuchProcess:
            break
        try:
            _, said = process.communicate(timeout=LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, stderr=said)
    folder = next(line for line in said.splitlines() if "report: " in line).split("report: ")[1]
    summary = json.loads((Path(folder).parent / "summary.json").read_text("utf-8"))
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "peak_gib": round(peak / 2**30, 2),
        **{key: {"base": summary[key]["base"], "aligned": summary[key]["aligned"], "lift": summary[key]["lift"]}
           for key in ("love_rate", "helpfulness", "safety")},
        "p_love": summary["offline"]["p_love"],
        "verdict": summary["gates"]["verdict"],
        "alarms": summary["gates"]["alarms"],
        "kl": summary["kl"],
        "phases": {name: round(seconds, 1) for name, seconds in summary["phases"].items()},
        "reused": summary["reused"],
    }  # fmt: skip


def show(row: dict[str, Any]) -> str:
    """One seed in one line."""
    lifts = ", ".join(
        f"{key} {row[key]['lift']['mean']:+.1%} [{row[key]['lift']['low']:+.1%}, {row[key]['lift']['high']:+.1%}]"
        for key in ("love_rate", "helpfulness", "safety")
    )
    gap = row["p_love"]["difference"]
    return (
        f"seed {row['seed']}: {lifts}; P[Love] {gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]; "
        f"{row['verdict']}; {row['seconds']:.0f} s, {row['peak_gib']:.1f} GiB"
    )


def main(arguments: list[str]) -> None:
    """Run the seeds named, or 1, 2 and 3."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    seeds = [int(argument) for argument in arguments if argument.isdigit()] or [1, 2, 3]
    rows = []
    for seed in seeds:
        rows.append(run(seed, [argument for argument in arguments if "=" in argument]))
        logger.info("%s", show(rows[-1]))
    sys.stdout.write(json.dumps({"benchmark": "quickstart", "seeds": rows}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
