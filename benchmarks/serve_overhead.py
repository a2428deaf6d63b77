"""Overhead of a request without a model: Ray Serve's proxy or our listener, and a call between two deployments.

An application of two deployments that compute nothing answers POST / (which calls the second deployment, as the gateway
calls a scorer) and GET / (which does not), with Ray Serve's defaults and with the throughput options that the service
sets for its replicas. CPU time is that of all processes including clients, so other programs hardly affect it.
Prints one JSON line last.

python benchmarks/serve_overhead.py [--requests 400]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import time
from typing import Any

import aiohttp
import numpy as np
import psutil

from rluf.serve.application import SERVE_THROUGHPUT_ENV
from rluf.serve.listener import HttpServer

REQUEST_BODY = json.dumps({"messages": [{"role": "user", "content": "word " * 12}], "response": "word " * 30}).encode()


class ScorerStub:
    """The second deployment, in place of a scorer."""

    async def score(self, items: list[bytes]) -> list[float]:
        """A constant for each item."""
        return [0.5] * len(items)


class GatewayStub:
    """The first deployment, reachable through Ray Serve's proxy and our listener."""

    def __init__(self, port: int, _: Any) -> None:
        from ray import serve

        self._port, self._scorer = port, serve.get_deployment_handle("scorer", "overhead")
        self._listener: HttpServer | None = None

        async def entry(
            scope: Any, receive: Any, send: Any
        ) -> None:  # a function, because uvicorn treats a bound method as ASGI 2
            await self._answer(scope, receive, send)

        self._entry = entry

    async def reconfigure(self, _: dict[str, Any]) -> None:
        """Start our own listener."""
        if self._listener is None:
            self._listener = HttpServer("127.0.0.1", self._port)
            await self._listener.start(self._entry, 10)

    def __serve_build_asgi_app__(self) -> Any:
        return self._entry

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["method"] == "POST":
            await self._scorer.score.remote([event["body"]])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})


def find_free_port() -> int:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def time_requests(port: int, method: str, request_count: int) -> list[float]:
    """Seconds of each request of one client."""
    seconds = []
    async with aiohttp.ClientSession() as http:
        for _ in range(request_count):
            started = time.perf_counter()
            async with http.request(
                method, f"http://127.0.0.1:{port}/", data=REQUEST_BODY if method == "POST" else None
            ) as response:
                await response.read()
            seconds.append(time.perf_counter() - started)
    return seconds


def cpu_seconds() -> float:
    """CPU seconds so far of this process and its descendants."""
    this_process = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this_process, *this_process.children(recursive=True)))


def measure_options(options: dict[str, str], request_count: int) -> dict[str, Any]:
    """Measure with these environment options for the replicas."""
    import ray
    from ray import serve

    proxy_port, listener_port = find_free_port(), find_free_port()
    logging_config = {"log_level": "WARNING", "enable_access_log": False}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    try:
        serve.start(http_options={"port": proxy_port}, logging_config=logging_config)
        actor_options = {"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1", **options}}}
        scorer = serve.deployment(ScorerStub, name="scorer", ray_actor_options=actor_options).bind()
        ingress = serve.deployment(
            serve.ingress()(GatewayStub), name="gateway", user_config={"listen": True}, ray_actor_options=actor_options
        )
        serve.run(ingress.bind(listener_port, scorer), name="overhead", logging_config=logging_config)
        figures = {}
        for name, port in (("proxy", proxy_port), ("listener", listener_port)):
            for method in ("GET", "POST"):
                asyncio.run(time_requests(port, method, 50))
                cpu_before = cpu_seconds()
                request_seconds = asyncio.run(time_requests(port, method, request_count))
                figures[f"{name} {method}"] = {
                    "cpu_ms": 1000 * (cpu_seconds() - cpu_before) / request_count,
                    "p50_ms": 1000 * float(np.median(request_seconds)),
                }
        serve.shutdown()
    finally:
        ray.shutdown()
    return figures


def main() -> None:
    """Measure both option sets and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    args = parser.parse_args()
    os.environ.pop("RLUF_SERVE_TOKEN", None)
    figures = {
        name: measure_options(options, args.requests)
        for name, options in (("defaults", {}), ("options", SERVE_THROUGHPUT_ENV))
    }
    print(json.dumps({"benchmark": "serve_overhead", **figures}))


if __name__ == "__main__":
    main()
