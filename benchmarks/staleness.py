"""Idle time at staleness 0, 1 and 4 with 8 to 1,024 engines, with slow engines, and time lost to failures.

Groups are admitted and trained on by the rule of a run (rluf.train.work_buffer.compute_admission_capacity).
Response lengths are sampled from real SmolLM2-135M-Instruct responses in the sample log. Assumptions: an engine runs 64
samples and generates a token for each every TOKEN_S, independent of load; a sample takes the first free slot; a step
trains on one wave (16 groups of 4 per engine); the number of learners is such that they finish a step in the time that
never-waiting engines need for its tokens, so the two pools are balanced; a weight sync stops all engines for
WEIGHT_SYNC_S.

The bound is no idle time at all: a step then takes as long as its tokens. `speed` is that time over the simulated one.
`lag` is the mean age of a group when it is trained on, in versions. stragglers: an eighth of the engines needs
SLOW_FACTOR times as long for each token; the bound is that of the engines without slow ones. failures: see
`compute_lost_share`. Pure Python; the last line is JSON.
Usage: python benchmarks/staleness.py [engines ...]
"""

from __future__ import annotations

import gzip
import heapq
import json
import random
import sys
from collections import deque
from dataclasses import dataclass, field
from importlib.resources import files
from statistics import fmean

from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.train.controller import ENGINE_QUEUE_FACTOR
from rluf.train.work_buffer import compute_admission_capacity
from rluf.utils.paths import resolve_cache_folder

ENGINE_COUNTS, STALENESS_VALUES, STEP_COUNT, WARMUP_STEPS = (8, 64, 256, 1024), (0, 1, 4), 24, 6
SLOTS_PER_ENGINE, SAMPLES_PER_GROUP, TOKEN_S, WEIGHT_SYNC_S = 64, 4, 0.02, 0.05
SLOW_SHARE, SLOW_FACTOR = 8, 2.0
"""One engine in SLOW_SHARE is slow, by SLOW_FACTOR."""
ENGINE_RESTART_S, RUN_RESTART_S, STEP_S, CHECKPOINT_STEPS = 37.0, 69.0, 60.0, 10
"""Restarts: median seconds of an engine, and of all actors after the loss of a learner (benchmarks/chaos.py, tiny)."""
FAILURE_HOURS = {"reserved": 50_000.0, "spot": 24.0}
"""Mean hours between failures of one GPU: 419 unexpected interruptions of 16,384 GPUs in 54 days (Llama 3, arXiv
2407.21783, section 3.3.4), and an assumption for machines that are taken away."""


@dataclass
class SimulatedRun:
    """State of a simulated run: running and ready groups, and busy seconds of each pool since the warm-up."""

    engines: int
    staleness: int
    lengths: list[int]
    has_stragglers: bool = False
    clock_s: float = 0.0
    weight_version: int = 0
    accepted_groups: int = 0
    engine_busy_s: float = 0.0
    learner_busy_s: float = 0.0
    measured_from: float = 0.0
    running_groups: list[tuple[float, int, int, int]] = field(default_factory=list)
    ready_groups: deque[tuple[int, int]] = field(default_factory=deque)
    lags: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Derive sizes from the number of engines."""
        self.rng = random.Random(f"{self.engines}-{self.staleness}")
        self.groups_per_step = self.engines * SLOTS_PER_ENGINE // SAMPLES_PER_GROUP
        # When each slot becomes free, and the seconds of a token there.
        self.slots = [
            (0.0, TOKEN_S * (SLOW_FACTOR if self.has_stragglers and engine % SLOW_SHARE == 0 else 1.0))
            for engine in range(self.engines)
            for _ in range(SLOTS_PER_ENGINE)
        ]
        self.started_groups = 0

    def admit_groups(self) -> None:
        """Start groups up to the admission capacity."""
        capacity = compute_admission_capacity(
            concurrency=int(self.groups_per_step * ENGINE_QUEUE_FACTOR),
            running_groups=len(self.running_groups),
            accepted_groups=self.accepted_groups,
            weight_version=self.weight_version,
            groups_per_step=self.groups_per_step,
            max_staleness=self.staleness,
        )
        for _ in range(capacity):
            self.started_groups += 1
            group_end, token_count = 0.0, 0
            # The heap holds the time at which each slot becomes free; a sample takes the earliest.
            for length in self.rng.choices(self.lengths, k=SAMPLES_PER_GROUP):
                free_at, token_s = self.slots[0]
                sample_end = max(self.clock_s, free_at) + length * token_s
                heapq.heapreplace(self.slots, (sample_end, token_s))
                group_end, token_count = max(group_end, sample_end), token_count + length
            heapq.heappush(self.running_groups, (group_end, self.started_groups, token_count, self.weight_version))

    def finish_next_group(self) -> None:
        """Advance the clock to the end of the next group."""
        group_end, _, token_count, version = heapq.heappop(self.running_groups)
        self.clock_s = max(self.clock_s, group_end)
        self.accepted_groups += 1
        self.ready_groups.append((token_count, version))
        self.engine_busy_s += token_count * TOKEN_S
        self.admit_groups()

    def run_step(self, step_s: float) -> None:
        """Wait for a batch, train on it while groups keep running, sync the weights."""
        self.admit_groups()
        while len(self.ready_groups) < self.groups_per_step:
            self.finish_next_group()
        batch = [self.ready_groups.popleft() for _ in range(self.groups_per_step)]
        self.lags += [self.weight_version - version for _, version in batch]
        step_end = self.clock_s + step_s
        while self.running_groups and self.running_groups[0][0] <= step_end:
            self.finish_next_group()
        self.clock_s, self.learner_busy_s = step_end + WEIGHT_SYNC_S, self.learner_busy_s + step_s
        self.weight_version += 1
        self.running_groups = [
            (end + WEIGHT_SYNC_S, group, token_count, version_at_start)
            for end, group, token_count, version_at_start in self.running_groups
        ]
        self.slots = [(end + WEIGHT_SYNC_S, token_s) for end, token_s in self.slots]

    def reset_counters(self) -> None:
        """Reset the counters after the warm-up."""
        self.engine_busy_s = self.learner_busy_s = 0.0
        self.measured_from, self.lags = self.clock_s, []


def simulate_run(engines: int, staleness: int, lengths: list[int], *, has_stragglers: bool = False) -> dict[str, float]:
    """Idle share of each pool and the speed relative to the bound."""
    run = SimulatedRun(engines, staleness, lengths, has_stragglers)
    step_s = run.groups_per_step * SAMPLES_PER_GROUP * fmean(lengths) * TOKEN_S / (engines * SLOTS_PER_ENGINE)
    for step_index in range(STEP_COUNT):
        if step_index == WARMUP_STEPS:
            run.reset_counters()
        run.run_step(step_s)
    measured_s = run.clock_s - run.measured_from
    return {
        "engines_idle": round(1 - run.engine_busy_s / (engines * SLOTS_PER_ENGINE * measured_s), 3),
        "learners_idle": round(1 - run.learner_busy_s / measured_s, 3),
        "speed": round(step_s * (STEP_COUNT - WARMUP_STEPS) / measured_s, 3),
        "lag": round(fmean(run.lags), 2),
        "lag_max": max(run.lags),
    }


def compute_lost_share(gpu_count: int, failure_hours: float, *, stops_run: bool) -> float:
    """Share of the engine time that failures cost; 1 where the run makes no progress.

    A lost engine (shm, disk, lora, nccl) is restarted while the others work: it loses its restart and half a step of
    repeated samples, a share that does not depend on their number. What stops the run (a learner, or an engine over
    cuda_ipc or in a broadcast of nccl) costs all GPUs the restart and half a checkpoint interval of CHECKPOINT_STEPS
    steps.
    """
    failure_s = failure_hours * 3600.0
    if not stops_run:
        return min(1.0, (ENGINE_RESTART_S + STEP_S / 2) / failure_s)
    return min(1.0, gpu_count * (RUN_RESTART_S + CHECKPOINT_STEPS * STEP_S / 2) / failure_s)


def load_response_lengths() -> list[int]:
    """Tokens of the real responses in the sample log that ships with rluf."""
    settings = Settings()
    tokenizer = load_tokenizer(resolve_model(settings.model.path, resolve_cache_folder(settings)))
    sample_log = (files("rluf") / "simulate" / "sample" / "feedback.jsonl.gz").read_bytes()
    texts = {json.loads(line)["response"] for line in gzip.decompress(sample_log).splitlines()}
    return [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in sorted(texts)]


def main() -> None:
    """Simulate every combination and write the JSON line."""
    lengths = load_response_lengths()
    engine_counts = [int(word) for word in sys.argv[1:]] or list(ENGINE_COUNTS)
    table = {
        str(engines): {str(staleness): simulate_run(engines, staleness, lengths) for staleness in STALENESS_VALUES}
        for engines in engine_counts
    }
    mean_length, max_length = fmean(lengths), max(lengths)
    result = {
        "benchmark": "staleness",
        "responses": len(lengths),
        "length_mean": round(mean_length, 1),
        "length_max": max_length,
        "wave_idle_bound": round(1 - mean_length / max_length, 3),
        "engines": table,
        "stragglers": {
            str(staleness): simulate_run(engine_counts[0], staleness, lengths, has_stragglers=True)
            for staleness in STALENESS_VALUES
        },
        "failures": {
            f"{kind}, {'stops the run' if stops_run else 'restarted'}": {
                str(count): round(compute_lost_share(count, hours, stops_run=stops_run), 5) for count in ENGINE_COUNTS
            }
            for kind, hours in FAILURE_HOURS.items()
            for stops_run in (False, True)
        },
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
