"""Throughput and latency of the service over HTTP, compared with the bare model and with vLLM's pooling server.

For each backbone, a reward model with random weights (speed does not depend on them) is served on Ray Serve with one
replica. 1 to 64 clients query it, each sending its next request when the last is answered. Before and after each run of
clients, so that other programs slow all equally, runs the bare loop: the same model on the same texts in a separate
process with a scorer's threads and environment, without HTTP and queue. It scores as many responses at once as there
are clients, which is the most that any server can see at once. With --vllm the same clients then query vLLM's pooling
server, with the same model in float32 without compilation.

The clients are one asyncio process on the same cores; their share of one core is `client_cpu`, and is not subtracted.
Requests are encoded in advance; every answer is parsed and checked after the clock has stopped.

--faults N runs at 80% of the peak for N seconds instead, kills a replica each minute (scorers and the feedback writer),
changes models twice, and sends feedback throughout. It counts wrong answers, refusals by status, and acknowledged rows
that are missing in the store. Prints one JSON line last.

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
from rluf.prepare.readers.feedback_folder import list_row_files
from rluf.reward.backbone import build_text_encoder, enable_fast_cpu_matmul, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.reward.text import SCORING_BATCH_TOKENS, render_context
from rluf.types import Message, ScoringItem
from rluf.utils.paths import resolve_cache_folder

ITEM_COUNT = 512
JSON_HEADERS = {"Content-Type": "application/json"}
VOCABULARY = (
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


def random_items(seed: int = 0) -> list[ScoringItem]:
    """Random conversations with responses of 5 to 60 words."""
    rng = random.Random(seed)

    def random_text(word_count: int) -> str:
        return " ".join(rng.choice(VOCABULARY) for _ in range(word_count))

    return [
        ScoringItem([Message(role="user", content=random_text(rng.randint(4, 20)))], random_text(rng.randint(5, 60)))
        for _ in range(ITEM_COUNT)
    ]


def save_random_model(name: str, folder: Path, seed: int) -> Path:
    """Write a reward model folder with a random head on the backbone."""
    backbone = resolve_model(name, resolve_cache_folder(Settings()))
    model = load_classifier(backbone, require_all_weights=False, seed=seed)
    build_text_encoder(model, backbone, 128).tokenizer.save_pretrained(str(folder))
    model.save_pretrained(str(folder))
    Calibration("love", "platt", -1.0, 1.0, 0.0, 128).save(folder)
    return folder


class BareLoop:
    """A plain loop over the same texts with the same model, in a process like a scorer's; no HTTP, no batching."""

    def __init__(self, folder: Path, items: list[ScoringItem]) -> None:
        enable_fast_cpu_matmul()
        self.model, self.items = RewardModel.load(folder, batch_tokens=SCORING_BATCH_TOKENS), items

    def score_values(self) -> list[float]:
        """Values of all texts."""
        return [score.value for score in self.model.score(self.items, "love")]

    def raw_logits(self) -> list[float]:
        """Raw logits of all texts."""
        return [score.raw_logit for score in self.model.score(self.items, "love")]

    def measure_rate(self, batch_size: int, seconds: float) -> float:
        """Responses per second in batches of `batch_size`, over at least `seconds`."""
        scored, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            batch = [self.items[(scored + index) % len(self.items)] for index in range(batch_size)]
            self.model.score(batch, "love")
            scored += len(batch)
        return scored / elapsed


def start_bare_loop(folder: Path, items: list[ScoringItem], threads: int) -> Any:
    """Start a BareLoop in a separate process, with the environment of a scorer."""
    import ray

    from cluster.placement import actor_environment

    settings = Settings.model_validate({"cluster": {"threads_per_actor": threads}})
    options = {"num_cpus": 0.1, "runtime_env": {"env_vars": actor_environment(settings, "reward")}}
    return ray.remote(**options)(BareLoop).remote(folder, items)


@dataclass
class ClientRecord:
    """Results of clients: latencies in s, statuses, bodies by item, summed rates, feedback ids acknowledged."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    bodies: list[tuple[int, bytes]] = field(default_factory=list)
    requests_per_s: float = 0.0
    client_cpu: float = 0.0
    acknowledged: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class RequestSet:
    """URL and one encoded request body per item."""

    url: str
    bodies: list[bytes]


def build_service_requests(url: str, items: list[ScoringItem]) -> RequestSet:
    """Requests to the service."""
    bodies = [json.dumps({"messages": item.messages, "response": item.response}).encode() for item in items]
    return RequestSet(f"{url}/v1/score", bodies)


async def run_client(
    http: aiohttp.ClientSession,
    requests: RequestSet,
    record: ClientRecord,
    seconds: float,
    first_item: int,
    pause_s: float = 0.0,
) -> None:
    """Run one client for `seconds`; its first request is a warm-up and not counted."""
    item_index, answered, request_started = first_item, -1, time.perf_counter()
    measuring_started = request_started
    while request_started - measuring_started < seconds or answered < 1:
        # 7 and the item count have no common factor, so every client visits all items.
        item_index = (item_index + 7) % len(requests.bodies)
        status, body = 0, b""
        try:
            async with http.post(requests.url, data=requests.bodies[item_index], headers=JSON_HEADERS) as response:
                status, body = response.status, await response.read()
        except aiohttp.ClientError:
            await asyncio.sleep(0.2)
        request_ended = time.perf_counter()
        record.statuses[status] += 1
        if status == 200:
            record.bodies.append((item_index, body))
            if answered >= 0:
                record.latencies.append(request_ended - request_started)
            else:
                measuring_started = request_ended
            answered += 1
        elif status:
            await asyncio.sleep(0.2)
        if pause_s:
            await asyncio.sleep(pause_s)
        request_started = time.perf_counter()
    record.requests_per_s += answered / (request_started - measuring_started)


async def run_clients(requests: RequestSet, client_count: int, seconds: float) -> ClientRecord:
    """Run `client_count` clients for `seconds`."""
    record, cpu_before, started = ClientRecord(), time.process_time(), time.perf_counter()
    async with open_http_session() as http:
        await asyncio.gather(
            *(run_client(http, requests, record, seconds, 31 * client_index) for client_index in range(client_count))
        )
    record.client_cpu = (time.process_time() - cpu_before) / (time.perf_counter() - started)
    return record


def open_http_session() -> aiohttp.ClientSession:
    """An HTTP client without a limit on connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120), trust_env=False
    )


def count_wrong_answers(record: ClientRecord, expected_by_version: dict[str, list[float]]) -> int:
    """Count answers that differ from the library's scorer for the version that they name."""
    wrong = 0
    for item_index, body in record.bodies:
        answer = json.loads(body)
        expected = expected_by_version.get(answer["model_version"], expected_by_version.get("any", []))[item_index]
        wrong += abs(answer["scores"]["love"]["value"] - expected) > 1e-4
    return wrong


async def send_feedback(http: aiohttp.ClientSession, url: str, client_record: ClientRecord, end_time: float) -> None:
    """Send reactions to responses that were served elsewhere, ten per second."""
    row_number = 0
    while time.perf_counter() < end_time:
        row_number += 1
        feedback_record = {
            "conversation_id": f"c{row_number}", "turn": 0, "user_id": f"u{row_number % 50}", "model_version": "m",
            "time": "2026-01-31T12:00:00Z", "messages": [{"role": "user", "content": "Hi"}], "response": "Hello",
        }  # fmt: skip
        status = 0
        with contextlib.suppress(aiohttp.ClientError):
            body = {"id": f"r{row_number}", "reaction": "love", "record": feedback_record}
            async with http.post(f"{url}/v1/feedback", json=body) as response:
                status = response.status
        client_record.statuses[status] += 1
        if status == 200:
            client_record.acknowledged.add(f"r{row_number}")
        await asyncio.sleep(0.1)


def kill_replica(deployment: str) -> int:
    """kill -9 one replica of a deployment, as in a crash; returns how many were killed."""
    for process in psutil.Process().children(recursive=True):  # only of this process's own Ray
        command_line = " ".join(process.cmdline())
        if command_line.startswith(f"ray::ServeReplica:rluf:{deployment}"):
            os.kill(process.pid, signal.SIGKILL)
            return 1
    return 0


def find_free_port() -> int:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class BenchmarkService:
    """The service for one backbone: settings, address, and deployment of model versions."""

    def __init__(self, root: Path, threads: int) -> None:
        port = find_free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.settings_tree: dict[str, Any] = {
            "name": "bench",
            "run": {"root": str(root)},
            "cluster": {"threads_per_actor": threads},
            "serve": {
                "port": port,
                "objectives": ["love"],
                "client_requests_per_s": 1e6,
                "reaction_window_s": 5,
            },
        }
        self.feedback_folder = root / "bench" / "feedback"

    def deploy(self, model_folder: Path) -> str:
        """Deploy the model of a folder; returns its version once it answers."""
        from rluf.config.derived import list_configured_reward_folders
        from rluf.serve.__main__ import start_service
        from rluf.serve.application import build_scorer_config

        self.settings_tree["objectives"] = {"love": {"path": str(model_folder), "weight": 1.0}}
        settings = Settings.model_validate(self.settings_tree)
        expected_version = str(build_scorer_config(settings, list_configured_reward_folders(settings))["version"])
        start_service(settings)
        body = {"messages": [{"role": "user", "content": "Hi"}], "response": "Hello"}
        deadline = time.monotonic() + 120
        while (
            httpx.post(f"{self.url}/v1/score", json=body, timeout=120).json().get("model_version") != expected_version
        ):
            if time.monotonic() > deadline:
                raise ResourceError(f"the service did not switch to {model_folder} in 120 s")
            time.sleep(0.1)
        return expected_version


def summarize_record(record: ClientRecord) -> dict[str, Any]:
    """Throughput and latency of one run."""
    p50, p95, p99 = (1000 * float(np.percentile(record.latencies, percentile)) for percentile in (50, 95, 99))
    return {
        "per_s": record.requests_per_s, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "client_cpu": record.client_cpu,
        "statuses": dict(record.statuses),
    }  # fmt: skip


def measure_with_bare_loop(
    bare_loop: Any, requests: RequestSet, client_count: int, seconds: float
) -> tuple[ClientRecord, dict[str, Any]]:
    """Run clients, and the bare loop before and after them."""
    import ray

    # Half before and half after the clients, so that a change of load affects both sides equally.
    rate_before = ray.get(bare_loop.measure_rate.remote(client_count, seconds / 2))
    record = asyncio.run(run_clients(requests, client_count, seconds))
    bare_rate = (rate_before + ray.get(bare_loop.measure_rate.remote(client_count, seconds / 2))) / 2
    figures = summarize_record(record) | {"bare_per_s": bare_rate}
    return record, figures | {"ratio": figures["per_s"] / bare_rate}


def measure_backbone(name: str, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure bare loop, service, and with --vllm vLLM's pooling server on one backbone."""
    import ray
    from ray import serve

    items, model_folder = random_items(), save_random_model(name, root / name, 1)
    bare_loop = start_bare_loop(model_folder, items, args.threads)
    expected_by_version = {"any": ray.get(bare_loop.score_values.remote())}
    service = BenchmarkService(root / f"{name}-served", args.threads)
    service.deploy(model_folder)
    asyncio.run(run_clients(build_service_requests(service.url, items), 8, 2.0))
    results: dict[str, Any] = {}
    for client_count in args.clients:
        record, figures = measure_with_bare_loop(
            bare_loop, build_service_requests(service.url, items), client_count, args.seconds
        )
        results[f"clients_{client_count}"] = figures | {"wrong": count_wrong_answers(record, expected_by_version)}
        print(name, client_count, "clients:", json.dumps(results[f"clients_{client_count}"]), flush=True)
    serve.shutdown()
    if args.vllm:
        logits = ray.get(bare_loop.raw_logits.remote())
        with vllm_pooling_server(model_folder, args.threads) as url:
            requests = build_vllm_requests(url, model_folder, items)
            asyncio.run(run_clients(requests, 8, 2.0))
            for client_count in args.clients:
                record, figures = measure_with_bare_loop(bare_loop, requests, client_count, args.seconds)
                figures["max_difference"] = max(
                    abs(read_vllm_score(body) - _sigmoid(logits[item_index])) for item_index, body in record.bodies
                )
                results[f"vllm_{client_count}"] = figures
                print(name, client_count, "clients of vLLM:", json.dumps(figures), flush=True)
    ray.kill(bare_loop)
    return results


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def build_vllm_requests(url: str, folder: Path, items: list[ScoringItem]) -> RequestSet:
    """Equivalent requests for vLLM: pairs of texts for an encoder, token ids for a decoder."""
    model = RewardModel.load(folder, batch_tokens=SCORING_BATCH_TOKENS)
    if model.encoder.uses_text_pairs:
        pairs = [{"text_1": render_context(item.messages), "text_2": item.response} for item in items]
        return RequestSet(f"{url}/score", [json.dumps(pair).encode() for pair in pairs])
    rows = model.encoder.encode(items)
    return RequestSet(f"{url}/classify", [json.dumps({"input": list(row.token_ids)}).encode() for row in rows])


def read_vllm_score(body: bytes) -> float:
    """The probability in a response of /score or /classify."""
    (item,) = json.loads(body)["data"]
    return float(item["score"] if "score" in item else item["probs"][0])


@contextlib.contextmanager
def vllm_pooling_server(model_folder: Path, threads: int) -> Iterator[str]:
    """Run vLLM's OpenAI server as a float32 pooling server for the model; yields its URL."""
    port = find_free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder), "--runner", "pooling",
        "--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--port", str(port), "--host", "127.0.0.1",
        "--disable-uvicorn-access-log", "--no-enable-log-requests",
        "--max-num-batched-tokens", str(SCORING_BATCH_TOKENS),
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    url, log_path = f"http://127.0.0.1:{port}", model_folder.parent / f"{model_folder.name}-vllm.log"
    with log_path.open("wb") as stream:
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise ResourceError(
                        f"vLLM's pooling server did not start; end of its log: {log_path.read_text()[-2000:]}"
                    )
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(60)


async def _run_with_faults(
    service: BenchmarkService, items: list[ScoringItem], model_folders: list[Path], args: argparse.Namespace
) -> tuple[ClientRecord, int, int]:
    requests = build_service_requests(service.url, items)
    peak_figures = summarize_record(await run_clients(requests, args.clients[-1], args.seconds))
    print("peak:", json.dumps(peak_figures), flush=True)
    target_rate, record = 0.8 * peak_figures["per_s"], ClientRecord()
    client_count = max(4, args.clients[-1] // 2)
    pause_s = max(0.0, client_count / target_rate - peak_figures["p50_ms"] / 1000 * client_count / args.clients[-1])
    kill_count = swap_count = 0
    async with open_http_session() as http:
        end_time = time.perf_counter() + args.faults
        client_tasks = [
            run_client(http, requests, record, args.faults, 31 * client_index, pause_s)
            for client_index in range(client_count)
        ]
        load = asyncio.gather(*client_tasks, send_feedback(http, service.url, record, end_time))
        for step in range(1, args.faults // args.every):
            await asyncio.sleep(args.every)
            kill_count += kill_replica("feedback-writer" if step % 3 == 2 else "scorer-live")
            if step in (1, 3):
                await asyncio.sleep(5)
                swap_count += 1
                await asyncio.to_thread(service.deploy, model_folders[swap_count % 2])
        await load
    return record, kill_count, swap_count


def measure_faults(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Load at 80% of the peak while replicas are killed and models change."""
    items, backbone = random_items(), args.models[0]
    model_folders = [save_random_model(backbone, root / f"{backbone}-{seed}", seed) for seed in (1, 2)]
    service = BenchmarkService(root / "served", args.threads)
    expected_by_version = {service.deploy(folder): BareLoop(folder, items).score_values() for folder in model_folders}
    service.deploy(model_folders[0])
    record, kill_count, swap_count = asyncio.run(_run_with_faults(service, items, model_folders, args))
    time.sleep(4 * service.settings_tree["serve"]["reaction_window_s"])
    row_ids = [
        row_id
        for parquet_file in list_row_files(service.feedback_folder)
        for row_id in pq.read_table(parquet_file)["id"].to_pylist()
    ]
    return {
        **summarize_record(record),
        "wrong": count_wrong_answers(record, expected_by_version),
        "kills": kill_count,
        "swaps": swap_count,
        "acknowledged": len(record.acknowledged),
        "rows": len(row_ids),
        "lost": len(record.acknowledged - set(row_ids)),
        "duplicated": len(row_ids) - len(set(row_ids)),
    }


def main() -> None:
    """Run the selected benchmark and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2-135m-instruct"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm", action="store_true", help="also measure vLLM's pooling server")
    parser.add_argument("--faults", type=int, default=0, help="seconds of load with faults, instead of the speed runs")
    parser.add_argument("--every", type=int, default=60, help="seconds between killed replicas")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    enable_fast_cpu_matmul()
    import ray
    from ray import serve

    os.environ.pop("RLUF_SERVE_TOKEN", None)
    with tempfile.TemporaryDirectory() as work_folder:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20)
        try:
            if args.faults:
                results = {"faults": measure_faults(args, Path(work_folder))}
            else:
                results = {name: measure_backbone(name, args, Path(work_folder)) for name in args.models}
        finally:
            serve.shutdown()
            ray.shutdown()
    print(json.dumps({"benchmark": "serve", "threads": args.threads, **results}))


if __name__ == "__main__":
    main()
