"""A typed client of the service, with retries: scoring and feedback may both be sent twice without harm."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from rluf.errors import ResourceError
from rluf.reward.text import Item
from rluf.serve import api
from rluf.serve.limits import ApiError
from rluf.types import Message, Score

Answer = TypeVar("Answer", bound=BaseModel)

PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


class RewardClient:
    """Talks to one service. Use it as a context manager, or call close; it may be shared by threads."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 60.0, attempts: int = 8) -> None:
        """`token` is the bearer token, by default RLUF_SERVE_TOKEN; `timeout_s` bounds one attempt."""
        found = token or os.environ.get("RLUF_SERVE_TOKEN")
        headers = {"Authorization": f"Bearer {found}"} if found else {}
        self.url, self.attempts = url.rstrip("/"), attempts
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)

    def score(self, messages: Sequence[Message], response: str) -> api.ScoreReply:
        """Scores of one response. Raises ApiError for what the service refuses, ResourceError when it stays away."""
        return self._post("/v1/score", {"messages": list(messages), "response": response}, api.ScoreReply)

    def score_batch(self, items: Sequence[Item]) -> list[api.ScoreReply]:
        """Scores of many responses in order, sent in requests of at most MAX_ITEMS."""
        found: list[api.ScoreReply] = []
        for start in range(0, len(items), api.MAX_ITEMS):
            part = [{"messages": list(m), "response": r} for m, r in items[start : start + api.MAX_ITEMS]]
            found += self._post("/v1/score/batch", {"items": part}, api.ScoreBatchReply).results
        return found

    def scores(self, items: Sequence[Item], objective: str) -> list[Score]:
        """One objective's scores of items as the library's own Score, for those who hold no model themselves.

        Raises ApiError 422 when the service does not serve the objective.
        """
        found = []
        for reply in self.score_batch(items):
            if objective not in reply.scores:
                raise ApiError(422, "invalid", f"{self.url} does not serve {objective}, but {', '.join(reply.scores)}")
            one = reply.scores[objective]
            found.append(Score(objective, one.value, one.raw, one.spread))
        return found

    def rank(self, messages: Sequence[Message], responses: Sequence[str], objective: str = "love") -> api.RankReply:
        """Responses from best to worst."""
        body = {"messages": list(messages), "responses": list(responses), "objective": objective}
        return self._post("/v1/rank", body, api.RankReply)

    def feedback(self, id_: str, reaction: str | None, record: api.FeedbackContext | None = None) -> api.FeedbackReply:
        """Store a reaction; it is on the service's disk when this returns."""
        told = None if record is None else record.model_dump(mode="json")
        return self._post("/v1/feedback", {"id": id_, "reaction": reaction, "record": told}, api.FeedbackReply)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str = "",
        user: str = "anonymous",
        conversation_id: str | None = None,
    ) -> api.ChatReply:
        """One answer of a served policy."""
        body = {"messages": list(messages), "model": model, "user": user, "conversation_id": conversation_id}
        return self._post("/v1/chat/completions", body, api.ChatReply)

    def models(self) -> list[api.ModelInfo]:
        """What is served now."""
        return self._send("GET", "/v1/models", None, api.ModelsReply).data

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _post(self, path: str, body: Mapping[str, object], answer: type[Answer]) -> Answer:
        return self._send("POST", path, body, answer)

    def _send(self, method: str, path: str, body: Mapping[str, object] | None, answer: type[Answer]) -> Answer:
        """One request, sent again with growing waits while the service is busy, restarts or cannot be reached."""
        problem = "it never answered"
        wait = FIRST_WAIT_S
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(LONGEST_WAIT_S, 2 * wait)
            try:
                told = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if told.is_success:
                return self._read(told, answer)
            refused = _refusal(told)
            if told.status_code not in PASSING:
                raise refused
            problem = f"{refused.status} {refused.message}"
            wait = max(wait, min(LONGEST_WAIT_S, refused.retry_after_s or 0.0))
        raise ResourceError(
            f"the service at {self.url} did not answer {path} in {self.attempts} attempts: {problem}; check that it "
            "runs and that the address is right"
        )

    def _read(self, told: httpx.Response, answer: type[Answer]) -> Answer:
        try:
            return answer.model_validate_json(told.content)
        except ValidationError as error:
            raise ResourceError(
                f"{told.url} answered, but not as an rluf service does ({error.errors()[0]['msg']}); check the address"
            ) from error


def _refusal(told: httpx.Response) -> ApiError:
    """The error that an answer stands for, whoever sent it."""
    after = told.headers.get("Retry-After", "")
    seconds = float(after) if after.isdigit() else None
    try:
        detail = api.ErrorReply.model_validate_json(told.content).error
    except ValidationError:
        return ApiError(told.status_code, "http", told.text[:200] or told.reason_phrase, seconds)
    return ApiError(told.status_code, detail.type, detail.message, seconds)
