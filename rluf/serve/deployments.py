"""Ray Serve deployments: gateway (HTTP), scorers (reward models) and feedback writer; policies: policy_deployment.

The gateway batches incoming items and sends whole batches to scorer replicas, so a batch costs one hop. Scorers load
new models after a change of their user_config: next to the old ones, then swap between two batches. When a replica
dies, its batch is sent again; scoring has no side effects.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from rluf.config.serve import LOOPBACK_HOSTS
from rluf.errors import RlufError, SettingsError
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
    build_score_route,
    build_served_event,
    to_messages,
)
from rluf.serve.assignment import assign_arm, is_canary
from rluf.serve.batching import RequestBatcher
from rluf.serve.listener import HttpServer
from rluf.serve.middleware import ServeMetrics, ServiceRules
from rluf.serve.observability import setup_service_logging, start_tracing, tracer
from rluf.serve.store import FeedbackStore
from rluf.serve.store_events import StoreEvent, StoreOutcome
from rluf.serve.writers import WRITER_STALE_S, flush_stopped_writers, mark_alive, resolve_writer_folders
from rluf.types import Score, ScoringItem
from rluf.utils.hashing import create_response_id

logger = logging.getLogger("rluf.serve")

APPLICATION_NAME = "rluf"
"""Name of the application in Ray Serve."""
FEEDBACK_WRITER_NAME = "feedback-writer"
"""Name of the feedback writer's deployment; scorers are scorer-<role>, policies policy-<name>."""
BatchScores = tuple[str, dict[str, list[tuple[float, float, float, bool, float, float | None, bool]]]]
"""Model version, and per objective the fields of each item's Score after the objective: tuples are cheap."""
REPLICA_LOST_ERRORS = (RayActorError, DeploymentUnavailableError, TaskCancelledError, grpc.RpcError)
"""Errors of a call whose replica died or is being replaced. grpc's appear since calls use gRPC, not Ray's transport."""
DEFAULT_ITEM_TOKENS = 512
"""Assumed maximum tokens per item until a scorer has reported its own."""
RETRY_WAIT_S = 0.2
"""Wait before a batch is sent again."""


def check_ray_token(host: str) -> None:
    """Raise SettingsError when `host` is not local and this process's Ray has no token authentication.

    Ray's processes exchange pickles: without its token, every machine that reaches a node can run code on it, whatever
    the service's own token is.
    """
    if host in LOOPBACK_HOSTS:
        return
    # Ray has no public function for this. It reads RAY_AUTH_MODE when it is imported, before the raylet's workers
    # import rluf, so the answer is that of the cluster.
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if not is_token_auth_enabled():
        raise SettingsError(
            f"serve.host={host} can be reached from other machines, but this Ray cluster runs without its token "
            "authentication: start its nodes with RAY_AUTH_MODE=token (KubeRay: authOptions: { mode: token }), or set "
            "serve.host=127.0.0.1"
        )


class LoadedModels:
    """One loaded version of the reward models: a scorer per objective, and facts from their cards."""

    def __init__(self, scorer_config: Mapping[str, Any]) -> None:
        """Load the models of `scorer_config`: version, batch_tokens, device, and sources by objective."""
        from rluf.objectives.judges import build_rule_scorer
        from rluf.reward.backbone import build_warmup_items, enable_fast_cpu_matmul
        from rluf.reward.model import load_reward_scorer

        self.version = str(scorer_config["version"])
        self.model_facts: dict[str, dict[str, Any]] = scorer_config["facts"]
        if scorer_config["device"] == "cpu":
            enable_fast_cpu_matmul()
        sources: dict[str, dict[str, str]] = scorer_config["models"]
        self._rule_scorers = {
            name: build_rule_scorer(name, **source) for name, source in sources.items() if "path" not in source
        }
        folders = {name: Path(source["path"]) for name, source in sources.items() if "path" in source}
        self._score_models = load_reward_scorer(
            folders, batch_tokens=scorer_config["batch_tokens"], device=scorer_config["device"]
        )
        # One forward pass now, so that the first request does not pay for lazy initialization.
        self._score_models(build_warmup_items())
        self._objective_names = tuple(sources)

    def score_items(self, items: Sequence[ScoringItem]) -> BatchScores:
        """Score items by every objective."""
        scores = self._score_models(items) | {name: score(items) for name, score in self._rule_scorers.items()}
        return self.version, {
            name: [
                (s.value, s.raw_logit, s.spread, s.is_probability, s.logit_spread, s.exact_logit, s.is_cut)
                for s in scores[name]
            ]
            for name in self._objective_names
        }


class ScorerDeployment:
    """One replica of one version's reward models. `application` turns this plain class into a deployment."""

    def __init__(self) -> None:
        self._loaded_models: LoadedModels | None = None
        self._score_lock = asyncio.Lock()
        self._load_lock = asyncio.Lock()
        self._wanted_config: dict[str, Any] = {}
        self._change_tasks: set[asyncio.Task[None]] = set()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the models of the deployment's user_config.

        The first models are loaded before Ray Serve counts the replica as started. Later ones load in the background,
        one at a time; of several pending ones only the newest is used. If a version cannot be loaded, the present one
        stays and the error is logged.
        """
        self._wanted_config = user_config
        if self._loaded_models is None:
            self._loaded_models = await asyncio.to_thread(LoadedModels, user_config)
        else:
            # Not awaited: Ray Serve stops routing to a replica while its reconfigure runs.
            task = asyncio.create_task(self._replace_models(user_config))
            self._change_tasks.add(task)
            task.add_done_callback(self._change_tasks.discard)

    async def _replace_models(self, scorer_config: dict[str, Any]) -> None:
        async with self._load_lock:
            if scorer_config is not self._wanted_config:
                return
            try:
                models = await asyncio.to_thread(LoadedModels, scorer_config)
            except RlufError:
                logger.exception("scorer: version %s cannot be loaded; the old one stays", scorer_config["version"])
                return
            if scorer_config is self._wanted_config:
                self._loaded_models = models
                logger.warning("scorer: serving version %s", models.version)

    async def score_batch(self, items: list[ScoringItem]) -> BatchScores:
        """Score a batch with one model version. One batch runs at a time, in a thread, so health checks are served."""
        async with self._score_lock:
            models = self._require_models()
            return await asyncio.to_thread(models.score_items, items)

    async def describe(self) -> dict[str, Any]:
        """Return the served version, the model facts by objective and the replica's process id."""
        models = self._require_models()
        return {"version": models.version, "facts": models.model_facts, "pid": os.getpid()}

    def _require_models(self) -> LoadedModels:
        if self._loaded_models is None:
            raise RuntimeError("the scorer replica was called before its models were loaded")
        return self._loaded_models


class FeedbackWriter:
    """The only writer of this cluster in the feedback store. Events that arrive during a write share the next fsync."""

    async def __init__(  # type: ignore[misc]
        self, root: str, log_folder: str, reaction_window_s: float, flush_interval_s: float, writer_name: str = ""
    ) -> None:
        """Open the store; Ray Serve awaits this before the replica counts as started."""
        setup_service_logging()
        self._root, self._log_folder, self._writer_name = root, Path(log_folder), writer_name
        store_root, self._writer_log_folder = resolve_writer_folders(root, self._log_folder, writer_name)
        self._feedback_store = FeedbackStore(
            store_root,
            self._writer_log_folder,
            reaction_window_s=reaction_window_s,
            has_other_writers=bool(writer_name),
        )
        self._flush_interval_s = flush_interval_s
        self._next_takeover_time = 0.0
        self._pending_events: list[tuple[list[StoreEvent], asyncio.Future[list[StoreOutcome]]]] = []
        self._write_task: asyncio.Task[None] | None = None
        self._store_lock = asyncio.Lock()
        row_count = await asyncio.to_thread(self._feedback_store.start)
        mark_alive(self._writer_log_folder)
        logger.info("feedback store %s: opened, open_rows=%d", store_root, row_count)
        self._flush_task = asyncio.create_task(self._flush_periodically())

    async def append_events(self, events: list[StoreEvent]) -> list[StoreOutcome]:
        """Store events and return their outcomes once they are on disk. Raises OSError or RlufError on failure."""
        future: asyncio.Future[list[StoreOutcome]] = asyncio.get_running_loop().create_future()
        self._pending_events.append((events, future))
        if self._write_task is None or self._write_task.done():
            self._write_task = asyncio.create_task(self._write_pending())
        return await future

    async def count_damaged_rows(self) -> int:
        """Number of rows that cannot be written, since the disk changed them."""
        return self._feedback_store.damaged_row_count

    async def flush_settled(self, all_rows: bool = False) -> int:
        """Write settled rows (or all) to Parquet now; returns the number of rows."""
        async with self._store_lock:
            return await asyncio.to_thread(self._feedback_store.flush_settled, all_rows=all_rows)

    async def _write_pending(self) -> None:
        while self._pending_events:
            batch, self._pending_events = self._pending_events, []
            all_events = [event for events, _ in batch for event in events]
            async with self._store_lock:
                # gather only to receive the error as a value: every waiting caller must get it.
                (result,) = await asyncio.gather(
                    asyncio.to_thread(self._feedback_store.append_events, all_events), return_exceptions=True
                )
            start = 0
            for events, future in batch:
                rows, start = slice(start, start + len(events)), start + len(events)
                if future.done():  # the caller was cancelled
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result[rows])

    async def _flush_periodically(self) -> None:
        while True:
            await asyncio.sleep(self._flush_interval_s)
            try:
                mark_alive(self._writer_log_folder)
                await self.flush_settled()
                await self._flush_stopped_writers()
                async with self._store_lock:
                    await asyncio.to_thread(self._feedback_store.merge_days)
            except (OSError, RlufError, sqlite3.Error):
                store_root = self._feedback_store.root
                logger.exception("feedback store %s: settled rows not written; they stay in the log", store_root)

    async def _flush_stopped_writers(self) -> None:
        if self._writer_name and "://" not in self._root and time.monotonic() >= self._next_takeover_time:
            self._next_takeover_time = time.monotonic() + WRITER_STALE_S
            window_s = self._feedback_store.reaction_window_s
            location = (self._root, self._log_folder, self._writer_name)
            row_count = await asyncio.to_thread(flush_stopped_writers, *location, reaction_window_s=window_s)
            if row_count:
                logger.info("feedback store %s: wrote rows of stopped writers, rows=%d", self._root, row_count)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of the gateway's batches: tokens per batch, queued responses, scorer replicas, seconds per request.

    `listen_address` is where the gateway itself listens; None where Ray Serve's proxies do.
    """

    batch_tokens: int
    max_queued_responses: int
    max_replicas: int
    deadline_s: float
    listen_address: tuple[str, int] | None


class GatewayDeployment:
    """ServiceBackend behind the HTTP app: batches items, routes between versions, stores feedback, keeps metrics."""

    def __init__(self, rules: ServiceRules, batch_limits: BatchLimits, user_salt: bytes, *_: Any) -> None:
        """The other arguments only bind the other deployments to the application; `reconfigure` gets them by name."""
        setup_service_logging()
        start_tracing()
        # Here too: a command that connects to a cluster knows its own authentication mode only.
        check_ray_token(rules.listen_host)
        self.rules, self.batch_limits, self._user_salt = rules, batch_limits, user_salt
        self.metrics, self.is_draining, self.running_requests = ServeMetrics(), False, 0
        self._feedback_writer = serve.get_deployment_handle(FEEDBACK_WRITER_NAME, APPLICATION_NAME)
        self._scorer_handles: dict[str, Any] = {}
        self._policy_handles: dict[str, tuple[Any, str]] = {}
        self._batchers: dict[str, RequestBatcher[ScoredItem]] = {}
        self._candidate_share = 0.0
        self._role_versions: dict[str, str] = {}
        self._experiment: dict[str, float] = {}
        self._warmup_tasks: dict[str, asyncio.Task[None]] = {}
        self._expected_means: dict[str, dict[str, float]] = {}
        self._refresh_task: asyncio.Task[Any] | None = None
        self._was_ready = False
        self._asgi_app: Any = None
        self._http_server: HttpServer | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Update the routes: scorer roles, the candidate's share of traffic, the version of each policy by name.

        Running requests are not interrupted. A new candidate gets its share once it responds.
        """
        for role in user_config["roles"]:
            if role not in self._scorer_handles:
                self._scorer_handles[role] = serve.get_deployment_handle(f"scorer-{role}", APPLICATION_NAME)
                self._batchers[role] = RequestBatcher(
                    self._make_batch_runner(role), batch_tokens=self.batch_limits.batch_tokens,
                    max_item_tokens=DEFAULT_ITEM_TOKENS, max_queued_responses=self.batch_limits.max_queued_responses,
                    replica_count=self.batch_limits.max_replicas, deadline_s=self.batch_limits.deadline_s,
                    on_batch_end=self.metrics.record_batch, on_queue_change=self._record_queue,
                )  # fmt: skip
                if role == "candidate":
                    self._warmup_tasks[role] = asyncio.create_task(self._wait_for_scorer(role))
        roles = user_config["roles"]
        self._scorer_handles = {role: handle for role, handle in self._scorer_handles.items() if role in roles}
        self._candidate_share = float(user_config["share"])
        self._experiment = dict(user_config.get("experiment", {}))
        self._policy_handles = {
            name: (serve.get_deployment_handle(f"policy-{name}", APPLICATION_NAME), version)
            for name, version in user_config["policies"].items()
        }
        if self.batch_limits.listen_address is not None and self._http_server is None:
            self._http_server = HttpServer(*self.batch_limits.listen_address)
            await self._http_server.start(self._asgi_app, self.batch_limits.deadline_s)

    async def __del__(self) -> None:
        """Finish running requests, then release the port; Ray Serve awaits this when it stops the gateway."""
        if self._http_server is not None:
            self.is_draining = True
            await self._http_server.close()

    async def _wait_for_scorer(self, role: str) -> None:
        """Wait until the scorer of a role responds; until then its share of traffic goes to the live one."""
        while role in self._scorer_handles:
            try:
                await self._scorer_handles[role].describe.remote()
                break
            except (*REPLICA_LOST_ERRORS, BackPressureError):
                await asyncio.sleep(RETRY_WAIT_S)
        self._warmup_tasks.pop(role, None)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the ASGI app; Ray Serve calls this hook once, after the constructor and before `reconfigure`."""
        from rluf.serve.app import make_app

        self._asgi_app = make_app(self)
        return self._asgi_app

    async def score_items(
        self, items: Sequence[ScoringItem], routes: Sequence[ScoreRoute] | None = None
    ) -> list[ScoredItem]:
        """Score items, in order, each with the model version of its route; None: all with the live version."""
        routes = routes or [ScoreRoute()] * len(items)
        roles = [await self._select_role(route) for route in routes]
        results: dict[int, ScoredItem] = {}

        async def score_role(role: str) -> None:
            indices = [i for i, item_role in enumerate(roles) if item_role == role]
            scored_items = await self._score_with_role(role, [items[i] for i in indices])
            results.update(zip(indices, scored_items, strict=True))

        await asyncio.gather(*(score_role(role) for role in dict.fromkeys(roles)))
        for i, route in enumerate(routes):
            if route.version not in (None, *self._batchers, results[i].model_version):
                # The models were replaced between the choice of the role and the batch.
                raise self._build_version_error(str(route.version))
        return [results[i] for i in range(len(items))]

    async def _score_with_role(self, role: str, items: Sequence[ScoringItem]) -> list[ScoredItem]:
        """Score items with one role and record the metrics of its version."""
        with tracer.start_as_current_span("score", attributes={"rluf.role": role, "rluf.items": len(items)}) as span:
            scored_items = await self._batchers[role].submit(items)
            span.set_attribute("rluf.model_version", scored_items[0].model_version)
        version = self._role_versions[role] = scored_items[0].model_version
        if version not in self._expected_means and self._refresh_task is None:
            self._refresh_task = asyncio.create_task(self._refresh_versions())
        for name in scored_items[0].scores:
            scores = [scored_item.scores[name] for scored_item in scored_items]
            self.metrics.record_scores(name, version, scores, self._expected_means.get(version, {}))
        return scored_items

    def _record_queue(self) -> None:
        self.metrics.queued_items.set(sum(batcher.queued_items for batcher in self._batchers.values()))

    async def _select_role(self, route: ScoreRoute) -> str:
        """Return the role that a route selects. Raises ApiError 409 for a version that is not served."""
        if route.version is None:
            is_ready = "candidate" in self._scorer_handles and "candidate" not in self._warmup_tasks
            return "candidate" if is_ready and is_canary(route.assignment_key, self._candidate_share) else "live"
        if route.version in self._scorer_handles:
            return route.version
        for is_refreshed in (False, True):
            for role in self._scorer_handles:
                if self._role_versions.get(role) == route.version:
                    return role
            if not is_refreshed:
                await self._refresh_versions()
        raise self._build_version_error(route.version)

    def _build_version_error(self, version: str) -> ApiError:
        served = ", ".join(f"{role} {self._role_versions.get(role, '')}".strip() for role in self._scorer_handles)
        return ApiError(409, "version", f"model_version: {version} is not served here (any more), but {served}")

    def _make_batch_runner(self, role: str) -> Any:
        """Build the function that scores one batch of a role and retries on another replica when one dies."""

        async def run_batch(items: list[ScoringItem]) -> list[ScoredItem]:
            deadline = time.monotonic() + self.batch_limits.deadline_s
            batch_scores: BatchScores | None = None
            while batch_scores is None:
                try:
                    # Looked up in every attempt: the candidate may have been removed in the meantime.
                    handle = self._scorer_handles.get(role, self._scorer_handles["live"])
                    batch_scores = await handle.score_batch.remote(items)
                except REPLICA_LOST_ERRORS as error:
                    if time.monotonic() > deadline:
                        raise ApiError(503, "unavailable", "no scorer replica is up; try again later", 1.0) from error
                    self.metrics.scorer_retries.inc()
                    await asyncio.sleep(RETRY_WAIT_S)
                except BackPressureError as error:
                    raise ApiError(429, "busy", "all replicas are busy; try again later", 1.0) from error
            return _to_scored_items(batch_scores)

        return run_batch

    async def _refresh_versions(self) -> list[tuple[str, dict[str, Any]]]:
        """Ask each scorer for its version and facts; updates the expected means and the token limits."""
        descriptions = []
        try:
            # A copy, since `reconfigure` may add a role meanwhile.
            for role, handle in list(self._scorer_handles.items()):
                description = await handle.describe.remote()
                facts = description["facts"]
                self._role_versions[role] = description["version"]
                self._expected_means[description["version"]] = {
                    name: fact["mean_value"] for name, fact in facts.items() if fact.get("mean_value") is not None
                }
                self._batchers[role].max_item_tokens = max(
                    (fact["max_tokens"] for fact in facts.values()), default=DEFAULT_ITEM_TOKENS
                )
                descriptions.append((role, description))
        except REPLICA_LOST_ERRORS as error:
            raise ApiError(503, "unavailable", "a scorer is being replaced; try again", 1.0) from error
        finally:
            self._refresh_task = None
        return descriptions

    async def is_ready(self) -> bool:
        """Return whether every scorer and every policy has responded once.

        Stays true afterwards: Ray Serve replaces replicas that die later, and requests wait for them. If readiness
        dropped, a load balancer would take the whole service out for one dead replica.
        """
        if not self._was_ready:
            try:
                async with asyncio.timeout(1.0):
                    await self._refresh_versions()
                    for handle, _ in self._policy_handles.values():
                        await handle.describe.remote()
            except (TimeoutError, ApiError, BackPressureError, *REPLICA_LOST_ERRORS):
                return False
            self._was_ready = True
        return True

    async def list_models(self) -> list[ModelInfo]:
        """Return the reward model versions and the policies."""
        candidate_share = self._candidate_share if "candidate" in self._scorer_handles else 0.0
        shares = {"live": 1 - candidate_share, "candidate": candidate_share}
        reward_models = [
            ModelInfo(
                id=f"reward-{role}",
                kind="reward",
                role=role,
                version=description["version"],
                share=shares[role],
                objectives=description["facts"],
            )
            for role, description in await self._refresh_versions()
        ]
        # Of the chats that name no policy.
        policy_shares = self._experiment or dict.fromkeys(list(self._policy_handles)[:1], 1.0)
        return reward_models + [
            ModelInfo(id=name, kind="policy", role="policy", version=version, share=policy_shares.get(name, 0.0))
            for name, (_, version) in self._policy_handles.items()
        ]

    async def store_feedback(self, request: FeedbackRequest) -> StoreOutcome:
        """Store a reaction, with a full row when another system served the response."""
        return await self._store_event(build_reaction_event(request, self._user_salt, self.rules.reactions))

    async def store_preference(self, request: PreferenceRequest) -> StoreOutcome:
        """Store a choice between two responses of this service."""
        return await self._store_event(build_preference_event(request, self._user_salt))

    async def count_damaged_rows(self) -> int | None:
        """Number of rows that the feedback writer cannot write; None while it does not respond."""
        try:
            async with asyncio.timeout(1.0):
                return int(await self._feedback_writer.count_damaged_rows.remote())
        except (TimeoutError, BackPressureError, *REPLICA_LOST_ERRORS):
            return None

    async def _store_event(self, event: StoreEvent) -> StoreOutcome:
        try:
            (outcome,) = await self._feedback_writer.append_events.remote([event])
        except REPLICA_LOST_ERRORS as error:
            raise ApiError(503, "unavailable", "the feedback store is restarting; send it again", 1.0) from error
        except (OSError, RlufError) as error:
            logger.error("gateway: feedback cannot be stored: %s", error)
            raise ApiError(503, "store", "feedback cannot be stored now; send it again later", 5.0) from error
        return outcome

    async def complete_chat(self, request: ChatRequest) -> ChatReply:
        """Sample a response from a policy and log it before it is returned."""
        arm = None
        if not request.model and self._experiment:
            # Without a key the turns of a conversation could not stay on one arm: they get the first policy, no arm.
            key = build_score_route(request.user, request.conversation_id, None).assignment_key
            arm = None if key is None else assign_arm(key, self._experiment, self._user_salt)
        policy_name = request.model or arm or next(iter(self._policy_handles), "")
        if policy_name not in self._policy_handles:
            served_names = ", ".join(self._policy_handles) or "none; set serve.policies"
            raise ApiError(404, "unknown", f"model: no policy {policy_name[:40]!r} is served here ({served_names})")
        handle, _ = self._policy_handles[policy_name]
        messages = to_messages(request.messages)
        seed = request.seed if request.seed is not None else uuid.uuid4().int % 2**31
        try:
            with tracer.start_as_current_span("chat", attributes={"rluf.policy": policy_name}):
                completion = await handle.complete_chat.remote(messages, seed, request.to_sampling())
        except ApiError as error:
            # A new error, since Ray's has the replica's traceback as its text.
            raise ApiError(error.status, error.error_type, error.message) from error
        except BackPressureError as error:
            raise ApiError(429, "busy", f"policy {policy_name} is busy; try again later", 1.0) from error
        except (*REPLICA_LOST_ERRORS, RlufError) as error:
            logger.error("policy %s: chat failed: %s", policy_name, error)
            raise ApiError(503, "unavailable", f"policy {policy_name} is not available now; retry", 2.0) from error
        text, finish_reason, prompt_tokens, response_tokens, version, temperature, response_logprob = completion
        response_id = create_response_id(request.user, self._user_salt)
        response = ServedResponse(
            version, text, finish_reason, arm, temperature, response_tokens, response_logprob
        )  # fmt: skip
        event = build_served_event(response_id, request, response, self._user_salt)
        if event is not None:
            await self._store_event(event)
        if request.user is None:
            self.metrics.rows_without_user.inc()
        return build_chat_reply(
            response_id, policy_name, version, text, finish_reason, prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
        )  # fmt: skip

    async def drain_requests(self, timeout_s: float) -> int:
        """Reject new requests and wait for running ones; returns how many still run after `timeout_s`."""
        self.is_draining = True
        deadline = time.monotonic() + timeout_s
        while self.running_requests > 0 and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.running_requests


def _to_scored_items(batch_scores: BatchScores) -> list[ScoredItem]:
    """Convert a batch's scores by objective to scores by item."""
    version, scores_by_objective = batch_scores
    names = list(scores_by_objective)
    rows = zip(*scores_by_objective.values(), strict=True)
    score_rows = ({name: Score(name, *fields) for name, fields in zip(names, row, strict=True)} for row in rows)
    return [ScoredItem(version, scores) for scores in score_rows]
