"""Tokens with scopes, the Host header, rates by client address, trusted proxies, and what a public service requires."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import httpx
import pytest

from rluf.config.settings import Settings
from rluf.errors import ModelError, SettingsError
from rluf.serve.api import ApiError
from rluf.serve.app import make_app
from rluf.serve.application import build, check_secrets
from rluf.serve.middleware import (
    ALL_SCOPES,
    AccessToken,
    ClientRateLimiter,
    find_access_token,
    hash_token,
    read_access_tokens,
    read_host_name,
)
from rluf.utils.hashing import create_response_id
from tests.serve.conftest import SALT, LocalBackend, make_rules

HELLO = {"messages": [{"role": "user", "content": "Hello?"}], "response": "Hello, friend!"}
RECORD = {"conversation_id": "c", "turn": 0, "user_id": "u", "time": "2026-01-31T12:00:00+00:00", "model_version": "m"}


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Bearer secret", "ops"), ("bearer secret", "ops"),
        ("Bearer  secret \t", "ops"), ("Bearer \xa0secret", None), ("Bearer secret\x85", None), ("Bearer older", "old"),
        ("Bearer other", None), ("secret", None), ("Basic secret", None), ("Bearer", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_only_a_right_token_is_accepted_and_several_may_be(header: str | None, name: str | None) -> None:
    tokens = (AccessToken("ops", hash_token("secret")), AccessToken("old", hash_token("older")))
    token = find_access_token(header, tokens)
    assert (token.name if token else None) == name


def test_tokens_come_from_two_variables() -> None:
    lines = "web chat first-token\n\ntrainer score,ingest second-token\n"
    tokens = read_access_tokens({"RLUF_SERVE_TOKEN": "main-token", "RLUF_SERVE_TOKENS": lines})
    assert [(token.name, sorted(token.scopes)) for token in tokens] == [
        ("default", sorted(ALL_SCOPES)), ("web", ["chat"]), ("trainer", ["ingest", "score"])
    ]  # fmt: skip
    assert "token" not in "".join(token.digest for token in tokens)
    assert read_access_tokens({}) == ()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("web chat", "line 1: expected NAME"), ("web chat a b", "got 4 words"), ("web char token", "scopes are admin"),
        ("web , token", "scopes are"), ("a chat token\na score other", "same name"),
        ("a chat t\nb score t", "same digest"), ("a chat short", "the token has 5 characters"),
    ],
)  # fmt: skip
def test_a_wrong_token_list_is_refused_without_the_token(lines: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        read_access_tokens({"RLUF_SERVE_TOKENS": lines}, min_chars=16 if "short" in lines else 1)
    assert "short" not in str(error.value)


@pytest.mark.parametrize(
    "token",
    [
        "zwölf-zeichen-und-mehr",
        "two words in one token",
        "tab\tin-the-token-here",
        "no-break\xa0space-token",
        "\x00" * 20,
    ],
)
def test_a_token_that_no_client_can_send_is_refused(token: str) -> None:
    with pytest.raises(SettingsError, match="RLUF_SERVE_TOKEN: expected a token of ASCII") as error:
        read_access_tokens({"RLUF_SERVE_TOKEN": token})
    assert token not in str(error.value)
    assert len(read_access_tokens({"RLUF_SERVE_TOKEN": "\n c2VjcmV0+/=.-_~!#$ \n"})) == 1


@pytest.mark.parametrize(
    ("scopes", "statuses"),
    [
        (("chat",), {"score": 403, "chat": 404, "react": 404, "ingest": 403, "metrics": 403, "models": 200}),
        (("score",), {"score": 200, "chat": 403, "react": 403, "ingest": 403, "metrics": 403, "models": 200}),
        (("ingest",), {"score": 403, "chat": 403, "react": 403, "ingest": 200, "metrics": 403, "models": 200}),
        (("admin",), {"score": 403, "chat": 403, "react": 403, "ingest": 403, "metrics": 200, "models": 200}),
        (("chat", "score"), {"score": 200, "chat": 404, "react": 404, "ingest": 403, "metrics": 403, "models": 200}),
    ],
)
async def test_a_scope_opens_its_routes_only(
    backend: LocalBackend, scopes: tuple[str, ...], statuses: dict[str, int]
) -> None:
    backend.rules = dataclasses.replace(
        make_rules(token="x"), tokens=(AccessToken("t", hash_token("t"), frozenset(scopes)),)
    )
    transport = httpx.ASGITransport(make_app(backend))
    headers = {"Authorization": "Bearer t"}
    async with httpx.AsyncClient(transport=transport, base_url="http://any", headers=headers) as client:
        responses = {
            "score": await client.post("/v1/score", json=HELLO),
            "chat": await client.post("/v1/chat/completions", json={"messages": HELLO["messages"]}),
            "react": await client.post("/v1/feedback", json={"id": create_response_id(None, SALT), "reaction": None}),
            "ingest": await client.post("/v1/feedback", json={"id": "r", "reaction": None, "record": RECORD | HELLO}),
            "metrics": await client.get("/metrics"),
            "models": await client.get("/v1/models"),
        }  # fmt: skip
        for path in ("/score", "/rerank", "/classify", "/predict", "/get_reward", "/v1/moderations", "/v1/rank"):
            assert ((await client.post(path, json={})).status_code == 403) == ("score" not in scopes)
        assert (await client.get("/docs")).status_code == (200 if "admin" in scopes else 403)
    assert {name: response.status_code for name, response in responses.items()} == statuses


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"), ("LOCALHOST:8000", "localhost"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"),
        ("127.0.0.1:", "127.0.0.1"), ("", ""), ("evil.com]", None), ("[::1", None), ("a b", None), ("a:b", None),
        ("a:123456", None), ("user@localhost", None), ("localhost/", None), ("[::1]x", None), ("a:1:2", None),
        ("localhost\x00", None), ("\u00fc", None), ("a,b:1]", None),
    ],
)  # fmt: skip
def test_the_host_header_follows_its_grammar(host: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(ApiError, match="Host header"):
            read_host_name([host], "1.1")
    else:
        assert read_host_name([host], "1.1") == name


@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"]])
def test_a_missing_or_second_host_header_is_refused(hosts: list[str]) -> None:
    with pytest.raises(ApiError, match="one Host header"):
        read_host_name(hosts, "1.1")
    assert read_host_name([], "1.0") == ""


def test_a_client_gets_its_rate_and_a_burst_of_two_seconds() -> None:
    now = [0.0]
    limit = ClientRateLimiter(5, lambda: now[0])
    assert [limit.acquire_token("a") for _ in range(10)] == [0.0] * 10
    assert limit.acquire_token("a") == pytest.approx(0.2)
    assert limit.acquire_token("b") == 0.0
    now[0] = 1.0
    assert [limit.acquire_token("a") > 0 for _ in range(6)] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("trusted_proxies", "has_own_limit"),
    [
        ((), False), (("10.0.0.0/8",), True), (("10.9.0.1",), False), (("10.0.0.7",), True), (("10.0.0.1/8",), True),
        (("10.0.0.9/255.255.255.0",), True), (("10.9.0.1/16",), False),
    ],
)  # fmt: skip
async def test_forwarded_addresses_count_only_from_trusted_proxies(
    backend: LocalBackend, trusted_proxies: tuple[str, ...], has_own_limit: bool
) -> None:
    backend.rules = dataclasses.replace(make_rules(requests_per_s=2), trusted_proxies=trusted_proxies)
    transport = httpx.ASGITransport(make_app(backend), client=("10.0.0.7", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        statuses = [
            (await client.get("/v1/models", headers={"X-Forwarded-For": f"203.0.113.{i}"})).status_code
            for i in range(8)
        ]
    assert (429 in statuses) is not has_own_limit


async def test_two_authorization_headers_are_refused(backend: LocalBackend) -> None:
    backend.rules = make_rules(token="right")
    transport = httpx.ASGITransport(make_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://any") as client:
        for values in (("right", "wrong"), ("wrong", "right"), ("right", "right")):
            headers = [("Authorization", f"Bearer {value}") for value in values]
            assert (await client.get("/v1/models", headers=headers)).status_code == 400


async def test_wrong_tokens_are_limited_and_a_right_one_still_works(backend: LocalBackend) -> None:
    backend.rules = make_rules(token="right")
    transport = httpx.ASGITransport(make_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://any") as client:
        statuses = [
            (await client.get("/v1/models", headers={"Authorization": f"Bearer {i}"})).status_code for i in range(40)
        ]
        assert statuses[0] == 401
        assert statuses.count(429) >= 10
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer right"})).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/health", "/ping", "/version", "/info", "/v1/models", "/metrics", "/"])
async def test_head_is_answered_as_get_without_a_body(backend: LocalBackend, path: str) -> None:
    transport = httpx.ASGITransport(make_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        response = await client.head(path)
        assert (response.status_code, response.content) == (200, b"")
        assert (await client.get(path)).content


def test_a_public_service_requires_tokens_and_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RLUF_SERVE_TOKEN", "RLUF_SERVE_TOKENS", "RLUF_USER_SALT", "RLUF_SERVE_SALT"):
        monkeypatch.delenv(variable, raising=False)
    public_settings = Settings.model_validate({"serve": {"host": "0.0.0.0"}})
    check_secrets(Settings())
    for variable in ("RLUF_SERVE_TOKEN", "RLUF_USER_SALT"):
        with pytest.raises(SettingsError, match=variable):
            check_secrets(public_settings)
        monkeypatch.setenv(variable, "0123456789abcdef")
    check_secrets(public_settings)
    monkeypatch.setenv("RLUF_SERVE_TOKEN", "short")
    with pytest.raises(SettingsError, match="5 characters"):
        check_secrets(public_settings)
    monkeypatch.delenv("RLUF_SERVE_TOKEN")
    monkeypatch.setenv("RLUF_SERVE_TOKENS", "trainer score 0123456789abcdef")
    check_secrets(public_settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "rewards.example.com", "192.168.0.4"])
def test_a_public_service_requires_rays_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLUF_SERVE_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("RLUF_USER_SALT", "salt")
    settings = Settings.model_validate({"serve": {"host": host}})
    check_secrets(settings)
    monkeypatch.setattr("ray._private.authentication.authentication_utils.is_token_auth_enabled", lambda: False)
    with pytest.raises(SettingsError, match="RAY_AUTH_MODE=token"):
        check_secrets(settings)
    check_secrets(Settings())


@pytest.mark.parametrize(
    ("host", "proxy_host", "is_refused"),
    [
        ("127.0.0.1", "0.0.0.0", True), ("localhost", "0.0.0.0", True), ("::1", "::", True),
        ("127.0.0.1", "10.0.0.4", True), ("127.0.0.1", "127.0.0.1", False), ("127.0.0.1", None, False),
    ],
)  # fmt: skip
def test_a_local_service_is_not_built_behind_proxies_that_other_machines_reach(
    monkeypatch: pytest.MonkeyPatch, host: str, proxy_host: str | None, is_refused: bool
) -> None:
    client = None if proxy_host is None else SimpleNamespace(http_config=SimpleNamespace(host=proxy_host))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda **_: client)
    arguments = {"overrides": [f"serve.host={host}", "serve.objectives=[love]"]}
    with pytest.raises(SettingsError if is_refused else ModelError) as error:  # no model is named
        build(arguments)
    assert ("http_options.host" in str(error.value)) == is_refused


@pytest.mark.parametrize("proxy", ["*", "proxy.local", "10.0.0.0/33", "10.0.0", "", "300.1.1.1", "10.0.0.1:80"])
def test_a_trusted_proxy_is_an_address_or_a_network(proxy: str) -> None:
    with pytest.raises(ValueError, match="trusted_proxies: expected addresses and networks"):
        Settings.model_validate({"serve": {"trusted_proxies": ["10.0.0.0/8", proxy]}})
    accepted = ["10.0.0.1", "10.0.0.0/8", "::1", "fd00::/8", "10.0.0.1/8"]
    Settings.model_validate({"serve": {"trusted_proxies": accepted}})
