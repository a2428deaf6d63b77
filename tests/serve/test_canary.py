"""The canary: a user or conversation stays on one version, alone and in batches; clients can require a version."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from rluf.config.derived import list_configured_reward_folders
from rluf.config.settings import Settings
from rluf.serve.api import ApiError, ScoreRoute, build_score_route
from rluf.serve.app import make_app
from rluf.serve.application import build_scorer_config
from rluf.serve.assignment import is_canary
from rluf.serve.deployments import BatchLimits, GatewayDeployment, ScorerDeployment
from rluf.types import ScoringItem
from tests.serve.conftest import OBJECTIVES, SALT, make_items, make_rules, write_models
from tests.serve.test_gateway import LocalGateway, StubHandle

KEYS: dict[str, Callable[[int], ScoreRoute]] = {
    "user": lambda number: build_score_route(f"user-{number}", None, None),
    "conversation": lambda number: build_score_route(None, f"conversation-{number}", None),
    "user before conversation": lambda number: build_score_route(f"user-{number}", str(random.random()), None),
    "number": lambda number: build_score_route(None, str(number), None),
    "unicode": lambda number: build_score_route("ü\U0001f49b" + chr(0x4E00 + number), None, None),
}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("key", KEYS)
def test_no_conversation_changes_version_and_shares_hold(share: float, key: str) -> None:
    turns = [[is_canary(KEYS[key](number).assignment_key, share) for _ in range(3)] for number in range(1000)]
    assert all(len(set(versions)) == 1 for versions in turns)
    canary_share = sum(versions[0] for versions in turns) / len(turns)
    assert abs(canary_share - share) <= 4 * math.sqrt(share * (1 - share) / len(turns))


@pytest.mark.parametrize("key", KEYS)
def test_a_larger_share_moves_nobody_back(key: str) -> None:
    for number in range(1000):
        assigned = [is_canary(KEYS[key](number).assignment_key, share) for share in (0.05, 0.2, 0.6, 1.0)]
        assert assigned == sorted(assigned)


def test_without_user_and_conversation_the_live_version_scores() -> None:
    assert not is_canary(build_score_route(None, None, None).assignment_key, 1.0)
    assert build_score_route("a", None, None) != build_score_route(None, "a", None)


@pytest.fixture(scope="module")
async def scorers(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, ScorerDeployment]]:
    other_folder = write_models(tmp_path_factory.mktemp("candidate"), 9)
    scorers = {}
    for role, folder in (("live", model_folder), ("candidate", other_folder)):
        objectives = {name: {"path": str(folder / name), "weight": 0.3} for name in OBJECTIVES}
        settings = Settings.model_validate({"objectives": objectives})
        config = build_scorer_config(settings, list_configured_reward_folders(settings))
        scorers[role] = (config["version"], ScorerDeployment())
        await scorers[role][1].reconfigure(config)
    return scorers


@pytest.fixture
async def gateway(
    scorers: dict[str, tuple[str, ScorerDeployment]], monkeypatch: pytest.MonkeyPatch
) -> GatewayDeployment:
    deployments = {f"scorer-{role}": scorer for role, (_, scorer) in scorers.items()} | {"feedback-writer": object()}
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda name, _: StubHandle(deployments[name]))
    gateway = LocalGateway(make_rules(), BatchLimits(4096, 1000, 1, 20.0, None), SALT)
    await gateway.reconfigure({"roles": ["live", "candidate"], "share": 0.3, "policies": {}})
    await gateway._warmup_tasks["candidate"]
    return gateway


async def test_served_versions_do_not_depend_on_turn_or_batch(
    gateway: GatewayDeployment, scorers: dict[str, tuple[str, ScorerDeployment]]
) -> None:
    versions = {scorers[role][0]: role for role in scorers}
    items = make_items(40)
    routes = [build_score_route(None, f"conversation-{i}", None) for i in range(40)]
    alone = [(await gateway.score_items([items[i]], [routes[i]]))[0] for i in range(10)]
    order = random.Random(1).sample(range(40), 40)
    batched = dict(
        zip(order, await gateway.score_items([items[i] for i in order], [routes[i] for i in order]), strict=True)
    )
    roles = [versions[batched[i].model_version] for i in range(40)]
    assert set(roles) == {"live", "candidate"}
    assert roles == ["candidate" if is_canary(route.assignment_key, 0.3) else "live" for route in routes]
    for i in range(10):
        assert alone[i].model_version == batched[i].model_version
        assert alone[i].scores["love"].value == pytest.approx(batched[i].scores["love"].value, abs=1e-4)
    without_route = await gateway.score_items(items[:3])
    assert {versions[scored_item.model_version] for scored_item in without_route} == {"live"}


async def test_a_thousand_conversations_of_three_turns_stay_on_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and in batches of any order with turns of others; scored by a rule, since only the version matters."""
    scorers = {role: ScorerDeployment() for role in ("live", "candidate")}
    for role, scorer in scorers.items():
        models = {"brevity": {"judge": "length"}}
        facts = {"brevity": {"version": "1", "max_tokens": 1, "mean_value": None}}
        await scorer.reconfigure(
            {"version": role, "models": models, "facts": facts, "batch_tokens": 4096, "device": "cpu"}
        )
    deployments = {f"scorer-{role}": scorer for role, scorer in scorers.items()} | {"feedback-writer": object()}
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda name, _: StubHandle(deployments[name]))
    gateway = LocalGateway(make_rules(), BatchLimits(4096, 10_000, 1, 60.0, None), SALT)
    await gateway.reconfigure({"roles": ["live", "candidate"], "share": 0.3, "policies": {}})
    await gateway._warmup_tasks["candidate"]
    turns = [(number, turn) for number in range(1000) for turn in range(3)]
    routes = {number: build_score_route(None, f"conversation-{number}", None) for number in range(1000)}
    versions: dict[int, set[str]] = {number: set() for number in range(1000)}
    for batch_size in (1, 7, 256):
        order = random.Random(batch_size).sample(turns, len(turns))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            items = [ScoringItem([{"role": "user", "content": f"Turn {turn}"}], f"Reply {turn}") for _, turn in batch]
            scored_items = await gateway.score_items(items, [routes[number] for number, _ in batch])
            for (number, _), scored_item in zip(batch, scored_items, strict=True):
                versions[number].add(scored_item.model_version)
    assert all(len(served) == 1 for served in versions.values())
    candidate_count = sum(served == {"candidate"} for served in versions.values())
    assert abs(candidate_count - 300) <= 4 * math.sqrt(1000 * 0.3 * 0.7)


async def test_a_client_can_require_a_version(
    gateway: GatewayDeployment, scorers: dict[str, tuple[str, ScorerDeployment]]
) -> None:
    (item,) = make_items(1)
    for role, (version, _) in scorers.items():
        for required in (role, version):
            (scored_item,) = await gateway.score_items([item], [build_score_route("someone", None, required)])
            assert scored_item.model_version == version
    with pytest.raises(
        ApiError, match=r"0123456789ab is not served here \(any more\), but live .*, candidate"
    ) as error:
        await gateway.score_items([item], [ScoreRoute(None, "0123456789ab")])
    assert error.value.status == 409
    await gateway.reconfigure({"roles": ["live"], "share": 0.0, "policies": {}})
    for required in ("candidate", scorers["candidate"][0]):
        with pytest.raises(ApiError, match="not served here"):
            await gateway.score_items([item], [ScoreRoute(None, required)])


async def test_the_version_is_required_over_http(gateway: GatewayDeployment) -> None:
    (item,) = make_items(1)
    body = {"messages": item.messages, "response": item.response}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(gateway)), base_url="http://testserver"
    ) as client:
        for route in ("/v1/score", "/v1/score/batch", "/v1/rank"):
            for version, status in (("live", 200), ("candidate", 200), ("other", 409)):
                request = body | {"model_version": version, "conversation_id": "c", "user": "u"}
                if route == "/v1/score/batch":
                    request = {"items": [request, body]}
                elif route == "/v1/rank":
                    request = {k: v for k, v in request.items() if k != "response"} | {"responses": ["a", "b"]}
                response = await client.post(route, json=request)
                assert response.status_code == status


async def test_the_id_of_a_reward_model_requires_its_version(
    gateway: GatewayDeployment, scorers: dict[str, tuple[str, ScorerDeployment]]
) -> None:
    """Clients of other systems choose a model of /v1/models."""
    bodies: dict[str, dict[str, object]] = {
        "/score": {"text_1": "Q?", "text_2": "A!"}, "/classify": {"input": "A!"}, "/pooling": {"input": "A!"},
        "/rerank": {"query": "Q?", "documents": ["A!"]},
    }  # fmt: skip
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(gateway)), base_url="http://testserver"
    ) as client:
        ids = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert ids == ["reward-live", "reward-candidate"]
        for path, body in bodies.items():
            for user in ("ann", "bob", "eve", None):
                for role, (version, _) in scorers.items():
                    reply = await client.post(path, json=body | {"model": f"reward-{role}", "user": user})
                    assert reply.json()["model_version"] == version, (path, role)
        await gateway.reconfigure({"roles": ["live"], "share": 0.0, "policies": {}})
        for path, body in bodies.items():
            assert (await client.post(path, json=body | {"model": "reward-candidate"})).status_code == 409
