"""The reward client and third-party clients against a real HTTP server; scores equal the library's."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import cohere
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rluf.errors import ResourceError, SettingsError
from rluf.objectives.aggregator import compute_signal
from rluf.reward.model import RewardModel
from rluf.serve.api import ApiError, ChatMessage, FeedbackContext
from rluf.serve.chat_text import split_text
from rluf.serve.client import RewardClient
from rluf.serve.deployments import LoadedModels, _to_scored_items
from rluf.serve.store import FeedbackStore
from rluf.types import Score, ScoringItem
from rluf.utils.stats import logit, sigmoid
from tests.serve.conftest import OBJECTIVES, LocalBackend, make_items, make_rules, run_http_server

QUERY = "What should I do about the exam?"
TEXTS = ["", "Study a little each day.", "No.", "I love that you care about it! " * 4]


@pytest.fixture
def client(service_url: str) -> Iterator[RewardClient]:
    with RewardClient(service_url) as client:
        yield client


def score_pairs(
    reward_models: dict[str, RewardModel], pairs: list[tuple[str, str]], objective: str = "love"
) -> list[float]:
    items = [ScoringItem([{"role": "user", "content": query}], text) for query, text in pairs]
    return [reward_models[objective].score([item], objective)[0].value for item in items]


class ScoredByLength:
    """Stands for a reward function, a judge and a reward model without calibration."""

    def score(self, items: list[ScoringItem], objective: str) -> list[Score]:
        numbers = [float(len(item.response)) for item in items]
        if objective == "external":
            return [Score(objective, float(sigmoid(n)), n, exact_logit=n) for n in numbers]
        return [Score(objective, n, n, is_probability=False) for n in numbers]


def test_a_service_preserves_what_rewards_are_computed_from(tmp_path: Path) -> None:
    store = FeedbackStore(str(tmp_path / "store"), tmp_path / "store" / ".log", reaction_window_s=60)
    store.start()
    scorer, names = ScoredByLength(), ("function", "external")
    rules = dataclasses.replace(make_rules(), allowed_hosts=None)
    items = [ScoringItem([{"role": "user", "content": "Hi"}], "x" * count) for count in (1, 20, 30, 40)]
    # Logits of 20, 30 and 40 are all 1 as probabilities.
    backend = LocalBackend(dict.fromkeys(names, scorer), store, rules)  # type: ignore[arg-type]
    with run_http_server(backend) as url, RewardClient(url) as client:
        for name in names:
            scores = client.score_objective(items, name)
            assert scores == scorer.score(items, name)
            assert [compute_signal(score) for score in scores] == [1.0, 20.0, 30.0, 40.0]


def count_characters(rows: list[dict[str, str]]) -> list[float]:
    return [float(len(row["response"])) for row in rows]


def test_a_replica_preserves_every_field_of_a_score() -> None:
    models = {"grade": {"reward": f"{__name__}:count_characters"}, "brevity": {"judge": "length"}}
    config = {"version": "1", "models": models, "facts": {}, "batch_tokens": 64, "device": "cpu"}
    items = [ScoringItem([{"role": "user", "content": "Hi"}], text) for text in ("Yes.", "No, never.")]
    scored_items = _to_scored_items(LoadedModels(config).score_items(items))
    assert [item.scores["grade"] for item in scored_items] == [
        Score("grade", n, n, is_probability=False) for n in (4.0, 10.0)
    ]
    assert [item.scores["brevity"].is_probability for item in scored_items] == [False, False]


def test_the_reward_client_scores_ranks_and_stores(client: RewardClient, reward_models: dict[str, RewardModel]) -> None:
    items = make_items(300)
    for objective in OBJECTIVES:
        scores = client.score_objective(items[:40], objective)
        expected_scores = reward_models[objective].score(items[:40], objective)
        for attribute in ("value", "raw_logit"):
            expected_values = [getattr(score, attribute) for score in expected_scores]
            assert [getattr(score, attribute) for score in scores] == pytest.approx(expected_values, abs=1e-4)
    assert len(client.score_batch(items)) == 300  # more than MAX_ITEMS_PER_REQUEST
    messages, response, is_truncated, *_ = items[3]
    assert client.score(messages, response, is_truncated).scores["love"].value == pytest.approx(
        reward_models["love"].score([items[3]], "love")[0].value, abs=1e-4
    )
    ranking = client.rank(messages, TEXTS, "safety")
    assert ranking.ranking[0].index == ranking.best
    record = FeedbackContext(
        conversation_id="c", turn=0, user_id="ann", time=datetime.now(UTC), model_version="m",
        messages=[ChatMessage(role="user", content="Hi")], response="Hello",
    )  # fmt: skip
    assert client.send_feedback("client-1", "love", record).status == "stored"
    assert client.send_feedback("client-1", "love").status == "duplicate"
    assert client.list_models()[0].version == "v1"
    with pytest.raises(ApiError, match="must end with a user message"):
        client.score([{"role": "assistant", "content": "x"}], "y")


def test_the_reward_client_retries_and_names_the_service_in_the_error() -> None:
    responses = [b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"] * 2
    responses.append(b'HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n{"object":"list","data":[]}')
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def send_responses() -> None:
            for response in responses:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(response[:-2] + b"\r\n" if response.endswith(b"\r\n\r\n") else response)

        thread = threading.Thread(target=send_responses, daemon=True)
        thread.start()
        with RewardClient(f"http://127.0.0.1:{port}") as client:
            assert client.list_models() == []
        thread.join()
    with (
        RewardClient(f"http://127.0.0.1:{port}", max_attempts=2) as client,
        pytest.raises(ResourceError, match="2 attempts"),
    ):
        client.list_models()


@pytest.mark.parametrize(("retry_after", "is_obeyed"), [(1, True), (500, False)])
def test_the_reward_client_obeys_retry_after_up_to_its_limit(
    retry_after: int, is_obeyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("rluf.serve.client.time.sleep", waits.append)
    replies = [httpx.Response(429, headers={"Retry-After": str(retry_after)}), httpx.Response(200, json={"data": []})]
    with RewardClient("http://unused", max_retry_after_s=60) as client:
        client._http_client = httpx.Client(
            base_url="http://unused", transport=httpx.MockTransport(lambda _: replies.pop(0))
        )
        if is_obeyed:
            assert client.list_models() == []
            assert retry_after <= waits[0] <= 2 * retry_after
        else:
            with pytest.raises(ResourceError, match=r"1 attempts.*max_retry_after_s"):
                client.list_models()
            assert waits == []


def test_openai_moderation(service_url: str, reward_models: dict[str, RewardModel]) -> None:
    client = openai.OpenAI(base_url=f"{service_url}/v1", api_key="none")
    reply = client.moderations.create(input=TEXTS)
    safety_values = score_pairs(reward_models, [("", text) for text in TEXTS], "safety")
    assert [result.flagged for result in reply.results] == [value < 0.5 for value in safety_values]
    unsafe_scores = [result.category_scores.to_dict()["unsafe"] for result in reply.results]
    assert unsafe_scores == pytest.approx([1 - value for value in safety_values], abs=1e-4)


def test_rerank_by_the_cohere_client_and_in_tei_format(service_url: str, reward_models: dict[str, RewardModel]) -> None:
    expected_values = score_pairs(reward_models, [(QUERY, text) for text in TEXTS[1:]])
    order = sorted(range(3), key=lambda i: -expected_values[i])
    reply = cohere.ClientV2(api_key="none", base_url=service_url).rerank(
        model="love", query=QUERY, documents=TEXTS[1:], top_n=2
    )
    assert [result.index for result in reply.results] == order[:2]
    assert [result.relevance_score for result in reply.results] == pytest.approx(
        sorted(expected_values)[::-1][:2], abs=1e-4
    )
    tei_reply = httpx.post(
        f"{service_url}/rerank", json={"query": QUERY, "texts": TEXTS[1:], "return_text": True}
    ).json()
    assert [(result["index"], result["text"]) for result in tei_reply] == [(i, TEXTS[1:][i]) for i in order]
    single_reply = httpx.post(f"{service_url}/predict", json={"inputs": TEXTS[1]}).json()
    assert single_reply == [
        {"label": "love", "score": pytest.approx(score_pairs(reward_models, [("", TEXTS[1])])[0], abs=1e-4)}
    ]
    pair_reply = httpx.post(f"{service_url}/predict", json={"inputs": [[QUERY, text] for text in TEXTS[1:]]}).json()
    assert [result[0]["score"] for result in pair_reply] == pytest.approx(expected_values, abs=1e-4)


@pytest.mark.slow  # importing vLLM takes long
def test_score_and_classify_in_vllm_format(service_url: str, reward_models: dict[str, RewardModel]) -> None:
    """vLLM's own response classes parse the replies."""
    from vllm.entrypoints.pooling.classify.protocol import ClassificationResponse
    from vllm.entrypoints.pooling.scoring.protocol import RerankResponse, ScoreResponse

    expected_values = score_pairs(reward_models, [(QUERY, text) for text in TEXTS])
    for texts in ({"text_1": QUERY, "text_2": TEXTS}, {"queries": [QUERY] * 4, "documents": TEXTS}):
        response = httpx.post(f"{service_url}/score", json={"model": "love", **texts})
        assert [result.score for result in ScoreResponse.model_validate_json(response.content).data] == pytest.approx(
            expected_values, abs=1e-4
        )
    response = httpx.post(f"{service_url}/classify", json={"model": "safety", "input": TEXTS})
    classifications = ClassificationResponse.model_validate_json(response.content).data
    assert [result.probs[0] for result in classifications] == pytest.approx(
        score_pairs(reward_models, [("", text) for text in TEXTS], "safety"), abs=1e-4
    )
    response = httpx.post(f"{service_url}/v1/rerank", json={"model": "love", "query": QUERY, "documents": TEXTS})
    best_result = RerankResponse.model_validate_json(response.content).results[0]
    assert best_result.relevance_score == pytest.approx(max(expected_values), abs=1e-4)
    assert httpx.post(f"{service_url}/score", json={"text_1": ["a", "b"], "text_2": ["c"]}).status_code == 422


def test_the_openrlhf_remote_reward_model(service_url: str, reward_models: dict[str, RewardModel]) -> None:
    """Request and reply of OpenRLHF's SingleTurnAgentExecutor: query, prompts and labels of one rollout."""
    prompt = f"<|im_start|>user\n{QUERY}<|im_end|>\n<|im_start|>assistant\n"
    body = {"query": [f"{prompt}{TEXTS[1]}<|im_end|>"], "prompts": [prompt], "labels": [""]}
    reply = httpx.post(f"{service_url}/get_reward", json=body).json()
    expected_value = score_pairs(reward_models, [(QUERY, TEXTS[1])])[0]
    assert reply["scores"] == [pytest.approx(expected_value, abs=1e-4)]
    assert reply["rewards"] == [pytest.approx(logit(expected_value), abs=1e-3)]
    assert set(reply["extra_logs"]) == set(OBJECTIVES)
    assert httpx.post(f"{service_url}/get_reward", json={**body, "prompts": []}).status_code == 422


PLAIN_TEXT = st.characters(codec="utf-8", exclude_characters="<[>]|")  # without what markers of templates consist of


@given(st.text(PLAIN_TEXT, min_size=1), st.text(PLAIN_TEXT))
def test_plain_text_is_split_into_prompt_and_response(prompt: str, response: str) -> None:
    item = split_text(prompt + response, prompt)
    assert item.messages == [{"role": "user", "content": prompt}]
    assert item.response == response.strip()


@pytest.mark.parametrize("token", ["a-token\n", " a-token", "a-token\r\n"])
@pytest.mark.parametrize("is_in_environment", [True, False])
def test_white_space_around_a_token_is_not_sent(
    monkeypatch: pytest.MonkeyPatch, token: str, is_in_environment: bool
) -> None:
    """A Secret that was made from a file ends with a line break."""
    monkeypatch.setenv("RLUF_SERVE_TOKEN", token if is_in_environment else "other")
    with RewardClient("http://127.0.0.1:9", token=None if is_in_environment else token) as client:
        assert client._http_client.headers["authorization"] == "Bearer a-token"


@pytest.mark.parametrize(
    "url",
    ["", "http://", "rewards:8000", "ftp://rewards", "http://[::1", "http://rewards:x", "http://a\nb", "http://r?a=1"],
)
def test_an_address_that_cannot_be_called_is_refused_at_once(url: str) -> None:
    with pytest.raises(SettingsError, match="expected the address of a service, such as http://rewards:8000"):
        RewardClient(url)
    for accepted in ("http://rewards", " https://rewards:8443/prefix/ \n", "HTTP://[::1]:8000"):
        with RewardClient(accepted) as client:
            assert client.url == accepted.strip().rstrip("/")


@pytest.mark.parametrize("token", ["gl\xfcck", "two\nlines", "nul\x00", "\u2014"])
def test_a_token_that_cannot_be_sent_is_refused_without_it(token: str) -> None:
    with pytest.raises(SettingsError, match="printable ASCII") as error:
        RewardClient("http://rewards", token=token)
    assert token not in str(error.value)


@pytest.mark.parametrize("value", ["\xb2", "-1", "1.5", "soon", "Wed, 21 Oct 2026 07:28:00 GMT", "9" * 400, ""])
def test_a_strange_retry_after_does_not_break_the_client(value: str) -> None:
    headers = [(b"Retry-After", value.encode("latin-1"))]
    transport = httpx.MockTransport(lambda _: httpx.Response(429, headers=headers, json={}))
    with RewardClient("http://rewards", max_attempts=2) as client:
        client._http_client = httpx.Client(base_url=client.url, transport=transport)
        with pytest.raises(ResourceError, match="did not answer /v1/models in"):
            client.list_models()
