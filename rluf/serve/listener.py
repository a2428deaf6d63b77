"""HTTP listener of the gateway: uvicorn in its process, with limits on headers, slow requests and connections.

On one machine it replaces Ray Serve's proxy. A hop through that proxy can cost more than scoring a response
(benchmarks/serve_overhead.py measures both). On a cluster Ray Serve's proxy listens, which has none of these limits:
put cluster/launch/nginx.conf in front of it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import re
import resource
import socket
from typing import Any, NoReturn

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rluf.errors import ResourceError
from rluf.serve.api import ApiError
from rluf.serve.middleware import BODY_TIMEOUT_S

PORT_RETRY_S = 0.1
"""Seconds between two attempts to bind the port."""
KEEP_ALIVE_S = 65
"""Idle timeout of connections: longer than that of most clients and load balancers, so that they close first."""
SOCKET_BACKLOG = 2048
MAX_HEADER_BYTES = 64 << 10
"""Maximum size of the request line and all headers of a request; also of bytes without progress, such as trailers."""
HEADERS_TIMEOUT_S = 10.0
"""Seconds from the start of a connection, or from the first byte of a later request, until its headers are complete."""
WRITE_TIMEOUT_S = 60.0
"""Seconds that a client may leave a full response buffer unread."""
MAX_CONNECTIONS = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
"""Maximum number of open connections. Half of the file descriptors stay free for models, Ray and the store."""
MAX_PIPELINED_REQUESTS = 32
"""Maximum number of requests of a connection that wait for the response to an earlier one; uvicorn has no limit."""
ABORT_WAIT_S = 5.0
"""Seconds to send an error before the connection is cut."""
_UPGRADE_HEADER = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)


class GuardedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol of one connection with the limits above, which uvicorn lacks.

    Each refusal is one JSON error, then the connection closes. When MAX_CONNECTIONS are open, a new connection replaces
    the one that has been without a request for longest, preferably one that never sent any.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request; make room when there are too many connections."""
        super().connection_made(transport)
        self._last_activity = self.loop.time()
        self._pending_bytes = self._header_bytes = 0
        self._is_reading_body = False
        self._write_timer: asyncio.TimerHandle | None = None
        self._request_timer: asyncio.TimerHandle | None = self.loop.call_later(HEADERS_TIMEOUT_S, self._on_headers_late)
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_request_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse bytes; refuse those that are no part of a body and complete no headers within the limit."""
        if self.transport.is_closing():
            return
        self._last_activity = self.loop.time()
        if not self._pending_bytes and not self._is_reading_body:
            # Java's HttpClient offers HTTP/2 with each request. The parser would end such a request at its headers, but
            # a server ignores an offer that it does not accept (RFC 9110, 7.8).
            head, head_end, body = data.partition(b"\r\n\r\n")
            data = _UPGRADE_HEADER.sub(b"", head) + head_end + body
        self._pending_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._pending_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()
        elif self._pending_bytes and self._request_timer is None:
            self._request_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self._on_headers_late)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what a client sent before it closed its side (`nc -N`), then close; True keeps this side open."""
        cycle: Any = self.pipeline[0][0] if self.pipeline else self.cycle
        if self._is_reading_body or self._pending_bytes or cycle is None or cycle.response_complete:
            return False
        cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        """Count the header bytes of a new request; it may begin in the bytes that completed the one before."""
        self._header_bytes, self._pending_bytes = 0, max(1, self._pending_bytes)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Add a piece of the request line."""
        self._count_header_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, or a trailer."""
        self._count_header_bytes(len(name) + len(value) + 4)  # 4: colon, space and line end
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the time limit of the body."""
        if self.parser.should_upgrade():  # in headers that came in pieces; without this its body would be missing
            self._send_error(ApiError(400, "upgrade", "Upgrade is not supported; send HTTP/1.1 without it"))
            raise ValueError("upgrade")  # stops the parser
        self._pending_bytes = 0
        self._is_reading_body = True
        self._stop_request_timer()
        # The middleware answers 408 earlier; this ends connections whose body continues after an early error.
        self._request_timer = self.loop.call_later(BODY_TIMEOUT_S + ABORT_WAIT_S, self.transport.abort)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED_REQUESTS:
            self.transport.abort()
            raise ValueError("too many pipelined requests")  # stops the parser

    def on_body(self, body: bytes) -> None:
        """Pass on a piece of the body."""
        self._pending_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the time limit: the request is complete."""
        self._pending_bytes = 0
        self._is_reading_body = False
        self._stop_request_timer()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Cut the connection of a client that does not read its responses."""
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """Stop the timer of `pause_writing`."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP; the parser also ends here when a header callback has refused a request."""
        if not self.transport.is_closing():
            self._send_error(ApiError(400, "bad_request", "the request is not valid HTTP/1.1"))

    @property
    def _is_waiting(self) -> bool:
        """Whether no request is in progress."""
        cycle: Any = self.cycle  # None before the first request, whatever uvicorn's annotation says
        return not self._is_reading_body and (cycle is None or cycle.response_complete)

    def _make_room(self) -> None:
        waiting = [other for other in self.connections if isinstance(other, GuardedHttpProtocol) and other._is_waiting]
        victim = min(waiting, key=lambda other: (other.cycle is not None, other._last_activity))
        victim.transport.abort()
        self.connections.discard(victim)

    def _count_header_bytes(self, byte_count: int) -> None:
        self._header_bytes += byte_count
        if self._header_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()
            raise ValueError("headers are too large")  # stops the parser, which then calls send_400_response

    def _refuse_headers(self) -> None:
        limit_kib = MAX_HEADER_BYTES >> 10
        self._send_error(ApiError(431, "headers_too_large", f"request line and headers exceed {limit_kib} KiB"))

    def _on_headers_late(self) -> None:
        self._request_timer = None
        if not self._is_waiting:  # a pipelined request waits for the response before it
            self._request_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self._on_headers_late)
        elif not self.transport.is_closing():
            self._send_error(ApiError(408, "timeout", f"no complete request within {HEADERS_TIMEOUT_S:g} s"))

    def _stop_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _send_error(self, error: ApiError) -> None:
        # Unread bytes of the client must not grow in memory, nor a response that it does not read.
        self.loop.call_later(ABORT_WAIT_S, self.transport.abort)
        cycle: Any = self.cycle
        if not self.pipeline and (cycle is None or cycle.response_complete or not cycle.response_started):
            body = json.dumps(error.body).encode()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()


class HttpServer:
    """HTTP server of one ASGI app in the running event loop."""

    def __init__(self, host: str, port: int) -> None:
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
            app, http=GuardedHttpProtocol, lifespan="off", ws="none", log_level="error", access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(timeout_s) + 1,
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
                server_socket = socket.create_server((self.host, self.port), family=family, backlog=SOCKET_BACKLOG)
                # Connections inherit it. Without it plain asyncio delays each keep-alive response by 40 ms.
                server_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return server_socket
            except OSError as error:
                if error.errno != errno.EADDRINUSE or loop.time() > deadline:
                    raise ResourceError(
                        f"cannot listen at {self.host}:{self.port}: {error.strerror}; set serve.host and serve.port to "
                        "a free address of this machine"
                    ) from error
            await asyncio.sleep(PORT_RETRY_S)
