"""A tiny service: reward models over bytes, real, and the app over them in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn

from rluf.config.settings import Settings
from rluf.models.hub import resolve_model
from rluf.reward.backbone import encoder_for, load_classifier
from rluf.reward.calibration import Calibration
from rluf.reward.model import RewardModel
from rluf.reward.text import Item
from rluf.serve.api import ChatReply, ChatRequest, FeedbackRequest, ModelInfo, plain
from rluf.serve.app import make_app
from rluf.serve.backend import Rules, Scored
from rluf.serve.batching import Batcher
from rluf.serve.limits import ApiError, token_digest
from rluf.serve.metrics import ServeMetrics
from rluf.serve.records import chat_reply, new_response_id, reaction_event, served_event
from rluf.serve.store import FeedbackStore, Outcome
from rluf.types import Message
from rluf.utils.paths import cache_dir

OBJECTIVES = ("love", "helpfulness", "safety")
TOKEN = "a-token-of-the-tests"


def write_models(folder: Path, seed: int) -> Path:
    """Reward models of a few hundred thousand random weights, one folder an objective."""
    backbone = resolve_model("tiny-encoder", cache_dir(Settings()))
    for offset, objective in enumerate(OBJECTIVES):
        model = load_classifier(backbone, trained=False, seed=seed + offset)
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(seed + offset))
        encoder_for(model, backbone, 96).tokenizer.save_pretrained(str(folder / objective))
        model.save_pretrained(str(folder / objective))
        Calibration(objective, "platt", -1.0, 0.7, 0.1 * offset, 96).save(folder / objective)
        (folder / objective / "reward_card.json").write_text('{"mean_value": 0.25}')
    return folder


def offline(folder: Path, items: Sequence[Item]) -> list[dict[str, tuple[float, float]]]:
    """(value, raw) by objective of each item, by the library's own scorer, one item at a time."""
    return one_by_one({name: RewardModel.load(folder / name, batch_tokens=4096) for name in OBJECTIVES}, items)


def one_by_one(models: dict[str, RewardModel], items: Sequence[Item]) -> list[dict[str, tuple[float, float]]]:
    """As `offline`, for models that are loaded already."""
    found = []
    for item in items:
        scores = {name: model.score([item], name)[0] for name, model in models.items()}
        found.append({name: (score.value, score.raw) for name, score in scores.items()})
    return found


def some_items(count: int) -> list[Item]:
    """Conversations of many lengths, empty responses and non-ASCII text among them."""
    texts = ("", "Yes.", "I love that 💛 " * 3, "No idea, sorry.\n" * 9, "Größe " * 40)
    return [
        ([{"role": "user", "content": f"Question {number} " * (1 + number % 4)}], texts[number % len(texts)])
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), 1)


@pytest.fixture(scope="session")
def loaded(models: Path) -> dict[str, RewardModel]:
    return {name: RewardModel.load(models / name, batch_tokens=4096) for name in OBJECTIVES}


@dataclass
class Here:
    """The service's backend without Ray: the same batching, models and store, in this process."""

    loaded: dict[str, RewardModel]
    store: FeedbackStore
    rules: Rules
    metrics: ServeMetrics = field(default_factory=ServeMetrics)
    draining: bool = False
    running: int = 0
    policies: Mapping[str, Callable[[Sequence[Message]], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._batcher = Batcher(
            self._run, batch_tokens=4096, longest=96, max_waiting=512, replicas=1, on_round=self.metrics.round
        )

    async def _run(self, items: list[Item]) -> list[Scored]:
        found = {name: model.score(items, name) for name, model in self.loaded.items()}
        return [Scored("v1", {name: scores[i] for name, scores in found.items()}) for i in range(len(items))]

    async def ready(self) -> bool:
        return True

    async def score(self, items: Sequence[Item]) -> list[Scored]:
        return await self._batcher.submit(items)

    async def feedback(self, request: FeedbackRequest) -> Outcome:
        return self.store.append([reaction_event(request, "salt")])[0]

    async def models(self) -> list[ModelInfo]:
        rewards = [ModelInfo(id="reward-live", kind="reward", role="live", version="v1", share=1.0)]
        return rewards + [
            ModelInfo(id=name, kind="policy", role="policy", version=f"{name}-1", share=1.0) for name in self.policies
        ]

    async def chat(self, request: ChatRequest) -> ChatReply:
        if request.model not in self.policies:
            raise ApiError(404, "unknown", f"model: no policy {request.model!r} is served here")
        text = await asyncio.to_thread(self.policies[request.model], plain(request.messages))
        id_, version = new_response_id(), f"{request.model}-1"
        event = served_event(id_, request, version, text, "salt")
        if event is not None:
            self.store.append([event])
        return chat_reply(id_, request.model, version, text, "stop", prompt_tokens=1, response_tokens=len(text))


def rules(*, token: str | None = None, requests_per_s: float = 1e6) -> Rules:
    digest = token_digest(token) if token else None
    return Rules(digest, 64 * 1024, requests_per_s, 20.0, log_text=False, hosts=None if token else ("testserver",))


@pytest.fixture
def here(loaded: dict[str, RewardModel], tmp_path: Path) -> Here:
    store = FeedbackStore(str(tmp_path / "store"), tmp_path / "store" / ".log", settle_s=60)
    store.start()
    return Here(loaded, store, rules())


@pytest.fixture
async def http(here: Here) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(here), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        yield client


@contextmanager
def listening(backend: Here) -> Iterator[str]:
    """The app behind a real HTTP server on a port of its own; yields its address."""
    server = uvicorn.Server(uvicorn.Config(make_app(backend), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(loaded: dict[str, RewardModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service for clients that are not ours."""
    folder = tmp_path_factory.mktemp("served")
    store = FeedbackStore(str(folder), folder / ".log", settle_s=60)
    store.start()
    with listening(Here(loaded, store, dataclasses.replace(rules(), hosts=None))) as address:
        yield address
