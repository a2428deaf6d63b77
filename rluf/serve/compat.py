"""Endpoints in the formats of other systems: OpenRLHF, vLLM, TEI (text-embeddings-inference) and OpenAI moderation.

OpenRLHF's remote reward model; score, rerank and classify of vLLM; predict and rerank of TEI; OpenAI's moderation by
the safety model. All of them score as /v1/score does. A query and a document are scored as a user message and a
response to it, a single text as a response to an empty user message.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rluf.config.objectives import BUILTIN_OBJECTIVES, PRIMARY_OBJECTIVE, find_objective_spec
from rluf.serve.api import MAX_ITEMS_PER_REQUEST, ApiError, MessageText
from rluf.types import Message, ScoringItem
from rluf.utils.stats import logit

if TYPE_CHECKING:
    from rluf.serve.api import ScoredItem
    from rluf.serve.middleware import ServiceBackend

SPECIAL_TOKEN_ENDS = re.compile(r"^(?:\s|<\|[a-z_]+\|>|</?s>)+|(?:\s|<\|[a-z_]+\|>|</?s>)+$")
"""Special tokens and white space at both ends of a decoded response."""
CHATML_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)
UNSAFE_THRESHOLD = 0.5
"""Moderation flags texts with a safety score below this."""
DEFAULT_OBJECTIVE, MODERATION_OBJECTIVE = PRIMARY_OBJECTIVE, "safety"

TextList = Annotated[list[MessageText], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]


class CompatRequest(BaseModel):
    """Base class of requests in other systems' formats. Fields that do not apply (truncation, ...) are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RemoteRewardRequest(CompatRequest):
    """OpenRLHF: decoded texts of prompt and response together, and optionally the prompts that they start with."""

    query: TextList
    prompts: TextList | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> RemoteRewardRequest:
        if self.prompts is not None and len(self.prompts) != len(self.query):
            raise ValueError(f"{len(self.query)} queries but {len(self.prompts)} prompts; send one prompt per query")
        return self


class PairScoreRequest(CompatRequest):
    """vLLM's score: text pairs under one of its two field names per side; one left text is paired with all right ones.

    vLLM has renamed the fields over its releases, so both names are accepted.
    """

    text_1: MessageText | TextList | None = None
    text_2: MessageText | TextList | None = None
    queries: MessageText | TextList | None = None
    documents: MessageText | TextList | None = None
    model: MessageText = DEFAULT_OBJECTIVE

    def text_pairs(self) -> list[tuple[str, str]]:
        """Return the pairs in order. Raises ApiError when a side is missing or the lengths differ."""
        left = self.text_1 if self.text_1 is not None else self.queries
        right = self.text_2 if self.text_2 is not None else self.documents
        if left is None or right is None:
            raise ApiError(422, "invalid", "send text_1 and text_2, or queries and documents")
        left_texts, right_texts = _as_list(left), _as_list(right)
        if len(left_texts) == 1:
            left_texts = left_texts * len(right_texts)
        if len(left_texts) != len(right_texts):
            raise ApiError(422, "invalid", f"{len(left_texts)} texts on one side, {len(right_texts)} on the other")
        return list(zip(left_texts, right_texts, strict=True))


class RerankRequest(CompatRequest):
    """Rerank in vLLM's (Jina's, Cohere's) format with `documents`, or in TEI's with `texts`."""

    query: MessageText
    documents: (
        Annotated[list[MessageText | dict[str, MessageText]], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]
        | None
    ) = None
    texts: TextList | None = None
    top_n: int | None = Field(default=None, ge=0, le=MAX_ITEMS_PER_REQUEST)
    return_text: bool = False
    raw_scores: bool = False
    model: MessageText = DEFAULT_OBJECTIVE

    def response_texts(self) -> list[str]:
        """Return the texts to order. Raises ApiError when there are none, or a document has no text."""
        if self.texts is not None:
            return list(self.texts)
        if self.documents is None:
            raise ApiError(422, "invalid", "send documents (or texts)")
        texts = [document if isinstance(document, str) else document.get("text") for document in self.documents]
        if any(text is None for text in texts):
            raise ApiError(422, "invalid", "a document has no text")
        return [text for text in texts if text is not None]


class ClassifyRequest(CompatRequest):
    """vLLM's classify: texts, or a chat that ends with the response."""

    input: MessageText | TextList
    model: MessageText = DEFAULT_OBJECTIVE


class PredictRequest(CompatRequest):
    """TEI's predict: a text, or a list whose entries are lists of one text or of a pair of texts."""

    inputs: MessageText | TextList | Annotated[list[TextList], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]
    raw_scores: bool = False


class ModerationRequest(CompatRequest):
    """OpenAI's moderation: one text or several."""

    input: MessageText | TextList
    model: MessageText = MODERATION_OBJECTIVE


def add_compat_routes(app: FastAPI, backend: ServiceBackend) -> None:
    """Add the endpoints in other systems' formats to the app."""
    _add_openrlhf_routes(app, backend)
    _add_vllm_routes(app, backend)
    _add_tei_routes(app, backend)
    _add_moderation_routes(app, backend)


def _add_openrlhf_routes(app: FastAPI, backend: ServiceBackend) -> None:
    @app.post("/get_reward", tags=["compatible"])
    async def get_reward(body: RemoteRewardRequest) -> dict[str, Any]:
        """OpenRLHF's remote reward model: `rewards` are calibrated logits of love, `scores` its probabilities."""
        prompts = body.prompts if body.prompts is not None else [""] * len(body.query)
        items = [split_query(query, prompt) for query, prompt in zip(body.query, prompts, strict=True)]
        scored_items = await backend.score_items(items)
        names = list(scored_items[0].scores)
        values_by_objective = {name: [item.scores[name].value for item in scored_items] for name in names}
        love_values = _objective_values(scored_items, DEFAULT_OBJECTIVE)
        # Logits as rewards: probabilities near 0 and 1 would give almost no advantage.
        rewards = [logit(value) for value in love_values]
        return {"rewards": rewards, "scores": love_values, "extra_logs": values_by_objective}


def _add_vllm_routes(app: FastAPI, backend: ServiceBackend) -> None:
    @app.post("/score", tags=["compatible"])
    async def score(body: PairScoreRequest) -> dict[str, Any]:
        """vLLM's score of text pairs; `model` names the objective (default love)."""
        pairs = body.text_pairs()
        scored_items = await backend.score_items([_to_item(left, right) for left, right in pairs])
        data = [
            {"index": i, "object": "score", "score": value}
            for i, value in enumerate(_objective_values(scored_items, body.model))
        ]
        return _reply_envelope("score", body.model, scored_items) | {"data": data}

    @app.post("/classify", tags=["compatible"])
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        """vLLM's classify: probability of each text's positive label under the objective named by `model`."""
        scored_items = await backend.score_items([_to_item("", text) for text in _as_list(body.input)])
        label = _positive_label(body.model, scored_items[0].scores)
        data = [
            {"index": i, "label": label, "probs": [value], "num_classes": 1}
            for i, value in enumerate(_objective_values(scored_items, body.model))
        ]
        return _reply_envelope("classify", body.model, scored_items) | {"data": data}

    async def rerank(body: RerankRequest) -> Any:
        """Order texts by their score as responses to the query: vLLM's (Jina's, Cohere's) format, or TEI's."""
        texts = body.response_texts()
        scored_items = await backend.score_items([_to_item(body.query, text) for text in texts])
        values = _objective_values(scored_items, body.model)
        order = sorted(range(len(texts)), key=lambda i: -values[i])
        if body.texts is not None:
            scores = [logit(value) for value in values] if body.raw_scores else values
            return [{"index": i, "score": scores[i], **({"text": texts[i]} if body.return_text else {})} for i in order]
        results = [
            {"index": i, "document": {"text": texts[i]}, "relevance_score": values[i]}
            for i in order[: body.top_n or None]
        ]
        envelope = _reply_envelope("rerank", body.model, scored_items)
        del envelope["object"]  # rerank replies have none
        return envelope | {"results": results}

    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        app.post(path, tags=["compatible"], response_model=None, name=path.strip("/").replace("/", "_"))(rerank)


def _add_tei_routes(app: FastAPI, backend: ServiceBackend) -> None:
    @app.post("/predict", tags=["compatible"])
    async def predict(body: PredictRequest) -> Any:
        """TEI's predict: the label love with its score; for a list of lists, one such list per entry."""
        inputs: Sequence[Any] = [[body.inputs]] if isinstance(body.inputs, str) else body.inputs
        is_single = isinstance(inputs[0], str)
        entries: list[list[str]] = [list(inputs)] if is_single else [list(entry) for entry in inputs]
        if any(len(entry) not in (1, 2) for entry in entries):
            raise ApiError(422, "invalid", "inputs: an entry is one text, or a pair of texts")
        scored_items = await backend.score_items(
            [_to_item(*entry) if len(entry) == 2 else _to_item("", entry[0]) for entry in entries]
        )
        values = _objective_values(scored_items, DEFAULT_OBJECTIVE)
        scores = [logit(value) if body.raw_scores else value for value in values]
        predictions = [[{"label": DEFAULT_OBJECTIVE, "score": score}] for score in scores]
        return predictions[0] if is_single or isinstance(body.inputs, str) else predictions


def _add_moderation_routes(app: FastAPI, backend: ServiceBackend) -> None:
    @app.post("/v1/moderations", tags=["compatible"])
    async def moderations(body: ModerationRequest) -> dict[str, Any]:
        """OpenAI's moderation by the safety model: one category, unsafe, flagged if safety is below 0.5."""
        scored_items = await backend.score_items([_to_item("", text) for text in _as_list(body.input)])
        results = [
            {
                "flagged": value < UNSAFE_THRESHOLD,
                "categories": {"unsafe": value < UNSAFE_THRESHOLD},
                "category_scores": {"unsafe": 1 - value},
                "category_applied_input_types": {"unsafe": ["text"]},
            }
            for value in _objective_values(scored_items, MODERATION_OBJECTIVE)
        ]
        return {"id": f"modr-{uuid.uuid4().hex}", "model": scored_items[0].model_version, "results": results}


def split_query(query: str, prompt: str) -> ScoringItem:
    """Split a decoded text into messages and response. ChatML is parsed into turns; other text is one user message.

    Without a prompt, or when the text does not start with it, the response is the last ChatML turn or the whole text.
    """
    if prompt and query.startswith(prompt):
        turns = _parse_chatml(prompt)
        messages = turns or [Message(role="user", content=prompt)]
        return ScoringItem(messages, SPECIAL_TOKEN_ENDS.sub("", query[len(prompt) :]))
    turns = _parse_chatml(query)
    if turns and turns[-1]["role"] == "assistant":
        return ScoringItem(turns[:-1], turns[-1]["content"])
    return ScoringItem([Message(role="user", content=prompt)], SPECIAL_TOKEN_ENDS.sub("", query))


def _parse_chatml(text: str) -> list[Message]:
    return [Message(role=role, content=content) for role, content in CHATML_TURN.findall(text)]


def _to_item(query: str, response: str) -> ScoringItem:
    return ScoringItem([Message(role="user", content=query)], response)


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _objective_values(scored_items: Sequence[ScoredItem], objective: str) -> list[float]:
    """Return the values of the objective named by a `model` field, or of love for any other model name."""
    scores = scored_items[0].scores
    # Clients put their own model names there, so unknown names mean love. Only safety never falls back: a love score
    # would pass for a moderation result.
    name = objective if objective in scores else DEFAULT_OBJECTIVE
    if name not in scores or (objective == MODERATION_OBJECTIVE and name != objective):
        raise ApiError(422, "invalid", f"model: expected one of {', '.join(scores)}, got {objective[:40]!r}")
    return [scored_item.scores[name].value for scored_item in scored_items]


def _positive_label(objective: str, served_objectives: Iterable[str]) -> str:
    is_known = objective in served_objectives or objective in BUILTIN_OBJECTIVES
    return find_objective_spec(objective if is_known else DEFAULT_OBJECTIVE).positive_label


def _reply_envelope(kind: str, model_name: str, scored_items: Sequence[ScoredItem]) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model_name,
        "model_version": scored_items[0].model_version, "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }  # fmt: skip
