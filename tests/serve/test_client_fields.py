"""Fields of other systems' clients are honored or refused, never ignored; nulls and neutral values are accepted."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from rluf.utils.stats import logit
from tests.serve.conftest import LocalBackend
from tests.serve.test_app import assert_error

USER = {"role": "user", "content": "Hello?"}
ASSISTANT = {"role": "assistant", "content": "Hi."}
SDK_NULLS = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
SHORT, LONG = "Yes.", "I love it. " * 200

CHAT_FIELDS: list[tuple[dict[str, Any], bool]] = [
    *(({name: None}, True) for name in ("top_logprobs", "logit_bias", "functions",
        "tools", "response_format", "model", "audio")),
    *(({name: value}, True) for name, value in (
        ("tool_choice", "none"), ("modalities", ["text"]), ("top_k", -1),
        ("parallel_tool_calls", False), ("service_tier", "auto"), ("repetition_penalty", 1.0), ("top_p", 1),
        ("stream_options", {"include_usage": True, "include_obfuscation": False}), ("metadata", {"a": 1}),
        ("functions", []), ("logit_bias", {}), ("stop_token_ids", []), ("bad_words", []), ("echo", False), ("stop", []),
        ("use_beam_search", False), ("length_penalty", 1.0), ("verbosity", "medium"), ("stream_options", {}),
        ("temperature", 0), ("temperature", 0.01), ("temperature", 2),
        ("include_stop_str_in_output", False), ("return_token_ids", False), ("return_tokens_as_token_ids", False),
        ("include_reasoning", True), ("documents", []), ("mm_processor_kwargs", {}), ("prompt_cache_retention", "24h"),
    )),
    *(({name: value}, False) for name, value in (
        ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("functions", [{"name": "f"}]),
        ("logit_bias", {"5": 1}), ("modalities", ["text", "audio"]), ("top_k", 5), ("min_p", 0.1), ("top_p", 0.9),
        ("repetition_penalty", 1.1), ("top_logprobs", 2), ("logprobs", True), ("n", 2), ("best_of", 2),
        ("response_format", {"type": "json_object"}), ("reasoning_effort", "low"), ("web_search_options", {}),
        ("guided_json", {}), ("chat_template_kwargs", {"enable_thinking": False}), ("ignore_eos", True),
        ("max_tokens", 0), ("stop", [""]), ("temperature", -1), ("temperature", "hot"),
        ("echo", True), ("length_penalty", 0.5), ("bad_words", ["x"]), ("verbosity", "low"), ("prediction", {}),
        ("n", True), ("max_tokens", True), ("max_tokens", "5"), ("temperature", True), ("seed", False),
        ("temperature", 0.001), ("include_stop_str_in_output", True), ("return_token_ids", True), ("documents", ["x"]),
    )),
]  # fmt: skip


async def test_chat_fields(http_client: httpx.AsyncClient, backend: LocalBackend) -> None:
    backend.policies = {"": lambda messages: "Hi."}
    for fields, is_accepted in CHAT_FIELDS:
        response = await http_client.post("/v1/chat/completions", json={"messages": [USER]} | fields)
        assert response.status_code == (200 if is_accepted else 422), fields
        if not is_accepted:
            assert assert_error(response) == (422, "invalid")
            assert next(iter(fields)) in response.json()["error"]["message"]


MESSAGES: list[tuple[list[Any], bool]] = [
    ([USER, ASSISTANT | SDK_NULLS, USER], True), ([USER | {"name": None}], True),
    ([USER | {"content": [{"type": "text", "text": "Hello?"}]}], True),
    ([{"role": "developer", "content": "x"}, USER], True),
    ([USER, ASSISTANT | {"tool_calls": [{"id": "1"}]}, USER], False),
    ([USER, {"role": "assistant", "content": None}, USER], False),
    ([USER | {"name": "bob"}], False), ([USER, {"role": "tool", "content": "x", "tool_call_id": "1"}, USER], False),
    ([USER, ASSISTANT | {"reasoning_content": "x"}, USER], False), ([USER | {"content": ["x"]}], False),
]  # fmt: skip


async def test_messages_of_an_sdk(http_client: httpx.AsyncClient, backend: LocalBackend) -> None:
    seen: list[Any] = []
    backend.policies = {"": lambda history: str(seen.append([m["content"] for m in history]) or "Hi.")}
    for messages, is_accepted in MESSAGES:
        response = await http_client.post("/v1/chat/completions", json={"messages": messages})
        assert response.status_code == (200 if is_accepted else 422), messages
        if is_accepted:
            assert seen[-1][-1] == "Hello?" and len(seen[-1]) == len(messages)
            classified = await http_client.post("/classify", json={"messages": [*messages, ASSISTANT | SDK_NULLS]})
            assert classified.status_code == 200, classified.text


async def test_the_later_name_of_a_user_is_the_user(http_client: httpx.AsyncClient, backend: LocalBackend) -> None:
    backend.policies = {"": lambda messages: "Hi."}
    reply = (
        await http_client.post("/v1/chat/completions", json={"messages": [USER], "safety_identifier": "ann"})
    ).json()
    for user, status in (("bob", 403), (None, 403), ("ann", 200)):
        body = {"id": reply["id"], "reaction": "love", "user": user}
        assert (await http_client.post("/v1/feedback", json=body)).status_code == status
    for user, status in (("ann", 200), ("bob", 422)):
        body = {"messages": [USER], "safety_identifier": "ann", "user": user}
        assert (await http_client.post("/v1/chat/completions", json=body)).status_code == status


async def test_a_chat_that_must_not_be_stored_leaves_no_row(
    http_client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    backend.policies = {"": lambda messages: "Hi."}
    for store, status in ((False, 404), (True, 200), (None, 200)):
        body = {"messages": [USER], "user": "ann", "store": store}
        reply = (await http_client.post("/v1/chat/completions", json=body)).json()
        reaction = {"id": reply["id"], "reaction": "love", "user": "ann"}
        assert (await http_client.post("/v1/feedback", json=reaction)).status_code == status
    assert backend.store.flush_settled(all_rows=True) == 2


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/score": {"messages": [USER], "response": "A"}, "/v1/rank": {"messages": [USER], "responses": ["A"]},
    "/v1/score/batch": {"items": [{"messages": [USER], "response": "A"}]}, "/score": {"text_1": "Q?", "text_2": "A"},
    "/classify": {"input": "A"}, "/pooling": {"input": "A"}, "/predict": {"inputs": "A"},
    "/get_reward": {"query": ["A"]},
    "/rerank": {"query": "Q?", "texts": ["A"]}, "/v2/rerank": {"query": "Q?", "documents": ["A"]},
    "/v1/moderations": {"input": "A"}, "/v1/chat/completions": {"messages": [USER]},
    "/v1/feedback": {"id": "x", "reaction": "love"}, "/v1/preferences": {"chosen_id": "x", "rejected_id": "y"},
}  # fmt: skip
QUERIES = ("model_version=candidate", "user=ann", "truncate=false", "model_version=", "x%00=1", "raw_scores=true&x=2")


@pytest.mark.parametrize("path", ROUTES)
async def test_no_field_in_the_query_is_ignored(
    http_client: httpx.AsyncClient, backend: LocalBackend, path: str
) -> None:
    backend.policies = {"": lambda messages: "Hi."}
    for query in QUERIES:
        response = await http_client.post(f"{path}?{query}", json=ROUTES[path])
        assert assert_error(response) == (422, "invalid") and "query" in response.json()["error"]["message"], query
    assert (await http_client.post(f"{path}?", json=ROUTES[path])).status_code in (200, 404)
    assert (await http_client.post("/ping?x=1")).status_code == 200
    assert (await http_client.get("/v1/models?limit=1")).status_code == 200


PAIR, TEXTS = {"text_1": "Q?", "text_2": "A!"}, {"query": "Q?", "texts": [SHORT, "No."]}
DOCUMENTS = {"query": "Q?", "documents": [SHORT, "No."]}
IGNORABLE: dict[str, Any] = {
    "priority": 3, "request_id": "r", "cache_salt": "s", "add_special_tokens": False, "truncate_prompt_tokens": -1,
    "encoding_format": "float", "instruction": None, "chat_template_kwargs": {}, "truncation_direction": "Right",
}  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("/score", PAIR, fields) for fields in (
        {"max_tokens_per_doc": 8}, {"max_tokens_per_query": 8}, {"truncation_side": "left"}, {"softmax": False},
        {"normalize": True}, {"instruction": "x"}, {"chat_template_kwargs": {"instruction": "x"}},
        {"truncate_prompt_tokens": 9}, {"activation": True, "use_activation": False},
    )),
    *(("/pooling", {"input": "A"}, fields) for fields in (
        {"encoding_format": "base64"}, {"embed_dtype": "float16"}, {"task": "token_classify"}, {"task": "embed"},
        {"dimensions": 5}, {"normalize": True},
    )),
    *(("/classify", {"messages": [USER, ASSISTANT]}, fields) for fields in (
        {"add_generation_prompt": True}, {"continue_final_message": True}, {"tools": [{}]}, {"chat_template": "x"},
    )),
    *(("/rerank", DOCUMENTS, fields) for fields in (
        {"max_chunks_per_doc": 1}, {"max_tokens_per_doc": 9}, {"rank_fields": ["title"]},
        {"texts": ["x"]}, {"top_n": -1}, {"raw_scores": True, "activation": True}, {"top_n": 1, "top_k": 2},
        {"return_documents": False, "return_text": True}, {"model": "reward-live", "model_version": "candidate"},
    )),
    ("/rerank", TEXTS, {"truncation_direction": "Left"}),
    ("/predict", {"inputs": SHORT}, {"parameters": {"function_to_apply": "none"}}),
    ("/predict", {"inputs": SHORT}, {"raw_scores": True, "use_activation": True}),
    ("/v1/moderations", {"input": SHORT}, {"model": "love"}),
    ("/v1/moderations", {"input": SHORT}, {"model": "gpt-4"}),
    ("/get_reward", {"query": [SHORT]}, {"prompt": ["Q?"]}),
]  # fmt: skip


async def test_a_field_that_would_change_the_reply_is_refused(http_client: httpx.AsyncClient) -> None:
    for path, body, fields in REFUSED:
        assert (await http_client.post(path, json=body | IGNORABLE)).status_code == 200, path
        response = await http_client.post(path, json=body | fields)
        assert assert_error(response) == (422, "invalid"), (path, fields)
        assert "constrained-str" not in response.text


async def test_rerank_honors_its_fields_in_both_formats(http_client: httpx.AsyncClient) -> None:
    async def rerank(body: dict[str, Any], **fields: Any) -> Any:
        return (await http_client.post("/rerank", json=body | fields)).json()

    results = (await rerank(DOCUMENTS))["results"]
    scores = [result["relevance_score"] for result in results]
    assert [result["document"]["text"] for result in results] == [DOCUMENTS["documents"][r["index"]] for r in results]
    for fields in ({"top_n": 1}, {"top_k": 1}):
        assert [r["relevance_score"] for r in (await rerank(DOCUMENTS, **fields))["results"]] == scores[:1]
        assert [r["score"] for r in await rerank(TEXTS, **fields)] == scores[:1]
    for fields in ({"raw_scores": True}, {"use_activation": False}):
        logits = [r["relevance_score"] for r in (await rerank(DOCUMENTS, **fields))["results"]]
        assert (
            logits
            == pytest.approx([logit(score) for score in scores])
            == [r["score"] for r in await rerank(TEXTS, **fields)]
        )
    for name in ("return_documents", "return_text"):
        for wants_texts in (True, False):
            answer = {name: wants_texts}
            assert all(("document" in r) == wants_texts for r in (await rerank(DOCUMENTS, **answer))["results"]), name
            assert all(("text" in r) == wants_texts for r in await rerank(TEXTS, **answer)), name
    assert not any("text" in r for r in await rerank(TEXTS))


async def test_a_client_can_refuse_to_have_its_texts_cut(http_client: httpx.AsyncClient) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/rerank": {"query": "Q?", "texts": [SHORT, LONG]}, "/predict": {"inputs": [[SHORT], [LONG]]},
        "/score": {"text_1": "Q?", "text_2": LONG}, "/classify": {"input": LONG}, "/get_reward": {"query": [LONG]},
    }  # fmt: skip
    for path, body in bodies.items():
        for truncate, status in ((None, 200), (True, 200), (False, 413)):
            assert (await http_client.post(path, json=body | {"truncate": truncate})).status_code == status, path


async def test_every_moderation_model_of_openai_is_the_safety_model(http_client: httpx.AsyncClient) -> None:
    scores = []
    for model in (None, "omni-moderation-2024-09-26", "omni-moderation-latest", "text-moderation-stable", "safety"):
        reply = await http_client.post("/v1/moderations", json={"input": SHORT, "model": model})
        scores.append(reply.json()["results"][0]["category_scores"]["unsafe"])
    assert scores == pytest.approx([scores[0]] * 5)
