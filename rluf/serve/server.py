"""The app behind a port of its own in this process, by uvicorn.

On one machine it takes the place of Ray Serve's proxy, a hop through which can cost more than scoring a response does
(benchmarks/serve_overhead.py measures both).
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any, NoReturn

import uvicorn

from rluf.errors import ResourceError

RETRY_S = 0.1
"""Seconds between two attempts to take the port."""
KEEP_ALIVE_S = 65
"""Seconds that an idle connection is kept: longer than most clients and balancers keep theirs."""
BACKLOG = 2048


class Listener:
    """One HTTP server over one app, in the running event loop."""

    def __init__(self, host: str, port: int) -> None:
        """Nothing is opened yet."""
        self.host, self.port = host, port
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, app: Any, wait_s: float) -> None:
        """Take the port and serve; an earlier owner (one that is being replaced) has `wait_s` seconds to give it up.

        Raises ResourceError when it does not, when the address is none of this machine's, or when the server ends
        before it serves.
        """
        opened = await self._opened(wait_s)
        config = uvicorn.Config(
            app, lifespan="off", ws="none", log_level="warning", access_log=False, server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=int(wait_s) + 1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[opened]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)
        if self._serving.done():
            await self._fallen(self._serving, opened)

    async def _fallen(self, serving: asyncio.Task[None], opened: socket.socket) -> NoReturn:
        """Give the port up and raise what the server that did not come to serve died of."""
        self._server = self._serving = None
        opened.close()
        where = f"the server at {self.host}:{self.port} ended before it served"
        try:
            await serving
        except OSError as error:
            raise ResourceError(f"{where}: {error}; set serve.host and serve.port to another address") from error
        raise ResourceError(f"{where}; look above for what it said, then start the service again")

    async def close(self) -> None:
        """Take no new connection, let running requests end, give the port up."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
            self._server = None

    async def _opened(self, wait_s: float) -> socket.socket:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        while True:
            try:
                return socket.create_server((self.host, self.port), family=family, backlog=BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or loop.time() > deadline:
                    raise ResourceError(
                        f"cannot listen at {self.host}:{self.port}: {error.strerror}; set serve.host and serve.port to "
                        "a free address of this machine"
                    ) from error
            await asyncio.sleep(RETRY_S)
