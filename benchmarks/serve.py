"""The service against the bare model: throughput and latency over HTTP beside a plain batched loop in the same run.

For each backbone a reward model of random weights (speed does not depend on them) is served on Ray Serve with one
replica, and asked by 1 to 64 clients, each sending its next request when the last is answered. The bare loop scores the
same texts, 128 at a time, in a process of its own with a scorer's threads and environment; it runs before and after
each number of clients, so that other programs slow both.

With --faults it runs at 80% of the peak for so many seconds instead, kills a replica each minute (scorers and the
ledger), changes models twice, and sends feedback all along; it counts wrong answers, refusals by status, and
acknowledged rows that the store does not hold. Prints one JSON line last.

python benchmarks/serve.py [--models minilm smollm2-135m-instruct] [--clients 1 8 64] [--seconds 8] [--faults 600]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch

from rluf.config.settings import Settings
from rluf.models import resolve_model
from rluf.objectives.backbone import encoder_for, load_classifier, quick_cpu_matmul
from rluf.objectives.calibration import Calibration
from rluf.objectives.scorer import RewardModel
from rluf.objectives.text import Item
from rluf.paths import cache_dir

TEXTS = 512
BATCH_TOKENS = 8192
WORDS = (
    "the",
    "day",
    "was",
    "long",
    "and",
    "so",
    "we",
    "went",
    "on",
    "until",
    "nobody",
    "asked",
    "for",
    "more",
    "of it",
)


def made_items(seed: int = 0) -> list[Item]:
    """Conversations with responses of 5 to 60 words."""
    rng = random.Random(seed)

    def text(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    return [([{"role": "user", "content": text(rng.randint(4, 20))}], text(rng.randint(5, 60))) for _ in range(TEXTS)]


def made_model(name: str, folder: Path, seed: int) -> Path:
    """A reward model folder on the backbone, with a random head."""
    backbone = resolve_model(name, cache_dir(Settings()))
    model = load_classifier(backbone, trained=False, seed=seed)
    encoder_for(model, backbone, 128).tokenizer.save_pretrained(str(folder))
    model.save_pretrained(str(folder))
    Calibration("love", "platt", -1.0, 1.0, 0.0, 128).save(folder)
    return folder


class Bare:
    """The plain loop over the same texts with the same model, in a process like a scorer's; no HTTP, no batching."""

    def __init__(self, folder: Path, items: list[Item]) -> None:
        quick_cpu_matmul()
        self.model, self.items = RewardModel.load(folder, batch_tokens=BATCH_TOKENS), items

    def values(self) -> list[float]:
        """Values of all texts."""
        return [score.value for score in self.model.score(self.items, "love")]

    def rate(self, seconds: float) -> float:
        """Responses a second over rounds of one batch budget each, for at least so many seconds."""
        done, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            part = [self.items[(done + i) % len(self.items)] for i in range(128)]
            self.model.score(part, "love")
            done += len(part)
        return done / passed


def started_bare(folder: Path, items: list[Item], threads: int) -> Any:
    """A Bare in a process of its own, with the environment of a scorer."""
    import ray

    from cluster.placement import role_environment

    settings = Settings.model_validate({"cluster": {"threads": threads}})
    options = {"num_cpus": 0.1, "runtime_env": {"env_vars": role_environment(settings, "reward")}}
    return ray.remote(**options)(Bare).remote(folder, items)


@dataclass
class Seen:
    """What the clients saw."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    acknowledged: set[str] = field(default_factory=set)


async def client(
    http: httpx.AsyncClient, items: list[Item], truth: dict[str, list[float]], seen: Seen, until: float, start: int,
    pause: float = 0.0,
) -> None:  # fmt: skip
    """One client that asks until the time is over."""
    number = start
    while time.perf_counter() < until:
        number = (number + 7) % len(items)
        messages, response = items[number]
        begun = time.perf_counter()
        try:
            told = await http.post("/v1/score", json={"messages": messages, "response": response})
        except httpx.TransportError:
            seen.statuses[0] += 1
            continue
        seen.statuses[told.status_code] += 1
        if told.status_code == 200:
            seen.latencies.append(time.perf_counter() - begun)
            body = told.json()
            expected = truth.get(body["model_version"], truth.get("any", []))[number]
            seen.wrong += abs(body["scores"]["love"]["value"] - expected) > 1e-4
        else:
            await asyncio.sleep(0.2)
        if pause:
            await asyncio.sleep(pause)


async def asked(url: str, items: list[Item], truth: dict[str, list[float]], clients: int, seconds: float) -> Seen:
    """What `clients` clients saw in so many seconds."""
    seen = Seen()
    limits = httpx.Limits(max_connections=clients + 4, max_keepalive_connections=clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as http:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(client(http, items, truth, seen, until, 31 * i) for i in range(clients)))
    return seen


async def feedback(http: httpx.AsyncClient, seen: Seen, until: float) -> None:
    """Reactions to responses that were served elsewhere, ten a second."""
    number = 0
    while time.perf_counter() < until:
        number += 1
        record = {
            "conversation_id": f"c{number}", "turn": 0, "user_id": f"u{number % 50}", "model_version": "m",
            "time": "2026-01-31T12:00:00Z", "messages": [{"role": "user", "content": "Hi"}], "response": "Hello",
        }  # fmt: skip
        try:
            told = await http.post("/v1/feedback", json={"id": f"r{number}", "reaction": "love", "record": record})
        except httpx.TransportError:
            seen.statuses[0] += 1
            continue
        seen.statuses[told.status_code] += 1
        if told.status_code == 200:
            seen.acknowledged.add(f"r{number}")
        await asyncio.sleep(0.1)


def killed(name: str) -> int:
    """End one replica of a deployment at once, as a crash would; returns how many were ended."""
    for process in psutil.Process().children(recursive=True):  # those of our own Ray only
        line = " ".join(process.cmdline())
        if line.startswith(f"ray::ServeReplica:rluf:{name}"):
            os.kill(process.pid, signal.SIGKILL)
            return 1
    return 0


class Service:
    """One backbone's service: settings, address, and deployments of its versions."""

    def __init__(self, root: Path, threads: int) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.tree: dict[str, Any] = {
            "name": "bench", "run": {"root": str(root)}, "cluster": {"threads": threads},
            "objectives": {"batch_tokens": BATCH_TOKENS},
            "serve": {"port": port, "objectives": ["love"], "requests_per_s": 1e6, "settle_s": 5, "rotate_s": 2},
        }  # fmt: skip
        self.log = root / "bench" / "feedback"

    def deploy(self, folder: Path) -> str:
        """Serve the model of that folder; returns its version once it answers."""
        from rluf.serve import serve

        self.tree["objectives"]["love"] = {"path": str(folder), "weight": 1.0}
        serve(Settings.model_validate(self.tree))
        body = {"messages": [{"role": "user", "content": "Hi"}], "response": "Hello"}
        return str(httpx.post(f"{self.url}/v1/score", json=body, timeout=120).json()["model_version"])


def figures(seen: Seen, seconds: float) -> dict[str, Any]:
    """Throughput and latency of one run."""
    p50, p95, p99 = (1000 * float(np.percentile(seen.latencies, q)) for q in (50, 95, 99))
    return {
        "per_s": len(seen.latencies) / seconds, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "wrong": seen.wrong,
        "statuses": dict(seen.statuses),
    }  # fmt: skip


def speed(name: str, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Bare loop and service on one backbone."""
    import ray

    items, folder = made_items(), made_model(name, root / name, 1)
    loop = started_bare(folder, items, args.threads)
    values = ray.get(loop.values.remote())
    service = Service(root / f"{name}-served", args.threads)
    service.deploy(folder)
    asyncio.run(asked(service.url, items, {"any": values}, 8, 2.0))
    found: dict[str, Any] = {}
    for clients in args.clients:
        before = ray.get(loop.rate.remote(args.seconds / 2))
        told = figures(asyncio.run(asked(service.url, items, {"any": values}, clients, args.seconds)), args.seconds)
        told["bare_per_s"] = (before + ray.get(loop.rate.remote(args.seconds / 2))) / 2
        told["ratio"] = told["per_s"] / told["bare_per_s"]
        found[f"clients_{clients}"] = told
        print(name, clients, "clients:", json.dumps(told), flush=True)
    return found


async def _faulty(
    service: Service, items: list[Item], folders: list[Path], truth: dict[str, list[float]], args: argparse.Namespace
) -> tuple[Seen, int, int]:
    peak = figures(await asked(service.url, items, truth, args.clients[-1], args.seconds), args.seconds)
    print("peak:", json.dumps(peak), flush=True)
    wanted, seen = 0.8 * peak["per_s"], Seen()
    clients = max(4, args.clients[-1] // 2)
    pause = max(0.0, clients / wanted - peak["p50_ms"] / 1000 * clients / args.clients[-1])
    kills = swaps = 0
    async with httpx.AsyncClient(base_url=service.url, timeout=120, trust_env=False) as http:
        until = time.perf_counter() + args.faults
        tasks = [client(http, items, truth, seen, until, 31 * i, pause) for i in range(clients)]
        running = asyncio.gather(*tasks, feedback(http, seen, until))
        for step in range(1, args.faults // args.every):
            await asyncio.sleep(args.every)
            kills += killed("ledger" if step % 3 == 2 else "scorer-live")
            if step in (1, 3):
                await asyncio.sleep(5)
                swaps += 1
                await asyncio.to_thread(service.deploy, folders[swaps % 2])
        await running
    return seen, kills, swaps


def faults(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Load at 80% of the peak while replicas die and models change."""
    items, name = made_items(), args.models[0]
    folders = [made_model(name, root / f"{name}-{seed}", seed) for seed in (1, 2)]
    service = Service(root / "served", args.threads)
    truth = {service.deploy(folder): Bare(folder, items).values() for folder in folders}
    service.deploy(folders[0])
    seen, kills, swaps = asyncio.run(_faulty(service, items, folders, truth, args))
    time.sleep(service.tree["serve"]["settle_s"] + 3 * service.tree["serve"]["rotate_s"])
    rows = [row for file in service.log.glob("*.parquet") for row in pq.read_table(file)["id"].to_pylist()]
    return {
        **figures(seen, args.faults), "kills": kills, "swaps": swaps, "acknowledged": len(seen.acknowledged),
        "rows": len(rows), "lost": len(seen.acknowledged - set(rows)), "twice": len(rows) - len(set(rows)),
    }  # fmt: skip


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2-135m-instruct"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--faults", type=int, default=0, help="seconds of load with faults, in place of the speed runs")
    parser.add_argument("--every", type=int, default=60, help="seconds between killed replicas")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quick_cpu_matmul()
    import ray
    from ray import serve

    os.environ.pop("RLUF_SERVE_TOKEN", None)
    with tempfile.TemporaryDirectory() as place:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20)
        try:
            if args.faults:
                found = {"faults": faults(args, Path(place))}
            else:
                found = {name: speed(name, args, Path(place)) for name in args.models}
        finally:
            serve.shutdown()
            ray.shutdown()
    print(json.dumps({"benchmark": "serve", "threads": args.threads, **found}))


if __name__ == "__main__":
    main()
