"""ASGI middleware: tokens with scopes, host check, rate limits, body size, deadline, uniform errors, metrics.

It wraps the whole app, so that a rejected request costs neither routing nor validation. The metrics (/metrics) cover
latency, batches, queue, rejections, feedback and score drift. Drift is the running mean of served values minus the mean
over test users on the reward card: the first sign of traffic that differs from the data that the model was tested on.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from opentelemetry.propagate import extract as extract_context
from opentelemetry.trace import SpanKind
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rluf.config.serve import DEFAULT_REACTIONS
from rluf.errors import SettingsError
from rluf.serve.api import (
    ApiError,
    ChatReply,
    ChatRequest,
    FeedbackRequest,
    ModelInfo,
    PreferenceRequest,
    ScoredItem,
    ScoreRoute,
)
from rluf.serve.batching import BatchStats
from rluf.serve.observability import tracer
from rluf.serve.store_events import StoreOutcome
from rluf.types import Score, ScoringItem

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from typing import Any

    from opentelemetry.context import Context
    from starlette.types import ASGIApp, Receive, Scope, Send


logger = logging.getLogger("rluf.serve")

TOKEN_VARIABLE, TOKEN_LIST_VARIABLE = "RLUF_SERVE_TOKEN", "RLUF_SERVE_TOKENS"
"""Environment variables: one token with every scope; more tokens, one per line: NAME SCOPE[,SCOPE...] TOKEN."""
ALL_SCOPES = frozenset(("chat", "score", "ingest", "admin"))
"""chat: sample responses and react to them. score: every scoring route. ingest: reactions to responses that another
system served. admin: metrics and API docs."""
MIN_TOKEN_CHARS = 16
"""Minimum length of the tokens of a service that other machines can reach: 16 hex digits are 64 random bits."""

PUBLIC_PATHS = frozenset(("/", "/page.js", "/page.css", "/healthz", "/health", "/ping"))
"""Paths served without a token. The page has no secrets and asks the user for the token."""
PROBE_PATHS = frozenset(("/healthz", "/health", "/ping"))
"""Paths without a rate limit: probes of load balancers share one address."""
_PATH_SCOPES: dict[str, frozenset[str]] = {
    "/v1/chat/completions": frozenset(("chat",)),
    "/v1/feedback": frozenset(("chat", "ingest")),
    "/v1/preferences": frozenset(("chat",)),
    "/metrics": frozenset(("admin",)),
    "/docs": frozenset(("admin",)),
    "/openapi.json": frozenset(("admin",)),
    "/info": ALL_SCOPES,
    "/version": ALL_SCOPES,
}
"""Scopes of which a token needs one; /v1/models is open to every token, any other path needs `score`."""

WRONG_TOKENS_PER_S = 10.0
"""Requests with a missing or wrong token per second and address that get 401; more get 429."""
MAX_TRACKED_CLIENTS = 10_000
"""Client addresses with a rate limit state; beyond that the least recently seen one is dropped."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
# RFC 9110 and 9112: a name, an IPv4 address or an IPv6 address in brackets, and optionally a port.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")
RETRY_AFTER_S = 1.0
"""Retry-After while the service drains or after a request that was too slow."""
MAX_BODY_BYTES = 1 << 20
"""Maximum request body: a full request of items of average length."""
BODY_TIMEOUT_S = 30.0
"""Maximum seconds for the body of a request to arrive, or the request's deadline if that is shorter."""
SCOPES_KEY = "rluf.scopes"
"""Key of the ASGI scope with the scopes of the request's token."""
TOKEN_NAME_KEY = "rluf.token"
"""Key of the ASGI scope with the name of the request's token."""
INTERNAL_ERROR = ApiError(500, "internal", "the service failed on this request; see its log")
"""Response for unhandled exceptions; the traceback is logged."""


RUNNING_MEAN_WINDOW = 500
"""Time constant of the running mean in scores: the newest has a weight of 1 / window, or more while there are fewer."""
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ITEM_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKEN_BUCKETS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)


class RunningMean:
    """Running mean: arithmetic over the first RUNNING_MEAN_WINDOW values, exponential after that."""

    def __init__(self) -> None:
        self.count, self.mean = 0, 0.0

    def add_value(self, value: float) -> float:
        """Add one value and return the mean."""
        self.count += 1
        self.mean += (value - self.mean) / min(self.count, RUNNING_MEAN_WINDOW)
        return self.mean


class ServeMetrics:
    """Metrics of one gateway."""

    def __init__(self) -> None:
        # Not the global registry: tests and a restarted gateway would register the same names twice.
        self.registry = CollectorRegistry()
        registry, by_route, by_model = self.registry, ("route", "status"), ("objective", "version")
        self.request_seconds = Histogram(
            "rluf_request_seconds", "Seconds from request to response", by_route, registry=registry,
            buckets=SECONDS_BUCKETS,
        )  # fmt: skip
        self.batch_items = Histogram("rluf_batch_items", "Responses per batch", registry=registry, buckets=ITEM_BUCKETS)
        self.batch_tokens = Histogram(
            "rluf_batch_tokens", "Tokens per batch (estimated)", registry=registry, buckets=TOKEN_BUCKETS
        )
        self.batch_seconds = Histogram(
            "rluf_batch_seconds", "Seconds per batch", registry=registry, buckets=SECONDS_BUCKETS
        )
        self.queued_items = Gauge("rluf_waiting_items", "Queued responses", registry=registry)
        self.running_requests = Gauge("rluf_running_requests", "Requests in progress", registry=registry)
        self.scored_responses = Counter("rluf_scores", "Scored responses", by_model, registry=registry)
        self.cut_responses = Counter(
            "rluf_cut_scores", "Scores of texts longer than the model reads", by_model, registry=registry
        )
        self.score_mean = Gauge("rluf_score_mean", "Running mean of served values", by_model, registry=registry)
        self.score_drift = Gauge(
            "rluf_score_drift", "Running mean of served values minus the reward card's", by_model, registry=registry
        )
        self.feedback_requests = Counter("rluf_feedback", "Feedback requests", ("outcome",), registry=registry)
        self.rows_without_user = Counter("rluf_rows_without_user", "Chats without a user id", registry=registry)
        self.damaged_rows = Gauge(
            "rluf_damaged_rows", "Feedback that cannot be written, since the disk changed it", registry=registry
        )
        self.scorer_retries = Counter("rluf_scorer_retries", "Batches repeated after a replica died", registry=registry)
        self._running_means: dict[tuple[str, str], RunningMean] = {}

    def record_batch(self, batch_stats: BatchStats) -> None:
        """Record a scored batch."""
        self.batch_items.observe(batch_stats.item_count)
        self.batch_tokens.observe(batch_stats.token_count)
        self.batch_seconds.observe(batch_stats.seconds)

    def record_scores(
        self, objective: str, version: str, scores: Sequence[Score], expected_means: Mapping[str, float]
    ) -> None:
        """Record served scores of one objective; `expected_means` are the reward cards' mean values by objective."""
        running_mean = self._running_means.setdefault((objective, version), RunningMean())
        for score in scores:
            running_mean.add_value(score.value)
        self.scored_responses.labels(objective, version).inc(len(scores))
        self.cut_responses.labels(objective, version).inc(sum(score.is_cut for score in scores))
        self.score_mean.labels(objective, version).set(running_mean.mean)
        if objective in expected_means:
            self.score_drift.labels(objective, version).set(running_mean.mean - expected_means[objective])

    def to_prometheus_text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


@dataclass(frozen=True, slots=True)
class ServiceRules:
    """Limits that the middleware enforces.

    `tokens` is empty for a service without authentication. `allowed_hosts` are the accepted Host header names (None:
    any); a service without a token needs them against DNS rebinding by web pages. `trusted_proxies` are addresses and
    networks whose X-Forwarded-For header names the client. `listen_host`, `chat_markers` and `reactions` are settings
    of `serve`.
    """

    tokens: tuple[AccessToken, ...]
    max_body_bytes: int
    requests_per_s: float
    deadline_s: float
    allowed_hosts: tuple[str, ...] | None
    trusted_proxies: tuple[str, ...] = ()
    listen_host: str = "127.0.0.1"
    chat_markers: Mapping[str, str] = field(default_factory=dict)
    reactions: tuple[str, ...] = DEFAULT_REACTIONS


class ServiceBackend(Protocol):
    """Models and feedback store behind the HTTP app. Every method raises ApiError for errors the client must see."""

    rules: ServiceRules
    metrics: ServeMetrics
    is_draining: bool
    running_requests: int

    async def is_ready(self) -> bool:
        """Return whether every model has answered."""

    async def score_items(
        self, items: Sequence[ScoringItem], routes: Sequence[ScoreRoute] | None = None
    ) -> list[ScoredItem]:
        """Score items, in order, each with the model version of its route; None: all with the live version."""

    async def store_feedback(self, request: FeedbackRequest) -> StoreOutcome:
        """Store a reaction; it is on disk when this returns."""

    async def store_preference(self, request: PreferenceRequest) -> StoreOutcome:
        """Store a choice between two responses; it is on disk when this returns."""

    async def count_damaged_rows(self) -> int | None:
        """Number of rows that the feedback store cannot write, since the disk changed them; None if unknown now."""

    async def list_models(self) -> list[ModelInfo]:
        """Return all served reward models and policies."""

    async def complete_chat(self, request: ChatRequest) -> ChatReply:
        """Sample one response from a policy; it is logged before this returns."""


class ServiceMiddleware:
    """Enforces the rules of a backend in front of `app`, and measures every request."""

    def __init__(self, app: ASGIApp, backend: ServiceBackend) -> None:
        self.app, self.backend = app, backend
        self.rate_limiter = ClientRateLimiter(backend.rules.requests_per_s, time.monotonic)
        self.wrong_token_limiter = ClientRateLimiter(WRONG_TOKENS_PER_S, time.monotonic)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; lifespan events pass through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # 500 until a response starts: a handler that raises past everything sends none.
        start_time, metrics, status = time.monotonic(), self.backend.metrics, 500

        async def send_and_record_status(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        is_head = scope["method"] == "HEAD"
        request_id = read_request_id(scope["headers"])
        if is_head:
            scope = {**scope, "method": "GET"}
        self.backend.running_requests += 1
        metrics.running_requests.set(self.backend.running_requests)
        with tracer.start_as_current_span(
            scope["method"], context=read_trace_context(scope["headers"]), kind=SpanKind.SERVER
        ) as span:
            try:
                await self._handle_request(scope, receive, send_and_record_status)
            finally:
                self.backend.running_requests -= 1
                metrics.running_requests.set(self.backend.running_requests)
                route = getattr(scope.get("route"), "path", "other")
                seconds = time.monotonic() - start_time
                metrics.request_seconds.labels(route, str(status)).observe(seconds)
                fields = {
                    "method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds, 1),
                    "request_id": request_id.decode(), "token": scope.get(TOKEN_NAME_KEY),
                }  # fmt: skip
                span.update_name(f"{scope['method']} {route}")
                span.set_attributes({
                    "http.request.method": scope["method"], "http.route": route, "http.response.status_code": status,
                    "rluf.request_id": request_id.decode(),
                })  # fmt: skip
                logger.info("%s %s %d %.1f ms request_id=%s", *list(fields.values())[:5], extra={"fields": fields})

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def send_and_mark_started(message: MutableMapping[str, Any]) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            scope[SCOPES_KEY] = self._check_request(scope)
            body = await self._read_body(scope, receive)
            async with asyncio.timeout(self.backend.rules.deadline_s):
                await self.app(scope, _replay_body(body, receive), send_and_mark_started)
        except ApiError as error:
            api_error = error
        except TimeoutError:
            deadline_s = self.backend.rules.deadline_s
            message = f"the request took longer than {deadline_s:g} s; try again later"
            api_error = ApiError(503, "deadline", message, RETRY_AFTER_S)
        else:
            return
        # After the first byte the status is sent; a second response would corrupt the connection.
        if not has_started:
            await send_error(api_error, send)

    def _check_request(self, scope: Scope) -> frozenset[str]:
        """Refuse a request by rate, host, token or declared size; returns the scopes of its token."""
        rules, path = self.backend.rules, scope["path"]
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.backend.is_draining:
            raise ApiError(503, "draining", "the service is shutting down; try again later", RETRY_AFTER_S)
        client_address = str((scope.get("client") or ("unknown",))[0])
        if path not in PROBE_PATHS:
            wait_s = self.rate_limiter.acquire_token(client_address)
            if wait_s:
                raise ApiError(429, "rate", f"more than {rules.requests_per_s:g} requests per second from you", wait_s)
        host_headers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        host = read_host_name(host_headers, scope["http_version"])
        if rules.allowed_hosts is not None and host not in rules.allowed_hosts:
            raise ApiError(403, "host", f"this service is available on this machine only, not as host {host[:100]!r}")
        scopes = ALL_SCOPES
        if rules.tokens and path not in PUBLIC_PATHS:
            if sum(name == b"authorization" for name, _ in scope["headers"]) > 1:
                raise ApiError(400, "authorization", "expected one Authorization header")
            token = find_access_token(headers.get(b"authorization"), rules.tokens)
            if token is None:
                raise self._build_wrong_token_error(client_address)
            check_scope(token, path)
            scopes, scope[TOKEN_NAME_KEY] = token.scopes, token.name
        content_length = headers.get(b"content-length", "0").strip(" \t")  # not part of a header's value (RFC 9110)
        is_number = content_length.isascii() and content_length.isdigit()
        # The length of the text is checked first: int() refuses texts of thousands of digits.
        digits = content_length.lstrip("0") or "0"
        if not is_number or len(digits) > 18 or int(digits) > rules.max_body_bytes:
            raise self._build_body_too_large_error()
        return scopes

    def _build_wrong_token_error(self, client_address: str) -> ApiError:
        """401; 429 for an address that sent too many wrong tokens (a right one is still accepted from there)."""
        wait_s = self.wrong_token_limiter.acquire_token(client_address)
        if wait_s:
            return ApiError(429, "rate", "too many requests with a missing or wrong token from you", wait_s)
        return ApiError(401, "unauthorized", "send the service's token as 'Authorization: Bearer <token>'")

    def _build_body_too_large_error(self) -> ApiError:
        limit_kib = self.backend.rules.max_body_bytes // 1024
        return ApiError(413, "too_large", f"the body exceeds {limit_kib} KiB; split the request")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the complete body and enforce the size limit, whatever Content-Length says; POST bodies must be UTF-8.

        The whole body is read before the app runs, so a slow client does not occupy a model.
        """
        chunks, body_bytes, has_more = [], 0, True
        timeout_s = min(BODY_TIMEOUT_S, self.backend.rules.deadline_s)
        try:
            async with asyncio.timeout(timeout_s):
                while has_more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "gone", "the client disconnected before its request was complete")
                    chunk = message.get("body", b"")
                    body_bytes += len(chunk)
                    if body_bytes > self.backend.rules.max_body_bytes:
                        raise self._build_body_too_large_error()
                    chunks.append(chunk)
                    has_more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, "timeout", f"the body did not arrive within {timeout_s:g} s") from None
        body = self._decompress_body(b"".join(chunks), scope)
        if scope["method"] == "POST":
            try:
                body.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ApiError(400, "not_utf8", f"the body is not UTF-8 text (byte {error.start})") from None
            if b"\0" in body:  # in no JSON text; the parser would take it for one of UTF-16 or UTF-32
                raise ApiError(400, "not_utf8", f"the body is not UTF-8 text (byte {body.index(0)} is NUL)")
        return body

    def _decompress_body(self, body: bytes, scope: Scope) -> bytes:
        """The body without its gzip Content-Encoding, within the size limit. Raises ApiError 415 for other codings."""
        codings = b",".join(value for name, value in scope["headers"] if name == b"content-encoding").strip().lower()
        if codings in (b"", b"identity"):
            return body
        if codings not in (b"gzip", b"x-gzip"):
            raise ApiError(415, "encoding", "Content-Encoding: expected gzip or none")
        decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            body = decompressor.decompress(body, self.backend.rules.max_body_bytes + 1)
        except zlib.error:
            raise ApiError(400, "encoding", "the body is not gzip, as its Content-Encoding says") from None
        if len(body) > self.backend.rules.max_body_bytes:
            raise self._build_body_too_large_error()
        if not decompressor.eof or decompressor.unused_data:
            raise ApiError(400, "encoding", "the body is not one complete gzip stream")
        return body


def read_request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The X-Request-Id of a request if it is fit for a log line; otherwise a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex.encode()


def read_trace_context(headers: Iterable[tuple[bytes, bytes]]) -> Context:
    """The trace of a request's `traceparent` header; an invalid one starts a new trace."""
    names = (b"traceparent", b"tracestate")
    return extract_context({name.decode(): value.decode("latin-1") for name, value in headers if name in names})


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """Build a receive callable that returns the body already read, then passes on to the original one."""
    was_replayed = False

    async def receive_body() -> MutableMapping[str, Any]:
        nonlocal was_replayed
        if was_replayed:
            return await receive()
        was_replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


async def send_error(error: ApiError, send: Send) -> None:
    """Send an error as JSON."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A bearer token: its name for logs and errors, its SHA-256 (only the client has the token), its scopes."""

    name: str
    digest: str
    scopes: frozenset[str] = ALL_SCOPES


def hash_token(token: str) -> str:
    """SHA-256 of a bearer token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_access_tokens(environment: Mapping[str, str], *, min_chars: int = 1) -> tuple[AccessToken, ...]:
    """Read all tokens from environment variables. Raises SettingsError, which never contains a token."""
    entries = []
    if token := environment.get(TOKEN_VARIABLE, "").strip():
        entries.append((TOKEN_VARIABLE, "default", ALL_SCOPES, token))
    for number, line in enumerate(environment.get(TOKEN_LIST_VARIABLE, "").splitlines(), start=1):
        if not line.strip():
            continue
        words = line.split()
        source = f"{TOKEN_LIST_VARIABLE}, line {number}"
        if len(words) != 3:
            raise SettingsError(f"{source}: expected NAME SCOPE[,SCOPE...] TOKEN, got {len(words)} words")
        name, scopes = words[0], frozenset(words[1].split(","))
        if not scopes <= ALL_SCOPES:
            raise SettingsError(f"{source} ({name}): scopes are {', '.join(sorted(ALL_SCOPES))}, got {words[1]!r}")
        entries.append((source, name, scopes, words[2]))
    for source, _, _, token in entries:
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise SettingsError(f"{source}: expected a token of ASCII letters, digits and signs without white space")
        if len(token) < min_chars:
            raise SettingsError(
                f"{source}: the token has {len(token)} characters, use at least {min_chars} random ones"
            )
    tokens = tuple(AccessToken(name, hash_token(token), scopes) for _, name, scopes, token in entries)
    for key in ("name", "digest"):
        values = [getattr(token, key) for token in tokens]
        if len(set(values)) < len(values):
            raise SettingsError(f"{TOKEN_LIST_VARIABLE}: two tokens have the same {key}; give each its own")
    return tokens


def find_access_token(authorization_header: str | None, tokens: Sequence[AccessToken]) -> AccessToken | None:
    """Return the token of an Authorization header; each comparison takes constant time."""
    scheme, _, value = (authorization_header or "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    digest = hash_token(value.strip(" \t"))
    matches = [token for token in tokens if hmac.compare_digest(digest, token.digest)]
    return matches[0] if matches else None


def check_scope(token: AccessToken, path: str) -> None:
    """Raise ApiError 403 when a token has none of the scopes of a path."""
    if path.startswith("/v1/models"):
        return
    required_scopes = _PATH_SCOPES.get(path, frozenset(("score",)))
    if not required_scopes & token.scopes:
        required = " or ".join(sorted(required_scopes))
        raise ApiError(403, "scope", f"{path} needs a token with scope {required}; token {token.name} lacks it")


def read_host_name(host_headers: Sequence[str], http_version: str) -> str:
    """Return the name in the Host header, without port, in lower case. Raises ApiError 400 for an invalid header."""
    if not host_headers and http_version == "1.0":
        return ""
    match = _HOST.fullmatch(host_headers[0]) if len(host_headers) == 1 else None
    if match is None:
        raise ApiError(400, "host", "expected one Host header with a name or address and optionally a port (RFC 9110)")
    return match[1].lower()


@dataclass(slots=True)
class _TokenBucket:
    tokens_left: float
    updated_at: float


class ClientRateLimiter:
    """A token bucket per client: `requests_per_s` on average, bursts of two seconds' worth."""

    def __init__(self, requests_per_s: float, clock: Callable[[], float]) -> None:
        """`clock` returns monotonic seconds."""
        self.requests_per_s, self.burst_size, self.clock = requests_per_s, max(1.0, 2 * requests_per_s), clock
        self._client_buckets: OrderedDict[str, _TokenBucket] = OrderedDict()

    def acquire_token(self, client_address: str) -> float:
        """Take one token; returns 0 if there was one, otherwise the seconds until the next one."""
        now = self.clock()
        bucket = self._client_buckets.setdefault(client_address, _TokenBucket(self.burst_size, now))
        # Ordered by last use, so that the bound drops idle clients, which have a full bucket anyway.
        self._client_buckets.move_to_end(client_address)
        if len(self._client_buckets) > MAX_TRACKED_CLIENTS:
            self._client_buckets.popitem(last=False)
        refill = (now - bucket.updated_at) * self.requests_per_s
        bucket.tokens_left = min(self.burst_size, bucket.tokens_left + refill)
        bucket.updated_at = now
        if bucket.tokens_left < 1:
            return (1 - bucket.tokens_left) / self.requests_per_s
        bucket.tokens_left -= 1
        return 0.0
