"""Endpoints in the formats of other systems: OpenRLHF, vLLM, TEI (text-embeddings-inference) and OpenAI moderation.

OpenRLHF's remote reward model; score, rerank, classify and pooling of vLLM; predict and rerank of TEI; OpenAI's
moderation by the safety model. All of them score as /v1/score does. A query and a document are scored as a user message
and a response to it, a single text as a response to an empty user message; text of a chat template is split into its
turns (rluf.serve.chat_text). Token counts in `usage` are estimates from characters.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI
from pydantic import AliasChoices, Field, field_validator, model_validator

from rluf.config.objectives import PRIMARY_OBJECTIVE, find_objective_spec
from rluf.prepare.schema import MAX_MESSAGES, MAX_TEXT_CHARS
from rluf.serve.api import (
    MAX_ITEMS_PER_REQUEST,
    ApiError,
    ClientMessage,
    MessageText,
    RoutedRequest,
    ScoreRoute,
    build_score_route,
)
from rluf.serve.batching import MAX_QUEUED_RESPONSES, estimate_tokens
from rluf.serve.chat_text import build_custom_format, split_pair, split_text
from rluf.serve.client_fields import NEUTRAL_SCORE_VALUES, drop_neutral_fields
from rluf.types import Message, ScoringItem
from rluf.utils.stats import logit

if TYPE_CHECKING:
    from rluf.serve.api import ScoredItem
    from rluf.serve.middleware import ServiceBackend

UNSAFE_THRESHOLD = 0.5
"""Moderation flags texts with a safety score below this."""
DEFAULT_OBJECTIVE, MODERATION_OBJECTIVE = PRIMARY_OBJECTIVE, "safety"
MODEL_ROLES = {"reward-live": "live", "reward-candidate": "candidate"}
"""Roles by the ids of /v1/models; as a `model` field an id means love by the version with this role."""

RewardTextList = Annotated[list[MessageText], Field(min_length=1, max_length=MAX_QUEUED_RESPONSES)]
TextList = Annotated[list[MessageText], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]


class CompatRequest(RoutedRequest):
    """Base class of requests in other systems' formats. Fields that would change a reply are honored or refused.

    `truncate` false (TEI's): a text that is longer than the models read is an error.
    """

    truncate: bool = True

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, values: Any) -> Any:
        return drop_neutral_fields(values, NEUTRAL_SCORE_VALUES)

    def to_route(self) -> ScoreRoute:
        """Convert to the gateway's type; a `model` that is an id of /v1/models requires its version."""
        role = MODEL_ROLES.get(getattr(self, "model", ""), self.model_version)
        if self.model_version not in (None, role):
            raise ApiError(422, "invalid", "model and model_version differ; send one of them")
        return build_score_route(self.user, self.conversation_id, role)


class ActivationRequest(CompatRequest):
    """Fields for logits in place of probabilities, under the names of two releases of vLLM and of TEI."""

    activation: bool | None = None
    use_activation: bool | None = None
    raw_scores: bool | None = None

    @model_validator(mode="after")
    def _check_activation(self) -> ActivationRequest:
        if len(self._list_activations()) > 1:
            raise ValueError("activation, use_activation and raw_scores differ; send one of them")
        return self

    def _list_activations(self) -> set[bool]:
        answers = (self.activation, self.use_activation, None if self.raw_scores is None else not self.raw_scores)
        return {answer for answer in answers if answer is not None}

    def apply_activation(self, values: Sequence[float]) -> list[float]:
        """Probabilities, or their log-odds if the request asks for no activation."""
        return [logit(value) for value in values] if False in self._list_activations() else list(values)


class RemoteRewardRequest(CompatRequest):
    """OpenRLHF: decoded texts of prompt and response together, and optionally the prompts that they start with."""

    query: RewardTextList
    prompts: RewardTextList | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> RemoteRewardRequest:
        if self.prompts is not None and len(self.prompts) != len(self.query):
            raise ValueError(f"{len(self.query)} queries but {len(self.prompts)} prompts; send one prompt per query")
        return self


class PairScoreRequest(ActivationRequest):
    """vLLM's score: text pairs under one of its field names per side; one left text is paired with all right ones.

    vLLM has renamed the fields over its releases, so all names are accepted.
    """

    text_1: MessageText | TextList | None = None
    text_2: MessageText | TextList | None = None
    queries: MessageText | TextList | None = None
    documents: MessageText | TextList | None = None
    data_1: MessageText | TextList | None = None
    data_2: MessageText | TextList | None = None
    items: MessageText | TextList | None = None
    model: MessageText = DEFAULT_OBJECTIVE

    def list_text_pairs(self) -> list[tuple[str, str]]:
        """Return the pairs in order. Raises ApiError when a side is missing or the lengths differ."""
        lefts = [text for text in (self.text_1, self.queries, self.data_1) if text is not None]
        rights = [text for text in (self.text_2, self.documents, self.data_2, self.items) if text is not None]
        if len(lefts) != 1 or len(rights) != 1:
            raise ApiError(
                422, "invalid", "send text_1 and text_2, data_1 and data_2, or queries and documents or items"
            )
        left, right = lefts[0], rights[0]
        left_texts, right_texts = _as_list(left), _as_list(right)
        if len(left_texts) == 1:
            left_texts = left_texts * len(right_texts)
        if len(left_texts) != len(right_texts):
            raise ApiError(422, "invalid", f"{len(left_texts)} texts on one side, {len(right_texts)} on the other")
        return list(zip(left_texts, right_texts, strict=True))


class RerankRequest(ActivationRequest):
    """Rerank in vLLM's (Jina's, Cohere's) format with `documents`, or in TEI's with `texts`."""

    query: MessageText
    documents: (
        Annotated[list[MessageText | dict[str, MessageText]], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]
        | None
    ) = None
    texts: TextList | None = None
    top_n: int | None = Field(strict=True, default=None, ge=0, validation_alias=AliasChoices("top_n", "top_k"))
    return_documents: bool | None = None
    return_text: bool | None = None
    model: MessageText = DEFAULT_OBJECTIVE

    @model_validator(mode="after")
    def _check_return_fields(self) -> RerankRequest:
        if None not in (self.return_documents, self.return_text) and self.return_documents != self.return_text:
            raise ValueError("return_documents and return_text differ; send one of them")
        return self

    @property
    def wants_texts(self) -> bool:
        """Whether results have their texts: as the request says under either name, else by its format."""
        answer = self.return_text if self.return_documents is None else self.return_documents
        return self.documents is not None if answer is None else answer

    def list_response_texts(self) -> list[str]:
        """Return the texts to order. Raises ApiError when there are none, or a document has no text."""
        if (self.texts is None) == (self.documents is None):
            raise ApiError(422, "invalid", "send either documents or texts")
        texts: list[str | None] = [
            document if isinstance(document, str) else document.get("text")
            for document in self.texts or self.documents or ()
        ]
        if any(text is None for text in texts):
            raise ApiError(422, "invalid", "a document has no text")
        return [text for text in texts if text is not None]


class ClassifyRequest(ActivationRequest):
    """vLLM's classify and pooling: texts, or `messages` that end with the response."""

    input: MessageText | TextList | None = None
    messages: Annotated[list[ClientMessage], Field(min_length=2, max_length=MAX_MESSAGES)] | None = None
    model: MessageText = DEFAULT_OBJECTIVE

    def list_items(self, split: Callable[[str], ScoringItem]) -> list[ScoringItem]:
        """Return the items to score. Raises ApiError 422 when there are none, or the messages have no response."""
        if (self.input is None) == (self.messages is None):
            raise ApiError(422, "invalid", "send either input or messages")
        if self.messages is None:
            return [split(text) for text in _as_list(self.input or "")]
        *context, answer = (Message(role=message.role, content=message.content) for message in self.messages)
        if answer["role"] != "assistant" or context[-1]["role"] != "user" or not context[-1]["content"].strip():
            raise ApiError(422, "invalid", "messages: they must end with a user message and the assistant's response")
        return [ScoringItem(context, answer["content"])]


class PredictRequest(ActivationRequest):
    """TEI's predict: a text, or a list whose entries are lists of one text or of a pair of texts."""

    inputs: MessageText | TextList | Annotated[list[TextList], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]


class ModerationRequest(CompatRequest):
    """OpenAI's moderation: one text or several."""

    input: MessageText | TextList
    model: MessageText = MODERATION_OBJECTIVE

    @field_validator("model")
    @classmethod
    def _check_model(cls, name: str) -> str:
        if name != MODERATION_OBJECTIVE and not re.match("(text|omni)-moderation-", name):
            raise ValueError(f"expected {MODERATION_OBJECTIVE}, or the name of a moderation model of OpenAI")
        return name


class CompatScorer:
    """Splits texts by the service's chat formats and scores them for one request."""

    def __init__(self, backend: ServiceBackend) -> None:
        self._backend = backend
        self._custom_format = build_custom_format(backend.rules.chat_markers)

    def split_text(self, text: str, prompt: str = "") -> ScoringItem:
        """Split a text into messages and response; see rluf.serve.chat_text."""
        return split_text(text, prompt, self._custom_format)

    def split_pair(self, query: str, response: str) -> ScoringItem:
        """Make an item of a query and a response; see rluf.serve.chat_text."""
        return split_pair(query, response, self._custom_format)

    async def score_items(self, items: Sequence[ScoringItem], request: CompatRequest) -> list[ScoredItem]:
        """Score all items of a request with one model version. Raises ApiError 413 for texts it must not cut."""
        scored_items = await self._backend.score_items(items, [request.to_route()] * len(items))
        cut_indices = [i for i, scored in enumerate(scored_items) if any(s.is_cut for s in scored.scores.values())]
        if cut_indices and not request.truncate:
            raise ApiError(413, "too_long", f"text {cut_indices[0]} is longer than a model reads; send truncate: true")
        return scored_items


def add_compat_routes(app: FastAPI, backend: ServiceBackend) -> None:
    """Add the endpoints in other systems' formats to the app."""
    scorer = CompatScorer(backend)
    _add_openrlhf_routes(app, scorer)
    _add_vllm_routes(app, scorer)
    _add_rerank_routes(app, scorer)
    _add_tei_routes(app, scorer)
    _add_moderation_routes(app, scorer)


def _add_openrlhf_routes(app: FastAPI, scorer: CompatScorer) -> None:
    @app.post("/get_reward", tags=["compatible"])
    async def get_reward(body: RemoteRewardRequest) -> dict[str, Any]:
        """OpenRLHF's remote reward model: `rewards` are calibrated logits of love, `scores` its probabilities."""
        prompts = body.prompts if body.prompts is not None else [""] * len(body.query)
        items = [scorer.split_text(query, prompt) for query, prompt in zip(body.query, prompts, strict=True)]
        scored_items = await scorer.score_items(items, body)
        names = list(scored_items[0].scores)
        values_by_objective = {name: [item.scores[name].value for item in scored_items] for name in names}
        love_values = _select_objective_values(scored_items, DEFAULT_OBJECTIVE)
        # Logits as rewards: probabilities near 0 and 1 would give almost no advantage.
        rewards = [logit(value) for value in love_values]
        return {"rewards": rewards, "scores": love_values, "extra_logs": values_by_objective}


def _add_vllm_routes(app: FastAPI, scorer: CompatScorer) -> None:
    @app.post("/score", tags=["compatible"])
    async def score(body: PairScoreRequest) -> dict[str, Any]:
        """vLLM's score of text pairs; `model` names the objective (default love)."""
        items = [scorer.split_pair(left, right) for left, right in body.list_text_pairs()]
        scored_items = await scorer.score_items(items, body)
        values = body.apply_activation(_select_objective_values(scored_items, body.model))
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]
        return _build_reply_envelope("score", body.model, items, scored_items) | {"data": data}

    @app.post("/classify", tags=["compatible"])
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        """vLLM's classify: probability of each text's positive label under the objective named by `model`."""
        items = body.list_items(scorer.split_text)
        scored_items = await scorer.score_items(items, body)
        values = body.apply_activation(_select_objective_values(scored_items, body.model))
        label = find_objective_spec(_resolve_objective(body.model, scored_items[0].scores)).positive_label
        data = [{"index": i, "label": label, "probs": [value], "num_classes": 1} for i, value in enumerate(values)]
        return _build_reply_envelope("classify", body.model, items, scored_items) | {"data": data}

    @app.post("/pooling", tags=["compatible"])
    async def pooling(body: ClassifyRequest) -> dict[str, Any]:
        """vLLM's pooling of a reward model: one value for each text, under the objective named by `model`."""
        items = body.list_items(scorer.split_text)
        scored_items = await scorer.score_items(items, body)
        values = body.apply_activation(_select_objective_values(scored_items, body.model))
        data = [{"index": i, "object": "pooling", "data": [value]} for i, value in enumerate(values)]
        return _build_reply_envelope("pool", body.model, items, scored_items) | {"data": data}


def _add_rerank_routes(app: FastAPI, scorer: CompatScorer) -> None:
    async def rerank(body: RerankRequest) -> Any:
        """Order texts by their score as responses to the query: vLLM's (Jina's, Cohere's) format, or TEI's."""
        texts = body.list_response_texts()
        items = [scorer.split_pair(body.query, text) for text in texts]
        scored_items = await scorer.score_items(items, body)
        values = _select_objective_values(scored_items, body.model)
        order = sorted(range(len(texts)), key=lambda i: -values[i])[: body.top_n or None]
        scores = body.apply_activation(values)
        if body.texts is not None:
            return [{"index": i, "score": scores[i], **({"text": texts[i]} if body.wants_texts else {})} for i in order]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
        if body.wants_texts:
            results = [result | {"document": {"text": texts[result["index"]]}} for result in results]
        envelope = _build_reply_envelope("rerank", body.model, items, scored_items)
        del envelope["object"]  # rerank replies have none
        return envelope | {"results": results}

    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        app.post(path, tags=["compatible"], response_model=None, name=path.strip("/").replace("/", "_"))(rerank)


def _add_tei_routes(app: FastAPI, scorer: CompatScorer) -> None:
    @app.post("/predict", tags=["compatible"])
    async def predict(body: PredictRequest) -> Any:
        """TEI's predict: the label love with its score; for a list of lists, one such list per entry."""
        inputs: Sequence[Any] = [[body.inputs]] if isinstance(body.inputs, str) else body.inputs
        is_single = isinstance(inputs[0], str)
        entries: list[list[str]] = [list(inputs)] if is_single else [list(entry) for entry in inputs]
        if any(len(entry) not in (1, 2) for entry in entries):
            raise ApiError(422, "invalid", "inputs: an entry is one text, or a pair of texts")
        items = [scorer.split_pair(*entry) if len(entry) == 2 else scorer.split_text(entry[0]) for entry in entries]
        scores = body.apply_activation(
            _select_objective_values(await scorer.score_items(items, body), DEFAULT_OBJECTIVE)
        )
        predictions = [[{"label": DEFAULT_OBJECTIVE, "score": score}] for score in scores]
        return predictions[0] if is_single or isinstance(body.inputs, str) else predictions


def _add_moderation_routes(app: FastAPI, scorer: CompatScorer) -> None:
    @app.post("/v1/moderations", tags=["compatible"])
    async def moderations(body: ModerationRequest) -> dict[str, Any]:
        """OpenAI's moderation by the safety model: one category, unsafe, flagged if safety is below 0.5."""
        scored_items = await scorer.score_items([scorer.split_text(text) for text in _as_list(body.input)], body)
        values = _select_objective_values(scored_items, MODERATION_OBJECTIVE)
        results = [
            {
                "flagged": value < UNSAFE_THRESHOLD,
                "categories": {"unsafe": value < UNSAFE_THRESHOLD},
                "category_scores": {"unsafe": 1 - value},
                "category_applied_input_types": {"unsafe": ["text"]},
            }
            for value in values
        ]
        return {"id": f"modr-{uuid.uuid4().hex}", "model": scored_items[0].model_version, "results": results}


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _resolve_objective(model_name: str, objectives: Iterable[str]) -> str:
    """The objective that a `model` field names: an objective, or love for a reward model's id. Raises ApiError 404."""
    names = tuple(objectives)
    objective = DEFAULT_OBJECTIVE if model_name in MODEL_ROLES else model_name
    if objective not in names:
        raise ApiError(404, "model", f"model: expected one of {', '.join(names)}, got {model_name[:40]!r}")
    return objective


def _select_objective_values(scored_items: Sequence[ScoredItem], model_name: str) -> list[float]:
    """Return the values of the objective that a `model` field names."""
    objective = _resolve_objective(model_name, scored_items[0].scores)
    return [scored_item.scores[objective].value for scored_item in scored_items]


def _build_reply_envelope(
    kind: str, model_name: str, items: Sequence[ScoringItem], scored_items: Sequence[ScoredItem]
) -> dict[str, Any]:
    token_count = sum(estimate_tokens(item, MAX_TEXT_CHARS) for item in items)
    return {
        "id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model_name,
        "model_version": scored_items[0].model_version,
        "usage": {"prompt_tokens": token_count, "total_tokens": token_count},
    }  # fmt: skip
