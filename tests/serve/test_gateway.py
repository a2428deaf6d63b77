"""The gateway with its scorer, feedback writer and policy in one process: the calls through handles, without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from ray.serve.exceptions import BackPressureError

from rluf.config.derived import list_configured_reward_folders
from rluf.config.settings import Settings
from rluf.serve.api import ApiError, ChatRequest, ChatSampling, FeedbackRequest
from rluf.serve.app import make_app
from rluf.serve.application import build_scorer_config
from rluf.serve.assignment import assign_arm
from rluf.serve.deployments import BatchLimits, FeedbackWriter, GatewayDeployment, ScorerDeployment
from rluf.serve.policy_deployment import ChatCompletion, PolicyDeployment
from rluf.types import Message
from rluf.utils.hashing import hash_user_id
from tests.call_recorder import list_walk, read_walk, start_recording, stop_recording
from tests.serve.conftest import OBJECTIVES, SALT, make_items, make_rules, score_offline

MAX_REQUEST_FILES = 9


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

    async def complete_chat(self, messages: Sequence[Message], seed: int, sampling: ChatSampling) -> ChatCompletion:
        return ChatCompletion(messages[-1]["content"], "stop", 3, 4, "policy-1", sampling.temperature or 1.0, -2.5)


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
    await scorer.reconfigure(build_scorer_config(settings, list_configured_reward_folders(settings)))
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
    for other_user in (None, "bob", "", "alice "):
        with pytest.raises(ApiError, match="another user"):
            await gateway.store_feedback(FeedbackRequest.model_construct(id=reply.id, reaction=None, user=other_user))
    assert await gateway.store_feedback(FeedbackRequest(id=reply.id, reaction="love", user="alice")) == "stored"
    assert await gateway.drain_requests(1.0) == 0
    assert await writer.flush_settled(all_rows=True) == 1
    (parquet_file,) = (tmp_path / "log").rglob("*.parquet")
    (row,) = pq.read_table(parquet_file).to_pylist()
    assert (row["reaction"], row["user_id"]) == ("love", hash_user_id("alice", SALT))
    assert (row["response_logprob"], row["response_tokens"], row["temperature"]) == (-2.5, 4, 1.0)


async def test_an_unknown_policy_is_named_in_the_error(gateway: GatewayDeployment) -> None:
    request = ChatRequest.model_validate({"model": "other", "messages": [{"role": "user", "content": "Hello"}]})
    with pytest.raises(ApiError, match=r"no policy 'other' is served here \(echo\)"):
        await gateway.complete_chat(request)


def test_the_policy_deployment_has_the_methods_that_the_gateway_calls() -> None:
    assert all(hasattr(PolicyDeployment, name) for name in ("describe", "complete_chat"))


async def test_chat_honors_or_refuses_openais_fields(gateway: GatewayDeployment) -> None:
    base = {"messages": [{"role": "user", "content": "Hello"}]}
    transport = httpx.ASGITransport(make_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:

        async def chat(**fields: object) -> httpx.Response:
            return await client.post("/v1/chat/completions", json=base | fields)

        for fields in (
            {"n": 2}, {"top_p": 0.5}, {"logprobs": True}, {"tools": [{}]}, {"presence_penalty": 1}, {"best_of": 2},
            {"max_tokens": 0}, {"stop": [""]}, {"stop": ["a"] * 5}, {"response_format": {"type": "json_object"}},
            {"temperature": 3}, {"function_call": "auto"}, {"functions": [{}]}, {"logit_bias": {"5": 1}},
            {"unknown": 1},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            {"messages": [{"role": "tool", "content": "x"}, *base["messages"]]}, {"seed": -1},
        ):  # fmt: skip
            assert (await chat(**fields)).status_code == 422, fields
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
        harmless = {"n": 1, "top_p": 1.0, "presence_penalty": 0, "logprobs": False, "tools": [], "metadata": {"a": "b"}}
        reply = await chat(messages=messages, temperature=0.5, max_tokens=7, stop="x", seed=3, **harmless)
        assert reply.json()["choices"][0]["message"]["content"] == "Hello"
        stream = await chat(stream=True, stream_options={"include_usage": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        chunks = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
        assert chunks[-1] == "[DONE]"
        deltas = [choice["delta"] for chunk in chunks[:-1] for choice in json.loads(chunk)["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == "Hello"
        assert (await client.get("/v1/models/echo")).json()["id"] == "echo"
        assert (await client.get("/v1/models/other")).status_code == 404


@pytest.mark.parametrize("key", ["reaction", "record"])
async def test_only_listed_reactions_are_stored(gateway: GatewayDeployment, key: str) -> None:
    record = {
        "conversation_id": "c", "turn": 0, "user_id": "u", "time": "2026-01-31T12:00:00+00:00", "model_version": "m",
        "messages": [{"role": "user", "content": "Hi"}], "response": "Hello", "interface": "app", "device": "d",
        "author": "a", "arm": "b",
    }  # fmt: skip
    transport = httpx.ASGITransport(make_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        for reaction, status in (("<img src=x>", 422), ("Love", 422), ("thumbs_down", 200), (None, 200)):
            body = {"id": f"r-{reaction}", "reaction": reaction, "record": record}
            if key == "reaction":
                body["record"] = None
                status = 404 if status == 200 else status
            assert (await client.post("/v1/feedback", json=body)).status_code == status


def test_users_are_assigned_to_arms_by_a_secret_hash() -> None:
    users = [f"u{number}" for number in range(4000)]
    for share in (0.0, 0.1, 0.5, 1.0):
        arms = [assign_arm(user, {"base": 1 - share, "aligned": share}, b"salt") for user in users]
        assert arms == [assign_arm(user, {"base": 1 - share, "aligned": share}, b"salt") for user in users]
        assert abs(arms.count("aligned") / len(users) - share) <= 4 * (share * (1 - share) / len(users)) ** 0.5
    ramp = [
        [assign_arm(user, {"base": 1 - s, "aligned": s}, b"salt") == "aligned" for s in (0.1, 0.3, 1.0)]
        for user in users
    ]
    assert all(steps == sorted(steps) for steps in ramp)
    other_salt = [assign_arm(user, {"base": 0.5, "aligned": 0.5}, b"other") for user in users]
    assert other_salt != [assign_arm(user, {"base": 0.5, "aligned": 0.5}, b"salt") for user in users]


async def test_the_arm_of_an_experiment_is_logged(
    gateway: GatewayDeployment, writer: FeedbackWriter, tmp_path: Path
) -> None:
    await gateway.reconfigure(
        {"roles": ["live"], "share": 0, "policies": {"echo": "policy-1"}, "experiment": {"echo": 1.0}}
    )
    message = {"messages": [{"role": "user", "content": "Hello"}]}
    for fields in ({"user": "ann"}, {"conversation_id": "c1"}, {"conversation_id": "c1"}, {}, {"model": "echo"}):
        await gateway.complete_chat(ChatRequest.model_validate(message | fields))
    await writer.flush_settled(all_rows=True)
    (parquet_file,) = (tmp_path / "log").rglob("*.parquet")
    rows = pq.read_table(parquet_file).to_pylist()
    assert [row["arm"] for row in rows] == ["echo"] * 3 + [None] * 2
    users = [row["user_id"] for row in rows]
    assert users[1] == users[2] and len(set(users)) == 4
    assert gateway.metrics.rows_without_user._value.get() == 4.0


async def test_no_chat_changes_policy_between_its_turns(
    gateway: GatewayDeployment, writer: FeedbackWriter, tmp_path: Path
) -> None:
    policies, shares = {"base": "policy-1", "aligned": "policy-1"}, {"base": 0.5, "aligned": 0.5}
    handle = gateway._policy_handles["echo"][0]
    gateway._policy_handles = {name: (handle, version) for name, version in policies.items()}
    gateway._experiment = shares
    keys: list[dict[str, str]] = [{"user": f"u{i}"} for i in range(40)] + [
        {"conversation_id": f"c{i}"} for i in range(40)
    ]
    keys += [{"user": f"u{i}", "conversation_id": f"d{i}"} for i in range(40)] + [{}] * 40
    models = []
    for key in keys:
        messages: list[dict[str, str]] = []
        served = set()
        for turn in range(3):
            messages = [*messages, {"role": "user", "content": f"Turn {turn} of {len(models)}"}]
            reply = await gateway.complete_chat(ChatRequest.model_validate({"messages": messages} | key))
            messages.append({"role": "assistant", "content": reply.choices[0].message["content"]})
            served.add(reply.model)
        models.append(served)
    assert all(len(served) == 1 for served in models)
    assert models[:40] == models[80:120] and {"base", "aligned"} == set.union(*models[:40]) == set.union(*models[40:80])
    assert set.union(*models[120:]) == {"base"}
    await writer.flush_settled(all_rows=True)
    (parquet_file,) = (tmp_path / "log").rglob("*.parquet")
    arms = [row["arm"] for row in pq.read_table(parquet_file).to_pylist()]
    assert [arm is None for arm in arms] == [False] * 360 + [True] * 120


async def test_a_policy_whose_queue_is_full_refuses_chats_at_once(
    gateway: GatewayDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> ChatCompletion:
        raise BackPressureError(num_queued_requests=64, max_queued_requests=64)

    monkeypatch.setattr(EchoPolicy, "complete_chat", refuse)
    transport = httpx.ASGITransport(make_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        body = {"messages": [{"role": "user", "content": "Hello?"}]}
        reply = await client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["type"], reply.headers["retry-after"]) == (429, "busy", "1")


async def test_a_service_whose_first_chats_fill_the_queue_is_not_ready_yet(
    gateway: GatewayDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> str:
        raise BackPressureError(num_queued_requests=64, max_queued_requests=64)

    with monkeypatch.context() as patch:
        patch.setattr(EchoPolicy, "describe", refuse)
        assert not await gateway.is_ready()
    assert await gateway.is_ready()


async def test_models_are_listed_while_a_candidate_is_added(
    gateway: GatewayDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = gateway._scorer_handles["live"]._deployment
    describe = scorer.describe

    async def add_candidate() -> dict[str, Any]:
        gateway._scorer_handles["candidate"] = gateway._scorer_handles["live"]
        return dict(await describe())

    monkeypatch.setattr(scorer, "describe", add_candidate)
    assert [model.id for model in await gateway.list_models()] == ["reward-live", "echo"]


@pytest.mark.parametrize(
    ("experiment", "shares"),
    [({}, {"echo": 1.0, "other": 0.0}), ({"other": 0.25, "echo": 0.75}, {"echo": 0.75, "other": 0.25})],
)
async def test_the_share_of_a_policy_is_that_of_chats_that_name_none(
    gateway: GatewayDeployment, experiment: dict[str, float], shares: dict[str, float]
) -> None:
    gateway._policy_handles["other"] = gateway._policy_handles["echo"]
    gateway._experiment = experiment
    models = await gateway.list_models()
    assert {model.id: model.share for model in models if model.kind == "policy"} == shares
