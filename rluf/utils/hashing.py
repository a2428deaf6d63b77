"""Stable hashes: user ids (the one user hash of the service and of prepare), split and sampling points, text ids.

All hashes are BLAKE2b, so they are equal on every machine and in every process, unlike Python's own `hash`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import uuid
from functools import cache

USER_SALT_VARIABLE = "RLUF_USER_SALT"
"""Environment variable of the secret salt of user ids. Its value is never written to a file."""

LEGACY_SERVE_SALT_VARIABLE = "RLUF_SERVE_SALT"
"""Salt of the service before it shared `RLUF_USER_SALT`; accepted for one release."""

USER_ID_TAG = "u1_"
"""Prefix of hashed user ids: the version of the hash."""

_SIGNED_ID = re.compile(r"chatcmpl-[0-9a-f]{32}-[0-9a-f]{16}")
_HASHED_USER_ID = re.compile(rf"{USER_ID_TAG}[0-9a-f]{{24}}")


def read_user_salt() -> bytes | None:
    """The secret salt from the environment; None if unset (ids are then assumed to be hashed by the log's writer)."""
    return os.environ.get(USER_SALT_VARIABLE, "").encode() or None


def hash_user_id(user_id: str, salt: bytes | None) -> str:
    """Hashed user id: "u1_" and 24 hex digits (96 bits) of BLAKE2b keyed with the salt; `user_id` itself without salt.

    Idempotent: an id that is already hashed is returned as it is. So a log that the service wrote can go through
    prepare, with or without a salt, and the user keeps one id.
    """
    if salt is None or _HASHED_USER_ID.fullmatch(user_id):
        return user_id
    # BLAKE2b keys are at most 64 bytes; hashing the salt first accepts a salt of any length.
    key = hashlib.blake2b(salt, digest_size=32).digest()
    return USER_ID_TAG + hashlib.blake2b(_encode_text(user_id), digest_size=12, key=key).hexdigest()


def is_hashed_user_id(user_id: str) -> bool:
    """Whether an id has the form of `hash_user_id`."""
    return _HASHED_USER_ID.fullmatch(user_id) is not None


def create_response_id(user: str | None, salt: bytes) -> str:
    """New id of a response, in OpenAI's format, signed for the user who is served; feedback refers to it."""
    unique_part = f"chatcmpl-{uuid.uuid4().hex}"
    return f"{unique_part}-{_compute_id_signature(unique_part, user, salt)}"


def is_signed_response_id(response_id: str) -> bool:
    """Whether an id has the form of `create_response_id`, unlike those of other systems."""
    return _SIGNED_ID.fullmatch(response_id) is not None


def is_response_of_user(response_id: str, user: str | None, salt: bytes) -> bool:
    """Whether a signed id was created for this user."""
    unique_part, _, signature = response_id.rpartition("-")
    return hmac.compare_digest(_compute_id_signature(unique_part, user, salt), signature)


def _compute_id_signature(unique_part: str, user: str | None, salt: bytes) -> str:
    return hmac.new(salt, json.dumps([unique_part, user]).encode(), hashlib.sha256).hexdigest()[:16]


def hash_user_id_legacy(user_id: str, salt: bytes) -> str:
    """User id as the service stored it before `hash_user_id`: 16 hex digits of HMAC-SHA256 under RLUF_SERVE_SALT."""
    return hmac.new(salt, _encode_text(user_id), hashlib.sha256).hexdigest()[:16]


def list_user_id_forms(user_id: str) -> list[str]:
    """Every form in which a user can stand in a log or data set: as given, and hashed by this and earlier releases.

    The salts come from the environment. Earlier releases of prepare wrote the same digest without the tag; earlier
    releases of the service wrote an HMAC, which prepare then hashed once more.
    """
    salt = read_user_salt()
    serve_salt = os.environ.get(LEGACY_SERVE_SALT_VARIABLE, "").encode()
    legacy_salts = {value for value in (serve_salt, salt) if value}
    raw_ids = {user_id, *(hash_user_id_legacy(user_id, legacy_salt) for legacy_salt in legacy_salts)}
    # The service hashes with RLUF_SERVE_SALT where that is the only salt it was given.
    hashed_ids = {hash_user_id(raw_id, value) for raw_id in raw_ids for value in {salt, serve_salt or None}}
    return sorted({*raw_ids, *hashed_ids, *(strip_user_id_tag(hashed_id) for hashed_id in hashed_ids)})


def strip_user_id_tag(user_id: str) -> str:
    """The digest of a hashed id without its tag, as releases before the tag wrote it; other ids as they are."""
    return user_id.removeprefix(USER_ID_TAG) if _HASHED_USER_ID.fullmatch(user_id) else user_id


def fingerprint_salt(salt: bytes | None) -> str:
    """Digest that tells two salts apart without revealing either (for cache keys); empty without a salt."""
    return hashlib.blake2b(salt, digest_size=8, person=b"rluf-salt-mark").hexdigest() if salt else ""


def hash64(key: str, salt: str) -> int:
    """64 bits, uniform over keys and fixed for a key and salt (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(_encode_text(key), digest_size=8, person=_encode_salt(salt)).digest(), "big")


def hash_to_unit_interval(key: str, salt: str) -> float:
    """A number in [0, 1), uniform over keys and fixed for a key and salt (the upper 53 bits of `hash64`)."""
    # A double has 53 bits of mantissa: with all 64 bits the largest hashes would round up to 1.0.
    return (hash64(key, salt) >> 11) * 2.0**-53


def hash_parts(*texts: str) -> str:
    """16 hex digits (64 bits) that identify a sequence of texts: ids of rows, users and prompt groups."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = _encode_text(text)
        # The length goes in first, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _encode_text(text: str) -> bytes:
    # Logs may hold unpaired surrogates, which strict UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass")


@cache
def _encode_salt(salt: str) -> bytes:
    return salt.encode()[:16].ljust(16, b"\0")
