"""Quickstart on several seeds: lifts, gates, time and memory.

Runs the main job once per seed and reads its summary. Memory is the sum of the proportional set sizes of the job and
all its processes, sampled every second. Run: python benchmarks/quickstart.py 1 2 3 [key=value ...]; the last
line is JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from lab.process_tree import run_command

logger = logging.getLogger("benchmarks.quickstart")


def run_job(seed: int, settings: list[str]) -> dict[str, Any]:
    """Run one job; returns measured verdict, lifts, seconds and peak memory. Raises CalledProcessError on failure."""
    run_name = f"quickstart-seed{seed}"
    command = [sys.executable, "-m", "rluf.train", f"seed={seed}", f"name={run_name}", *settings]
    cost = run_command(command)
    report_path = next(line for line in cost.output.splitlines() if "report: " in line).split("report: ")[1]
    summary = json.loads((Path(report_path).parent / "summary.json").read_text("utf-8"))
    return {
        "seed": seed,
        "seconds": round(cost.seconds, 1),
        "peak_gib": round(cost.peak_bytes / 2**30, 2),
        **{key: {"base": summary[key]["base"], "aligned": summary[key]["aligned"], "lift": summary[key]["lift"]}
           for key in ("love_rate", "helpfulness", "safety")},
        "p_love": summary["offline"]["p_love"],
        "measured_verdict": summary["gates"]["measured_verdict"],
        "alarms": summary["gates"]["alarms"],
        "kl": summary["kl"],
        "phases": {phase: round(seconds, 1) for phase, seconds in summary["phases"].items()},
        "reused": summary["reused"],
    }  # fmt: skip


def format_row(row: dict[str, Any]) -> str:
    """Format the result of one seed as one line."""
    lifts = ", ".join(
        f"{metric} {row[metric]['lift']['mean']:+.1%} "
        f"[{row[metric]['lift']['low']:+.1%}, {row[metric]['lift']['high']:+.1%}]"
        for metric in ("love_rate", "helpfulness", "safety")
    )
    p_love_change = row["p_love"]["difference"]
    return (
        f"seed {row['seed']}: {lifts}; P[Love] {p_love_change['mean']:+.3f} "
        f"[{p_love_change['low']:+.3f}, {p_love_change['high']:+.3f}]; "
        f"measured {row['measured_verdict']}; {row['seconds']:.0f} s, {row['peak_gib']:.1f} GiB"
    )


def main(arguments: list[str]) -> None:
    """Run the given seeds, or 1, 2 and 3."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    seeds = [int(argument) for argument in arguments if argument.isdigit()] or [1, 2, 3]
    rows = []
    for seed in seeds:
        rows.append(run_job(seed, [argument for argument in arguments if "=" in argument]))
        logger.info("%s", format_row(rows[-1]))
    sys.stdout.write(json.dumps({"benchmark": "quickstart", "seeds": rows}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
