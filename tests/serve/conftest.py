"""A tiny service: real reward models over bytes, and the HTTP app over them in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch

from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.reward.backbone import build_text_encoder, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.serve.api import (
    ApiError,
    ChatReply,
    ChatRequest,
    FeedbackRequest,
    ModelInfo,
    PreferenceRequest,
    ScoredItem,
    ScoreRoute,
    ServedResponse,
    build_chat_reply,
    build_preference_event,
    build_reaction_event,
    build_served_event,
    to_messages,
)
from rluf.serve.app import make_app
from rluf.serve.batching import RequestBatcher
from rluf.serve.listener import HttpServer
from rluf.serve.middleware import AccessToken, ServeMetrics, ServiceRules, hash_token
from rluf.serve.store import FeedbackStore
from rluf.serve.store_events import StoreOutcome
from rluf.types import Message, ScoringItem
from rluf.utils.hashing import create_response_id
from rluf.utils.paths import resolve_cache_folder

OBJECTIVES = ("love", "helpfulness", "safety")
TOKEN = "a-token-of-the-tests"
SALT = b"salt"


def write_models(folder: Path, seed: int) -> Path:
    """Write one reward model per objective, of a few hundred thousand random weights each."""
    backbone = resolve_model("tiny-encoder", resolve_cache_folder(Settings()))
    for offset, objective in enumerate(OBJECTIVES):
        model = load_classifier(backbone, require_all_weights=False, seed=seed + offset)
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(seed + offset))
        build_text_encoder(model, backbone, 96).tokenizer.save_pretrained(str(folder / objective))
        model.save_pretrained(str(folder / objective))
        Calibration(objective, "platt", -1.0, 0.7, 0.1 * offset, 96, mark_truncated=True).save(folder / objective)
        (folder / objective / "reward_card.json").write_text('{"mean_value": 0.25}')
    return folder


def score_offline(folder: Path, items: Sequence[ScoringItem]) -> list[dict[str, tuple[float, float]]]:
    """(value, raw logit) by objective of each item, by the library's own model, one item at a time."""
    return score_one_by_one({name: RewardModel.load(folder / name, batch_tokens=4096) for name in OBJECTIVES}, items)


def score_one_by_one(
    reward_models: dict[str, RewardModel], items: Sequence[ScoringItem]
) -> list[dict[str, tuple[float, float]]]:
    """Like `score_offline`, for models that are loaded already."""
    results = []
    for item in items:
        scores = {name: model.score([item], name)[0] for name, model in reward_models.items()}
        results.append({name: (score.value, score.raw_logit) for name, score in scores.items()})
    return results


def make_items(count: int) -> list[ScoringItem]:
    """Conversations of many lengths, including empty responses and non-ASCII text."""
    texts = ("", "Yes.", "I love that 💛 " * 3, "No idea, sorry.\n" * 9, "Größe " * 40)
    return [
        ScoringItem(
            [{"role": "user", "content": f"Question {number} " * (1 + number % 4)}],
            texts[number % len(texts)],
            is_truncated=number % 7 == 3,
        )
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), 1)


@pytest.fixture(scope="session")
def reward_models(model_folder: Path) -> dict[str, RewardModel]:
    return {name: RewardModel.load(model_folder / name, batch_tokens=4096) for name in OBJECTIVES}


@dataclass
class LocalBackend:
    """ServiceBackend without Ray: the same batching, models and store, in this process."""

    reward_models: dict[str, RewardModel]
    store: FeedbackStore
    rules: ServiceRules
    metrics: ServeMetrics = field(default_factory=ServeMetrics)
    is_draining: bool = False
    running_requests: int = 0
    policies: Mapping[str, Callable[[Sequence[Message]], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._batcher = RequestBatcher(
            self._run_batch,
            batch_tokens=4096,
            max_item_tokens=96,
            max_queued_responses=512,
            replica_count=1,
            on_batch_end=self.metrics.record_batch,
        )

    async def _run_batch(self, items: list[ScoringItem]) -> list[ScoredItem]:
        scores = {name: model.score(items, name) for name, model in self.reward_models.items()}
        return [ScoredItem("v1", {name: scores[name][i] for name in scores}) for i in range(len(items))]

    async def is_ready(self) -> bool:
        return True

    async def score_items(
        self, items: Sequence[ScoringItem], routes: Sequence[ScoreRoute] | None = None
    ) -> list[ScoredItem]:
        return await self._batcher.submit(items)

    async def store_feedback(self, request: FeedbackRequest) -> StoreOutcome:
        return self.store.append_events([build_reaction_event(request, SALT)])[0]

    async def store_preference(self, request: PreferenceRequest) -> StoreOutcome:
        return self.store.append_events([build_preference_event(request, SALT)])[0]

    async def count_damaged_rows(self) -> int:
        return self.store.damaged_row_count

    async def list_models(self) -> list[ModelInfo]:
        reward_model = ModelInfo(id="reward-live", kind="reward", role="live", version="v1", share=1.0)
        return [reward_model] + [
            ModelInfo(id=name, kind="policy", role="policy", version=f"{name}-1", share=1.0) for name in self.policies
        ]

    async def complete_chat(self, request: ChatRequest) -> ChatReply:
        if request.model not in self.policies:
            raise ApiError(404, "unknown", f"model: no policy {request.model!r} is served here")
        text = await asyncio.to_thread(self.policies[request.model], to_messages(request.messages))
        response_id, version = create_response_id(request.user, SALT), f"{request.model}-1"
        event = build_served_event(response_id, request, ServedResponse(version, text, "stop"), SALT)
        if event is not None:
            self.store.append_events([event])
        return build_chat_reply(
            response_id, request.model, version, text, "stop", prompt_tokens=1, response_tokens=len(text)
        )


def make_rules(*, token: str | None = None, requests_per_s: float = 1e6) -> ServiceRules:
    tokens = (AccessToken("default", hash_token(token)),) if token else ()
    return ServiceRules(tokens, 64 * 1024, requests_per_s, 20.0, allowed_hosts=None if token else ("testserver",))


@pytest.fixture
def backend(reward_models: dict[str, RewardModel], tmp_path: Path) -> LocalBackend:
    store = FeedbackStore(str(tmp_path / "store"), tmp_path / "store" / ".log", reaction_window_s=60)
    store.start()
    return LocalBackend(reward_models, store, make_rules())


@pytest.fixture
async def http_client(backend: LocalBackend) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(backend), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        yield client


@contextmanager
def run_http_server(backend: LocalBackend) -> Iterator[str]:
    """Run the app behind the service's own listener on a free port; yields its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = find_free_port()
    server = HttpServer("127.0.0.1", port)
    asyncio.run_coroutine_threadsafe(server.start(make_app(backend), 5), loop).result(10)
    yield f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def service_url(reward_models: dict[str, RewardModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the service for third-party clients, which send their own Host header."""
    folder = tmp_path_factory.mktemp("served")
    store = FeedbackStore(str(folder), folder / ".log", reaction_window_s=60)
    store.start()
    rules = dataclasses.replace(make_rules(), allowed_hosts=None)
    with run_http_server(LocalBackend(reward_models, store, rules)) as address:
        yield address
