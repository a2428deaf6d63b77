"""Assignment of users and conversations to the candidate's models and to the arms of an experiment."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from rluf.utils.hashing import hash_to_unit_interval


def is_canary(assignment_key: str | None, share: float) -> bool:
    """Whether the candidate scores a user or conversation: always the same answer for a key and share.

    A larger share adds keys and moves none back. Items without a key are not assigned: their turns could not be joined.
    """
    return assignment_key is not None and hash_to_unit_interval(assignment_key, "rluf-canary") < share


def assign_arm(assignment_key: str, shares: Mapping[str, float], salt: bytes) -> str:
    """The arm of a user or conversation: always the same one for a key, its shares and salt.

    Arms are laid out in the order of `shares`, so that a ramp of two arms moves users in one direction only. The salt
    is secret, so that users cannot choose an id for its arm.
    """
    digest = hashlib.blake2b(assignment_key.encode("utf-8", "surrogatepass"), digest_size=8, key=salt[:64]).digest()
    point, total = int.from_bytes(digest, "big") / 2**64, 0.0
    for arm, share in shares.items():
        total += share
        if point < total:
            return arm
    return max(shares, key=lambda name: shares[name])  # the shares sum to 1 up to rounding
