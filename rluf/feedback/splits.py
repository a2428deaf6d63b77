"""Which side of train, dev and test a row stands on, from its user or prompt alone.

The side is a pure function of a hash, so it needs no table of who went where, is the same on every machine, and stays
the same when the log grows: no user or prompt ever moves from test to train. The run's seed plays no part in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping


def unit_hash(key: str, salt: str) -> float:
    """A number in [0, 1), uniform over keys and fixed for a key and salt (BLAKE2b, 53 bits)."""
    data = key.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8, person=salt.encode()[:16].ljust(16, b"\0")).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def short_hash(*parts: str) -> str:
    """16 hex digits that stand for some text (64 bits): ids, hashed users, prompt groups."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def side(key: str, *, dev_share: float, test_share: float) -> str:
    """train, dev or test for a user id or prompt group; shares are of users or groups, not of rows."""
    point = unit_hash(key, "rluf-split")
    if point < test_share:
        return "test"
    return "dev" if point < test_share + dev_share else "train"


def prompt_key(messages: Iterable[Mapping[str, str]]) -> str:
    """Hash of a context, equal for contexts that differ only in case and white space."""
    return short_hash(*(f"{m['role']} {' '.join(m['content'].casefold().split())}" for m in messages))


def place(key: str) -> float:
    """Where in [0, 1) a row id lies in the prepared files: an order at random that is the same however work is cut."""
    return unit_hash(key, "rluf-place")


def bucket(key: str, buckets: int) -> int:
    """Which of `buckets` parts a row id falls in: part 0 holds the lowest places; equal ids always meet in one part."""
    return math.floor(place(key) * buckets)
