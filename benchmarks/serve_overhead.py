"""What a request costs before any model runs: Ray Serve's proxy or our listener, and a call between two deployments.

An application of two deployments that compute nothing answers POST / (which asks the second deployment, as the gateway
asks a scorer) and GET / (which does not), with Ray Serve's defaults and with the throughput options that the service
sets for its replicas. CPU time is that of all processes, clients included, so other programs hardly change it.
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

from rluf.serve.application import LEAN
from rluf.serve.server import Listener

BODY = json.dumps({"messages": [{"role": "user", "content": "word " * 12}], "response": "word " * 30}).encode()


class Scorer:
    """The second deployment."""

    async def score(self, items: list[bytes]) -> list[float]:
        """A number for each item."""
        return [0.5] * len(items)


class Gateway:
    """The first deployment, behind Ray Serve's proxy and behind our listener."""

    def __init__(self, port: int, _: Any) -> None:
        from ray import serve

        self._port, self._scorer = port, serve.get_deployment_handle("scorer", "hops")
        self._listener: Listener | None = None

        async def entry(scope: Any, receive: Any, send: Any) -> None:  # uvicorn takes a bound method for ASGI 2
            await self._answer(scope, receive, send)

        self._entry = entry

    async def reconfigure(self, _: dict[str, Any]) -> None:
        """Open our own port."""
        if self._listener is None:
            self._listener = Listener("127.0.0.1", self._port)
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


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def asked(port: int, method: str, requests: int) -> list[float]:
    """Seconds of each request of one client."""
    found = []
    async with aiohttp.ClientSession() as http:
        for _ in range(requests):
            begun = time.perf_counter()
            async with http.request(
                method, f"http://127.0.0.1:{port}/", data=BODY if method == "POST" else None
            ) as told:
                await told.read()
            found.append(time.perf_counter() - begun)
    return found


def cpu() -> float:
    """CPU seconds of this process and of all below it so far."""
    me = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (me, *me.children(recursive=True)))


def measured(options: dict[str, str], requests: int) -> dict[str, Any]:
    """Figures with these options for the replicas."""
    import ray
    from ray import serve

    proxy, own = free_port(), free_port()
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    try:
        serve.start(http_options={"port": proxy}, logging_config=quiet)
        actor = {"num_cpus": 0.1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1", **options}}}
        scorer = serve.deployment(Scorer, name="scorer", ray_actor_options=actor).bind()
        ingress = serve.deployment(
            serve.ingress()(Gateway), name="gateway", user_config={"listen": True}, ray_actor_options=actor
        )
        serve.run(ingress.bind(own, scorer), name="hops", logging_config=quiet)
        found = {}
        for name, port in (("proxy", proxy), ("listener", own)):
            for method in ("GET", "POST"):
                asyncio.run(asked(port, method, 50))
                before = cpu()
                seconds = asyncio.run(asked(port, method, requests))
                found[f"{name} {method}"] = {
                    "cpu_ms": 1000 * (cpu() - before) / requests, "p50_ms": 1000 * float(np.median(seconds)),
                }  # fmt: skip
        serve.shutdown()
    finally:
        ray.shutdown()
    return found


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    args = parser.parse_args()
    os.environ.pop("RLUF_SERVE_TOKEN", None)
    found = {name: measured(options, args.requests) for name, options in (("defaults", {}), ("options", LEAN))}
    print(json.dumps({"benchmark": "hops", **found}))


if __name__ == "__main__":
    main()
