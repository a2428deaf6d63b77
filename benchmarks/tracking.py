"""Overhead of tracking: CPU and wall time of all its work in a step, relative to the duration of a step.

python benchmarks/tracking.py [RUN FOLDER] (without one: against a step of one second)

Rows are those of a quickstart: every documented metric, 48 samples with six values each, and the sample table at the
steps that log one. They are written to metrics.jsonl, to W&B offline and to gauges on a real Ray. CPU time covers this
process and W&B's service, wall time only what the step waits for.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

import psutil
import ray

from rluf.config.settings import Settings
from rluf.tracking.gauges import RunGauges
from rluf.tracking.metric_registry import add_token_rate, metric_specs
from rluf.tracking.run_files import SAMPLE_TABLE_ROWS, RolloutSample
from rluf.tracking.wandb import WandbTracker
from rluf.train.sample_table import NON_OBJECTIVE_VALUES, should_log_samples
from rluf.utils.files import JsonlWriter, read_jsonl

STEP_COUNT = 200
STEP_PAUSE_S = 0.05
SAMPLES_PER_STEP = 48


def cpu_seconds() -> float:
    """CPU seconds so far of this process and W&B's service; Ray's own processes also run without tracking."""
    this_process = psutil.Process()
    wandb_processes = [process for process in this_process.children(recursive=True) if "wandb-core" in process.name()]
    if not wandb_processes:
        raise SystemExit("W&B: no wandb-core among the child processes, cannot measure its CPU time")
    return sum(sum(process.cpu_times()[:2]) for process in (this_process, *wandb_processes))


def build_sample_row(step: int, objectives: list[str]) -> RolloutSample:
    """One row of the sample table."""
    return {
        "step": step, "version": step, "topic": "chat", "prompt": "What is rain? " * 5, "response": "Water. " * 40,
        "scores": dict.fromkeys(objectives, 0.5), "reward": 0.1, "kl": 1.0, "failed": [],
    }  # fmt: skip


def measure_overhead(folder: Path) -> dict[str, float]:
    """Milliseconds per step, and the seconds to start and finish W&B once."""
    settings, rng = Settings(), random.Random(1)
    objectives = list(settings.objectives.by_objective)
    started = time.monotonic()
    tracker = WandbTracker(settings, folder)
    wandb_start_s = time.monotonic() - started
    gauges = RunGauges("benchmark", objectives)
    wall_seconds, cpu_before = [], cpu_seconds()
    with JsonlWriter(folder / "metrics.jsonl") as metrics_writer:
        for step in range(1, STEP_COUNT + 1):
            metrics_row = {spec.key: rng.random() for spec in metric_specs(objectives)}
            values = {
                name: [rng.random() for _ in range(SAMPLES_PER_STEP)] for name in (*objectives, *NON_OBJECTIVE_VALUES)
            }
            call_started = time.perf_counter()
            metrics_row = add_token_rate(
                {**metrics_row, "step": step, "version": step, "samples": SAMPLES_PER_STEP, "response_tokens": 2000}
            )
            metrics_writer.append_row(metrics_row)
            tracker.log_step(step, metrics_row, values)
            if should_log_samples(step, STEP_COUNT):
                tracker.log_rollout_samples(
                    step, [build_sample_row(step, objectives) for _ in range(SAMPLE_TABLE_ROWS)]
                )
            gauges.set_step(metrics_row)
            wall_seconds.append(time.perf_counter() - call_started)
            time.sleep(STEP_PAUSE_S)  # lets the background threads run as they do between real steps
    cpu_used = cpu_seconds() - cpu_before
    started = time.monotonic()
    tracker.finish()
    return {
        "wall_ms_per_step": 1000 * fmean(wall_seconds),
        "wall_ms_worst": 1000 * max(wall_seconds),
        "cpu_ms_per_step": 1000 * cpu_used / STEP_COUNT,
        "wandb_start_s": wandb_start_s,
        "wandb_finish_s": time.monotonic() - started,
    }


def main() -> None:
    """Measure, then print the overhead relative to the steps of a run."""
    logging.basicConfig(level=logging.WARNING)
    run_folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    step_seconds = [row["step_s"] for row in read_jsonl(run_folder / "metrics.jsonl")] if run_folder else [1.0]
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure_overhead(Path(folder))
    finally:
        ray.shutdown()
    step_s = median(step_seconds)
    figures |= {
        "step_s": step_s,
        "wall_share": figures["wall_ms_per_step"] / 1000 / step_s,
        "cpu_share": figures["cpu_ms_per_step"] / 1000 / step_s,
    }
    for name, value in figures.items():
        print(f"{name:18} {value:.4g}")
    print(
        json.dumps(
            {"benchmark": "tracking", "steps": STEP_COUNT, **{name: round(value, 6) for name, value in figures.items()}}
        )
    )


if __name__ == "__main__":
    main()
