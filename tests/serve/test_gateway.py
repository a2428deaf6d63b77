"""The gateway with its scorer, feedback writer and policy in one process: the calls through handles, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from rluf.config.settings import Settings
from rluf.serve.api import ApiError, ChatRequest, FeedbackRequest
from rluf.serve.app import make_app
from rluf.serve.application import build_scorer_config, configured_reward_folders
from rluf.serve.deployments import BatchLimits, FeedbackWriter, GatewayDeployment, ScorerDeployment
from rluf.serve.policy_deployment import ChatCompletion, PolicyDeployment
from rluf.types import Message
from rluf.utils.hashing import hash_user_id
from tests.call_recorder import list_walk, read_walk, start_recording, stop_recording
from tests.serve.conftest import OBJECTIVES, SALT, make_items, make_rules, score_offline

MAX_REQUEST_FILES = 10


class LocalGateway(GatewayDeployment):
    """The gateway without its asynchronous destructor, which Ray Serve awaits but plain Python cannot."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class StubMethod:
    """A deployment method; `remote` runs it in this process."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


class StubHandle:
    """A deployment handle of an object in this process; unknown methods raise AttributeError."""

    def __init__(self, deployment: object) -> None:
        self._deployment = deployment

    def __getattr__(self, name: str) -> StubMethod:
        return StubMethod(getattr(self._deployment, name))


class EchoPolicy:
    """A policy that repeats the user's message."""

    async def describe(self) -> str:
        return "policy-1"

    async def complete_chat(self, messages: Sequence[Message], seed: int) -> ChatCompletion:
        return ChatCompletion(messages[-1]["content"], "stop", 3, 4, "policy-1")


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[FeedbackWriter]:
    feedback_writer = FeedbackWriter.__new__(FeedbackWriter)
    # Ray Serve awaits the asynchronous constructor.
    await feedback_writer.__init__(str(tmp_path / "log"), str(tmp_path / "log" / ".log"), 60, 60)  # type: ignore[misc]
    yield feedback_writer
    feedback_writer._flush_task.cancel()


@pytest.fixture
async def gateway(model_folder: Path, writer: FeedbackWriter, monkeypatch: pytest.MonkeyPatch) -> GatewayDeployment:
    objectives = {name: {"path": str(model_folder / name), "weight": 0.3} for name in OBJECTIVES}
    settings = Settings.model_validate({"objectives": objectives})
    scorer = ScorerDeployment()
    await scorer.reconfigure(build_scorer_config(settings, configured_reward_folders(settings)))
    deployments = {"scorer-live": scorer, "feedback-writer": writer, "policy-echo": EchoPolicy()}
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda name, _: StubHandle(deployments[name]))
    gateway = LocalGateway(make_rules(), BatchLimits(4096, 100, 1, 20.0, None), SALT)
    await gateway.reconfigure({"roles": ["live"], "share": 0.0, "policies": {"echo": "policy-1"}})
    return gateway


async def test_the_gateway_scores_with_the_live_scorer(gateway: GatewayDeployment, model_folder: Path) -> None:
    assert await gateway.is_ready()
    items = make_items(3)
    scored_items = await gateway.score_items(items)
    for scored_item, expected in zip(scored_items, score_offline(model_folder, items), strict=True):
        for name in OBJECTIVES:
            score = scored_item.scores[name]
            assert (score.value, score.raw_logit) == pytest.approx(expected[name], abs=1e-4)
    assert [model.id for model in await gateway.list_models()] == ["reward-live", "echo"]


async def test_a_served_request_enters_the_files_of_the_page(gateway: GatewayDeployment) -> None:
    (item,) = make_items(1)
    transport = httpx.ASGITransport(make_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        # The scorer's thread pool has threads from before; those of a new pool start with the recorder.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())
        start_recording()
        reply = await client.post("/v1/score", json={"messages": item.messages, "response": item.response})
        walk = list_walk(stop_recording())
    assert set(reply.json()["scores"]) == set(OBJECTIVES)
    assert sorted(walk) == sorted(read_walk("A served request"))
    assert len(walk) <= MAX_REQUEST_FILES


async def test_a_chat_is_logged_and_its_reaction_stored(
    gateway: GatewayDeployment, writer: FeedbackWriter, tmp_path: Path
) -> None:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hello"}], "user": "alice"})
    reply = await gateway.complete_chat(request)
    assert reply.choices[0].message["content"] == "Hello"
    assert await gateway.store_feedback(FeedbackRequest(id=reply.id, reaction="love")) == "stored"
    assert await gateway.drain_requests(1.0) == 0
    assert await writer.flush_settled(all_rows=True) == 1
    (parquet_file,) = (tmp_path / "log").glob("*.parquet")
    (row,) = pq.read_table(parquet_file).to_pylist()
    assert (row["reaction"], row["user_id"]) == ("love", hash_user_id("alice", SALT))


async def test_an_unknown_policy_is_named_in_the_error(gateway: GatewayDeployment) -> None:
    request = ChatRequest.model_validate({"model": "other", "messages": [{"role": "user", "content": "Hello"}]})
    with pytest.raises(ApiError, match=r"no policy 'other' is served here \(echo\)"):
        await gateway.complete_chat(request)


def test_the_policy_deployment_has_the_methods_that_the_gateway_calls() -> None:
    assert all(hasattr(PolicyDeployment, name) for name in ("describe", "complete_chat"))
