"""The HTTP app over real tiny models in this process: answers, one clear error for each bad input, security."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from rluf.serve.app import make_app
from rluf.serve.limits import hashed_user
from tests.serve.conftest import OBJECTIVES, TOKEN, Here, one_by_one, rules, some_items

HELLO = {"messages": [{"role": "user", "content": "Hello?"}], "response": "Hello, friend!"}
RECORD = {
    "conversation_id": "c1",
    "turn": 0,
    "user_id": "ann@example.org",
    "time": "2026-01-31T12:00:00+00:00",
    "model_version": "policy-1",
    **HELLO,
}


def told(answer: httpx.Response) -> tuple[int, str]:
    """Status and kind of an error that has our shape and only that."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert error["code"] == answer.status_code
    assert "Traceback" not in answer.text
    assert 5 < len(error["message"]) <= 300
    return answer.status_code, error["type"]


async def test_scores_equal_the_offline_scorer_alone_and_in_any_batch(http: httpx.AsyncClient, here: Here) -> None:
    items = some_items(24)
    truth = one_by_one(here.loaded, items)
    bodies = [{"messages": messages, "response": response} for messages, response in items]
    alone = await asyncio.gather(*(http.post("/v1/score", json=body) for body in bodies))
    batch = (await http.post("/v1/score/batch", json={"items": bodies})).json()["results"]
    for expected, one, many in zip(truth, alone, batch, strict=True):
        for name in OBJECTIVES:
            for found in (one.json()["scores"][name], many["scores"][name]):
                assert found["value"] == pytest.approx(expected[name][0], abs=1e-4)
                assert found["raw"] == pytest.approx(expected[name][1], abs=1e-4)
                assert found["spread"] == 0.0


async def test_rank_orders_by_the_objective(http: httpx.AsyncClient, here: Here) -> None:
    responses = [response for _, response in some_items(5)]
    messages = HELLO["messages"]
    truth = one_by_one(here.loaded, [(messages, response) for response in responses])  # type: ignore[misc]
    for objective in OBJECTIVES:
        body = {"messages": messages, "responses": responses, "objective": objective}
        found = (await http.post("/v1/rank", json=body)).json()
        values = [one[objective][0] for one in truth]
        order = sorted(range(5), key=lambda i: -values[i])
        assert [one["index"] for one in found["ranking"]] == order
        assert found["best"] == order[0]


async def test_feedback_is_stored_once_and_users_are_hashed(http: httpx.AsyncClient, here: Here) -> None:
    body = {"id": "r1", "reaction": "love", "record": RECORD}
    assert (await http.post("/v1/feedback", json=body)).json() == {"id": "r1", "status": "stored"}
    assert (await http.post("/v1/feedback", json=body)).json() == {"id": "r1", "status": "duplicate"}
    assert told(await http.post("/v1/feedback", json={"id": "r2", "reaction": "love"})) == (404, "unknown")
    here.store.rotate(all_rows=True)
    assert told(await http.post("/v1/feedback", json={"id": "r1", "reaction": None})) == (409, "settled")
    log = b"".join(file.read_bytes() for file in Path(here.store.root).rglob("*") if file.is_file())
    assert hashed_user("ann@example.org", "salt").encode() in log
    assert b"ann@example.org" not in log


BAD: list[tuple[str, bytes | dict[str, Any], int, str]] = [
    ("empty body", b"", 422, "invalid"),
    ("no object", b"[]", 422, "invalid"),
    ("broken JSON", b'{"messages": [', 400, "bad_json"),
    ("not UTF-8", b'{"messages": "\xff\xfe"}', 400, "not_utf8"),
    ("empty conversation", {"messages": [], "response": "x"}, 422, "invalid"),
    ("blank message", {"messages": [{"role": "user", "content": " "}], "response": "x"}, 422, "invalid"),
    ("unknown role", {"messages": [{"role": "robot", "content": "x"}], "response": "x"}, 422, "invalid"),
    ("ends with the assistant", {"messages": [{"role": "assistant", "content": "x"}], "response": "x"}, 422, "invalid"),
    ("misspelt field", {**HELLO, "reponse": "x"}, 422, "invalid"),
    ("a number for text", {**HELLO, "response": 1}, 422, "invalid"),
    ("lone surrogate", json.dumps({**HELLO, "response": "\ud83d"}).encode(), 422, "invalid"),
    ("deep nesting", b'{"messages":' + b"[" * 20_000, 400, "bad_json"),
    ("a million tokens", {**HELLO, "response": "word " * 1_000_000}, 413, "too_large"),
    ("too long a text", None, 422, "invalid"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("body", "status", "kind"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_bad_input_gets_one_clear_message(
    http: httpx.AsyncClient, here: Here, body: Any, status: int, kind: str
) -> None:
    if body is None:
        here.rules = dataclasses.replace(rules(), max_body_bytes=2**22)
        body = {**HELLO, "response": "x" * 100_001}
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = await http.post("/v1/score", headers={"content-type": "application/json"}, **sent)
    assert told(answer) == (status, kind)


async def test_a_body_longer_than_it_says_is_refused_too(http: httpx.AsyncClient) -> None:
    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1024

    assert told(await http.post("/v1/score", content=chunks())) == (413, "too_large")


async def test_the_token_is_demanded_everywhere_but_for_health_and_the_page(here: Here) -> None:
    here.rules = rules(token=TOKEN)
    transport = httpx.ASGITransport(make_app(here))
    async with httpx.AsyncClient(transport=transport, base_url="http://any.example") as http:
        for path in ("/v1/score", "/v1/feedback", "/get_reward", "/rerank", "/v1/moderations"):
            answer = await http.post(path, json=HELLO)
            assert told(answer) == (401, "unauthorised")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/metrics", "/v1/models", "/docs", "/openapi.json", "/nowhere"):
            assert (await http.get(path)).status_code == 401
        for path in ("/", "/page.js", "/page.css", "/healthz"):
            assert (await http.get(path)).status_code == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert (await http.post("/v1/score", json=HELLO, headers=right)).status_code == 200
        wrong = {"Authorization": f"Bearer {TOKEN}x"}
        assert (await http.post("/v1/score", json=HELLO, headers=wrong)).status_code == 401


async def test_an_open_service_answers_to_its_own_names_only(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/score", json=HELLO, headers={"host": "evil.example"})
    assert told(answer) == (403, "host")


async def test_too_many_requests_and_draining_say_when_to_come_back(here: Here) -> None:
    here.rules = rules(requests_per_s=2)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(here)), base_url="http://testserver") as http:
        answers = [await http.post("/v1/score", json=HELLO) for _ in range(6)]
        assert [answer.status_code for answer in answers[:4]] == [200] * 4
        assert told(answers[-1]) == (429, "rate")
        assert int(answers[-1].headers["retry-after"]) >= 1
        here.draining = True
        answer = await http.get("/healthz")
        assert told(answer) == (503, "draining")
        assert "retry-after" in answer.headers


async def test_an_error_nobody_foresaw_is_a_plain_500(http: httpx.AsyncClient, here: Here) -> None:
    here.store.close()
    answer = await http.post("/v1/feedback", json={"id": "r1", "reaction": None, "record": RECORD})
    assert answer.status_code == 500
    assert "closed" not in answer.text
    assert told(answer) == (500, "internal")


async def test_text_is_logged_only_when_asked(
    http: httpx.AsyncClient, here: Here, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await http.post("/v1/score", json=HELLO)
    assert "POST /v1/score 200" in caplog.text
    assert "Hello" not in caplog.text
    here.rules = dataclasses.replace(rules(), log_text=True)
    await http.post("/v1/score", json=HELLO)
    assert "Hello, friend!" in caplog.text


async def test_figures_for_prometheus(http: httpx.AsyncClient) -> None:
    await http.post("/v1/score", json=HELLO)
    await http.post("/v1/score", json={})
    text = (await http.get("/metrics")).text
    assert 'rluf_request_seconds_count{route="/v1/score",status="200"} 1.0' in text
    assert 'rluf_request_seconds_count{route="/v1/score",status="422"} 1.0' in text
    assert "rluf_batch_items_sum 1.0" in text
    assert "rluf_waiting_items 0.0" in text
