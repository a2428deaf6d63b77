"""What the HTTP app asks of whatever stands behind it, and the plain values that pass between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rluf.reward.text import Item
from rluf.serve.api import ChatReply, ChatRequest, FeedbackRequest, ModelInfo
from rluf.serve.metrics import ServeMetrics
from rluf.serve.store import Outcome
from rluf.types import Score


@dataclass(frozen=True, slots=True)
class Scored:
    """One item's scores by objective, and the version of the models that gave them."""

    version: str
    scores: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class Rules:
    """What the app enforces: digest of the token (none: open), body and rate limits, whether text may be logged.

    `hosts` are the Host names an open service answers to (none: any), so that no web page can reach it by another name.
    """

    token_digest: str | None
    max_body_bytes: int
    requests_per_s: float
    deadline_s: float
    log_text: bool
    hosts: tuple[str, ...] | None


class Backend(Protocol):
    """The models and the store behind the app. Every method raises ApiError for what a client should be told."""

    rules: Rules
    metrics: ServeMetrics
    draining: bool
    running: int

    async def ready(self) -> bool:
        """Whether the models answer."""

    async def score(self, items: Sequence[Item]) -> list[Scored]:
        """Scores of items, in order, all by one version."""

    async def feedback(self, request: FeedbackRequest) -> Outcome:
        """Store a reaction; on disk before this returns."""

    async def models(self) -> list[ModelInfo]:
        """All served models."""

    async def chat(self, request: ChatRequest) -> ChatReply:
        """One answer of a policy, logged as served."""
