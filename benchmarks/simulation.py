"""Throughput of the simulated users: reading responses with the frozen model, and reacting to them.

One reaction is one user reading one response: heart, continuing and returning are sampled. Responses are those of the
shipped sample log. Times are wall seconds; the median of the rounds counts. The last line is JSON.

python benchmarks/simulation.py [--users 100000] [--per-user 10] [--rounds 5] [--responses 64]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable

from rluf.config.settings import Settings
from rluf.simulate.ground_truth import GroundTruth, Reader, ReaderInput
from rluf.simulate.users import SimulatedReactions, simulate_population
from rluf.simulate.world import WORLD
from rluf.utils.paths import find_sample_log, resolve_cache_folder


def median_seconds(rounds: int, work: Callable[[], object]) -> float:
    """Median wall seconds of `work` after a warm-up run."""
    work()
    wall_seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        wall_seconds.append(time.perf_counter() - started)
    return statistics.median(wall_seconds)


def main() -> None:
    """Time the parts and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--per-user", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--responses", type=int, default=64, help="responses that the model reads per round")
    args = parser.parse_args()
    with gzip.open(find_sample_log("feedback"), "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream][: args.responses]
    topics = [row["topic"] for row in rows]

    inputs = [ReaderInput.from_row(row) for row in rows]
    cache_folder = resolve_cache_folder(Settings())
    model = Reader(cache_folder).model

    def score_responses() -> list[GroundTruth]:
        # A new reader per round: a reader reads each response once.
        return Reader(cache_folder, model=model).score_responses(inputs)

    response_scores = score_responses()

    def simulate_users(user_count: int = args.users) -> SimulatedReactions:
        return simulate_population(
            response_scores, topics, user_count=user_count, responses_per_user=args.per_user, seed=1
        )

    reactions_sample = simulate_users(2000)  # fixed size: the fingerprint must not depend on --users
    scoring_s, reacting_s = (
        median_seconds(args.rounds, score_responses),
        median_seconds(args.rounds, simulate_users),
    )
    reaction_count = args.users * args.per_user
    report = {
        "benchmark": "simulation",
        "world": WORLD.version,
        "reactions_per_second": round(reaction_count / reacting_s),
        "responses_read_per_second": round(len(rows) / scoring_s, 1),
        "reactions": reaction_count,
        "responses": len(rows),
        "fingerprint": hashlib.sha256(
            reactions_sample.loved.tobytes() + reactions_sample.probability.tobytes()
        ).hexdigest()[:16],
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
