"""FastAPI app of the HTTP API, version 1, over a ServiceBackend. Docs are at /docs, the schema at /openapi.json."""

from __future__ import annotations

import json
import logging
import mimetypes
import re
from collections.abc import Mapping
from importlib.util import find_spec
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

import rluf
from rluf.serve import api
from rluf.serve.api import ApiError, ScoredItem
from rluf.serve.compat import add_compat_routes
from rluf.serve.middleware import INTERNAL_ERROR, PROBE_PATHS, SCOPES_KEY, ServiceBackend, ServiceMiddleware
from rluf.utils.hashing import is_signed_response_id
from rluf.utils.stats import logit

logger = logging.getLogger("rluf.serve")

WEB_FOLDER = Path(__file__).parent / "web"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
ERROR_TYPES = {404: "not_found", 405: "method"}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": api.ErrorReply, "description": text}
    for status, text in {
        400: "The body is not JSON in UTF-8",
        401: "The token is missing or wrong",
        403: "The Host header names another host, the token lacks the scope, or the response went to another user",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The Content-Encoding is not supported",
        422: "A field is missing, unknown or invalid",
        429: "Too many requests, or the queue is full: see Retry-After",
        500: "Internal error",
        503: "Shutting down, timed out, or a model is not available: see Retry-After",
    }.items()
}


def make_app(backend: ServiceBackend) -> ProxyHeadersMiddleware:
    """Build the complete ASGI app over `backend`, including the middleware."""
    app = FastAPI(
        title="rluf",
        version="1",
        description="Reward model scores, chat and user feedback. Send a bearer token if the service has one.",
        responses=ERROR_RESPONSES,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # behind a TLS proxy the redirect would lead to plain HTTP
        dependencies=[Depends(_check_query)],
    )
    _add_error_handlers(app)
    _add_score_routes(app, backend)
    _add_service_routes(app, backend)
    _add_status_routes(app, backend)
    _add_web_page(app)
    _add_docs_page(app)
    add_compat_routes(app, backend)
    # Without trusted proxies the client's address is that of the connection, whatever its headers say.
    middleware: Any = ServiceMiddleware(app, backend)
    # uvicorn would silently trust no proxy of a network that is named by one of its addresses, such as 10.0.0.1/8.
    networks = [str(ip_network(proxy, strict=False)) for proxy in backend.rules.trusted_proxies]
    return ProxyHeadersMiddleware(middleware, trusted_hosts=networks)


async def _check_query(request: Request) -> None:
    """Raise ApiError 422 for fields in the query string of a request with a body, which would be ignored there."""
    if request.method == "POST" and request.query_params and request.url.path not in PROBE_PATHS:
        name = next(iter(request.query_params))
        raise ApiError(422, "invalid", f"{name[:40]!a}: send this field in the JSON body; the query string is not read")


def _add_error_handlers(app: FastAPI) -> None:
    """Return every error in one JSON format: one sentence, without the input and without a traceback."""

    @app.exception_handler(ApiError)
    async def _handle_api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()
        # Of a field that takes several types, the problem of the type that was sent: it is not one of type, or deeper.
        first_problem = max(
            (problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]),
            key=lambda problem: (not problem["type"].endswith("_type"), len(problem["loc"])),
            default={"loc": (), "msg": "the request is not valid", "type": ""},
        )
        message = _format_request_error(first_problem, len(problems))
        content_type = request.headers.get("content-type", "").lower()
        if first_problem["loc"] == ("body",) and not re.match(r"application/([^;]+\+)?json\b", content_type):
            message = "body: send JSON with the header Content-Type: application/json"
        is_bad_json = first_problem["type"] == "json_invalid"
        api_error = ApiError(400, "bad_json", message) if is_bad_json else ApiError(422, "invalid", message)
        return JSONResponse(api_error.body, api_error.status)

    @app.exception_handler(Exception)
    async def _handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s: internal error", request.method, request.url.path, exc_info=error)
        return JSONResponse(INTERNAL_ERROR.body, INTERNAL_ERROR.status)

    @app.exception_handler(HTTPException)
    async def _handle_http_exception(_: Request, error: HTTPException) -> JSONResponse:
        # FastAPI raises a plain 400 when it cannot decode the body, before validation could name the problem.
        error_type = ERROR_TYPES.get(error.status_code, "bad_json" if error.status_code == 400 else "http")
        api_error = ApiError(error.status_code, error_type, str(error.detail))
        return JSONResponse(api_error.body, api_error.status, error.headers)


def _format_request_error(error: Mapping[str, Any], error_count: int) -> str:
    # loc[0] is always "body"; the input itself stays out of the message, since it may be personal data.
    # Names of types, such as list[str], are no part of the field's path.
    field_path = ".".join(str(key) for key in error["loc"][1:] if re.fullmatch(r"\w+", str(key))) or "body"
    suffix = f" (and {error_count - 1} more)" if error_count > 1 else ""
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        reason = "this field is not supported here, or not with this value"
    return f"{field_path}: {reason}{suffix}"[:300]


def to_objective_scores(scored_item: ScoredItem) -> dict[str, api.ObjectiveScore]:
    """Convert the scores of one item to the API's model, by objective."""
    return {
        name: api.ObjectiveScore(
            value=score.value,
            logit=logit(score.value),
            raw=score.raw_logit,
            spread=score.spread,
            logit_spread=score.logit_spread,
            truncated=score.is_cut,
            is_probability=score.is_probability,
            exact_logit=score.exact_logit,
        )
        for name, score in scored_item.scores.items()
    }


def to_score_reply(scored_item: ScoredItem) -> api.ScoreReply:
    """Convert one scored item to the API's model."""
    return api.ScoreReply(model_version=scored_item.model_version, scores=to_objective_scores(scored_item))


def format_event_stream(reply: api.ChatReply, *, include_usage: bool) -> str:
    """Server-sent events of a complete reply, in OpenAI's format of a stream: the text in one chunk, then its end."""
    head = {"id": reply.id, "object": "chat.completion.chunk", "created": reply.created, "model": reply.model}
    head["system_fingerprint"] = reply.system_fingerprint
    choice = reply.choices[0]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": choice.message, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": choice.finish_reason}]},
    ]
    if include_usage:
        chunks.append({"choices": [], "usage": reply.usage.model_dump()})
    return "".join(f"data: {json.dumps(head | chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def _add_score_routes(app: FastAPI, backend: ServiceBackend) -> None:
    @app.post("/v1/score", tags=["scores"])
    async def score(body: api.ScoreRequest) -> api.ScoreReply:
        """Score one response: calibrated P[Love] and the other served objectives, with the version of the models."""
        scored_items = await backend.score_items([body.to_item()], [body.to_route()])
        return to_score_reply(scored_items[0])

    @app.post("/v1/score/batch", tags=["scores"])
    async def score_batch(body: api.ScoreBatchRequest) -> api.ScoreBatchReply:
        """Score many responses in one request; neither score nor model version of one depends on the others."""
        scored_items = await backend.score_items(
            [item.to_item() for item in body.items], [item.to_route() for item in body.items]
        )
        return api.ScoreBatchReply(results=[to_score_reply(scored_item) for scored_item in scored_items])

    @app.post("/v1/rank", tags=["scores"])
    async def rank(body: api.RankRequest) -> api.RankReply:
        """Order responses to one conversation from best to worst by an objective."""
        scored_items = await backend.score_items(body.to_items(), [body.to_route()] * len(body.responses))
        if body.objective not in scored_items[0].scores:
            names = ", ".join(scored_items[0].scores)
            raise ApiError(422, "invalid", f"objective: {body.objective} is not served here, but {names}")
        order = sorted(range(len(scored_items)), key=lambda i: -scored_items[i].scores[body.objective].value)
        ranking = [api.RankedResponse(index=i, scores=to_objective_scores(scored_items[i])) for i in order]
        return api.RankReply(
            model_version=scored_items[0].model_version, objective=body.objective, best=order[0], ranking=ranking
        )


def _add_service_routes(app: FastAPI, backend: ServiceBackend) -> None:
    @app.post(
        "/v1/feedback",
        tags=["feedback"],
        responses={
            404: {"model": api.ErrorReply, "description": "Unknown response id, and the request has no record"},
            409: {"model": api.ErrorReply, "description": "The record is of another response than the stored one"},
        },
    )
    async def feedback(body: api.FeedbackRequest, request: Request) -> api.FeedbackReply:
        """Store a reaction to a response. The row is on disk before the reply; repeating a request is harmless."""
        is_own_response = body.record is None and is_signed_response_id(body.id)
        required_scope = "chat" if is_own_response else "ingest"
        if required_scope not in request.scope[SCOPES_KEY]:
            raise ApiError(403, "scope", f"this request needs a token with scope {required_scope}")
        if body.reaction is not None and body.reaction not in backend.rules.reactions:
            names = ", ".join(backend.rules.reactions)
            raise ApiError(422, "invalid", f"reaction: expected one of {names} (serve.reactions), or null")
        outcome = await backend.store_feedback(body)
        backend.metrics.feedback_requests.labels(outcome).inc()
        if outcome == "unknown":
            raise ApiError(404, "unknown", "no response with that id was served here; add its record to the request")
        if outcome == "conflict":
            raise ApiError(409, "conflict", "another response is stored under this id; give each response its own")
        return api.FeedbackReply(id=body.id, status="duplicate" if outcome == "duplicate" else "stored")

    @app.post(
        "/v1/preferences",
        tags=["feedback"],
        responses={
            404: {"model": api.ErrorReply, "description": "A response id is unknown"},
            409: {"model": api.ErrorReply, "description": "Another choice between the two is settled"},
        },
    )
    async def preferences(body: api.PreferenceRequest) -> api.FeedbackReply:
        """Store which of two responses to one conversation a user prefers; of two choices the later counts."""
        outcome = await backend.store_preference(body)
        backend.metrics.feedback_requests.labels(outcome).inc()
        if outcome == "unknown":
            raise ApiError(404, "unknown", "no response with that id was served here")
        if outcome == "unreadable":
            raise ApiError(503, "store", "one of the responses cannot be looked up now; send it again later", 5.0)
        if outcome == "mismatch":
            raise ApiError(422, "invalid", "the two responses answer different messages, or they are equal")
        if outcome == "settled":
            raise ApiError(409, "settled", "another choice between these responses is settled")
        return api.FeedbackReply(id=body.chosen_id, status="duplicate" if outcome == "duplicate" else "stored")

    @app.post(
        "/v1/chat/completions",
        tags=["chat"],
        response_model=api.ChatReply,
        responses={404: {"model": api.ErrorReply, "description": "No such policy is served"}},
    )
    async def chat(body: api.ChatRequest) -> Any:
        """Sample a response from a served policy (OpenAI's format); send feedback with its `id`."""
        reply = await backend.complete_chat(body)
        if not body.stream:
            return reply
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return Response(format_event_stream(reply, include_usage=include_usage), media_type="text/event-stream")

    @app.get("/v1/models", tags=["service"])
    async def models() -> api.ModelsReply:
        """List the served reward models and policies with their versions."""
        return api.ModelsReply(data=await backend.list_models())

    @app.get("/v1/models/{model_id}", tags=["service"], responses={404: {"model": api.ErrorReply}})
    async def model(model_id: str) -> api.ModelInfo:
        """Return one served model."""
        for info in await backend.list_models():
            if info.id == model_id:
                return info
        raise ApiError(404, "model", f"no model {model_id[:40]!r} is served here; see /v1/models")


def _add_status_routes(app: FastAPI, backend: ServiceBackend) -> None:
    @app.get("/healthz", tags=["service"])
    async def healthz() -> dict[str, str]:
        """Readiness check: 503 while the service starts or shuts down."""
        if not await backend.is_ready():
            raise ApiError(503, "starting", "the models are being loaded; try again later", 1.0)
        return {"status": "ok"}

    for path in ("/health", "/ping"):  # the probes of vLLM, TEI and SageMaker
        app.add_api_route(path, healthz, include_in_schema=False, methods=["GET", "POST"])

    @app.get("/version", tags=["service"])
    async def version() -> dict[str, str]:
        """Release of rluf (vLLM's route)."""
        return {"version": rluf.__version__}

    @app.get("/info", tags=["service"])
    async def info() -> dict[str, Any]:
        """Models and limits, in the format of text-embeddings-inference."""
        live_model, *_ = await backend.list_models()
        return {
            "model_id": live_model.id, "model_sha": live_model.version, "model_type": {"classifier": {}},
            "version": rluf.__version__, "max_client_batch_size": api.MAX_ITEMS_PER_REQUEST,
            "objectives": live_model.objectives,
        }  # fmt: skip

    @app.get("/metrics", tags=["service"], response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        if (damaged_row_count := await backend.count_damaged_rows()) is not None:
            backend.metrics.damaged_rows.set(damaged_row_count)
        return Response(backend.metrics.to_prometheus_text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_web_page(app: FastAPI) -> None:
    for path, file_name in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _build_static_file_route(file_name), include_in_schema=False)


def _build_static_file_route(file_name: str, folder: Path = WEB_FOLDER) -> Any:
    async def send_file() -> Response:
        # Not FileResponse: it answers a wrong Range header in a format of its own.
        content, media_type = (folder / file_name).read_bytes(), mimetypes.guess_type(file_name)[0]
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return send_file


def _add_docs_page(app: FastAPI) -> None:
    """Serve the API docs at /docs with the copy of Swagger UI that vLLM installs: nothing comes from a CDN."""
    spec = find_spec("vllm")
    folder = Path(str(spec.origin)).parent / "entrypoints/serve/instrumentator/static" if spec is not None else None
    file_names = ("swagger-ui-bundle.js", "swagger-ui.css")
    if folder is None or not all((folder / name).is_file() for name in file_names):
        return
    for name in file_names:
        app.add_api_route(f"/docs/{name}", _build_static_file_route(name, folder), include_in_schema=False)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json", title="rluf", swagger_js_url=f"/docs/{file_names[0]}",
            swagger_css_url=f"/docs/{file_names[1]}", swagger_favicon_url="data:,",
        )  # fmt: skip
