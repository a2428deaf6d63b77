"""Starts the actors of a run, waits for them with a deadline, watches their health, and ends them.

The supervisor lives in the driver: actors belong to the job, so Ray ends them when the driver dies, and it ends them in
order when the driver stops. It holds handles and small numbers only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from actors.learner import LearnerActor
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from cluster.placement import role_options
from rluf.config.settings import Settings
from rluf.errors import ActorError, ResourceError, RlufError, StallError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Member:
    """One actor: its role and index (for messages) and its handle."""

    role: str
    index: int
    handle: ActorHandle[Any]

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


@dataclass(slots=True)
class Crew:
    """All actors of a run by role. `rewards` has one pool an objective."""

    rollouts: list[Member] = field(default_factory=list)
    rewards: dict[str, list[Member]] = field(default_factory=dict)
    learners: list[Member] = field(default_factory=list)

    @property
    def members(self) -> list[Member]:
        """Every actor of the run."""
        return [*self.rollouts, *(m for pool in self.rewards.values() for m in pool), *self.learners]


async def within(call: Awaitable[Any], seconds: float, who: str) -> Any:
    """Await a call to an actor for at most `seconds`.

    Raises the actor's own RlufError as it is, StallError past the deadline, ActorError when the actor died or failed;
    each names `who`.
    """
    try:
        return await asyncio.wait_for(_future(call), seconds)
    except TimeoutError as error:
        raise StallError(
            f"waited {seconds:g} s for {who} without an answer; raise its deadline_s, or look at the actor's log "
            "in the Ray dashboard"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, RlufError):
            raise error.cause from None
        logger.debug("%s failed:\n%s", who, error)
        raise ActorError(
            f"{who} failed: {type(error.cause).__name__}: {error.cause}; run.log has the traceback"
        ) from error
    except OutOfMemoryError as error:
        logger.debug("%s: out of memory:\n%s", who, error)
        raise ResourceError(
            f"{who} was ended by Ray because its machine ran out of memory ({_sentence(error)}); end other programs "
            "there, or lower algorithm.micro_batch_tokens, rollout.kv_cache_gib or learner.ranks"
        ) from error
    except RayError as error:
        logger.debug("%s died:\n%s", who, error)
        raise ActorError(f"{who} died: {_reason(error)}; its log in the Ray dashboard says more") from error


def _sentence(error: RayError) -> str:
    return str(error).strip().partition(", which exceeds")[0].splitlines()[0]


def _reason(error: RayError) -> str:
    """Why an actor died, in one line: the exception its constructor raised, else what Ray knows of its process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines[1:] if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (raised or lines or ["no reason given"])[-1 if raised else 0]


async def _future(call: Awaitable[Any]) -> Any:
    return await call


async def everyone(calls: Sequence[tuple[Member, Awaitable[Any]]], seconds: float, doing: str) -> list[Any]:
    """Await one call an actor, all at once; the first failure is raised and names its actor."""
    return list(await asyncio.gather(*(within(call, seconds, f"{member} ({doing})") for member, call in calls)))


class Supervisor:
    """Owns the crew of one run. Use as an async context manager: on leaving, every actor is ended."""

    def __init__(self, settings: Settings, model: Path, rewards: Mapping[str, Path | None], *, learners: bool) -> None:
        """Plan a crew for `settings`: `rewards` gives the model folder of each objective (None for a judge)."""
        self.settings = settings
        self.crew = Crew()
        self._model = model
        self._rewards = dict(rewards)
        self._with_learners = learners

    async def __aenter__(self) -> Supervisor:
        """Start all actors and wait until each is ready."""
        try:
            self._create()
            await self._wait_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all actors."""
        await self.stop()

    def _create(self) -> None:
        blob, settings = self.settings.model_dump_json(), self.settings
        rollout, reward, learner = (_remote(cls) for cls in (RolloutActor, RewardActor, LearnerActor))
        self.crew.rollouts = [
            Member("rollout", i, self._named("rollout", i, rollout).remote(i, blob, str(self._model)))
            for i in range(settings.rollout.engines)
        ]
        for objective, folder in self._rewards.items():
            path = None if folder is None else str(folder)
            self.crew.rewards[objective] = [
                Member(
                    f"{objective} reward", i, self._named("reward", i, reward, objective).remote(objective, blob, path)
                )
                for i in range(settings.objectives.named[objective].replicas)
            ]
        if self._with_learners:
            world = settings.learner.ranks
            self.crew.learners = [
                Member("learner", i, self._named("learner", i, learner).remote(i, world, blob, str(self._model)))
                for i in range(world)
            ]

    def _named(self, role: str, index: int, actor: Any, objective: str = "") -> Any:
        name = "-".join(part for part in ("rluf", objective, role, str(index)) if part)
        return actor.options(name=name, **role_options(self.settings, role))

    async def _wait_ready(self) -> None:
        seconds = self.settings.cluster.start_deadline_s
        others = [m for m in self.crew.members if m.role != "learner"]
        logger.info("waiting for %d actors to be placed and ready (deadline %g s)", len(self.crew.members), seconds)
        await asyncio.gather(
            everyone([(m, m.handle.ready.remote()) for m in others], seconds, "starting"),
            self._join_learners(seconds),
        )
        logger.info("ready: %s", ", ".join(str(m) for m in self.crew.members))

    async def _join_learners(self, seconds: float) -> None:
        """Form the learners' process group around rank 0's address."""
        if not self.crew.learners:
            return
        first = self.crew.learners[0]
        host, port = await within(first.handle.address.remote(), seconds, f"{first} (address)")
        await everyone([(m, m.handle.setup.remote(host, port)) for m in self.crew.learners], seconds, "joining")

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work` while watching every actor; a dead or silent actor ends the work with its error."""
        job, watcher = asyncio.ensure_future(work), asyncio.ensure_future(self.watch())
        try:
            await asyncio.wait({job, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                watcher.result()
            return await job
        finally:
            job.cancel()
            watcher.cancel()
            await asyncio.gather(job, watcher, return_exceptions=True)

    async def watch(self) -> None:
        """Check every actor's health each `cluster.heartbeat_s` seconds; raise when one misses two checks in a row."""
        seconds = self.settings.cluster.heartbeat_s
        missed: dict[str, int] = {}
        while True:
            await asyncio.sleep(seconds)
            checks = [self._alive(member, seconds) for member in self.crew.members]
            for member, alive in zip(self.crew.members, await asyncio.gather(*checks), strict=True):
                missed[str(member)] = 0 if alive else missed.get(str(member), 0) + 1
                if missed[str(member)] >= 2:
                    raise StallError(
                        f"{member} answered no health check for {2 * seconds:g} s; look at its log in the Ray dashboard"
                    )

    async def _alive(self, member: Member, seconds: float) -> bool:
        try:
            check = member.handle.health.options(concurrency_group="health").remote()
            await within(check, seconds, f"{member} (health)")
        except StallError:
            logger.warning("%s missed a health check of %g s", member, seconds)
            return False
        return True

    async def stop(self) -> None:
        """Ask engines and learners to shut down, wait at most STOP_SECONDS for them, then end every actor."""
        crew, self.crew = self.crew, Crew()
        asked = [m.handle.shutdown.remote() for m in (*crew.rollouts, *crew.learners)]
        if asked:
            with contextlib.suppress(TimeoutError, GetTimeoutError):
                await asyncio.wait_for(asyncio.gather(*map(_quiet, asked)), STOP_SECONDS)
        for member in crew.members:
            ray.kill(member.handle)


def _remote(cls: type) -> Any:
    """Make a class an actor whose health check has a thread of its own, so that a long step does not hide it."""
    return ray.remote(concurrency_groups={"health": 1})(cls)


async def _quiet(call: Awaitable[Any]) -> None:
    with contextlib.suppress(RayError):
        await call
