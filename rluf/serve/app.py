"""The HTTP app: our API, version 1, over a backend. FastAPI's docs are at /docs, the schema at /openapi.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from rluf.reward.calibration import logit
from rluf.serve import api
from rluf.serve.backend import Backend, Scored
from rluf.serve.compat import add_foreign_routes
from rluf.serve.limits import ApiError
from rluf.serve.middleware import INTERNAL, Guard

if TYPE_CHECKING:
    from rluf.reward.text import Item

logger = logging.getLogger("rluf.serve")

WEB = Path(__file__).parent / "web"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
KINDS = {404: "not_found", 405: "method"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": api.ErrorReply, "description": text}
    for status, text in {
        400: "The body is not JSON in UTF-8",
        401: "No token, or not the right one",
        403: "Asked under another host name",
        413: "The body is too large",
        422: "A field is missing, unknown or has a wrong value",
        429: "Too many requests, or too much waits: see Retry-After",
        500: "The service failed",
        503: "Shutting down, too slow, or a model is not available: see Retry-After",
    }.items()
}


def make_app(backend: Backend) -> Guard:
    """The whole ASGI app over `backend`."""
    app = FastAPI(
        title="rluf",
        version="1",
        description="Scores of reward models, and reactions of users. With a bearer token where the service has one.",
        responses=ERRORS,
        redoc_url=None,
    )
    _add_errors(app)
    _add_scores(app, backend)
    _add_rest(app, backend)
    _add_page(app)
    add_foreign_routes(app, backend)
    return Guard(app, backend)


def _add_errors(app: FastAPI) -> None:
    """Every error in one shape, with one sentence, without the input and without a trace."""

    @app.exception_handler(ApiError)
    async def _told(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        first = found[0] if found else {"loc": (), "msg": "the request is not valid", "type": ""}
        bad_json = first["type"] == "json_invalid"
        told = ApiError(400 if bad_json else 422, "bad_json" if bad_json else "invalid", _sentence(first, len(found)))
        return JSONResponse(told.body, told.status)

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(INTERNAL.body, INTERNAL.status)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        kind = KINDS.get(error.status_code, "bad_json" if error.status_code == 400 else "http")
        told = ApiError(error.status_code, kind, str(error.detail))
        return JSONResponse(told.body, told.status, error.headers)


def _sentence(error: Mapping[str, Any], count: int) -> str:
    where = ".".join(str(part) for part in error["loc"][1:]) or "body"
    more = f" (and {count - 1} more)" if count > 1 else ""
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{more}"[:300]


def reply_scores(scored: Scored) -> dict[str, api.ObjectiveScore]:
    """Scores as the API gives them."""
    return {
        name: api.ObjectiveScore(value=s.value, logit=logit(s.value), raw=s.raw, spread=s.spread)
        for name, s in scored.scores.items()
    }


def reply(scored: Scored) -> api.ScoreReply:
    """One item's scores as the API gives them."""
    return api.ScoreReply(model_version=scored.version, scores=reply_scores(scored))


def _add_scores(app: FastAPI, backend: Backend) -> None:
    async def scored(items: list[Item]) -> list[Scored]:
        if backend.rules.log_text:
            for messages, response in items:
                logger.info("score %r -> %r", messages, response)
        return await backend.score(items)

    @app.post("/v1/score", tags=["scores"])
    async def score(body: api.ScoreRequest) -> api.ScoreReply:
        """Score one response: P[Love], helpfulness and safety, calibrated, with the version of the models."""
        return reply((await scored([(api.plain(body.messages), body.response)]))[0])

    @app.post("/v1/score/batch", tags=["scores"])
    async def score_batch(body: api.ScoreBatchRequest) -> api.ScoreBatchReply:
        """Score many responses in one request; the same response gets the same score in any batch."""
        found = await scored([(api.plain(item.messages), item.response) for item in body.items])
        return api.ScoreBatchReply(results=[reply(one) for one in found])

    @app.post("/v1/rank", tags=["scores"])
    async def rank(body: api.RankRequest) -> api.RankReply:
        """Order responses to one conversation from best to worst by an objective."""
        messages = api.plain(body.messages)
        found = await scored([(messages, response) for response in body.responses])
        if body.objective not in found[0].scores:
            raise ApiError(422, "invalid", f"objective: {body.objective} is not served here")
        order = sorted(range(len(found)), key=lambda i: -found[i].scores[body.objective].value)
        ranking = [api.Ranked(index=i, scores=reply_scores(found[i])) for i in order]
        return api.RankReply(model_version=found[0].version, objective=body.objective, best=order[0], ranking=ranking)


def _add_rest(app: FastAPI, backend: Backend) -> None:
    @app.post(
        "/v1/feedback",
        tags=["feedback"],
        responses={
            404: {"model": api.ErrorReply, "description": "No response with that id was served here, and no record"},
            409: {"model": api.ErrorReply, "description": "The row is settled with another reaction"},
        },
    )
    async def feedback(body: api.FeedbackRequest) -> api.FeedbackReply:
        """Take a reaction to a response. The row is on disk before the answer; repeating a request is harmless."""
        outcome = await backend.feedback(body)
        backend.metrics.feedback.labels(outcome).inc()
        if outcome == "unknown":
            raise ApiError(404, "unknown", "no response with that id was served here; send its record along")
        if outcome == "settled":
            raise ApiError(409, "settled", "the reaction to that response can no longer be changed")
        return api.FeedbackReply(id=body.id, status=outcome)

    @app.post(
        "/v1/chat/completions",
        tags=["chat"],
        responses={404: {"model": api.ErrorReply, "description": "No such policy is served"}},
    )
    async def chat(body: api.ChatRequest) -> api.ChatReply:
        """Answer a conversation with a served policy (OpenAI's shape, no streaming); `id` is what feedback names."""
        if backend.rules.log_text:
            logger.info("chat %r", api.plain(body.messages))
        return await backend.chat(body)

    @app.get("/v1/models", tags=["service"])
    async def models() -> api.ModelsReply:
        """Reward models and policies that are served now, with their versions."""
        return api.ModelsReply(data=await backend.models())

    @app.get("/healthz", tags=["service"])
    async def healthz() -> dict[str, str]:
        """Whether the service takes requests (503 while it starts or shuts down)."""
        if not await backend.ready():
            raise ApiError(503, "starting", "the models are being loaded; try again later", 1.0)
        return {"status": "ok"}

    @app.get("/metrics", tags=["service"], response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(backend.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    for path, file in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _static(file), include_in_schema=False)


def _static(file: str) -> Any:
    async def page() -> FileResponse:
        return FileResponse(WEB / file, headers=PAGE_HEADERS)

    return page
