"""Who may ask, how much and how often: bearer token, body size, request rate, hashed user ids; and API errors."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from rluf.errors import RlufError

MAX_CLIENTS = 10_000
"""Client addresses whose rate is remembered; the least recent are forgotten first."""


class ApiError(RlufError):
    """What a client is told: HTTP status, a fixed word for the kind, one clear sentence, seconds to wait if any."""

    def __init__(self, status: int, kind: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry_after_s = status, kind, message, retry_after_s

    def __reduce__(self) -> tuple[type[ApiError], tuple[int, str, str, float | None]]:
        return ApiError, (self.status, self.kind, self.message, self.retry_after_s)

    @property
    def body(self) -> dict[str, object]:
        """The answer's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "code": self.status}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, at least 1, where waiting helps; the challenge that goes with 401."""
        named = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            named["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return named


def token_digest(token: str) -> str:
    """SHA-256 of a bearer token: what the service keeps, so that the token itself is in no process but the client's."""
    return hashlib.sha256(token.encode()).hexdigest()


def authorised(header: str | None, digest: str | None) -> bool:
    """Whether an Authorization header carries the token of that digest, in constant time; no digest lets all in."""
    if digest is None:
        return True
    scheme, _, token = (header or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(token_digest(token.strip()), digest)


def hashed_user(user: str, salt: str) -> str:
    """16 hex digits that stand for a user: HMAC-SHA256 under the salt, so that ids cannot be tried out without it."""
    return hmac.new(salt.encode(), user.encode(), hashlib.sha256).hexdigest()[:16]


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class RateLimit:
    """A token bucket for each client: `rate` requests a second, two seconds' worth at once."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        """`clock` gives seconds and never goes back."""
        self.rate, self.size, self.clock = rate, max(1.0, 2 * rate), clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, client: str) -> float:
        """0 when the client may go on, else the seconds until it may."""
        now = self.clock()
        bucket = self._buckets.setdefault(client, _Bucket(self.size, now))
        self._buckets.move_to_end(client)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        bucket.left = min(self.size, bucket.left + (now - bucket.at) * self.rate)
        bucket.at = now
        if bucket.left < 1:
            return (1 - bucket.left) / self.rate
        bucket.left -= 1
        return 0.0
