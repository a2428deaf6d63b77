"""Authentication and rate limits of the service, and the error type of its API."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from rluf.errors import RlufError

MAX_TRACKED_CLIENTS = 10_000
"""Client addresses with a rate limit state; beyond that the least recently seen one is dropped."""


class ApiError(RlufError):
    """Error response: HTTP status, machine-readable type, one-sentence message, optional seconds until a retry."""

    def __init__(self, status: int, error_type: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message, self.retry_after_s = status, error_type, message, retry_after_s

    def __reduce__(self) -> tuple[type[ApiError], tuple[int, str, str, float | None]]:
        # The default would call ApiError(message) in the process that unpickles it, which lacks two arguments.
        return ApiError, (self.status, self.error_type, self.message, self.retry_after_s)

    @property
    def body(self) -> dict[str, object]:
        """JSON body of the response."""
        return {"error": {"message": self.message, "type": self.error_type, "code": self.status}}

    @property
    def headers(self) -> dict[str, str]:
        """Response headers: Retry-After in whole seconds, at least 1, if a retry helps; the challenge for 401."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


def hash_token(token: str) -> str:
    """SHA-256 of a bearer token. The service stores only this, so the token itself is in no process but the client."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_authorized(authorization_header: str | None, expected_digest: str | None) -> bool:
    """Return whether an Authorization header has the token of that digest (constant time); None accepts everyone."""
    if expected_digest is None:
        return True
    scheme, _, token = (authorization_header or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(hash_token(token.strip()), expected_digest)


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
