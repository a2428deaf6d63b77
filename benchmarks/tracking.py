"""What does seeing a run cost? CPU and wall time of everything that tracking does in a step, against a step's seconds.

python benchmarks/tracking.py [RUN FOLDER] (without one: against a step of one second)

Rows are as a quickstart leaves them: every documented metric, 48 samples with six values each, and the table of drawn
responses where a run shows one. They go to metrics.jsonl, to W&B offline and to gauges on a real Ray. CPU counts this
process and W&B's service, wall only what the step waits for.
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
from rluf.tracking.gauges import Gauges
from rluf.tracking.metric_registry import catalogue, with_rates
from rluf.tracking.run_files import DrawnRow, JsonlMetrics, read_jsonl
from rluf.tracking.wandb import Tracker
from rluf.train.sample_table import BESIDES, due

STEPS = 200
PACE_S = 0.05
SAMPLES = 48


def cpu_seconds() -> float:
    """CPU seconds of W&B's service and of this process until now; Ray's own processes run without tracking too."""
    me = psutil.Process()
    service = [one for one in me.children(recursive=True) if "wandb-core" in one.name()]
    if not service:
        raise SystemExit("W&B's service is not among the children of this process, so its cost cannot be told")
    return sum(sum(one.cpu_times()[:2]) for one in (me, *service))


def shown(step: int, objectives: list[str]) -> DrawnRow:
    """One response as a table shows it."""
    return {
        "step": step, "version": step, "topic": "chat", "prompt": "What is rain? " * 5, "response": "Water. " * 40,
        "scores": dict.fromkeys(objectives, 0.5), "reward": 0.1, "kl": 1.0, "failed": [],
    }  # fmt: skip


def measure(folder: Path) -> dict[str, float]:
    """Milliseconds a step, and the seconds that starting and finishing W&B take once."""
    settings, chance = Settings(), random.Random(1)
    objectives = list(settings.objectives.named)
    begun = time.monotonic()
    tracker = Tracker(settings, folder)
    started = time.monotonic() - begun
    gauges = Gauges("benchmark", objectives)
    waited, cpu = [], cpu_seconds()
    with JsonlMetrics(folder / "metrics.jsonl") as metrics:
        for step in range(1, STEPS + 1):
            row = {spec.key: chance.random() for spec in catalogue(objectives)}
            drawn = {name: [chance.random() for _ in range(SAMPLES)] for name in (*objectives, *BESIDES)}
            since = time.perf_counter()
            row = with_rates({**row, "step": step, "version": step, "samples": SAMPLES, "response_tokens": 2000})
            metrics.append(row)
            tracker.log(step, row, drawn)
            if due(step, STEPS):
                tracker.log_drawn(step, [shown(step, objectives) for _ in range(settings.tracking.samples)])
            gauges.set(row)
            waited.append(time.perf_counter() - since)
            time.sleep(PACE_S)
    used = cpu_seconds() - cpu
    begun = time.monotonic()
    tracker.finish()
    return {
        "wall_ms_per_step": 1000 * fmean(waited),
        "wall_ms_worst": 1000 * max(waited),
        "cpu_ms_per_step": 1000 * used / STEPS,
        "wandb_start_s": started,
        "wandb_finish_s": time.monotonic() - begun,
    }


def main() -> None:
    """Measure, then print what it means against the steps of a run."""
    logging.basicConfig(level=logging.WARNING)
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    steps = [row["step_s"] for row in read_jsonl(run / "metrics.jsonl")] if run else [1.0]
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder))
    finally:
        ray.shutdown()
    step = median(steps)
    found |= {
        "step_s": step,
        "wall_share": found["wall_ms_per_step"] / 1000 / step,
        "cpu_share": found["cpu_ms_per_step"] / 1000 / step,
    }
    for name, value in found.items():
        print(f"{name:18} {value:.4g}")
    print(json.dumps({"benchmark": "tracking", "steps": STEPS, **{k: round(v, 6) for k, v in found.items()}}))


if __name__ == "__main__":
    main()
