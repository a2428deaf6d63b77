"""Throughput of the simulated users: scoring responses, reacting to them, and both together as in an evaluation.

One reaction is one user reading one response: heart, continuing and returning are sampled. Responses are those of the
shipped sample log. Times are CPU seconds on one core; the median of the rounds counts. The last line is JSON.

python benchmarks/simulation.py [--users 100000] [--per-user 10] [--rounds 5]
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

from rluf.simulate.ground_truth import GroundTruth, true_scores
from rluf.simulate.users import SimulatedReactions, simulate_population
from rluf.simulate.world import WORLD
from rluf.utils.paths import find_sample_log


def median_cpu_seconds(rounds: int, work: Callable[[], object]) -> float:
    """Median CPU seconds of `work` after a warm-up run."""
    work()
    cpu_seconds = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        cpu_seconds.append(time.process_time() - started)
    return statistics.median(cpu_seconds)


def main() -> None:
    """Time the parts and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--per-user", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with gzip.open(find_sample_log("feedback"), "rt", encoding="utf-8") as stream:
        rows = [json.loads(report) for report in stream][:2000]
    topics = [row["topic"] for row in rows]

    def score_responses() -> list[GroundTruth]:
        return [true_scores(row["messages"], row["topic"], row["response"], True) for row in rows]

    response_scores = score_responses()

    def simulate_users(user_count: int = args.users) -> SimulatedReactions:
        return simulate_population(
            response_scores, topics, user_count=user_count, responses_per_user=args.per_user, seed=1
        )

    reactions_sample = simulate_users(2000)  # fixed size: the fingerprint must not depend on --users
    scoring_s, reacting_s = (
        median_cpu_seconds(args.rounds, score_responses),
        median_cpu_seconds(args.rounds, simulate_users),
    )
    reaction_count = args.users * args.per_user
    report = {
        "benchmark": "simulation",
        "world": WORLD.version,
        "reactions_per_second": round(reaction_count / reacting_s),
        "responses_read_per_second": round(len(rows) / scoring_s),
        "reactions_per_second_with_reading": round(reaction_count / (reacting_s + scoring_s)),
        "reactions": reaction_count,
        "responses": len(rows),
        "fingerprint": hashlib.sha256(
            reactions_sample.loved.tobytes() + reactions_sample.probability.tobytes()
        ).hexdigest()[:16],
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
