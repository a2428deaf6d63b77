"""How fast the simulated users are: reading responses, reacting to them, and both together as an evaluation does.

Reactions are counted as one user reading one response: heart, writing on and coming back drawn. Responses are those of
the shipped sample log. Seconds are those of the processor, on one core; the median of the rounds counts. The last line
is JSON.

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

from rluf.simulate.ground_truth import Gold, judge
from rluf.simulate.users import Reactions, react
from rluf.simulate.world import WORLD
from rluf.utils.paths import sample_file


def timed(rounds: int, work: Callable[[], object]) -> float:
    """Median processor seconds of `work`, run once before to warm up."""
    work()
    spans = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        spans.append(time.process_time() - started)
    return statistics.median(spans)


def main() -> None:
    """Time the parts and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--per-user", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with gzip.open(sample_file("feedback"), "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream][:2000]
    topics = [row["topic"] for row in rows]

    def read() -> list[Gold]:
        return [judge(row["messages"], row["topic"], row["response"], True) for row in rows]

    golds = read()

    def answer(users: int = given.users) -> Reactions:
        return react(golds, topics, users=users, responses_per_user=given.per_user, seed=1)

    made = answer(2000)
    reading, reacting = timed(given.rounds, read), timed(given.rounds, answer)
    reactions = given.users * given.per_user
    line = {
        "benchmark": "simulation",
        "world": WORLD.version,
        "reactions_per_second": round(reactions / reacting),
        "responses_read_per_second": round(len(rows) / reading),
        "reactions_per_second_with_reading": round(reactions / (reacting + reading)),
        "reactions": reactions,
        "responses": len(rows),
        "fingerprint": hashlib.sha256(made.loved.tobytes() + made.probability.tobytes()).hexdigest()[:16],
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
