"""Typed HTTP client of the service. It retries: scoring and feedback requests are both safe to repeat."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from rluf.config.objectives import PRIMARY_OBJECTIVE
from rluf.errors import ResourceError, SettingsError
from rluf.serve import api
from rluf.serve.api import ApiError
from rluf.types import Message, Score, ScoringItem

ReplyModel = TypeVar("ReplyModel", bound=BaseModel)

RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed."""
INITIAL_WAIT_S = 0.1
MAX_WAIT_S = 5.0


class RewardClient:
    """Client of one service. Use it as a context manager or call `close`; threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        max_attempts: int = 8,
        max_retry_after_s: float = 120.0,
        model_version: str | None = None,
    ) -> None:
        """`token` is the bearer token, by default RLUF_SERVE_TOKEN; `timeout_s` bounds one attempt.

        A busy service says when to retry; a wait of more than `max_retry_after_s` is an error at once. `model_version`
        (live, candidate, or a version) is required of every score: another one is ApiError 409. Raises SettingsError
        for an address or a token that cannot be sent.
        """
        self.max_retry_after_s, self.model_version = max_retry_after_s, model_version
        bearer_token = (token or os.environ.get("RLUF_SERVE_TOKEN", "")).strip()
        if not (bearer_token.isascii() and bearer_token.isprintable()):
            raise SettingsError("the token of the service has other characters than printable ASCII; check its source")
        headers = {"Authorization": f"Bearer {bearer_token}"} if bearer_token else {}
        self.url, self.max_attempts = _check_url(url), max_attempts
        # trust_env off: a proxy set for downloads must not see conversations.
        self._http_client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)

    def score(self, messages: Sequence[Message], response: str, is_truncated: bool = False) -> api.ScoreReply:
        """Score one response. Raises ApiError if the service rejects it, ResourceError if it stays unreachable."""
        item = ScoringItem(messages, response, is_truncated)
        return self._send("POST", "/v1/score", self._to_request_json(item), api.ScoreReply)

    def score_batch(self, items: Sequence[ScoringItem]) -> list[api.ScoreReply]:
        """Score many responses in order, in requests of at most MAX_ITEMS_PER_REQUEST."""
        replies: list[api.ScoreReply] = []
        for start in range(0, len(items), api.MAX_ITEMS_PER_REQUEST):
            batch = [self._to_request_json(item) for item in items[start : start + api.MAX_ITEMS_PER_REQUEST]]
            replies += self._send("POST", "/v1/score/batch", {"items": batch}, api.ScoreBatchReply).results
        return replies

    def score_objective(self, items: Sequence[ScoringItem], objective: str) -> list[Score]:
        """Score items by one objective and return the library's Score, as a loaded reward model does.

        Raises ApiError 422 when the service does not serve the objective.
        """
        scores = []
        for reply in self.score_batch(items):
            if objective not in reply.scores:
                raise ApiError(422, "invalid", f"{self.url} does not serve {objective}, but {', '.join(reply.scores)}")
            score = reply.scores[objective]
            scores.append(
                Score(
                    objective, score.value, score.raw, score.spread, score.is_probability, score.logit_spread,
                    score.exact_logit, score.truncated,
                )
            )  # fmt: skip
        return scores

    def rank(
        self, messages: Sequence[Message], responses: Sequence[str], objective: str = PRIMARY_OBJECTIVE
    ) -> api.RankReply:
        """Order responses to one conversation from best to worst by an objective."""
        body = {"messages": list(messages), "responses": list(responses), "objective": objective}
        if self.model_version is not None:
            body["model_version"] = self.model_version
        return self._send("POST", "/v1/rank", body, api.RankReply)

    def send_feedback(
        self,
        response_id: str,
        reaction: str | None,
        record: api.FeedbackContext | None = None,
        *,
        user: str | None = None,
    ) -> api.FeedbackReply:
        """Store a reaction of the `user` who chatted; it is on the service's disk when this returns."""
        record_json = None if record is None else record.model_dump(mode="json")
        body = {"id": response_id, "reaction": reaction, "record": record_json, "user": user}
        return self._send("POST", "/v1/feedback", body, api.FeedbackReply)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str = "",
        user: str | None = None,
        conversation_id: str | None = None,
    ) -> api.ChatReply:
        """Sample one response from a served policy, by default the first one."""
        body = {"messages": list(messages), "model": model, "user": user, "conversation_id": conversation_id}
        return self._send("POST", "/v1/chat/completions", body, api.ChatReply)

    def list_models(self) -> list[api.ModelInfo]:
        """Return the served reward models and policies."""
        return self._send("GET", "/v1/models", None, api.ModelsReply).data

    def close(self) -> None:
        """Close the connections."""
        self._http_client.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _to_request_json(self, item: ScoringItem) -> dict[str, object]:
        body: dict[str, object] = {"messages": list(item.messages), "response": item.response}
        # Only if they say something: services of earlier releases reject the fields.
        if item.is_truncated:
            body["finish_reason"] = "length"
        if self.model_version is not None:
            body["model_version"] = self.model_version
        return body

    def _send(
        self, method: str, path: str, body: Mapping[str, object] | None, reply_type: type[ReplyModel]
    ) -> ReplyModel:
        """Send one request; retry with exponential waits while the service is busy, restarting or unreachable."""
        problem, attempt = "no response", 0
        wait_s = INITIAL_WAIT_S
        for attempt in range(self.max_attempts):
            if attempt:
                # Jitter, so that clients that were rejected together do not return together.
                time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(MAX_WAIT_S, max(INITIAL_WAIT_S, 2 * wait_s))
            try:
                http_response = self._http_client.request(method, path, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if http_response.is_success:
                return _parse_reply(http_response, reply_type)
            api_error = _parse_error_response(http_response)
            if http_response.status_code not in RETRYABLE_STATUSES:
                raise api_error
            problem = f"{api_error.status} {api_error.message}"
            retry_after_s = api_error.retry_after_s or 0.0
            if retry_after_s > self.max_retry_after_s:
                problem += f" (retry after {retry_after_s:g} s, which is more than max_retry_after_s)"
                break
            # Twice, since the jitter halves it at most: never earlier than the service asks for.
            wait_s = max(wait_s, 2 * retry_after_s)
        raise ResourceError(
            f"the service at {self.url} did not answer {path} in {attempt + 1} attempts: {problem}; check that "
            "it is running and that the address is right"
        )


def _check_url(url: str) -> str:
    """The address of a service without white space and slashes at its end. Raises SettingsError for another text."""
    try:
        parsed_url = httpx.URL(url.strip())
        is_address = parsed_url.scheme in ("http", "https") and bool(parsed_url.host) and not parsed_url.query
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise SettingsError(f"expected the address of a service, such as http://rewards:8000, got {url!r}")
    return url.strip().rstrip("/")


def _parse_reply(http_response: httpx.Response, reply_type: type[ReplyModel]) -> ReplyModel:
    try:
        return reply_type.model_validate_json(http_response.content)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ResourceError(f"{http_response.url} is not an rluf service ({reason}); check the address") from error


def _parse_error_response(http_response: httpx.Response) -> ApiError:
    """Convert an error response of the service, or of a proxy in front of it, to an ApiError."""
    retry_after = http_response.headers.get("Retry-After", "")
    # The header may also be an HTTP date, which only proxies send.
    retry_after_s = float(retry_after) if retry_after.isdecimal() else None
    try:
        detail = api.ErrorReply.model_validate_json(http_response.content).error
    except ValidationError:
        message = http_response.text[:200] or http_response.reason_phrase
        return ApiError(http_response.status_code, "http", message, retry_after_s)
    return ApiError(http_response.status_code, detail.type, detail.message, retry_after_s)
