"""The service against the bare model and against vLLM's pooling server: throughput and latency over HTTP, in one run.

For each backbone a reward model of random weights (speed does not depend on them) is served on Ray Serve with one
replica, and asked by 1 to 64 clients, each sending its next request when the last is answered. Beside each number of
clients, before and after it so that other programs slow all alike, runs the bare loop: the same model on the same texts
in a process of its own with a scorer's threads and environment, no HTTP, no queue. It scores as many responses at once
as there are clients, which is all that any server can see at once: one at a time for one client. With --vllm the same
clients then ask vLLM's pooling server, on the same model in float32 without compilation.

The clients are one asyncio process on the same cores; what they take of one core is `client_cpu`, and nothing is
subtracted for it. Requests are encoded before, answers are read and checked, each of them, after the clock has stopped.

With --faults it runs at 80% of the peak for so many seconds instead, kills a replica each minute (scorers and the
ledger), changes models twice, and sends feedback all along; it counts wrong answers, refusals by status, and
acknowledged rows that the store does not hold. Prints one JSON line last.

python benchmarks/serve.py [--models minilm smollm2-135m-instruct] [--clients 1 8 64] [--seconds 8] [--vllm]
python benchmarks/serve.py --models minilm --faults 600
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch

from rluf.config.settings import Settings
from rluf.errors import ResourceError
from rluf.models.hub import resolve_model
from rluf.reward.backbone import encoder_for, load_classifier, quick_cpu_matmul
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.reward.text import Item, context_text
from rluf.utils.paths import cache_dir

TEXTS = 512
BATCH_TOKENS = 8192
JSON = {"Content-Type": "application/json"}
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

    def raw(self) -> list[float]:
        """The model's own logits of all texts."""
        return [score.raw for score in self.model.score(self.items, "love")]

    def rate(self, at_once: int, seconds: float) -> float:
        """Responses a second in rounds of `at_once`, for at least so many seconds."""
        done, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            part = [self.items[(done + i) % len(self.items)] for i in range(at_once)]
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
    """What the clients saw: latencies in s, statuses, bodies by item, rate of each client, ids the ledger took."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    bodies: list[tuple[int, bytes]] = field(default_factory=list)
    per_s: float = 0.0
    client_cpu: float = 0.0
    acknowledged: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Questions:
    """Where to ask, and one encoded body an item."""

    url: str
    bodies: list[bytes]


def ours(url: str, items: list[Item]) -> Questions:
    """Our own questions."""
    bodies = [json.dumps({"messages": messages, "response": response}).encode() for messages, response in items]
    return Questions(f"{url}/v1/score", bodies)


async def client(
    http: aiohttp.ClientSession, questions: Questions, seen: Seen, seconds: float, start: int, pause: float = 0.0
) -> None:
    """One client that asks until the time is over; its first request is not counted, its last one ends in its time."""
    number, count, begun = start, -1, time.perf_counter()
    first = begun
    while begun - first < seconds or count < 1:
        number = (number + 7) % len(questions.bodies)
        status, body = 0, b""
        try:
            async with http.post(questions.url, data=questions.bodies[number], headers=JSON) as told:
                status, body = told.status, await told.read()
        except aiohttp.ClientError:
            await asyncio.sleep(0.2)
        ended = time.perf_counter()
        seen.statuses[status] += 1
        if status == 200:
            seen.bodies.append((number, body))
            if count >= 0:
                seen.latencies.append(ended - begun)
            else:
                first = ended
            count += 1
        elif status:
            await asyncio.sleep(0.2)
        if pause:
            await asyncio.sleep(pause)
        begun = time.perf_counter()
    seen.per_s += count / (begun - first)


async def asked(questions: Questions, clients: int, seconds: float) -> Seen:
    """What `clients` clients saw in so many seconds."""
    seen, cpu, started = Seen(), time.process_time(), time.perf_counter()
    async with session() as http:
        await asyncio.gather(*(client(http, questions, seen, seconds, 31 * i) for i in range(clients)))
    seen.client_cpu = (time.process_time() - cpu) / (time.perf_counter() - started)
    return seen


def session() -> aiohttp.ClientSession:
    """An HTTP client with as many connections as it is asked for."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120), trust_env=False
    )


def wrong_answers(seen: Seen, truth: dict[str, list[float]]) -> int:
    """Answers that are not what the library's scorer gives for the version that they name."""
    count = 0
    for number, body in seen.bodies:
        told = json.loads(body)
        expected = truth.get(told["model_version"], truth.get("any", []))[number]
        count += abs(told["scores"]["love"]["value"] - expected) > 1e-4
    return count


async def feedback(http: aiohttp.ClientSession, url: str, seen: Seen, until: float) -> None:
    """Reactions to responses that were served elsewhere, ten a second."""
    number = 0
    while time.perf_counter() < until:
        number += 1
        record = {
            "conversation_id": f"c{number}", "turn": 0, "user_id": f"u{number % 50}", "model_version": "m",
            "time": "2026-01-31T12:00:00Z", "messages": [{"role": "user", "content": "Hi"}], "response": "Hello",
        }  # fmt: skip
        status = 0
        with contextlib.suppress(aiohttp.ClientError):
            body = {"id": f"r{number}", "reaction": "love", "record": record}
            async with http.post(f"{url}/v1/feedback", json=body) as told:
                status = told.status
        seen.statuses[status] += 1
        if status == 200:
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


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Service:
    """One backbone's service: settings, address, and deployments of its versions."""

    def __init__(self, root: Path, threads: int) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.tree: dict[str, Any] = {
            "name": "bench", "run": {"root": str(root)}, "cluster": {"threads": threads},
            "objectives": {"batch_tokens": BATCH_TOKENS},
            "serve": {"port": port, "objectives": ["love"], "requests_per_s": 1e6, "settle_s": 5, "rotate_s": 2},
        }  # fmt: skip
        self.log = root / "bench" / "feedback"

    def deploy(self, folder: Path) -> str:
        """Serve the model of that folder; returns its version once it answers."""
        from rluf.serve.__main__ import serve
        from rluf.serve.application import chosen_models, given_folders

        self.tree["objectives"]["love"] = {"path": str(folder), "weight": 1.0}
        settings = Settings.model_validate(self.tree)
        wanted = str(chosen_models(settings, given_folders(settings))["version"])
        serve(settings)
        body = {"messages": [{"role": "user", "content": "Hi"}], "response": "Hello"}
        deadline = time.monotonic() + 120
        while httpx.post(f"{self.url}/v1/score", json=body, timeout=120).json().get("model_version") != wanted:
            if time.monotonic() > deadline:
                raise ResourceError(f"the service does not change over to {folder}")
            time.sleep(0.1)
        return wanted


def figures(seen: Seen) -> dict[str, Any]:
    """Throughput and latency of one run."""
    p50, p95, p99 = (1000 * float(np.percentile(seen.latencies, q)) for q in (50, 95, 99))
    return {
        "per_s": seen.per_s, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "client_cpu": seen.client_cpu,
        "statuses": dict(seen.statuses),
    }  # fmt: skip


def beside(loop: Any, questions: Questions, clients: int, seconds: float) -> tuple[Seen, dict[str, Any]]:
    """Clients, and the bare loop before and after them."""
    import ray

    before = ray.get(loop.rate.remote(clients, seconds / 2))
    seen = asyncio.run(asked(questions, clients, seconds))
    bare = (before + ray.get(loop.rate.remote(clients, seconds / 2))) / 2
    told = figures(seen) | {"bare_per_s": bare}
    return seen, told | {"ratio": told["per_s"] / bare}


def speed(name: str, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Bare loop, service, and with --vllm vLLM's pooling server on one backbone."""
    import ray
    from ray import serve

    items, folder = made_items(), made_model(name, root / name, 1)
    loop = started_bare(folder, items, args.threads)
    truth = {"any": ray.get(loop.values.remote())}
    service = Service(root / f"{name}-served", args.threads)
    service.deploy(folder)
    asyncio.run(asked(ours(service.url, items), 8, 2.0))
    found: dict[str, Any] = {}
    for clients in args.clients:
        seen, told = beside(loop, ours(service.url, items), clients, args.seconds)
        found[f"clients_{clients}"] = told | {"wrong": wrong_answers(seen, truth)}
        print(name, clients, "clients:", json.dumps(found[f"clients_{clients}"]), flush=True)
    serve.shutdown()
    if args.vllm:
        logits = ray.get(loop.raw.remote())
        with pooling(folder, args.threads) as url:
            questions = theirs(url, folder, items)
            asyncio.run(asked(questions, 8, 2.0))
            for clients in args.clients:
                seen, told = beside(loop, questions, clients, args.seconds)
                told["apart"] = max(abs(their_score(body) - _sigmoid(logits[n])) for n, body in seen.bodies)
                found[f"vllm_{clients}"] = told
                print(name, clients, "clients of vLLM:", json.dumps(told), flush=True)
    ray.kill(loop)
    return found


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def theirs(url: str, folder: Path, items: list[Item]) -> Questions:
    """vLLM's questions for the same work: an encoder reads pairs of texts, a decoder the very token ids."""
    model = RewardModel.load(folder, batch_tokens=BATCH_TOKENS)
    if model.encoder.pair:
        pairs = [{"text_1": context_text(messages), "text_2": response} for messages, response in items]
        return Questions(f"{url}/score", [json.dumps(pair).encode() for pair in pairs])
    rows = model.encoder.encode(items)
    return Questions(f"{url}/classify", [json.dumps({"input": list(row.ids)}).encode() for row in rows])


def their_score(body: bytes) -> float:
    """The probability in an answer of /score or /classify."""
    (one,) = json.loads(body)["data"]
    return float(one["score"] if "score" in one else one["probs"][0])


@contextlib.contextmanager
def pooling(folder: Path, threads: int) -> Iterator[str]:
    """vLLM's OpenAI server as a pooling server on the model, in float32; yields its address."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--runner", "pooling",
        "--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--port", str(port), "--host", "127.0.0.1",
        "--disable-uvicorn-access-log", "--max-num-batched-tokens", str(BATCH_TOKENS), "--no-enable-log-requests",
    ]  # fmt: skip
    env = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    url, log = f"http://127.0.0.1:{port}", folder.parent / f"{folder.name}-vllm.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise ResourceError(
                        f"vLLM's pooling server does not answer; its log ends: {log.read_text()[-2000:]}"
                    )
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(60)


async def _faulty(
    service: Service, items: list[Item], folders: list[Path], args: argparse.Namespace
) -> tuple[Seen, int, int]:
    questions = ours(service.url, items)
    peak = figures(await asked(questions, args.clients[-1], args.seconds))
    print("peak:", json.dumps(peak), flush=True)
    wanted, seen = 0.8 * peak["per_s"], Seen()
    clients = max(4, args.clients[-1] // 2)
    pause = max(0.0, clients / wanted - peak["p50_ms"] / 1000 * clients / args.clients[-1])
    kills = swaps = 0
    async with session() as http:
        until = time.perf_counter() + args.faults
        tasks = [client(http, questions, seen, args.faults, 31 * i, pause) for i in range(clients)]
        running = asyncio.gather(*tasks, feedback(http, service.url, seen, until))
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
    seen, kills, swaps = asyncio.run(_faulty(service, items, folders, args))
    time.sleep(service.tree["serve"]["settle_s"] + 3 * service.tree["serve"]["rotate_s"])
    rows = [row for file in service.log.glob("*.parquet") for row in pq.read_table(file)["id"].to_pylist()]
    return {
        **figures(seen), "wrong": wrong_answers(seen, truth), "kills": kills, "swaps": swaps,
        "acknowledged": len(seen.acknowledged), "rows": len(rows), "lost": len(seen.acknowledged - set(rows)),
        "twice": len(rows) - len(set(rows)),
    }  # fmt: skip


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2-135m-instruct"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm", action="store_true", help="ask vLLM's pooling server too")
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
