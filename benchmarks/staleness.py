"""Idle time of engines and learners at staleness 0, 1 and 4 with 8 to 1,024 engines, on a simulated clock.

Groups are admitted and trained on by the rule of a run (rluf.train.work_buffer.compute_admission_capacity).
Response lengths are sampled from real SmolLM2-135M-Instruct responses in the sample log. Assumptions: an engine runs 64
samples and generates a token for each every TOKEN_S, independent of load; a sample takes the first free slot; a step
trains on one wave (16 groups of 4 per engine); the number of learners is such that they finish a step in the time that
never-waiting engines need for its tokens, so the two pools are balanced; a weight sync stops all engines for
WEIGHT_SYNC_S.

The bound is no idle time at all: a step then takes as long as its tokens. `speed` is that time over the simulated one.
`lag` is the mean age of a group when it is trained on, in versions. Pure Python; the last line is JSON.
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


@dataclass
class SimulatedRun:
    """State of a simulated run: running and ready groups, and busy seconds of each pool since the warm-up."""

    engines: int
    staleness: int
    lengths: list[int]
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
        self.slot_free_at = [0.0] * (self.engines * SLOTS_PER_ENGINE)
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
                sample_end = max(self.clock_s, self.slot_free_at[0]) + length * TOKEN_S
                heapq.heapreplace(self.slot_free_at, sample_end)
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
        self.slot_free_at = [end + WEIGHT_SYNC_S for end in self.slot_free_at]

    def reset_counters(self) -> None:
        """Reset the counters after the warm-up."""
        self.engine_busy_s = self.learner_busy_s = 0.0
        self.measured_from, self.lags = self.clock_s, []


def simulate_run(engines: int, staleness: int, lengths: list[int]) -> dict[str, float]:
    """Idle share of each pool and the speed relative to the bound."""
    run = SimulatedRun(engines, staleness, lengths)
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
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
