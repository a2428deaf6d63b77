"""Our client and others': each speaks to a real HTTP server and gets the scores that the library gives."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import cohere
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.errors import ResourceError
from rluf.reward.calibration import logit
from rluf.reward.model import RewardModel
from rluf.reward.text import Item
from rluf.serve.api import ChatMessage, FeedbackContext
from rluf.serve.client import RewardClient
from rluf.serve.compat import split_query
from rluf.serve.limits import ApiError
from tests.serve.conftest import OBJECTIVES, some_items

QUERY = "What shall I do about the exam?"
TEXTS = ["", "Study a little each day.", "No.", "I love that you care about it! " * 4]


@pytest.fixture
def client(url: str) -> Iterator[RewardClient]:
    with RewardClient(url) as client:
        yield client


def values(loaded: dict[str, RewardModel], pairs: list[tuple[str, str]], objective: str = "love") -> list[float]:
    items: list[Item] = [([{"role": "user", "content": query}], text) for query, text in pairs]
    return [loaded[objective].score([item], objective)[0].value for item in items]


def test_our_client_scores_ranks_and_stores(client: RewardClient, loaded: dict[str, RewardModel]) -> None:
    items = some_items(300)
    for objective in OBJECTIVES:
        found = client.scores(items[:40], objective)
        truth = loaded[objective].score(items[:40], objective)
        assert [one.value for one in found] == pytest.approx([one.value for one in truth], abs=1e-4)
        assert [one.raw for one in found] == pytest.approx([one.raw for one in truth], abs=1e-4)
    assert len(client.score_batch(items)) == 300  # more than one request holds
    messages, response = items[3]
    assert client.score(messages, response).scores["love"].value == pytest.approx(
        loaded["love"].score([items[3]], "love")[0].value, abs=1e-4
    )
    ranked = client.rank(messages, TEXTS, "safety")
    assert ranked.ranking[0].index == ranked.best
    record = FeedbackContext(
        conversation_id="c", turn=0, user_id="ann", time=datetime.now(UTC), model_version="m",
        messages=[ChatMessage(role="user", content="Hi")], response="Hello",
    )  # fmt: skip
    assert client.feedback("client-1", "love", record).status == "stored"
    assert client.feedback("client-1", "love").status == "duplicate"
    assert client.models()[0].version == "v1"
    with pytest.raises(ApiError, match="must end with a user message"):
        client.score([{"role": "assistant", "content": "x"}], "y")


def test_our_client_tries_again_and_says_who_did_not_answer() -> None:
    answers = [b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"] * 2
    answers.append(b'HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n{"object":"list","data":[]}')
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer[:-2] + b"\r\n" if answer.endswith(b"\r\n\r\n") else answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with RewardClient(f"http://127.0.0.1:{port}") as client:
            assert client.models() == []
        thread.join()
    with (
        RewardClient(f"http://127.0.0.1:{port}", attempts=2) as client,
        pytest.raises(ResourceError, match="2 attempts"),
    ):
        client.models()


def test_openai_moderation(url: str, loaded: dict[str, RewardModel]) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    found = client.moderations.create(input=TEXTS)
    safe = values(loaded, [("", text) for text in TEXTS], "safety")
    assert [one.flagged for one in found.results] == [value < 0.5 for value in safe]
    told = [one.category_scores.to_dict()["unsafe"] for one in found.results]
    assert told == pytest.approx([1 - value for value in safe], abs=1e-4)


def test_rerank_by_coheres_client_and_teis_shape(url: str, loaded: dict[str, RewardModel]) -> None:
    truth = values(loaded, [(QUERY, text) for text in TEXTS[1:]])
    order = sorted(range(3), key=lambda i: -truth[i])
    found = cohere.ClientV2(api_key="none", base_url=url).rerank(
        model="love", query=QUERY, documents=TEXTS[1:], top_n=2
    )
    assert [one.index for one in found.results] == order[:2]
    assert [one.relevance_score for one in found.results] == pytest.approx(sorted(truth)[::-1][:2], abs=1e-4)
    tei = httpx.post(f"{url}/rerank", json={"query": QUERY, "texts": TEXTS[1:], "return_text": True}).json()
    assert [(one["index"], one["text"]) for one in tei] == [(i, TEXTS[1:][i]) for i in order]
    single = httpx.post(f"{url}/predict", json={"inputs": TEXTS[1]}).json()
    assert single == [{"label": "love", "score": pytest.approx(values(loaded, [("", TEXTS[1])])[0], abs=1e-4)}]
    pairs = httpx.post(f"{url}/predict", json={"inputs": [[QUERY, text] for text in TEXTS[1:]]}).json()
    assert [one[0]["score"] for one in pairs] == pytest.approx(truth, abs=1e-4)


@pytest.mark.slow  # vLLM takes its time to import
def test_score_and_classify_in_vllms_shape(url: str, loaded: dict[str, RewardModel]) -> None:
    """Read by vLLM's own response classes."""
    from vllm.entrypoints.pooling.classify.protocol import ClassificationResponse
    from vllm.entrypoints.pooling.scoring.protocol import RerankResponse, ScoreResponse

    truth = values(loaded, [(QUERY, text) for text in TEXTS])
    for sides in ({"text_1": QUERY, "text_2": TEXTS}, {"queries": [QUERY] * 4, "documents": TEXTS}):
        told = httpx.post(f"{url}/score", json={"model": "love", **sides})
        assert [one.score for one in ScoreResponse.model_validate_json(told.content).data] == pytest.approx(
            truth, abs=1e-4
        )
    told = httpx.post(f"{url}/classify", json={"model": "safety", "input": TEXTS})
    classes = ClassificationResponse.model_validate_json(told.content).data
    assert [one.probs[0] for one in classes] == pytest.approx(
        values(loaded, [("", text) for text in TEXTS], "safety"), abs=1e-4
    )
    told = httpx.post(f"{url}/v1/rerank", json={"model": "love", "query": QUERY, "documents": TEXTS})
    best = RerankResponse.model_validate_json(told.content).results[0]
    assert best.relevance_score == pytest.approx(max(truth), abs=1e-4)
    assert httpx.post(f"{url}/score", json={"text_1": ["a", "b"], "text_2": ["c"]}).status_code == 422


def test_openrlhfs_remote_reward_model(url: str, loaded: dict[str, RewardModel]) -> None:
    """The body and the answer of its SingleTurnAgentExecutor: query, prompts and labels of one rollout."""
    prompt = f"<|im_start|>user\n{QUERY}<|im_end|>\n<|im_start|>assistant\n"
    body = {"query": [f"{prompt}{TEXTS[1]}<|im_end|>"], "prompts": [prompt], "labels": [""]}
    found = httpx.post(f"{url}/get_reward", json=body).json()
    value = values(loaded, [(QUERY, TEXTS[1])])[0]
    assert found["scores"] == [pytest.approx(value, abs=1e-4)]
    assert found["rewards"] == [pytest.approx(logit(value), abs=1e-3)]
    assert set(found["extra_logs"]) == set(OBJECTIVES)
    assert httpx.post(f"{url}/get_reward", json={**body, "prompts": []}).status_code == 422


@given(st.text(min_size=1), st.text())
def test_a_query_splits_into_its_prompt_and_its_response(prompt: str, response: str) -> None:
    messages, found = split_query(prompt + response, prompt)
    assert messages == [{"role": "user", "content": prompt}] or "<|im_start|>" in prompt
    assert found in response
    assert response.strip() == found or not response.strip(" \n\t") or found == found.strip()
