"""The service on Ray Serve: a gateway (HTTP), scorers (reward models), a ledger (feedback).

Policies are in rluf.serve.policy_deployment.

The gateway batches what comes in and sends whole batches to scorer replicas, so a batch costs one hop. Scorers take new
models as a configuration change: they load beside the old ones and change over between two batches. When a replica dies
its batch is sent again, since scoring changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from rluf.errors import RlufError
from rluf.serve.api import ChatReply, ChatRequest, FeedbackRequest, ModelInfo, plain
from rluf.serve.backend import Rules, Scored
from rluf.serve.batching import Batcher
from rluf.serve.limits import ApiError
from rluf.serve.metrics import ServeMetrics
from rluf.serve.records import chat_reply, new_response_id, reaction_event, served_event
from rluf.serve.server import Listener
from rluf.serve.store import Event, FeedbackStore, Outcome
from rluf.types import Score

if TYPE_CHECKING:
    from rluf.reward.text import Item

logger = logging.getLogger("rluf.serve")

NAME = "rluf"
"""Name of the application on Ray Serve."""
Replies = tuple[str, dict[str, list[tuple[float, float, float]]]]
"""Version, and for each objective (value, raw, spread) of each item."""
DEAD = (RayActorError, DeploymentUnavailableError, TaskCancelledError, grpc.RpcError)
"""What a call ends with when its replica died or is being replaced."""
LONGEST = 512
"""Tokens that a model is taken to read of an item until it has said so itself."""
RETRY_S = 0.2
"""Wait before a batch is sent again."""


def _log_to_stderr() -> None:
    """Send this process's service log to its stderr, which Ray keeps as the replica's log."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


class Models:
    """One version of the reward models, loaded: a scorer for each objective, and what their cards say."""

    def __init__(self, chosen: Mapping[str, Any]) -> None:
        """Load what `chosen` names: version, batch_tokens, device, and path or judge by objective."""
        from rluf.objectives.judges import judge_scorer
        from rluf.reward.backbone import probe_items, quick_cpu_matmul
        from rluf.reward.model import load_scorers

        self.version = str(chosen["version"])
        self.facts: dict[str, dict[str, Any]] = chosen["facts"]
        if chosen["device"] == "cpu":
            quick_cpu_matmul()
        named: dict[str, dict[str, str]] = chosen["models"]
        self._judges = {n: judge_scorer(source["judge"], n) for n, source in named.items() if "judge" in source}
        folders = {name: Path(source["path"]) for name, source in named.items() if "judge" not in source}
        self._models = load_scorers(folders, batch_tokens=chosen["batch_tokens"], device=chosen["device"])
        self._models(probe_items())
        self._names = tuple(named)

    def score(self, items: Sequence[Item]) -> Replies:
        """Scores of items by every objective."""
        found = self._models(items) | {name: judge(items) for name, judge in self._judges.items()}
        return self.version, {name: [(s.value, s.raw, s.spread) for s in found[name]] for name in self._names}


class Scorer:
    """One replica of one version's reward models. A plain class; `application` makes it a deployment."""

    def __init__(self) -> None:
        self._models: Models | None = None
        self._turn = asyncio.Lock()
        self._loading = asyncio.Lock()
        self._wanted: dict[str, Any] = {}
        self._changes: set[asyncio.Task[None]] = set()

    async def reconfigure(self, chosen: dict[str, Any]) -> None:
        """Take the models that the deployment's user_config names.

        The first are loaded before the replica counts as started. Later ones load beside those that are served, one
        after the other, and of several the last one counts. A version that cannot be loaded leaves the present one in
        place and an error in the log.
        """
        self._wanted = chosen
        if self._models is None:
            self._models = await asyncio.to_thread(Models, chosen)
        else:
            change = asyncio.create_task(self._change(chosen))
            self._changes.add(change)
            change.add_done_callback(self._changes.discard)

    async def _change(self, chosen: dict[str, Any]) -> None:
        async with self._loading:
            if chosen is not self._wanted:
                return
            try:
                models = await asyncio.to_thread(Models, chosen)
            except RlufError:
                logger.exception("version %s cannot be loaded; the present one stays", chosen["version"])
                return
            if chosen is self._wanted:
                self._models = models
                logger.warning("serving version %s now", models.version)

    async def score(self, items: list[Item]) -> Replies:
        """Scores of a batch, all by one version. Batches take turns; health checks are answered meanwhile."""
        async with self._turn:
            models = self._loaded()
            return await asyncio.to_thread(models.score, items)

    async def describe(self) -> dict[str, Any]:
        """The version that is served, its facts by objective, and the replica's process id."""
        models = self._loaded()
        return {"version": models.version, "facts": models.facts, "pid": os.getpid()}

    def _loaded(self) -> Models:
        if self._models is None:
            raise RuntimeError("the replica was asked before it had models")
        return self._models


class Ledger:
    """The one writer of the feedback store: what arrives while a write is under way is written with one fsync."""

    async def __init__(self, root: str, log: str, settle_s: float, rotate_s: float) -> None:  # type: ignore[misc]
        """Open the store; Ray Serve awaits this before the replica counts as started."""
        _log_to_stderr()
        self._store = FeedbackStore(root, Path(log), settle_s=settle_s)
        self._rotate_s = rotate_s
        self._waiting: list[tuple[list[Event], asyncio.Future[list[Outcome]]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        rows = await asyncio.to_thread(self._store.start)
        logger.info("feedback store %s: %d rows open", root, rows)
        self._clock = asyncio.create_task(self._rotations())

    async def append(self, events: list[Event]) -> list[Outcome]:
        """Outcomes of events that are on disk now. Raises OSError or RlufError when they cannot be stored."""
        future: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self._waiting.append((events, future))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await future

    async def rotate(self, all_rows: bool = False) -> int:
        """Write settled rows (or all) to Parquet now; returns how many."""
        async with self._turn:
            return await asyncio.to_thread(self._store.rotate, all_rows=all_rows)

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            events = [event for part, _ in batch for event in part]
            async with self._turn:
                (found,) = await asyncio.gather(asyncio.to_thread(self._store.append, events), return_exceptions=True)
            at = 0
            for part, future in batch:
                mine, at = slice(at, at + len(part)), at + len(part)
                if future.done():
                    continue
                if isinstance(found, BaseException):
                    future.set_exception(found)
                else:
                    future.set_result(found[mine])

    async def _rotations(self) -> None:
        while True:
            await asyncio.sleep(self._rotate_s)
            try:
                await self.rotate()
            except (OSError, RlufError):
                logger.exception("settled rows could not be written to %s; they stay in the log", self._store.root)


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the gateway's batches: tokens of one, responses that may wait, replicas to fill, seconds to wait.

    `listen` is the address that the gateway itself listens at; none where Ray Serve's proxies do.
    """

    batch_tokens: int
    max_waiting: int
    max_replicas: int
    deadline_s: float
    listen: tuple[str, int] | None


class Gateway:
    """The HTTP side: checks, batches, routes between versions, keeps the figures. A plain class, see `application`."""

    def __init__(self, rules: Rules, limits: Limits, salt: str, *_: Any) -> None:
        """The other arguments only tell Ray Serve which deployments belong to the application; `reconfigure` names
        those that are used."""
        _log_to_stderr()
        self.rules, self.limits, self._salt = rules, limits, salt
        self.metrics, self.draining, self.running = ServeMetrics(), False, 0
        self._ledger = serve.get_deployment_handle("ledger", NAME)
        self._scorers: dict[str, Any] = {}
        self._policies: dict[str, tuple[Any, str]] = {}
        self._batchers: dict[str, Batcher[Scored]] = {}
        self._share = 0.0
        self._warming: dict[str, asyncio.Task[None]] = {}
        self._expected: dict[str, dict[str, float]] = {}
        self._looking: asyncio.Task[Any] | None = None
        self._woken = False
        self._app: Any = None
        self._listener: Listener | None = None

    async def reconfigure(self, chosen: dict[str, Any]) -> None:
        """Take the routes: roles of the scorers that are there, the candidate's share, version of each policy by name.

        Requests under way go on; what changes here costs none of them. A new candidate gets its share once it answers.
        """
        for role in chosen["roles"]:
            if role not in self._scorers:
                self._scorers[role] = serve.get_deployment_handle(f"scorer-{role}", NAME)
                self._batchers[role] = Batcher(
                    self._runner(role),
                    batch_tokens=self.limits.batch_tokens,
                    longest=LONGEST,
                    max_waiting=self.limits.max_waiting,
                    replicas=self.limits.max_replicas,
                    on_round=self.metrics.round,
                )
                if role == "candidate":
                    self._warming[role] = asyncio.create_task(self._warm(role))
        self._scorers = {role: handle for role, handle in self._scorers.items() if role in chosen["roles"]}
        self._share = float(chosen["share"])
        self._policies = {
            name: (serve.get_deployment_handle(f"policy-{name}", NAME), version)
            for name, version in chosen["policies"].items()
        }
        if self.limits.listen is not None and self._listener is None:
            self._listener = Listener(*self.limits.listen)
            await self._listener.start(self._app, self.limits.deadline_s)

    async def __del__(self) -> None:
        """Ray Serve awaits this when it takes the gateway down: running requests end, then the port is given up."""
        if self._listener is not None:
            self.draining = True
            await self._listener.close()

    async def _warm(self, role: str) -> None:
        """Wait until the scorer of a role answers; until then its share goes to the live one."""
        while role in self._scorers:
            try:
                await self._scorers[role].describe.remote()
                break
            except (*DEAD, BackPressureError):
                await asyncio.sleep(RETRY_S)
        self._warming.pop(role, None)

    def __serve_build_asgi_app__(self) -> Any:
        """The app that Ray Serve asks for once the gateway is made."""
        from rluf.serve.app import make_app

        self._app = make_app(self)
        return self._app

    async def score(self, items: Sequence[Item]) -> list[Scored]:
        """Scores of items by the version that their conversation belongs to."""
        role = self._role(items[0])
        found = await self._batchers[role].submit(items)
        self.metrics.waiting.set(sum(batcher.waiting for batcher in self._batchers.values()))
        version = found[0].version
        if version not in self._expected and self._looking is None:
            self._looking = asyncio.create_task(self._look())
        for name in found[0].scores:
            values = [one.scores[name].value for one in found]
            self.metrics.scored(name, version, values, self._expected.get(version, {}))
        return found

    def _role(self, item: Item) -> str:
        """live or candidate, by a hash of the conversation: the same one always goes to the same version."""
        if "candidate" not in self._scorers or "candidate" in self._warming or self._share <= 0:
            return "live"
        text = "\n".join(message["content"] for message in item[0])
        point = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32
        return "candidate" if point < self._share else "live"

    def _runner(self, role: str) -> Any:
        """The function that scores one batch of a role, again on another replica when one dies."""

        async def run(items: list[Item]) -> list[Scored]:
            deadline = time.monotonic() + self.limits.deadline_s
            found: Replies | None = None
            while found is None:
                try:
                    handle = self._scorers.get(role, self._scorers["live"])  # the candidate may have gone meanwhile
                    found = await handle.score.remote(items)
                except DEAD as error:
                    if time.monotonic() > deadline:
                        raise ApiError(503, "unavailable", "no replica answers; try again later", 1.0) from error
                    self.metrics.retries.inc()
                    await asyncio.sleep(RETRY_S)
                except BackPressureError as error:
                    raise ApiError(429, "busy", "all replicas are busy; try again later", 1.0) from error
            version, by_name = found
            names = list(by_name)
            rows = zip(*(by_name[name] for name in names), strict=True)
            return [
                Scored(
                    version,
                    {n: Score(n, value, raw, spread) for n, (value, raw, spread) in zip(names, row, strict=True)},
                )
                for row in rows
            ]

        return run

    async def _look(self) -> list[tuple[str, dict[str, Any]]]:
        """What each role serves now; notes the means that its cards promise."""
        found = []
        try:
            for role, handle in self._scorers.items():
                told = await handle.describe.remote()
                facts = told["facts"]
                self._expected[told["version"]] = {
                    name: fact["mean_value"] for name, fact in facts.items() if fact.get("mean_value") is not None
                }
                self._batchers[role].longest = max((fact["max_tokens"] for fact in facts.values()), default=LONGEST)
                found.append((role, told))
        except DEAD as error:
            raise ApiError(503, "unavailable", "a scorer is being replaced; try again", 1.0) from error
        finally:
            self._looking = None
        return found

    async def ready(self) -> bool:
        """Whether every scorer and every policy has answered once.

        What dies or comes later is Ray Serve's to mend, and requests wait for it.
        """
        if not self._woken:
            try:
                async with asyncio.timeout(1.0):
                    await self._look()
                    for handle, _ in self._policies.values():
                        await handle.describe.remote()
            except (TimeoutError, ApiError, *DEAD):
                return False
            self._woken = True
        return True

    async def models(self) -> list[ModelInfo]:
        """Reward model versions and policies."""
        share = self._share if "candidate" in self._scorers else 0.0
        shares = {"live": 1 - share, "candidate": share}
        rewards = [
            ModelInfo(
                id=f"reward-{role}",
                kind="reward",
                role=role,
                version=told["version"],
                share=shares[role],
                objectives=told["facts"],
            )
            for role, told in await self._look()
        ]
        return rewards + [
            ModelInfo(id=name, kind="policy", role="policy", version=version, share=1.0)
            for name, (_, version) in self._policies.items()
        ]

    async def feedback(self, request: FeedbackRequest) -> Outcome:
        """Store a reaction, with a row of its own when the response was served elsewhere."""
        return await self._store(reaction_event(request, self._salt))

    async def _store(self, event: Event) -> Outcome:
        try:
            (outcome,) = await self._ledger.append.remote([event])
        except DEAD as error:
            raise ApiError(503, "unavailable", "the feedback store restarts; send it again", 1.0) from error
        except (OSError, RlufError) as error:
            logger.error("feedback cannot be stored: %s", error)
            raise ApiError(503, "store", "feedback cannot be stored now; send it again later", 5.0) from error
        return outcome

    async def chat(self, request: ChatRequest) -> ChatReply:
        """Answer with a policy, and log what was served before the answer goes out."""
        name = request.model or next(iter(self._policies), "")
        if name not in self._policies:
            known = ", ".join(self._policies) or "none; set serve.policies"
            raise ApiError(404, "unknown", f"model: no policy {name[:40]!r} is served here ({known})")
        handle, _ = self._policies[name]
        messages = plain(request.messages)
        seed = request.seed if request.seed is not None else uuid.uuid4().int % 2**31
        try:
            text, reason, read, written, version = await handle.chat.remote(messages, seed)
        except ApiError as error:
            raise ApiError(error.status, error.kind, error.message) from error
        except (*DEAD, RlufError) as error:
            logger.error("policy %s failed: %s", name, error)
            raise ApiError(503, "unavailable", f"policy {name} does not answer now; try again later", 2.0) from error
        id_ = new_response_id()
        event = served_event(id_, request, version, text, self._salt)
        if event is not None:
            await self._store(event)
        return chat_reply(id_, name, version, text, reason, prompt_tokens=read, response_tokens=written)

    async def drain(self, seconds: float) -> int:
        """Refuse what is new, wait for what runs; returns the requests that still ran at the end of the time."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.running > 0 and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.running
