"""The HTTP app over real tiny models in this process: replies, one clear error per invalid input, security."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from rluf.prepare.readers.feedback_folder import list_row_files, read_late_reactions
from rluf.serve.app import make_app
from rluf.types import Message
from rluf.utils.hashing import hash_user_id
from tests.serve.conftest import OBJECTIVES, SALT, TOKEN, LocalBackend, make_items, make_rules, score_one_by_one

HELLO = {"messages": [{"role": "user", "content": "Hello?"}], "response": "Hello, friend!"}
RECORD = {
    "conversation_id": "c1",
    "turn": 0,
    "user_id": "ann@example.org",
    "time": "2026-01-31T12:00:00+00:00",
    "model_version": "policy-1",
    **HELLO,
}


def assert_error(response: httpx.Response) -> tuple[int, str]:
    """Check the error format of a response; returns its status and error type."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert error["code"] == response.status_code
    assert "Traceback" not in response.text
    assert 5 < len(error["message"]) <= 300
    return response.status_code, error["type"]


async def test_scores_equal_offline_scores_alone_and_in_a_batch(
    http_client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    items = make_items(24)
    expected_scores = score_one_by_one(backend.reward_models, items)
    bodies = [
        {"messages": m, "response": text, "finish_reason": "length" if is_truncated else "stop"}
        for m, text, is_truncated, *_ in items
    ]
    single_replies = await asyncio.gather(*(http_client.post("/v1/score", json=body) for body in bodies))
    batch_replies = (await http_client.post("/v1/score/batch", json={"items": bodies})).json()["results"]
    for expected, single, batched in zip(expected_scores, single_replies, batch_replies, strict=True):
        for name in OBJECTIVES:
            for score in (single.json()["scores"][name], batched["scores"][name]):
                assert score["value"] == pytest.approx(expected[name][0], abs=1e-4)
                assert score["raw"] == pytest.approx(expected[name][1], abs=1e-4)
                assert score["spread"] == 0.0


async def test_rank_orders_by_the_objective(http_client: httpx.AsyncClient, backend: LocalBackend) -> None:
    messages: list[Message] = HELLO["messages"]  # type: ignore[assignment]
    items = [item._replace(messages=messages) for item in make_items(5)]
    finish_reasons = ["length" if item.is_truncated else "stop" for item in items]
    expected_scores = score_one_by_one(backend.reward_models, items)
    for objective in OBJECTIVES:
        body = {"messages": messages, "responses": [item.response for item in items], "objective": objective}
        body["finish_reasons"] = finish_reasons
        reply = (await http_client.post("/v1/rank", json=body)).json()
        values = [scores[objective][0] for scores in expected_scores]
        order = sorted(range(5), key=lambda i: -values[i])
        assert [ranked["index"] for ranked in reply["ranking"]] == order
        assert reply["best"] == order[0]


async def test_an_objective_of_any_name_is_served(http_client: httpx.AsyncClient, backend: LocalBackend) -> None:
    body = {"messages": HELLO["messages"], "responses": ["Yes.", "No!"], "objective": "brevity"}
    response = await http_client.post("/v1/rank", json=body)
    assert assert_error(response) == (422, "invalid")
    assert "brevity is not served here, but love, helpfulness, safety" in response.json()["error"]["message"]
    backend.reward_models = {**backend.reward_models, "brevity": backend.reward_models["love"]}
    reply = (await http_client.post("/v1/rank", json=body)).json()
    by_love = (await http_client.post("/v1/rank", json={**body, "objective": "love"})).json()
    assert (reply["objective"], reply["best"]) == ("brevity", by_love["best"])
    for model, label in (("brevity", "brevity"), ("safety", "safe"), ("reward-live", "love")):
        classified = (await http_client.post("/classify", json={"model": model, "input": "Yes."})).json()
        assert classified["data"][0]["label"] == label
    response = await http_client.post("/classify", json={"model": "gpt-9", "input": "Yes."})
    assert assert_error(response) == (404, "model")


async def test_feedback_is_stored_once_and_users_are_hashed(
    http_client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    body = {"id": "r1", "reaction": "love", "record": RECORD}
    assert (await http_client.post("/v1/feedback", json=body)).json() == {"id": "r1", "status": "stored"}
    assert (await http_client.post("/v1/feedback", json=body)).json() == {"id": "r1", "status": "duplicate"}
    assert assert_error(await http_client.post("/v1/feedback", json={"id": "r2", "reaction": "love"})) == (
        404,
        "unknown",
    )
    backend.store.flush_settled(all_rows=True)
    assert (await http_client.post("/v1/feedback", json={"id": "r1", "reaction": None})).json()["status"] == "stored"
    backend.store.flush_settled(all_rows=True)
    assert read_late_reactions(Path(backend.store.root)) == {"r1": None}
    stored_bytes = b"".join(path.read_bytes() for path in Path(backend.store.root).rglob("*") if path.is_file())
    assert hash_user_id("ann@example.org", SALT).encode() in stored_bytes
    assert b"ann@example.org" not in stored_bytes


INVALID_REQUESTS: list[tuple[str, bytes | dict[str, Any], int, str]] = [
    ("empty body", b"", 422, "invalid"),
    ("not an object", b"[]", 422, "invalid"),
    ("broken JSON", b'{"messages": [', 400, "bad_json"),
    ("not UTF-8", b'{"messages": "\xff\xfe"}', 400, "not_utf8"),
    ("UTF-16 without its mark", json.dumps(HELLO).encode("utf-16-le"), 400, "not_utf8"),
    ("UTF-32 without its mark", json.dumps(HELLO).encode("utf-32-be"), 400, "not_utf8"),
    ("empty conversation", {"messages": [], "response": "x"}, 422, "invalid"),
    ("blank message", {"messages": [{"role": "user", "content": " "}], "response": "x"}, 422, "invalid"),
    ("unknown role", {"messages": [{"role": "robot", "content": "x"}], "response": "x"}, 422, "invalid"),
    ("ends with the assistant", {"messages": [{"role": "assistant", "content": "x"}], "response": "x"}, 422, "invalid"),
    ("misspelled field", {**HELLO, "reponse": "x"}, 422, "invalid"),
    ("a number instead of text", {**HELLO, "response": 1}, 422, "invalid"),
    ("lone surrogate", json.dumps({**HELLO, "response": "\ud83d"}).encode(), 422, "invalid"),
    ("deep nesting", b'{"messages":' + b"[" * 20_000, 400, "bad_json"),
    ("a million tokens", {**HELLO, "response": "word " * 1_000_000}, 413, "too_large"),
    ("text too long", None, 422, "invalid"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(
    ("body", "status", "error_type"),
    [case[1:] for case in INVALID_REQUESTS],
    ids=[case[0] for case in INVALID_REQUESTS],
)
async def test_invalid_requests_get_one_clear_error(
    http_client: httpx.AsyncClient, backend: LocalBackend, body: Any, status: int, error_type: str
) -> None:
    if body is None:
        backend.rules = dataclasses.replace(make_rules(), max_body_bytes=2**22)
        body = {**HELLO, "response": "x" * 100_001}
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = await http_client.post("/v1/score", headers={"content-type": "application/json"}, **content)
    assert assert_error(response) == (status, error_type)


BODY = json.dumps(HELLO).encode()
ENCODED_BODIES: list[tuple[str, bytes, str, int, str]] = [
    ("gzip", gzip.compress(BODY), "application/json", 200, ""),
    ("GZIP", gzip.compress(BODY), "application/json", 200, ""),
    ("identity", BODY, "application/json", 200, ""), ("", BODY, "application/vnd.api+json; charset=utf-8", 200, ""),
    ("gzip", BODY, "application/json", 400, "not gzip"),
    ("gzip", gzip.compress(BODY)[:-9], "application/json", 400, "complete"),
    ("gzip", gzip.compress(BODY) + b"x", "application/json", 400, "complete"),
    ("gzip", b"", "application/json", 400, "complete"),
    ("gzip", gzip.compress(b" " * 100_000_000, 9)[:65_000], "application/json", 413, "exceeds"),
    ("br", BODY, "application/json", 415, "expected gzip"), ("deflate", b"x", "application/json", 415, "expected gzip"),
    ("gzip, gzip", gzip.compress(gzip.compress(BODY)), "application/json", 415, "expected gzip"),
    ("", BODY, "text/plain", 422, "Content-Type: application/json"),
    ("", BODY, "", 422, "Content-Type: application/json"),
    ("", BODY, "application/x-www-form-urlencoded", 422, "Content-Type: application/json"),
    ("", BODY, "text/json", 422, "Content-Type: application/json"),
    ("", BODY, "application/x-ndjson", 422, "Content-Type: application/json"),
    ("", BODY, "Application/JSON ;charset=utf-8", 200, ""), ("", b"[]", "application/json", 422, "valid dictionary"),
]  # fmt: skip


async def test_compressed_bodies_are_read_within_the_limit_and_other_codings_refused(
    http_client: httpx.AsyncClient,
) -> None:
    for encoding, content, content_type, status, message in ENCODED_BODIES:
        fields = {"Content-Encoding": encoding, "Content-Type": content_type}
        headers = {name: value for name, value in fields.items() if value}
        response = await http_client.post("/v1/score", content=content, headers=headers)
        assert response.status_code == status, (encoding, content_type, response.text)
        assert message in response.text


async def test_blank_ids_are_refused_and_paths_are_not_redirected(http_client: httpx.AsyncClient) -> None:
    for field in ("user", "conversation_id"):
        for blank in ("", " ", "\n\t"):
            assert assert_error(await http_client.post("/v1/score", json=HELLO | {field: blank})) == (422, "invalid")
    for path in ("/v1/models/", "/health/", "/metrics%2f"):
        assert assert_error(await http_client.get(path)) == (404, "not_found")


async def test_a_body_longer_than_its_content_length_is_rejected(http_client: httpx.AsyncClient) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1024

    assert assert_error(await http_client.post("/v1/score", content=chunks())) == (413, "too_large")


async def test_every_path_except_health_and_the_page_requires_the_token(backend: LocalBackend) -> None:
    backend.rules = make_rules(token=TOKEN)
    transport = httpx.ASGITransport(make_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://any.example") as http_client:
        for path in ("/v1/score", "/v1/feedback", "/get_reward", "/rerank", "/v1/moderations"):
            response = await http_client.post(path, json=HELLO)
            assert assert_error(response) == (401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/models", "/docs", "/openapi.json", "/nowhere"):
            assert (await http_client.get(path)).status_code == 401
        for path in ("/", "/page.js", "/page.css", "/healthz"):
            assert (await http_client.get(path)).status_code == 200
        valid_headers = {"Authorization": f"Bearer {TOKEN}"}
        assert (await http_client.post("/v1/score", json=HELLO, headers=valid_headers)).status_code == 200
        invalid_headers = {"Authorization": f"Bearer {TOKEN}x"}
        assert (await http_client.post("/v1/score", json=HELLO, headers=invalid_headers)).status_code == 401


async def test_a_service_without_a_token_accepts_only_its_own_host_names(http_client: httpx.AsyncClient) -> None:
    response = await http_client.post("/v1/score", json=HELLO, headers={"host": "evil.example"})
    assert assert_error(response) == (403, "host")


async def test_rate_limit_and_draining_send_retry_after(backend: LocalBackend) -> None:
    backend.rules = make_rules(requests_per_s=0.05)  # slower than any machine that runs this test
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(backend)), base_url="http://testserver"
    ) as http_client:
        responses = [await http_client.post("/v1/score", json=HELLO) for _ in range(3)]
        assert responses[0].status_code == 200
        assert assert_error(responses[-1]) == (429, "rate")
        assert int(responses[-1].headers["retry-after"]) >= 1
        backend.is_draining = True
        response = await http_client.get("/healthz")
        assert assert_error(response) == (503, "draining")
        assert "retry-after" in response.headers


async def test_an_unexpected_error_is_a_500_without_details(
    http_client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    backend.store.close()
    response = await http_client.post("/v1/feedback", json={"id": "r1", "reaction": None, "record": RECORD})
    assert response.status_code == 500
    assert "closed" not in response.text
    assert assert_error(response) == (500, "internal")


async def test_the_text_of_messages_is_not_logged(
    http_client: httpx.AsyncClient, backend: LocalBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await http_client.post("/v1/score", json=HELLO)
    assert "POST /v1/score 200" in caplog.text
    assert "Hello" not in caplog.text


async def test_prometheus_metrics(http_client: httpx.AsyncClient) -> None:
    await http_client.post("/v1/score", json=HELLO)
    await http_client.post("/v1/score", json={})
    text = (await http_client.get("/metrics")).text
    assert 'rluf_request_seconds_count{route="/v1/score",status="200"} 1.0' in text
    assert 'rluf_request_seconds_count{route="/v1/score",status="422"} 1.0' in text
    assert "rluf_batch_items_sum 1.0" in text
    assert "rluf_waiting_items 0.0" in text


async def test_rank_refuses_finish_reasons_that_are_not_one_per_response(http_client: httpx.AsyncClient) -> None:
    body = {"messages": HELLO["messages"], "responses": ["Yes.", "No!"], "finish_reasons": ["stop"]}
    response = await http_client.post("/v1/rank", json=body)
    assert assert_error(response) == (422, "invalid")
    assert "got 1 for 2" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("sent", "is_returned"),
    [
        ("abc-123", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("a b", False),
        ("a\tb", False),
        ("", False),
        (None, False),
    ],
)
async def test_each_response_and_its_log_line_have_a_request_id(
    http_client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, sent: str | None, is_returned: bool
) -> None:
    caplog.set_level(logging.INFO)
    headers = {} if sent is None else {"X-Request-Id": sent}
    for path, status in (("/v1/models", 200), ("/nowhere", 404)):
        response = await http_client.get(path, headers=headers)
        request_id = response.headers["x-request-id"]
        assert response.status_code == status
        assert (request_id == sent) is is_returned and len(request_id) >= 7
        assert f"request_id={request_id}" in caplog.text


async def test_a_choice_is_stored_for_the_user_of_both_chats_only(
    http_client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    backend.policies = {"base": lambda messages: "Hi.", "new": lambda messages: f"Hello, {messages[-1]['content']}!"}

    async def chat(policy: str, content: str, user: str | None) -> str:
        body = {"model": policy, "messages": [{"role": "user", "content": content}], "user": user}
        response_id: str = (await http_client.post("/v1/chat/completions", json=body)).json()["id"]
        return response_id

    async def choose(chosen_id: str, rejected_id: str, user: str | None = "ann") -> httpx.Response:
        body = {"chosen_id": chosen_id, "rejected_id": rejected_id, "user": user}
        return await http_client.post("/v1/preferences", json=body)

    base, new, other_words, of_bob = [
        await chat(policy, content, user)
        for policy, content, user in (
            ("base", "Hey", "ann"), ("new", "Hey", "ann"), ("new", "Bye", "ann"), ("new", "Hey", "bob"),
        )
    ]  # fmt: skip
    assert [(await choose(new, base)).json()["status"] for _ in range(2)] == ["stored", "duplicate"]
    assert assert_error(await choose(new, of_bob)) == (403, "user")
    assert assert_error(await choose(new, base, None)) == (403, "user")
    assert assert_error(await choose(other_words, base)) == (422, "invalid")
    assert assert_error(await choose(new, new)) == (422, "invalid")
    assert assert_error(await choose("unknown", base)) == (404, "unknown")
    backend.store.flush_settled(all_rows=True)
    assert assert_error(await choose(base, new)) == (409, "settled")


async def test_a_record_cannot_forge_feedback_on_a_response_of_this_service(
    http_client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    backend.policies = {"base": lambda messages: "Hi."}
    body = {"model": "base", "messages": HELLO["messages"], "user": "ann"}
    response_id = (await http_client.post("/v1/chat/completions", json=body)).json()["id"]
    logged = {"id": "other-1", "reaction": None, "record": RECORD | {"user_id": "ann"}}
    assert (await http_client.post("/v1/feedback", json=logged)).status_code == 200
    forged: list[tuple[dict[str, Any], tuple[int, str]]] = [
        ({"id": response_id, "record": RECORD}, (403, "user")),
        ({"id": response_id, "record": RECORD, "user": "eve"}, (403, "user")),
        ({"id": response_id, "record": RECORD | {"user_id": "ann"}}, (409, "conflict")),
        ({"id": "chatcmpl-" + "0" * 32 + "-" + "0" * 16, "record": RECORD}, (403, "user")),
        ({"id": "other-1", "record": RECORD | {"user_id": "eve"}}, (409, "conflict")),
        ({"id": "other-1", "record": RECORD | {"user_id": "ann", "response": "Other"}}, (409, "conflict")),
        ({"id": "r2", "record": RECORD | {"time": "2199-01-01T00:00:00Z"}}, (422, "invalid")),
        ({"id": "r3", "record": RECORD | {"response_logprob": float("nan")}}, (422, "invalid")),
        ({"id": "r4", "record": RECORD | {"temperature": -1}}, (422, "invalid")),
        ({"id": "r6", "record": RECORD | {"response_logprob": 0.5}}, (422, "invalid")),
        ({"id": "r7", "record": RECORD, "user": "eve"}, (422, "invalid")),
    ]  # fmt: skip
    for request, expected in forged:
        content, headers = json.dumps({"reaction": "love"} | request), {"content-type": "application/json"}
        response = await http_client.post("/v1/feedback", content=content, headers=headers)
        assert assert_error(response) == expected, request
    for choice in (("other-1", response_id), (response_id, "other-1"), ("other-1", "other-1")):
        body = {"chosen_id": choice[0], "rejected_id": choice[1], "user": "ann"}
        assert assert_error(await http_client.post("/v1/preferences", json=body)) == (404, "unknown")
    sampled = RECORD | {"temperature": 0.7, "response_tokens": 4, "response_logprob": -3.5}
    response = await http_client.post("/v1/feedback", json={"id": "r5", "reaction": None, "record": sampled})
    assert response.status_code == 200
    backend.store.flush_settled(all_rows=True)
    rows = {
        row["id"]: row for file in list_row_files(Path(backend.store.root)) for row in pq.read_table(file).to_pylist()
    }
    assert {row_id: row["reaction"] for row_id, row in rows.items()} == {response_id: None, "other-1": None, "r5": None}
    assert (rows["r5"]["temperature"], rows["r5"]["response_tokens"], rows["r5"]["response_logprob"]) == (0.7, 4, -3.5)


@pytest.mark.parametrize("is_own", [True, False])
async def test_devices_and_authors_are_hashed_like_users(
    http_client: httpx.AsyncClient, backend: LocalBackend, is_own: bool
) -> None:
    extra = {"interface": "app", "device": "phone-77", "author": "ann@example.org"}
    if is_own:
        backend.policies = {"base": lambda messages: "Hi."}
        body = {"model": "base", "messages": HELLO["messages"], "user": "ann@example.org"} | extra
        response = await http_client.post("/v1/chat/completions", json=body)
    else:
        response = await http_client.post("/v1/feedback", json={"id": "r1", "reaction": None, "record": RECORD | extra})
    assert response.status_code == 200, response.text
    backend.store.flush_settled(all_rows=True)
    (file,) = list_row_files(Path(backend.store.root))
    (row,) = pq.read_table(file).to_pylist()
    assert row["author"] == row["user_id"] == hash_user_id("ann@example.org", SALT)
    assert (row["interface"], row["device"]) == ("app", hash_user_id("phone-77", SALT))


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=9999999-"}, {"Range": "bytes=x-y"}, {"Range": "lines=1-2"}, {"Range": "bytes=" + "0-1," * 900},
        {"Range": "bytes=0-9", "If-Range": "x"}, {"If-None-Match": "*", "If-Modified-Since": "yesterday"},
    ],
)  # fmt: skip
async def test_files_of_the_page_are_sent_whole(http_client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    for path, media_type in (("/", "text/html"), ("/page.js", "javascript"), ("/page.css", "text/css")):
        response = await http_client.get(path, headers=headers)
        assert response.status_code == 200 and media_type in response.headers["content-type"]
        assert response.content == (await http_client.get(path)).content
