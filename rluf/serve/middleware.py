"""The door of the service, as ASGI middleware: host, token, rate, body size, deadline, and one shape for every error.

It stands before the app, so that what is refused costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING

from rluf.serve.limits import ApiError, RateLimit, authorised

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import Any

    from starlette.types import ASGIApp, Receive, Scope, Send

    from rluf.serve.backend import Backend

logger = logging.getLogger("rluf.serve")

OPEN = ("/", "/page.js", "/page.css", "/healthz")
"""Paths without secrets, answered without a token: the page asks for the token itself."""
HURRY_S = 1.0
"""What Retry-After says while the service drains or was too slow."""
INTERNAL = ApiError(500, "internal", "the service failed on this request; its log says why")
"""What an error that nobody foresaw looks like from outside; the trace goes to the log."""


class Guard:
    """Wraps the app."""

    def __init__(self, app: ASGIApp, backend: Backend) -> None:
        self.app, self.backend = app, backend
        self.rate = RateLimit(backend.rules.requests_per_s, time.monotonic)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Lifespan events pass through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, metrics, status = time.monotonic(), self.backend.metrics, 500

        async def watch(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.backend.running += 1
        metrics.running.set(self.backend.running)
        try:
            await self._guarded(scope, receive, watch)
        finally:
            self.backend.running -= 1
            metrics.running.set(self.backend.running)
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - started
            metrics.seconds.labels(route, str(status)).observe(seconds)
            logger.info("%s %s %d %.1f ms", scope["method"], route, status, 1000 * seconds)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watch(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
            async with asyncio.timeout(self.backend.rules.deadline_s):
                await self.app(scope, _replayed(body, receive), watch)
        except ApiError as error:
            problem = error
        except TimeoutError:
            limit = self.backend.rules.deadline_s
            problem = ApiError(503, "deadline", f"the answer took longer than {limit:g} s; try again later", HURRY_S)
        else:
            return
        if not begun:
            await answer(problem, send)

    def _check(self, scope: Scope) -> None:
        rules, path = self.backend.rules, scope["path"]
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.backend.draining:
            raise ApiError(503, "draining", "the service is shutting down; try again later", HURRY_S)
        host = headers.get(b"host", "").rsplit(":", 1)[0] if not headers.get(b"host", "").endswith("]") else "[::1]"
        if rules.hosts is not None and host not in rules.hosts:
            raise ApiError(403, "host", f"this service answers on this machine only, not as {host[:100]!r}")
        if path not in OPEN and not authorised(headers.get(b"authorization"), rules.token_digest):
            raise ApiError(401, "unauthorised", "send the service's token as 'Authorization: Bearer <token>'")
        if path != "/healthz":
            wait = self.rate.take(str((scope.get("client") or ("unknown",))[0]))
            if wait:
                raise ApiError(429, "rate", f"more than {rules.requests_per_s:g} requests a second from you", wait)
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > rules.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        limit = self.backend.rules.max_body_bytes // 1024
        return ApiError(
            413, "too_large", f"the body is longer than {limit} KiB (serve.max_body_kib); send less at once"
        )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, at most as long as allowed, whatever Content-Length says; JSON must be UTF-8."""
        parts, size, more = [], 0, True
        async with asyncio.timeout(self.backend.rules.deadline_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "gone", "the client left before its request was whole")
                part = message.get("body", b"")
                size += len(part)
                if size > self.backend.rules.max_body_bytes:
                    raise self._too_large()
                parts.append(part)
                more = message.get("more_body", False)
        body = b"".join(parts)
        if scope["method"] == "POST":
            try:
                body.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ApiError(400, "not_utf8", f"the body is not UTF-8 text (byte {error.start})") from None
        return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read already, then whatever comes."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def answer(problem: ApiError, send: Send) -> None:
    """Send an error as JSON."""
    headers = {"content-type": "application/json", **problem.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": pairs})
    await send({"type": "http.response.body", "body": json.dumps(problem.body).encode()})
