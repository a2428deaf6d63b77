"""Batching: rluf's RequestBatcher against Ray Serve's @serve.batch with a batch_size_fn that counts tokens.

Both batch the same items for the same reward model (MiniLM with a random head, float32), in turns within one process,
so that other programs slow both equally. N clients in that process each send their next item up to --jitter-ms after
the last is answered, as over a network. Ray's decorator runs with waits of 0 and 10 ms. HTTP and the calls between
processes, which are the same for both, are left out. Prints one JSON line last.

python benchmarks/serve_batching.py [--clients 1 4 16 64] [--seconds 6] [--rounds 2] [--jitter-ms 10]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.reward.backbone import build_text_encoder, enable_fast_cpu_matmul, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.serve.batching import RequestBatcher, estimate_tokens
from rluf.types import Message, ScoringItem
from rluf.utils.paths import resolve_cache_folder

BATCH_TOKENS, MAX_ITEM_TOKENS, ITEM_COUNT = 8192, 128, 512
WORDS = ("the", "day", "was", "long", "and", "so", "we", "went", "until", "asked", "for", "more")


def random_items() -> list[ScoringItem]:
    """Random conversations with responses of 5 to 60 words."""
    rng = random.Random(0)

    def random_text(fewest: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))

    return [
        ScoringItem([Message(role="user", content=random_text(4, 20))], random_text(5, 60)) for _ in range(ITEM_COUNT)
    ]


def count_tokens(items: list[ScoringItem]) -> int:
    """The batch_size_fn: estimated tokens of the items."""
    return sum(estimate_tokens(item, MAX_ITEM_TOKENS) for item in items)


class BatchingModel:
    """A reward model behind three batchers, and the clients that measure them."""

    def __init__(self, backbone_folder: str, jitter_s: float) -> None:
        self.jitter_s = jitter_s
        from ray import serve
        from ray.serve._private.common import DeploymentID, ReplicaID
        from ray.serve._private.config import DeploymentConfig
        from ray.serve.context import _set_internal_replica_context
        from ray.serve.schema import ReplicaRank

        # @serve.batch refuses to run outside a replica, although it needs nothing else of one.
        _set_internal_replica_context(
            replica_id=ReplicaID("0", DeploymentID("batching")), servable_object=self,
            _deployment_config=DeploymentConfig(max_ongoing_requests=BATCH_TOKENS),
            rank=ReplicaRank(rank=0, node_rank=0, local_rank=0), world_size=1,
        )  # fmt: skip
        enable_fast_cpu_matmul()
        folder = Path(backbone_folder)
        member = load_classifier(folder, require_all_weights=False)
        encoder = build_text_encoder(member, folder, MAX_ITEM_TOKENS)
        calibration = Calibration("love", "platt", -1.0, 1.0, 0.0, MAX_ITEM_TOKENS)
        self.model = RewardModel([member], encoder, calibration, BATCH_TOKENS)
        self.items, self.batch_sizes, self.lock = random_items(), list[int](), asyncio.Lock()
        batcher = RequestBatcher(
            self.run_batch, batch_tokens=BATCH_TOKENS, max_item_tokens=MAX_ITEM_TOKENS, max_queued_responses=10**6,
            replica_count=1,
        )  # fmt: skip

        async def submit(item: ScoringItem) -> float:
            return (await batcher.submit([item]))[0]

        async def run_batch(items: list[ScoringItem]) -> list[float]:
            return await self.run_batch(items)

        self.batchers: dict[str, Any] = {"rluf": submit}
        for wait_ms in (0, 10):
            self.batchers[f"ray {wait_ms} ms"] = serve.batch(
                max_batch_size=BATCH_TOKENS, batch_wait_timeout_s=wait_ms / 1000, batch_size_fn=count_tokens
            )(run_batch)

    async def run_batch(self, items: list[ScoringItem]) -> list[float]:
        """Score one batch at a time in a thread, as a scorer does."""
        async with self.lock:
            self.batch_sizes.append(len(items))
            scores = await asyncio.to_thread(self.model.score, items, "love")
            return [score.value for score in scores]

    async def measure(self, name: str, client_count: int, seconds: float) -> dict[str, float]:
        """Responses per second, median latency and mean batch size of one batcher with this many clients."""
        latencies: list[float] = []
        self.batch_sizes.clear()
        start_time = time.perf_counter()

        async def send_repeatedly(index: int) -> None:
            while time.perf_counter() - start_time < seconds:
                await asyncio.sleep(random.uniform(0.0, self.jitter_s))
                sent_at = time.perf_counter()
                await self.batchers[name](self.items[index % ITEM_COUNT])
                latencies.append(time.perf_counter() - sent_at)
                index += client_count

        await asyncio.gather(*(send_repeatedly(index) for index in range(client_count)))
        elapsed = time.perf_counter() - start_time
        return {
            "per_s": len(latencies) / elapsed,
            "p50_ms": 1000 * float(np.median(latencies)),
            "batch": float(np.mean(self.batch_sizes)),
        }


async def measure_batchers(
    client_counts: list[int], seconds: float, rounds: int, jitter_s: float
) -> dict[str, list[dict[str, float]]]:
    """Figures of each round by batcher and number of clients."""
    model = BatchingModel(str(resolve_model("minilm", resolve_cache_folder(Settings()))), jitter_s)
    await model.measure("rluf", 4, 2.0)
    figures: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for client_count in client_counts:
            for name in model.batchers:
                result = await model.measure(name, client_count, seconds)
                figures.setdefault(f"{name}, {client_count} clients", []).append(result)
    return figures


def main() -> None:
    """Measure the batchers in turns and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jitter-ms", type=float, default=10.0, help="longest pause before a client sends again")
    args = parser.parse_args()
    figures = asyncio.run(measure_batchers(args.clients, args.seconds, args.rounds, args.jitter_ms / 1000))
    means = {
        key: {name: round(float(np.mean([row[name] for row in rows])), 1) for name in rows[0]}
        for key, rows in figures.items()
    }
    print(json.dumps({"benchmark": "serve_batching", **means}))


if __name__ == "__main__":
    main()
