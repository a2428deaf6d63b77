"""Which side of train, dev and test a row stands on, from its user or prompt alone.

The side is a pure function of a hash, so it needs no table of who went where, is the same on every machine, and stays
the same when the log grows: no user or prompt ever moves from test to train. The run's seed plays no part in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray


def hash64(key: str, salt: str) -> int:
    """64 bits, uniform over keys and fixed for a key and salt (BLAKE2b)."""
    data = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=_person(salt)).digest(), "big")


@cache
def _person(salt: str) -> bytes:
    return salt.encode()[:16].ljust(16, b"\0")


def unit_hash(key: str, salt: str) -> float:
    """A number in [0, 1), uniform over keys and fixed for a key and salt (the upper 53 bits of `hash64`)."""
    return (hash64(key, salt) >> 11) * 2.0**-53


def units(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """`unit_hash` of keys [N] whose `hash64` is at hand."""
    found: NDArray[np.float64] = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


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


def context_text(messages: Iterable[tuple[str, str]]) -> str:
    """A context as one text, equal for contexts that differ only in case and white space; messages are (role, text)."""
    return "\x1f".join(f"{role} {' '.join(content.casefold().split())}" for role, content in messages)


ROW_KEY = "rluf-place"
"""Salt of a row id's hash: the key that joins and duplicates go by, and the row's place in the prepared files.

Places are an order at random that is the same however work is cut, and a bucket of rows is a range of places.
"""
