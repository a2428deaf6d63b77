"""What others already call: OpenRLHF's remote reward models, score, rerank and classify of vLLM's and TEI's servers.

And OpenAI's moderation for the safety model. Each speaks its own shape and scores as /v1/score does. A query and a
document are read as a user's message and a response to it; a single text as a response to nothing said.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rluf.reward.calibration import logit
from rluf.serve.api import MAX_ITEMS, Text
from rluf.serve.limits import ApiError
from rluf.types import Message

if TYPE_CHECKING:
    from rluf.reward.text import Item
    from rluf.serve.backend import Backend, Scored

SPECIAL = re.compile(r"^(?:\s|<\|[a-z_]+\|>|</?s>)+|(?:\s|<\|[a-z_]+\|>|</?s>)+$")
"""Special tokens and blanks at the ends of a decoded response."""
CHATML = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)
UNSAFE = 0.5
"""Moderation flags what the safety model gives less than this."""
DEFAULT = "love"

Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS)]


class Foreign(BaseModel):
    """Base of foreign requests: their other fields (model, truncation, ...) change nothing here."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RemoteRewardRequest(Foreign):
    """OpenRLHF: whole texts (prompt and response as decoded), and the prompts they start with."""

    query: Texts
    prompts: Texts | None = None

    @model_validator(mode="after")
    def _alike(self) -> RemoteRewardRequest:
        if self.prompts is not None and len(self.prompts) != len(self.query):
            raise ValueError(f"{len(self.query)} queries but {len(self.prompts)} prompts; send one prompt a query")
        return self


class PairScoreRequest(Foreign):
    """vLLM's score: pairs under one of its three names for the two sides; one text against many is spread out."""

    text_1: Text | Texts | None = None
    text_2: Text | Texts | None = None
    queries: Text | Texts | None = None
    documents: Text | Texts | None = None
    model: Text = DEFAULT

    def pairs(self) -> list[tuple[str, str]]:
        """Pairs in order. Raises ApiError when a side is missing or the lengths do not fit."""
        left = self.text_1 if self.text_1 is not None else self.queries
        right = self.text_2 if self.text_2 is not None else self.documents
        if left is None or right is None:
            raise ApiError(422, "invalid", "send text_1 and text_2, or queries and documents")
        lefts, rights = _listed(left), _listed(right)
        if len(lefts) == 1:
            lefts = lefts * len(rights)
        if len(lefts) != len(rights):
            raise ApiError(422, "invalid", f"{len(lefts)} texts on one side, {len(rights)} on the other")
        return list(zip(lefts, rights, strict=True))


class RerankRequest(Foreign):
    """Rerank in vLLM's (Jina's, Cohere's) shape with `documents`, or in TEI's with `texts`."""

    query: Text
    documents: Annotated[list[Text | dict[str, Text]], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    texts: Texts | None = None
    top_n: int | None = Field(default=None, ge=0, le=MAX_ITEMS)
    return_text: bool = False
    raw_scores: bool = False
    model: Text = DEFAULT

    def responses(self) -> list[str]:
        """The texts to order. Raises ApiError when there are none, or a document has no text."""
        if self.texts is not None:
            return list(self.texts)
        if self.documents is None:
            raise ApiError(422, "invalid", "send documents (or texts)")
        found = [d if isinstance(d, str) else d.get("text") for d in self.documents]
        if any(text is None for text in found):
            raise ApiError(422, "invalid", "a document has no text")
        return [text for text in found if text is not None]


class ClassifyRequest(Foreign):
    """vLLM's classify: texts, or a chat that ends with the response."""

    input: Text | Texts
    model: Text = DEFAULT


class PredictRequest(Foreign):
    """TEI's predict: a text, a pair, or a list of either in lists."""

    inputs: Text | Texts | Annotated[list[Texts], Field(min_length=1, max_length=MAX_ITEMS)]
    raw_scores: bool = False


class ModerationRequest(Foreign):
    """OpenAI's moderation of texts."""

    input: Text | Texts
    model: Text = "safety"


def add_foreign_routes(app: FastAPI, backend: Backend) -> None:
    """Put the foreign endpoints on the app."""
    _add_openrlhf(app, backend)
    _add_vllm(app, backend)
    _add_tei(app, backend)
    _add_moderation(app, backend)


def _add_openrlhf(app: FastAPI, backend: Backend) -> None:
    @app.post("/get_reward", tags=["compatible"])
    async def get_reward(body: RemoteRewardRequest) -> dict[str, Any]:
        """OpenRLHF's remote reward model: rewards are calibrated logits of love, scores its probabilities."""
        prompts = body.prompts if body.prompts is not None else [""] * len(body.query)
        items = [split_query(query, prompt) for query, prompt in zip(body.query, prompts, strict=True)]
        found = await backend.score(items)
        values = {name: [one.scores[name].value for one in found] for name in found[0].scores}
        love = _chosen(found, DEFAULT)
        return {"rewards": [logit(value) for value in love], "scores": love, "extra_logs": values}


def _add_vllm(app: FastAPI, backend: Backend) -> None:
    @app.post("/score", tags=["compatible"])
    async def score(body: PairScoreRequest) -> dict[str, Any]:
        """vLLM's score of text pairs; `model` names the objective (default love)."""
        pairs = body.pairs()
        found = await backend.score([_item(left, right) for left, right in pairs])
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(_chosen(found, body.model))]
        return _envelope("score", body.model, found) | {"data": data}

    @app.post("/classify", tags=["compatible"])
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        """vLLM's classify: probability of each text's positive label under the objective `model` names."""
        found = await backend.score([_item("", text) for text in _listed(body.input)])
        data = [
            {"index": i, "label": _label(body.model), "probs": [value], "num_classes": 1}
            for i, value in enumerate(_chosen(found, body.model))
        ]
        return _envelope("classify", body.model, found) | {"data": data}

    async def rerank(body: RerankRequest) -> Any:
        """Order texts by how well they answer the query: vLLM's (Jina's, Cohere's) shape, or TEI's with `texts`."""
        texts = body.responses()
        found = await backend.score([_item(body.query, text) for text in texts])
        values = _chosen(found, body.model)
        order = sorted(range(len(texts)), key=lambda i: -values[i])
        if body.texts is not None:
            scores = [logit(value) for value in values] if body.raw_scores else values
            return [{"index": i, "score": scores[i], **({"text": texts[i]} if body.return_text else {})} for i in order]
        results = [
            {"index": i, "document": {"text": texts[i]}, "relevance_score": values[i]}
            for i in order[: body.top_n or None]
        ]
        named = {key: value for key, value in _envelope("rerank", body.model, found).items() if key != "object"}
        return named | {"results": results}

    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        app.post(path, tags=["compatible"], response_model=None, name=path.strip("/").replace("/", "_"))(rerank)


def _add_tei(app: FastAPI, backend: Backend) -> None:
    @app.post("/predict", tags=["compatible"])
    async def predict(body: PredictRequest) -> Any:
        """TEI's predict: the label love with its score; for a list of lists one answer each."""
        inputs: Sequence[Any] = [[body.inputs]] if isinstance(body.inputs, str) else body.inputs
        single = isinstance(inputs[0], str)
        rows: list[list[str]] = [list(inputs)] if single else [list(row) for row in inputs]
        if any(len(row) not in (1, 2) for row in rows):
            raise ApiError(422, "invalid", "inputs: an entry is one text, or a pair of texts")
        found = await backend.score([_item(*row) if len(row) == 2 else _item("", row[0]) for row in rows])
        values = [logit(value) if body.raw_scores else value for value in _chosen(found, DEFAULT)]
        answers = [[{"label": DEFAULT, "score": value}] for value in values]
        return answers[0] if single or isinstance(body.inputs, str) else answers


def _add_moderation(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/moderations", tags=["compatible"])
    async def moderations(body: ModerationRequest) -> dict[str, Any]:
        """OpenAI's moderation by the safety model: one category, unsafe, flagged where safety is below a half."""
        found = await backend.score([_item("", text) for text in _listed(body.input)])
        results = [
            {
                "flagged": value < UNSAFE,
                "categories": {"unsafe": value < UNSAFE},
                "category_scores": {"unsafe": 1 - value},
                "category_applied_input_types": {"unsafe": ["text"]},
            }
            for value in _chosen(found, "safety")
        ]
        return {"id": f"modr-{uuid.uuid4().hex}", "model": found[0].version, "results": results}


def split_query(query: str, prompt: str) -> Item:
    """Messages and response of a decoded text. ChatML is taken apart into its turns; other text is one user message.

    Without a prompt (or when the text does not start with it) the last ChatML turn is the response, or all of the text.
    """
    if prompt and query.startswith(prompt):
        turns = _turns(prompt)
        messages = turns or [Message(role="user", content=prompt)]
        return messages, SPECIAL.sub("", query[len(prompt) :])
    turns = _turns(query)
    if turns and turns[-1]["role"] == "assistant":
        return turns[:-1], turns[-1]["content"]
    return [Message(role="user", content=prompt)], SPECIAL.sub("", query)


def _turns(text: str) -> list[Message]:
    return [Message(role=role, content=content) for role, content in CHATML.findall(text)]


def _item(query: str, response: str) -> Item:
    return [Message(role="user", content=query)], response


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _chosen(found: Sequence[Scored], objective: str) -> list[float]:
    """Values of the objective that a `model` field names, of love when it names something else."""
    served = found[0].scores
    name = objective if objective in served else DEFAULT
    if name not in served or (objective == "safety" and name != "safety"):
        raise ApiError(422, "invalid", f"model: {objective[:40]!r} is not served here, but {', '.join(served)}")
    return [one.scores[name].value for one in found]


def _label(objective: str) -> str:
    return {"safety": "safe", "helpfulness": "helpful"}.get(objective, DEFAULT)


def _envelope(kind: str, model: str, found: Sequence[Scored]) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "model_version": found[0].version,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
