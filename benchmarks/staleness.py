"""How idle are engines and learners at staleness 0, 1 and 4, on 8 to 1,024 engines? A simulated clock, nothing runs.

Groups start and are trained on by the rule of a run (rluf.algorithms.staleness.capacity), on a clock that only
knows how long things take. Lengths of responses are those of real SmolLM2-135M-Instruct responses in the sample log,
sampled at random. Assumptions: an engine holds 64 samples and gives each a token every TOKEN_S, however many it
holds; a sample takes the first place that is free; a step takes one wave (16 groups of 4 an engine); the learners are as many as finish
a step in the time that its tokens take the engines when these never wait, so the two pools are balanced; a publish
stops all engines for PUBLISH_S.

The bound is no idle pool at all: the time of a step is then that of its tokens. `speed` is that time over the simulated
one. `lag` is the mean age of a group when it is learnt from, in versions. Pure Python; the last line is JSON.
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

from rluf.algorithms.staleness import capacity
from rluf.config.settings import Settings
from rluf.models.hub import load_tokenizer, resolve_model
from rluf.train.controller import QUEUE
from rluf.utils.paths import cache_dir

ENGINES, STALENESS, STEPS, WARM = (8, 64, 256, 1024), (0, 1, 4), 24, 6
SLOTS, SAMPLES, TOKEN_S, PUBLISH_S = 64, 4, 0.02, 0.05


@dataclass
class Clock:
    """The state of a simulated run: what runs, what waits, and how long each pool was busy since the warm-up."""

    engines: int
    staleness: int
    lengths: list[int]
    now: float = 0.0
    version: int = 0
    accepted: int = 0
    engine_busy: float = 0.0
    learner_busy: float = 0.0
    counted_from: float = 0.0
    running: list[tuple[float, int, int, int]] = field(default_factory=list)
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    lags: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Derive sizes from the number of engines."""
        self.draw = random.Random(f"{self.engines}-{self.staleness}")
        self.batch = self.engines * SLOTS // SAMPLES
        self.places = [0.0] * (self.engines * SLOTS)
        self.started = 0

    def admit(self) -> None:
        """Start groups while the rule leaves room."""
        room = capacity(
            concurrency=int(self.batch * QUEUE),
            running=len(self.running),
            accepted=self.accepted,
            version=self.version,
            batch=self.batch,
            staleness=self.staleness,
        )
        for _ in range(room):
            self.started += 1
            end, tokens = 0.0, 0
            for length in self.draw.choices(self.lengths, k=SAMPLES):
                place = max(self.now, self.places[0]) + length * TOKEN_S
                heapq.heapreplace(self.places, place)
                end, tokens = max(end, place), tokens + length
            heapq.heappush(self.running, (end, self.started, tokens, self.version))

    def finish_one(self) -> None:
        """Move the clock to the next group that ends."""
        end, _, tokens, version = heapq.heappop(self.running)
        self.now = max(self.now, end)
        self.accepted += 1
        self.waiting.append((tokens, version))
        self.engine_busy += tokens * TOKEN_S
        self.admit()

    def step(self, step_s: float) -> None:
        """Wait for a batch, learn from it while groups go on, publish."""
        self.admit()
        while len(self.waiting) < self.batch:
            self.finish_one()
        taken = [self.waiting.popleft() for _ in range(self.batch)]
        self.lags += [self.version - version for _, version in taken]
        done = self.now + step_s
        while self.running and self.running[0][0] <= done:
            self.finish_one()
        self.now, self.learner_busy = done + PUBLISH_S, self.learner_busy + step_s
        self.version += 1
        self.running = [(end + PUBLISH_S, group, tokens, at) for end, group, tokens, at in self.running]
        self.places = [end + PUBLISH_S for end in self.places]

    def forget(self) -> None:
        """Count from here on."""
        self.engine_busy = self.learner_busy = 0.0
        self.counted_from, self.lags = self.now, []


def simulate(engines: int, staleness: int, lengths: list[int]) -> dict[str, float]:
    """Idle share of each pool and the speed against the bound."""
    clock = Clock(engines, staleness, lengths)
    step_s = clock.batch * SAMPLES * fmean(lengths) * TOKEN_S / (engines * SLOTS)
    for number in range(STEPS):
        if number == WARM:
            clock.forget()
        clock.step(step_s)
    span = clock.now - clock.counted_from
    return {
        "engines_idle": round(1 - clock.engine_busy / (engines * SLOTS * span), 3),
        "learners_idle": round(1 - clock.learner_busy / span, 3),
        "speed": round(step_s * (STEPS - WARM) / span, 3),
        "lag": round(fmean(clock.lags), 2),
        "lag_max": max(clock.lags),
    }


def response_lengths() -> list[int]:
    """Tokens of the real responses in the sample log that ships with rluf."""
    settings = Settings()
    tokenizer = load_tokenizer(resolve_model(settings.model.path, cache_dir(settings)))
    raw = (files("rluf") / "simulation" / "sample" / "feedback.jsonl.gz").read_bytes()
    texts = {json.loads(line)["response"] for line in gzip.decompress(raw).splitlines()}
    return [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in sorted(texts)]


def main() -> None:
    """Simulate every pair and write the JSON line."""
    lengths = response_lengths()
    counts = [int(word) for word in sys.argv[1:]] or list(ENGINES)
    table = {
        str(engines): {str(staleness): simulate(engines, staleness, lengths) for staleness in STALENESS}
        for engines in counts
    }
    mean, longest = fmean(lengths), max(lengths)
    result = {
        "benchmark": "staleness",
        "responses": len(lengths),
        "length_mean": round(mean, 1),
        "length_max": longest,
        "wave_idle_bound": round(1 - mean / longest, 3),
        "engines": table,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
