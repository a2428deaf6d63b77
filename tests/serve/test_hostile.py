"""Hostile input on real sockets: no 500, no hang, bounded memory, and a healthy service within a second afterwards.

One service for all cases, behind the listener that the gateway uses. Its time limits are shortened, nothing else.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from rluf.reward.model import RewardModel
from rluf.serve import listener, middleware
from rluf.serve.middleware import AccessToken, hash_token
from rluf.serve.store import FeedbackStore
from tests.serve.conftest import TOKEN, LocalBackend, make_rules, run_http_server

MAX_GROWTH_BYTES = 50 << 20
SHORT_TIMEOUT_S = 0.4
Address = tuple[str, int]
GOOD = json.dumps({"messages": [{"role": "user", "content": "Hello?"}], "response": "Hello, friend!"}).encode()
AUTHORIZATION = f"Authorization: Bearer {TOKEN}".encode()


@pytest.fixture(scope="module")
def address(reward_models: dict[str, RewardModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    folder = tmp_path_factory.mktemp("hostile")
    store = FeedbackStore(str(folder), folder / ".log", reaction_window_s=60)
    store.start()
    tokens = (
        AccessToken("default", hash_token(TOKEN)), AccessToken("web", hash_token("web-token"), frozenset(("chat",))),
    )  # fmt: skip
    rules = dataclasses.replace(
        make_rules(), tokens=tokens, allowed_hosts=("localhost", "127.0.0.1", "[::1]"), deadline_s=5.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listener, "HEADERS_TIMEOUT_S", SHORT_TIMEOUT_S)
        patch.setattr(listener, "ABORT_WAIT_S", SHORT_TIMEOUT_S)
        patch.setattr(listener, "WRITE_TIMEOUT_S", SHORT_TIMEOUT_S)
        patch.setattr(listener, "BODY_TIMEOUT_S", SHORT_TIMEOUT_S)
        patch.setattr(middleware, "BODY_TIMEOUT_S", SHORT_TIMEOUT_S)
        patch.setattr(listener, "MAX_CONNECTIONS", 64)
        patch.setattr("rluf.serve.middleware.WRONG_TOKENS_PER_S", 1e6)
        with run_http_server(LocalBackend(reward_models, store, rules)) as url:
            yield "127.0.0.1", int(url.rpartition(":")[2])


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(address: Address) -> Iterator[None]:
    """Check memory over all cases of this module; the client's memory counts too."""
    # The first forward passes and the first schema allocate what a service keeps.
    for data in (post(GOOD), post(GOOD.replace(b"friend", b"x" * 50_000)), get(b"/openapi.json", AUTHORIZATION)):
        assert read_status(exchange(address, data)) == 200
    assert_healthy(address)
    start_bytes = psutil.Process().memory_info().rss
    yield
    assert psutil.Process().memory_info().rss - start_bytes <= MAX_GROWTH_BYTES


def assert_healthy(address: Address) -> None:
    response = httpx.get(f"http://{address[0]}:{address[1]}/healthz", timeout=1.0)
    assert response.status_code == 200


def exchange(address: Address, data: bytes, repeat: int = 1, *, ends: bool = False, timeout_s: float = 10.0) -> bytes:
    """Send bytes, then read until the service closes, falls silent or (at the latest) `timeout_s` have passed."""
    received, deadline = b"", time.monotonic() + timeout_s
    with socket.create_connection(address, timeout=timeout_s) as connection:
        try:
            for _ in range(repeat):
                connection.sendall(data)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(1 << 16):
                received += chunk
                if b"\r\n\r\n" in received and _is_complete(received):
                    break
        except (ConnectionResetError, BrokenPipeError):
            # The service may close while this side still sends.
            return received
    assert time.monotonic() < deadline, "the service hung"
    return received


def _is_complete(received: bytes) -> bool:
    head, _, body = received.partition(b"\r\n\r\n")
    for line in head.lower().splitlines():
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return False


def read_status(received: bytes) -> int:
    """Status of the first response; 0 if the service closed without one."""
    return int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1.1 ") else 0


def post(
    body: bytes, *headers: bytes, path: bytes = b"/v1/score", host: bytes = b"localhost", length: bytes | None = None
) -> bytes:
    length_line = b"Content-Length: " + (str(len(body)).encode() if length is None else length)
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: " + host, AUTHORIZATION, b"Content-Type: application/json"]
    return b"\r\n".join([*lines, length_line, *headers, b"", b""]) + body


def post_chunked(body: bytes) -> bytes:
    return post(body, b"Transfer-Encoding: chunked").replace(b"Content-Length: %d\r\n" % len(body), b"")


def get(path: bytes = b"/v1/models", *headers: bytes, host: bytes = b"Host: localhost") -> bytes:
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", host, *headers, b"", b""])


def nest(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * depth + closing * depth


def messages(content: bytes = b'"x"', role: bytes = b'"user"') -> bytes:
    return b'{"messages":[{"role":' + role + b',"content":' + content + b'}],"response":"y"}'


BODIES: dict[str, bytes] = {
    "empty": b"", "null": b"null", "number": b"1", "string": b'"x"', "list": b"[]", "object": b"{}", "true": b"true",
    "NaN": messages(b"NaN"), "Infinity": messages(b"-Infinity"), "number of 900k digits": messages(b"9" * 60_000),
    "exponent": messages(b"1e999999"), "nested lists": nest(20_000), "nested objects": nest(9_000, b'{"a":', b"}"),
    "nested content": messages(nest(10_000)), "unclosed": b'{"messages":[', "unclosed string": b'{"messages":"',
    "two values": GOOD + GOOD, "trailing comma": b'{"a":1,}', "single quotes": b"{'a':1}", "comment": b"/* */{}",
    "NUL": messages(b'"\x00"'), "escaped NUL": messages(b'"\\u0000"'), "surrogate": messages(b'"\\ud83d"'),
    "surrogate key": b'{"\\ud83d":1}', "low surrogate": messages(b'"\\udc00x"'), "bad UTF-8": messages(b'"\xff"'),
    "overlong UTF-8": messages(b'"\xc0\xaf"'), "UTF-8 surrogate": messages(b'"\xed\xa0\x80"'),
    "cut UTF-8": messages(b'"\xe2\x82'), "BOM": b"\xef\xbb\xbf" + GOOD, "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-32": GOOD.decode().encode("utf-32"), "binary": bytes(range(256)) * 40, "gzip": b"\x1f\x8b\x08\x00" + b"x" * 99,
    "duplicate keys": b'{"messages":[],"messages":[]}', "role null": messages(role=b"null"),
    "role robot": messages(role=b'"robot"'), "role list": messages(role=b'["user"]'), "content null": messages(b"null"),
    "content list": messages(b"[1]"), "content object": messages(b"{}"), "content bool": messages(b"true"),
    "blank content": messages(b'" "'), "2,001 messages": b'{"messages":[' + b",".join(
        [b'{"role":"user","content":"x"}'] * 1200) + b'],"response":1}',
    "unknown field": GOOD[:-1] + b',"extra":1}', "finish reason": GOOD[:-1] + b',"finish_reason":"x"}',
    "response number": GOOD.replace(b'"Hello, friend!"', b"1"), "form": b"messages=1&response=2",
    "XML": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
    "pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01x\x94.", "prototype": b'{"__proto__":{"a":1}}',
    "model version": GOOD[:-1] + b',"model_version":{"a":1}}',
}  # fmt: skip

PATH_BODIES: dict[str, tuple[bytes, bytes]] = {
    f"{path} {name}": (path.encode(), body)
    for path in (
        "/v1/score/batch", "/v1/rank", "/v1/feedback", "/v1/preferences", "/v1/chat/completions", "/score", "/rerank",
        "/classify", "/predict", "/get_reward", "/v1/moderations",
    )
    for name, body in {
        "wrong types": b'{"items":1,"messages":2,"id":3,"query":[4],"inputs":[[1]],"input":{},"documents":[[]],'
        b'"text_1":5,"responses":"x","reaction":[],"prompts":6}',
        "many": b'{"items":[' + b"{}," * 9_000 + b"{}]," + b'"query":[' + b'"",' * 9_000 + b'""]}',
        "deep": b'{"items":' + nest(9_000) + b',"query":' + nest(9_000) + b"}",
    }.items()
}  # fmt: skip

RAW: dict[str, tuple[bytes, set[int]]] = {
    "CL with TE": (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", length=b"5"), {400, 422}),
    "two CL": (post(GOOD, b"Content-Length: 1"), {400}),
    "negative CL": (post(GOOD, length=b"-1"), {400}),
    "huge CL": (post(GOOD, length=b"9" * 30), {400}),
    "CL over the limit": (post(b"", length=b"99999999"), {413}),
    "CL as hex": (post(GOOD, length=b"0x10"), {400}),
    "CL with a superscript": (post(GOOD, length=b"\xb2"), {400, 413}),
    "CL list": (post(GOOD, length=b"1, 1"), {400}),
    "empty CL": (post(GOOD, length=b""), {400, 422}),
    "bad chunk size": (post_chunked(b"xyz\r\n"), {400, 413}),
    "TE twice": (post(b"", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: x"), {400}),
    "unknown TE": (post(GOOD, b"Transfer-Encoding: rot13"), {400}),
    "space before colon": (get(b"/v1/models", b"X-A : b"), {400, 401}),
    "folded header": (get(b"/v1/models", b"X-A: b\r\n c"), {400, 401}),
    "NUL in header": (get(b"/v1/models", b"X-A: \x00"), {400}),
    "LF only": (b"GET / HTTP/1.1\nHost: localhost\n\n", {400, 200}),
    "bare CR": (get(b"/v1/models", b"X-A: a\rb"), {400}),
    "empty header name": (get(b"/v1/models", b": b"), {400}),
    "header without colon": (get(b"/v1/models", b"abc"), {400}),
    "unicode header": (get(b"/v1/models", "X-Ä: ö".encode()), {400}),
    "no host": (get(host=b"X: y"), {400}),
    "two hosts": (get(b"/v1/models", b"Host: localhost"), {400}),
    "HTTP/0.9": (b"GET /\r\n\r\n", {400}),
    "HTTP/1.0 without host": (b"GET /healthz HTTP/1.0\r\n\r\n", {200, 403}),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 505}),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", {400, 505}),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), {400}),
    "SOCKS": (b"\x05\x01\x00" + b"\r\n\r\n", {400}),
    "SSH": (b"SSH-2.0-OpenSSH_9.0\r\n", {400}),
    "Redis": (b"*1\r\n$4\r\nPING\r\n", {400}),
    "SMTP": (b"EHLO x\r\n", {400}),
    "random bytes": (bytes((i * 7919) % 256 for i in range(5000)), {400}),
    "zeros": (bytes(5000), {400}),
    "unknown method": (b"FOO / HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
    "long method": (b"A" * 5000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
    "lower case method": (b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", {405, 401}),
    "CONNECT": (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 401, 404}),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 401, 404, 405}),
    "websocket": (get(b"/", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: x"), {200, 400, 426}),
    "h2c": (get(b"/", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"), {200, 400}),
    "expect": (post(GOOD, b"Expect: 200-maybe"), {200, 417}),
    "wrong traceparent": (get(b"/", b"traceparent: 00-zz-\xff-01", b"tracestate: =,=,;"), {200, 400}),
    "two traceparents": (get(b"/", *[b"traceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"] * 2), {200}),
    "long tracestate": (get(b"/", b"traceparent: " + b"0" * 9_000, b"tracestate: " + b"a=b," * 9_000), {200}),
    "baggage": (get(b"/", b"baggage: " + b"user=x%0d%0a," * 3_000), {200}),
    "wrong request id": (get(b"/", b"X-Request-Id: " + b"a b" * 900), {200}),
    "path traversal": (get(b"/../../etc/passwd", AUTHORIZATION), {404, 400}),
    "encoded traversal": (get(b"/%2e%2e/%2e%2e/etc/passwd", AUTHORIZATION), {404}),
    "NUL in path": (get(b"/page.js%00.html", AUTHORIZATION), {404}),
    "bad percent": (get(b"/%zz%", AUTHORIZATION), {404, 400}),
    "CRLF in path": (get(b"/a%0d%0aX-Injected:%20b", AUTHORIZATION), {404}),
    "invalid UTF-8 path": (get(b"/%ff%fe", AUTHORIZATION), {404}),
    "raw UTF-8 path": (get("/ü".encode(), AUTHORIZATION), {400, 404}),
    "absolute target": (get(b"http://evil.example/v1/models", AUTHORIZATION), {200, 400}),
    "path without slash": (get(b"v1/models", AUTHORIZATION), {400}),
    "long path": (get(b"/" + b"a" * 60_000, AUTHORIZATION), {404}),
    "path over the limit": (get(b"/" + b"a" * 70_000, AUTHORIZATION), {431}),
    "query over the limit": (get(b"/?" + b"a=b&" * 20_000, AUTHORIZATION), {431}),
    "one header over the limit": (get(b"/", b"X: " + b"a" * 70_000), {431}),
    "many headers": (get(b"/", *[b"X-%d: y" % i for i in range(8_000)]), {431}),
    "many empty headers": (get(b"/", *[b"A:" for _ in range(20_000)]), {431}),
    "many header bytes in few headers": (get(b"/", *[b"A: " + b"b" * 9_000] * 8), {431}),
    "long header name": (get(b"/", b"a" * 70_000 + b": b"), {431}),
    "many cookies": (get(b"/", *[b"Cookie: " + b"c" * 4_000] * 20), {431}),
    "trailers over the limit": (
        post_chunked(b"0\r\n" + b"X: " + b"a" * 70_000),
        {400, 408, 431},
    ),
    "blank lines": (b"\r\n" * 40_000, {431, 400}),
    "CL with spaces": (post(GOOD, length=b"  %d \t" % len(GOOD)), {200}),
    "CL with zeros": (post(GOOD, length=b"0" * 30 + b"%d" % len(GOOD)), {200}),
    "CL with many zeros": (post(GOOD, length=b"0" * 9_000 + b"%d" % len(GOOD)), {200, 400}),
    "CL with a sign": (post(GOOD, length=b"+%d" % len(GOOD)), {400}),
    "CL with an underscore": (post(GOOD, length=b"1_0"), {400}),
    "CL twice": (post(GOOD, b"Content-Length: %d" % len(GOOD)), {400}),
    "space before the colon of TE": (post(b"0\r\n\r\n", b"Transfer-Encoding : chunked"), {400}),
    "TE chunked and identity": (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked, identity"), {400}),
    "negative chunk": (post_chunked(b"-1\r\nabc\r\n0\r\n\r\n"), {400}),
    "chunk as hex": (post_chunked(b"0x5\r\nabcde\r\n0\r\n\r\n"), {400}),
    "chunks with bare LF": (post_chunked(b"5\nabcde\n0\n\n"), {400}),
    "huge chunk": (post_chunked(b"f" * 16 + b"\r\nabc"), {400, 408, 413}),
    "long chunk extension": (post_chunked(b"5;a=" + b"x" * 200_000 + b"\r\nabcde\r\n0\r\n\r\n"), {400, 431}),
    "chunks of one byte": (post_chunked(b"".join(b"1\r\n%c\r\n" % c for c in GOOD) + b"0\r\n\r\n"), {200}),
    "gzip bomb": (post(gzip.compress(b" " * 50_000_000), b"Content-Encoding: gzip"), {413}),
    "gzip that is cut": (post(gzip.compress(GOOD)[:-5], b"Content-Encoding: gzip"), {400}),
    "gzip with more": (post(gzip.compress(GOOD) + b"x", b"Content-Encoding: gzip"), {400}),
    "gzip twice": (post(gzip.compress(gzip.compress(GOOD)), b"Content-Encoding: gzip, gzip"), {415}),
    "unknown encoding": (post(GOOD, b"Content-Encoding: \xff\xfe"), {415}),
    "odd Content-Type": (post(GOOD).replace(b"application/json", b";;=," + b"a" * 30_000), {422}),
    "no Content-Type": (post(GOOD).replace(b"Content-Type: application/json\r\n", b""), {422}),
    "token in the query": (get(b"/v1/models?authorization=Bearer%20" + TOKEN.encode()), {401}),
    "token in a cookie": (get(b"/v1/models", b"Cookie: authorization=Bearer " + TOKEN.encode()), {401}),
    "two tokens": (get(b"/v1/models", AUTHORIZATION, b"authorization: Basic x"), {400}),
    "forged addresses": (post(GOOD, b"X-Forwarded-For: 1.1.1.1, \xff", b"Forwarded: for=\"[::1\""), {200}),
    "method override": (post(GOOD, b"X-HTTP-Method-Override: DELETE"), {200}),
    "HTTP/1.2": (b"GET /healthz HTTP/1.2\r\nHost: localhost\r\n\r\n", {400, 505}),
    "tabs in the request line": (b"GET\t/healthz\tHTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
}  # fmt: skip

HOSTS = (
    b"evil.example", b"evil.example]", b"[::1", b"localhost.evil.example", b"localhost@evil.example",
    b"localhost:80:80", b"localhost/", b"localhost\t", b" ", b"[evil]", b"127.0.0.1.evil.example", b"0x7f.1",
    b"2130706433", b"127.1",
    b"LOCALHOST.", b"localhost,evil.example", b"\xfc", b"a" * 3000, b"[::ffff:127.0.0.1]", b"localhost:99999999",
    b"http://localhost", b"localhost#", b"localhost?", b"localhost;", b"%6cocalhost",
)  # fmt: skip

TOKENS = (
    b"", b"Bearer", b"Bearer ", b"Bearer x", b"Basic " + TOKEN.encode(), TOKEN.encode(), b"Bearer " + b"x" * 50_000,
    b"Bearer \xff\xfe", b"Bearer " + TOKEN.upper().encode(), b"Bearer " + TOKEN.encode() + b"x",
    b"Bearer " + TOKEN.encode()[:-1], b"Bearer\t" + TOKEN.encode(), b"Token " + TOKEN.encode(),
    b"Bearer " + TOKEN.encode() + b"," + TOKEN.encode(), b"Digest username=x", b"Bearer null", b"Bearer undefined",
    b"Bearer " + hash_token(TOKEN).encode(),
)  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused(address: Address, name: str) -> None:
    accepted = (200,) if name in ("escaped NUL", "BOM") else ()
    assert read_status(exchange(address, post(BODIES[name]))) in (400, 413, 422, *accepted)


@pytest.mark.parametrize("name", PATH_BODIES)
def test_a_hostile_body_is_refused_on_every_route(address: Address, name: str) -> None:
    path, body = PATH_BODIES[name]
    assert read_status(exchange(address, post(body, path=path))) in (400, 404, 413, 422)


@pytest.mark.parametrize("name", RAW)
def test_hostile_bytes_are_refused(address: Address, name: str) -> None:
    data, expected_statuses = RAW[name]
    received = exchange(address, data)
    assert read_status(received) in expected_statuses
    assert b"Traceback" not in received and b"x-injected" not in received.lower()


@pytest.mark.parametrize("host", HOSTS)
def test_another_host_is_refused(address: Address, host: bytes) -> None:
    status = read_status(exchange(address, get(b"/v1/models", AUTHORIZATION, host=b"Host: " + host)))
    assert status in (400, 403) or host == b"localhost\t"  # white space at the end is not part of a value


@pytest.mark.parametrize("value", TOKENS)
def test_a_wrong_token_is_refused(address: Address, value: bytes) -> None:
    for path in (b"/v1/models", b"/metrics"):
        assert read_status(exchange(address, get(path, b"Authorization: " + value))) in (400, 401)


@pytest.mark.parametrize("path", [b"/metrics", b"/openapi.json", b"/docs"])
def test_a_token_without_the_scope_is_refused(address: Address, path: bytes) -> None:
    assert read_status(exchange(address, get(path, b"Authorization: Bearer web-token"))) == 403


def read_all(address: Address, *pieces: bytes, ends: bool = False) -> bytes:
    """Send pieces one by one and read until the service closes the connection."""
    received = b""
    with socket.create_connection(address, timeout=5) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05 if len(pieces) > 1 else 0)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(1 << 16):
            received += chunk
    return received


@pytest.mark.parametrize(
    ("data", "answers"),
    [
        (post(GOOD), 1), (get(b"/healthz"), 1), (post(GOOD) * 3, 3), (get(b"/healthz") + post(GOOD), 2),
        (post(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0"), 1), (post(GOOD, b"Connection: close"), 1),
        (post_chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD)), 1),
        (post(GOOD)[:-5], 0), (b"GET / HT", 0), (b"", 0),
    ],
)  # fmt: skip
def test_a_client_that_closes_its_side_is_answered(address: Address, data: bytes, answers: int) -> None:
    received = read_all(address, data, ends=True)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == received.count(b"HTTP/1.1 ") == answers


@pytest.mark.parametrize(
    "offer",
    [
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB",
        b"upgrade: websocket\r\nconnection: upgrade", b"UPGRADE: TLS/1.0\r\nConnection: Upgrade, close",
        b"Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket",
    ],
)  # fmt: skip
def test_an_offer_of_another_protocol_is_ignored(address: Address, offer: bytes) -> None:
    """Java's HttpClient sends the first one with each request."""

    def add_offer(data: bytes) -> bytes:
        return data.replace(b"\r\nHost: localhost", b"\r\n" + offer + b"\r\nHost: localhost", 1)

    chunked = post_chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD))
    for data in (post(GOOD), chunked, get(b"/healthz")):
        received = read_all(address, add_offer(data) + get(b"/healthz"), ends=True)
        assert received.count(b"HTTP/1.1 200 OK\r\n") == received.count(b"HTTP/1.1 ") == 1 + (b"close" not in offer)
    # Only headers are changed.
    text = offer.decode().replace("\r\n", "\\r\\n").encode()
    scored = exchange(address, post(GOOD.replace(b"friend", text)))
    plain = exchange(address, post(GOOD.replace(b"friend", b"")))
    assert read_status(scored) == 200 and scored.partition(b'"love"')[2] != plain.partition(b'"love"')[2]
    request_line, _, rest = add_offer(post(GOOD)).partition(b"\r\n")
    received = read_all(address, request_line + b"\r\n", rest)
    assert read_status(received) == 400 and b"Upgrade is not supported; send HTTP/1.1 without it" in received


def test_headers_without_end_are_cut_off(address: Address) -> None:
    start = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    for piece in (b"X: " + b"a" * (1 << 20) + b"\r\n", b"a" * (1 << 20)):
        assert read_status(exchange(address, start + piece, repeat=60)) in (0, 431)
    assert_healthy(address)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: loc", b"\r\n", b"\x16",
        get(b"/healthz") + b"GET / HT", post(GOOD) + b"P",
    ],
)  # fmt: skip
def test_a_silent_connection_is_closed(address: Address, data: bytes) -> None:
    start_time = time.monotonic()
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(data)
        while connection.recv(1 << 16):
            pass
    assert time.monotonic() - start_time < 5 * SHORT_TIMEOUT_S


@pytest.mark.parametrize("head", [post(b"", length=b"500"), post_chunked(b"")], ids=["length", "chunked"])
def test_a_slow_body_gets_408_and_its_connection_is_closed(address: Address, head: bytes) -> None:
    received = b""
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(head)
        while chunk := connection.recv(1 << 16):
            received += chunk
    assert read_status(received) == 408


def test_a_body_that_drips_after_its_refusal_is_cut_off(address: Address) -> None:
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(post(b"", length=b"900000", path=b"/v1/score").replace(AUTHORIZATION, b"X: y"))
        start_time = time.monotonic()
        with pytest.raises((ConnectionError, TimeoutError)):
            while time.monotonic() - start_time < 3:
                connection.sendall(b" ")
                time.sleep(0.02)
            raise TimeoutError
        assert time.monotonic() - start_time < 2.5


@pytest.mark.parametrize("burst", [8, 600])
def test_a_client_that_reads_nothing_is_cut_off(address: Address, burst: int) -> None:
    data = get(b"/openapi.json", AUTHORIZATION) * burst
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.settimeout(5)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(400):
                connection.sendall(data)
                time.sleep(0.01)


def test_many_silent_connections_do_not_block_the_service(address: Address) -> None:
    connections = [socket.create_connection(address, timeout=5) for _ in range(200)]
    try:
        for connection in connections[::2]:
            connection.sendall(b"GET / HT")
        assert_healthy(address)
        assert read_status(exchange(address, post(GOOD))) == 200
    finally:
        for connection in connections:
            connection.close()
    assert_healthy(address)


def test_the_suite_has_enough_cases_and_a_good_request_still_works(address: Address) -> None:
    assert sum(len(cases) for cases in (BODIES, PATH_BODIES, RAW, HOSTS, TOKENS)) >= 150
    assert read_status(exchange(address, post(GOOD))) == 200
    assert_healthy(address)
