"""Who may call what: named bearer tokens with scopes, the Host header, and request rates by client address."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rluf.errors import SettingsError
from rluf.serve.api import ApiError

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

# RFC 9110 and 9112: a name, an IPv4 address or an IPv6 address in brackets, and optionally a port.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")


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
    digest = hash_token(value.strip())
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
