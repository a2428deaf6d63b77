"""Which Ray a command uses, and what it says when there is none. No Ray starts here."""

from __future__ import annotations

import pytest
from ray.exceptions import AuthenticationError

from cluster.connect import ray_connection, read_ray_address
from rluf.errors import ResourceError, SettingsError


@pytest.mark.parametrize(
    ("value", "address"),
    [
        (None, None), ("", None), (" ", None), ("local", None), ("10.0.0.7:6379", "10.0.0.7:6379"), ("auto", "auto"),
        (" head:20021\n", "head:20021"), ("ray://head:10001", "ray://head:10001"),
    ],
)  # fmt: skip
def test_the_address_of_the_cluster_is_read(
    monkeypatch: pytest.MonkeyPatch, value: str | None, address: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert read_ray_address() == address


@pytest.mark.parametrize("value", ["http://127.0.0.1:8265", "https://ray.example.com"])
def test_the_address_of_a_dashboard_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    with (
        pytest.raises(SettingsError, match="address of a dashboard: run the command with ray job submit"),
        ray_connection(),
    ):
        pass


@pytest.mark.parametrize("address", [None, "auto"])
@pytest.mark.parametrize(
    "error",
    [AuthenticationError("no token"), FileNotFoundError(2, "no", "/x/.ray"), ConnectionError("x"), ValueError("x")],
)
def test_an_error_of_ray_names_what_to_check(
    monkeypatch: pytest.MonkeyPatch, address: str | None, error: Exception
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    hint = "its token and ports are right" if address else "RAY_AUTH_TOKEN_PATH names a file with a token"
    with pytest.raises(ResourceError, match=hint), ray_connection():
        pass
