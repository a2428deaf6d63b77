"""LlmJudge against a real local HTTP server: concurrency, cache, retries, and replies that are not a grade."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rluf.errors import ResourceError, SettingsError
from rluf.objectives.judges import build_rule_scorer
from rluf.objectives.llm_judge import LlmJudge, parse_grade
from rluf.types import ScoringItem

Reply = tuple[int, Any, dict[str, str]]
judge: LlmJudge


class JudgeServer:
    """Replies to chat completions by `reply(request, attempt of this text)`; records requests and concurrency."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.attempts: Counter[str] = Counter()
        self.running, self.most_running = 0, 0
        self.lock = threading.Lock()
        self.url = ""


@contextmanager
def serve_judge(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[JudgeServer]:
    state = JudgeServer(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = request["messages"][-1]["content"]
            with state.lock:
                state.requests.append(request)
                state.headers.append({key.lower(): value for key, value in self.headers.items()})
                state.attempts[text] += 1
                attempt = state.attempts[text]
                state.running += 1
                state.most_running = max(state.running, state.most_running)
            status, content, headers = state.reply(request, attempt)
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            with state.lock:
                state.running -= 1
            self.send_response(status)
            for key, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Keep the output of the tests clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def grade_reply(text: str) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


def build_rows(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"question {i}"}], "response": f"{i % 11}"} for i in range(count)]


def grade_by_response(request: dict[str, Any], attempt: int) -> Reply:
    time.sleep(0.02)
    return grade_reply(json.loads(request["messages"][-1]["content"])["response"])


async def test_grades_come_in_order_by_concurrent_requests_and_equal_rows_are_asked_once() -> None:
    with serve_judge(grade_by_response) as server:
        llm_judge = LlmJudge(server.url, "judge", "Is it a number?", concurrency=4)
        rows = build_rows(20)
        expected = [(i % 11) / 10 for i in range(20)]
        assert await llm_judge([*rows, *rows]) == expected * 2
        assert await llm_judge(rows[::-1]) == expected[::-1]
        assert len(server.requests) == 20
        assert 2 <= server.most_running <= 4
        first = server.requests[0]
        assert (first["model"], first["temperature"]) == ("judge", 0.0)
        assert "Is it a number?" in first["messages"][0]["content"]
        assert "from 0 (worst) to 10 (best)" in first["messages"][0]["content"]


async def test_the_cache_is_bounded() -> None:
    with serve_judge(lambda request, attempt: grade_reply("5")) as server:
        llm_judge = LlmJudge(server.url, "judge", cache_size=3)
        assert await llm_judge(build_rows(8)) == [0.5] * 8
        await llm_judge(build_rows(8)[-3:])
        assert len(server.requests) == 8
        await llm_judge(build_rows(1))
        assert len(server.requests) == 9


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_request_is_repeated_after_a_fault_that_may_pass(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rluf.objectives.llm_judge.INITIAL_WAIT_S", 0.01)

    def reply(request: dict[str, Any], attempt: int) -> Reply:
        return (status, {"error": "busy"}, {"retry-after": "0"}) if attempt < 3 else grade_reply("8")

    with serve_judge(reply) as server:
        assert await LlmJudge(server.url, "judge")(build_rows(2)) == [0.8, 0.8]
        assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        pytest.param((503, {}, {}), "HTTP 503 after 2 attempts", 2, id="unavailable"),
        pytest.param((401, {"error": "bad key"}, {}), "refused a request: HTTP 401 .*bad key", 1, id="key"),
        pytest.param((404, {"error": "no such model"}, {}), "HTTP 404 .*no such model", 1, id="model"),
        pytest.param((200, b"<html>", {}), "does not speak the OpenAI API", 1, id="html"),
        pytest.param((200, {"choices": []}, {}), "does not speak the OpenAI API", 1, id="empty"),
    ],
)
async def test_a_server_that_does_not_grade_is_one_clear_error(
    reply: Reply, message: str, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rluf.objectives.llm_judge.INITIAL_WAIT_S", 0.01)
    with serve_judge(lambda request, attempt: reply) as server:
        with pytest.raises(ResourceError, match=message):
            await LlmJudge(server.url, "judge", max_attempts=2)(build_rows(1))
        assert len(server.requests) == requests


async def test_a_server_that_is_not_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rluf.objectives.llm_judge.INITIAL_WAIT_S", 0.01)
    with pytest.raises(ResourceError, match=r"judge m at http://127.0.0.1:9/v1: ConnectError.* after 2 attempts"):
        await LlmJudge("http://127.0.0.1:9/v1", "m", max_attempts=2)(build_rows(1))


async def test_an_invalid_reply_is_asked_again_and_counts_as_zero_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def reply(request: dict[str, Any], attempt: int) -> Reply:
        response = json.loads(request["messages"][-1]["content"])["response"]
        return grade_reply("7" if response == "1" and attempt == 2 else "I cannot grade this")

    with serve_judge(reply) as server, caplog.at_level(logging.WARNING):
        assert await LlmJudge(server.url, "judge", max_attempts=3)(build_rows(2)) == [0.0, 0.7]
        assert [request["temperature"] for request in server.requests].count(0.0) == 2
    assert [record.getMessage() for record in caplog.records if "judge" in record.getMessage()] == [
        "judge judge: the reply 'I cannot grade this' is not a grade; its response counts as 0"
    ]


async def test_the_key_is_sent_and_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLUF_JUDGE_API_KEY", "secret-key")
    with serve_judge(lambda request, attempt: (403, {"error": "no"}, {})) as server:
        with pytest.raises(ResourceError) as caught:
            await LlmJudge(server.url, "judge")(build_rows(1))
        assert server.headers[0]["authorization"] == "Bearer secret-key"
    assert "secret-key" not in str(caught.value)


def test_a_judge_is_a_reward_function(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_judge(grade_by_response) as server:
        monkeypatch.setitem(globals(), "judge", LlmJudge(server.url, "judge"))
        score_items = build_rule_scorer("quality", reward=f"{__name__}:judge")
        assert [score.value for score in score_items([ScoringItem([{"role": "user", "content": "?"}], "9")])] == [0.9]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("7", 0.7), (" 10\n", 1.0), ("0", 0.0), ("8/10", 0.8), ("Score: 6", 0.6), ("**9**", 0.9), ("7.5", 0.75),
        ("<think>It deserves 3 or 4.</think>\n\n5", 0.5), ("Reasons.\nScore: 2", 0.2),
        ("11", None), ("-3", None), ("", None), ("good", None), ("between 4 and 6", None), ("<think>4", None),
    ],
)  # fmt: skip
def test_grades_are_read_from_replies(reply: str, grade: float | None) -> None:
    assert parse_grade(reply, 10) == grade


@pytest.mark.parametrize(
    ("url", "options"),
    [("localhost:8000", {}), ("http://a/v1", {"concurrency": 0}), ("http://a/v1", {"max_score": 0}),
     ("http://a/v1", {"timeout_s": 0.0})],
)  # fmt: skip
def test_invalid_arguments_are_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="LlmJudge"):
        LlmJudge(url, "judge", **options)
