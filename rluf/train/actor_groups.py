"""Starts the actors of a run, waits for them with a deadline, watches their health, and ends them.

The supervisor lives in the driver: actors belong to the job, so Ray ends them when the driver dies, and it ends them in
order when the driver stops. It holds handles and small numbers only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)  # fmt: skip

from actors.learner import LearnerActor
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from cluster.placement import Places, role_options
from rluf.backends.colocation import Phase, shares_gpus
from rluf.checkpoint.format import Checkpoint
from rluf.config.derived import scored_together
from rluf.config.settings import Settings
from rluf.errors import ActorError, LostError, ResourceError, RlufError, StallError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
STOP_SECONDS = 10.0
ROLES: dict[str, type] = {"rollout": RolloutActor, "reward": RewardActor, "learner": LearnerActor}


@dataclass(frozen=True, slots=True)
class Member:
    """One actor: its role and index (for messages), its handle, a scorer's objective, how often it was replaced."""

    role: str
    index: int
    handle: ActorHandle[Any]
    objective: str = ""
    life: int = 0

    def __str__(self) -> str:
        return f"{self.role} {self.index}" + (f", start {self.life + 1}" if self.life else "")


@dataclass(slots=True)
class Crew:
    """All actors of a run by role. `rewards` has one pool an objective, or for heads of one backbone by the first."""

    rollouts: list[Member] = field(default_factory=list)
    rewards: dict[str, list[Member]] = field(default_factory=dict)
    learners: list[Member] = field(default_factory=list)
    phase: Phase = "generate"
    """Whose turn it is on GPUs that engines and learners share (rluf/train/gpu_phases.py)."""
    turning: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the turn changes."""

    @property
    def members(self) -> list[Member]:
        """Every actor of the run."""
        return [*self.rollouts, *(m for pool in self.rewards.values() for m in pool), *self.learners]

    def pool(self, member: Member) -> list[Member]:
        """The list of its kind that `member` is in or belongs to."""
        if member.objective:
            return self.rewards[member.objective]
        return self.rollouts if member.role == "rollout" else self.learners


async def within(call: Awaitable[Any], seconds: float, who: str) -> Any:
    """Await a call to an actor for at most `seconds`.

    Raises the actor's own RlufError as it is, StallError past the deadline, LostError when its process has gone,
    ActorError when it failed otherwise; each names `who`: an actor, and in brackets what it was doing.
    """
    name = who.partition(" (")[0]
    try:
        return await asyncio.wait_for(_future(call), seconds)
    except TimeoutError as error:
        raise StallError(
            f"waited {seconds:g} s for {who} without an answer; raise its deadline_s, or look at the actor's log "
            "in the Ray dashboard"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, LostError):
            raise LostError(str(error.cause), name) from None
        if isinstance(error.cause, RlufError):
            raise error.cause from None
        if isinstance(error.cause, ObjectStoreFullError | OutOfDiskError):
            raise _full(who, error.cause) from None
        if isinstance(error.cause, ObjectLostError):
            raise LostError(f"{who} missed an object: {_sentence(error)}") from None
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
    except RayActorError as error:
        logger.debug("%s died:\n%s", who, error)
        message = f"{who} died: {_reason(error)}; its log in the Ray dashboard says more"
        raised = "The actor died because of an error raised in its creation task" in str(error)
        raise (ActorError(message) if raised else LostError(message, name)) from error
    except ObjectLostError as error:
        raise LostError(f"{who} lost an object: {_sentence(error)}") from error
    except RayError as error:
        raise ActorError(f"{who} failed: {_reason(error)}; its log in the Ray dashboard says more") from error


def kept(value: Result) -> ObjectRef[Result]:
    """`value` in the object store. Raises ResourceError when that is full."""
    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise _full("the driver", error) from None


def _full(who: str, error: RayError) -> ResourceError:
    return ResourceError(
        f"{who} found Ray's object store full, and no disk to spill to ({_sentence(error)}); free the disk that holds "
        "Ray's folder, or lower algorithm.prompts_per_step or algorithm.staleness"
    )


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

    def __init__(
        self,
        settings: Settings,
        model: Path,
        rewards: Mapping[str, Path | None],
        *,
        learners: bool,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Plan a crew for `settings`: `rewards` gives the model folder of each objective (None for a judge).

        With `checkpoint`, engines and learners go on from there; `model` stays the reference policy.
        """
        self.settings = settings
        self.crew = Crew()
        self.on_loss: Callable[[LostError], None] | None = None
        self._model = model
        self._rewards = dict(rewards)
        self._pools = {group[0]: group for group in scored_together(settings) if group[0] in rewards}
        self._with_learners = learners
        self._checkpoint = checkpoint
        self._places: Places | None = None

    async def __aenter__(self) -> Supervisor:
        """Start all actors and wait until each is ready."""
        try:
            self._places = Places(self.settings, learners=self._with_learners)
            await self._places.ready(self.settings.cluster.start_deadline_s)
            self._create()
            await self._wait_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """End all actors; after a lost process without asking them first, as the others may wait for it."""
        await self.stop(ask=not isinstance(error, LostError))

    def _create(self) -> None:
        settings = self.settings
        self.crew.rollouts = [self._hired("rollout", index) for index in range(settings.rollout.engines)]
        for objective in self._pools:
            replicas = settings.objectives.named[objective].replicas
            self.crew.rewards[objective] = [self._hired("reward", index, objective) for index in range(replicas)]
        if self._with_learners:
            self.crew.learners = [self._hired("learner", index) for index in range(settings.learner.ranks)]

    def _hired(self, role: str, index: int, objective: str = "", life: int = 0) -> Member:
        """Create one actor; it is not ready yet."""
        blob, model, begin = self.settings.model_dump_json(), str(self._model), self._checkpoint
        name = "-".join(part for part in ("rluf", objective, role, str(index), str(life or "")) if part)
        options = {
            "name": name,
            **role_options(self.settings, role),
            **(self._places.options(role, index) if self._places else {}),
        }
        arguments: tuple[object, ...]
        if role == "rollout":
            arguments = (index, blob, model)
            if begin is not None:  # adapters go on the model that they were trained on, and are published later
                merged = self.settings.publish.engine != "adapter"
                arguments = (index, blob, str(begin.policy) if merged else model, begin.step)
        elif role == "reward":
            folders = {name: self._rewards[name] for name in self._pools[objective]}
            arguments = (blob, {name: None if folder is None else str(folder) for name, folder in folders.items()})
        else:
            arguments = (index, self.settings.learner.ranks, blob, model, None if begin is None else str(begin.folder))
        handle = _remote(ROLES[role]).options(**options).remote(*arguments)
        return Member(f"{objective} reward" if objective else role, index, handle, objective, life)

    async def replace(self, lost: Member) -> Member:
        """End a rollout or reward actor for certain, start another in its place, and wait until it is ready.

        It has the weights the run began with, and is not in the crew yet.
        """
        ray.kill(lost.handle)
        fresh = self._hired("reward" if lost.objective else lost.role, lost.index, lost.objective, lost.life + 1)
        await within(fresh.handle.ready.remote(), self.settings.cluster.start_deadline_s, f"{fresh} (starting)")
        return fresh

    async def _wait_ready(self) -> None:
        seconds = self.settings.cluster.start_deadline_s
        crew = self.crew
        others = [m for m in crew.members if m.role != "learner"]
        logger.info("waiting for %d actors to be placed and ready (deadline %g s)", len(self.crew.members), seconds)
        started = everyone([(m, m.handle.ready.remote()) for m in others], seconds, "starting")
        if self._with_learners and shares_gpus(self.settings):  # never both on a GPU at once
            await started
            await everyone([(m, m.handle.sleep.remote()) for m in crew.rollouts], seconds, "making room for learners")
            await self._join_learners(seconds)
            crew.phase = "learn"
        else:
            await asyncio.gather(started, self._join_learners(seconds))
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
        """Check every actor's health each `cluster.heartbeat_s` seconds.

        One that has gone or misses two checks in a row is reported to `on_loss`, or raised as LostError without one.
        """
        seconds = self.settings.cluster.heartbeat_s
        missed: dict[str, int] = {}
        while True:
            await asyncio.sleep(seconds)
            members = self.crew.members
            for member, alive in zip(
                members, await asyncio.gather(*(self._alive(m, seconds) for m in members)), strict=True
            ):
                missed[str(member)] = 0 if alive else missed.get(str(member), 0) + 1
                if missed[str(member)] >= 2:
                    silent = f"{member} answered no health check for {2 * seconds:g} s"
                    self._report(LostError(f"{silent}; look at its log in the Ray dashboard", str(member)))

    async def _alive(self, member: Member, seconds: float) -> bool:
        try:
            check = member.handle.health.options(concurrency_group="health").remote()
            await within(check, seconds, f"{member} (health)")
        except StallError:
            logger.warning("%s missed a health check of %g s", member, seconds)
            return False
        except LostError as error:
            self._report(error)
        return True

    def _report(self, error: LostError) -> None:
        if self.on_loss is None:
            raise error
        self.on_loss(error)

    async def stop(self, *, ask: bool = True) -> None:
        """Ask engines and learners to shut down, wait at most STOP_SECONDS for them, then end every actor."""
        crew, self.crew = self.crew, Crew()
        asked = [m.handle.shutdown.remote() for m in (*crew.rollouts, *crew.learners)] if ask else []
        if asked:
            with contextlib.suppress(TimeoutError, GetTimeoutError):
                await asyncio.wait_for(asyncio.gather(*map(_quiet, asked)), STOP_SECONDS)
        for member in crew.members:
            ray.kill(member.handle)
        if self._places is not None:
            self._places.release()


def _remote(cls: type) -> Any:
    """Make a class an actor whose health check has a thread of its own, so that a long step does not hide it."""
    return ray.remote(concurrency_groups={"health": 1})(cls)


async def _quiet(call: Awaitable[Any]) -> None:
    with contextlib.suppress(RayError):
        await call
