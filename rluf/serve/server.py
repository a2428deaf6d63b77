"""HTTP server of the gateway: uvicorn on its own port, in the gateway's process.

On one machine it replaces Ray Serve's proxy. A hop through that proxy can cost more than scoring a response
(benchmarks/serve_overhead.py measures both).
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any, NoReturn

import uvicorn

from rluf.errors import ResourceError

PORT_RETRY_S = 0.1
"""Seconds between two attempts to bind the port."""
KEEP_ALIVE_S = 65
"""Idle timeout of connections: longer than that of most clients and load balancers, so that they close first."""
SOCKET_BACKLOG = 2048


class HttpServer:
    """HTTP server of one ASGI app in the running event loop."""

    def __init__(self, host: str, port: int) -> None:
        """Open nothing yet."""
        self.host, self.port = host, port
        self._server: uvicorn.Server | None = None
        self._serve_task: asyncio.Task[None] | None = None

    async def start(self, app: Any, timeout_s: float) -> None:
        """Bind the port and serve; a gateway that is being replaced has `timeout_s` seconds to release it.

        Raises ResourceError when the port stays in use, when the address does not belong to this machine, or when the
        server stops before it accepts requests.
        """
        listening_socket = await self._open_socket(timeout_s)
        config = uvicorn.Config(
            app, lifespan="off", ws="none", log_level="warning", access_log=False, server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=int(timeout_s) + 1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._serve_task = asyncio.create_task(self._server.serve(sockets=[listening_socket]))
        # uvicorn has no awaitable for "started".
        while not self._server.started and not self._serve_task.done():
            await asyncio.sleep(0.01)
        if self._serve_task.done():
            await self._raise_start_failure(self._serve_task, listening_socket)

    async def _raise_start_failure(self, serve_task: asyncio.Task[None], listening_socket: socket.socket) -> NoReturn:
        """Release the port and raise the error of a server that stopped before it accepted requests."""
        self._server = self._serve_task = None
        listening_socket.close()
        message = f"the server at {self.host}:{self.port} stopped before it accepted requests"
        try:
            await serve_task
        except OSError as error:
            raise ResourceError(f"{message}: {error}; set serve.host and serve.port to another address") from error
        raise ResourceError(f"{message}; see its log lines above, then start the service again")

    async def close(self) -> None:
        """Accept no new connection, finish running requests, release the port."""
        if self._server is not None and self._serve_task is not None:
            self._server.should_exit = True
            await self._serve_task
            self._server = None

    async def _open_socket(self, timeout_s: float) -> socket.socket:
        # Opened here rather than by uvicorn, which exits the process when it cannot bind.
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        while True:
            try:
                return socket.create_server((self.host, self.port), family=family, backlog=SOCKET_BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or loop.time() > deadline:
                    raise ResourceError(
                        f"cannot listen at {self.host}:{self.port}: {error.strerror}; set serve.host and serve.port to "
                        "a free address of this machine"
                    ) from error
            await asyncio.sleep(PORT_RETRY_S)
