"""User ids have one hash in the service and in prepare; texts have stable ids and points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.utils.hashing import (
    fingerprint_salt,
    hash64,
    hash_parts,
    hash_to_unit_interval,
    hash_user_id,
    hash_user_id_legacy,
    list_user_id_forms,
)


def test_hashed_user_ids_are_tagged_and_depend_on_user_and_salt() -> None:
    hashed_id = hash_user_id("alice", b"pepper")
    assert hashed_id.startswith("u1_") and len(hashed_id) == 27 and "alice" not in hashed_id
    assert hashed_id == "u1_0ce0ed5a63b41c32d65415bd"
    assert len({hash_user_id(user, salt) for user in ("alice", "bob") for salt in (b"pepper", b"salt")}) == 4


@given(st.text(), st.binary(min_size=1), st.binary(min_size=1))
def test_hashing_a_hashed_id_changes_nothing(user_id: str, salt: bytes, other_salt: bytes) -> None:
    hashed_id = hash_user_id(user_id, salt)
    assert hash_user_id(hashed_id, salt) == hash_user_id(hashed_id, other_salt) == hashed_id
    assert hash_user_id(user_id, None) == user_id


def test_user_id_forms_cover_earlier_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLUF_USER_SALT", raising=False)
    monkeypatch.delenv("RLUF_SERVE_SALT", raising=False)
    assert list_user_id_forms("alice") == ["alice"]
    monkeypatch.setenv("RLUF_USER_SALT", "pepper")
    monkeypatch.setenv("RLUF_SERVE_SALT", "service")
    served_id = hash_user_id_legacy("alice", b"service")
    expected = {
        "alice",
        served_id,
        "u1_0ce0ed5a63b41c32d65415bd",
        "0ce0ed5a63b41c32d65415bd",
        hash_user_id("alice", b"service"),
        hash_user_id(served_id, b"pepper"),
        hash_user_id(served_id, b"pepper").removeprefix("u1_"),
    }
    assert expected <= set(list_user_id_forms("alice"))
    assert not set(list_user_id_forms("alice")) & set(list_user_id_forms("bob"))


def test_the_legacy_hash_is_that_of_the_earlier_service() -> None:
    assert hash_user_id_legacy("alice", b"pepper") == "f2f95d059a71b4aa"


def test_a_salt_fingerprint_reveals_no_salt() -> None:
    assert fingerprint_salt(None) == ""
    assert fingerprint_salt(b"salt") not in ("", "salt", fingerprint_salt(b"other"))


@given(st.text(), st.text(max_size=10))
def test_points_lie_in_the_unit_interval(key: str, salt: str) -> None:
    assert 0 <= hash_to_unit_interval(key, salt) < 1
    assert 0 <= hash64(key, salt) < 2**64


def test_text_ids_depend_on_where_the_parts_end() -> None:
    assert hash_parts("ab", "c") != hash_parts("a", "bc")
    assert hash_parts("ab", "c") == hash_parts("ab", "c") and len(hash_parts("ab")) == 16
