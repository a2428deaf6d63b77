"""The actors of a run as the driver sees them: handles by role, calls with a deadline, the phase of shared GPUs."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rluf.backends.colocation import GpuPhase, PhaseAction, list_phase_transitions
from rluf.config.settings import Settings
from rluf.errors import ActorError, ActorLostError, DeadlineError, ResourceError, RlufError

logger = logging.getLogger(__name__)

T = TypeVar("T")
FETCH_TIMEOUT_S = 60.0
"""Deadline for reading one group of samples from the object store."""
OBJECT_STORE_LABEL = "the object store"


@dataclass(frozen=True, slots=True)
class ActorRef:
    """One actor: role and index (for messages), handle, objective of a reward actor, number of restarts."""

    role: str
    index: int
    handle: ActorHandle[Any]
    objective: str = ""
    restarts: int = 0

    def __str__(self) -> str:
        return f"{self.role} {self.index}" + (f", start {self.restarts + 1}" if self.restarts else "")


@dataclass(slots=True)
class ActorGroups:
    """All actors of a run by role.

    `reward_pools` has one pool per objective; objectives that share a backbone have one pool, under the first of them.
    """

    rollout_actors: list[ActorRef] = field(default_factory=list)
    reward_pools: dict[str, list[ActorRef]] = field(default_factory=dict)
    learner_actors: list[ActorRef] = field(default_factory=list)
    phase: GpuPhase = "generate"
    """Phase of the GPUs that engines and learners share; constant where each has GPUs of its own."""
    phase_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Acquired for each change of the phase."""
    in_collective_sync: bool = False
    """Whether a weight sync is under way, or has failed, in which each process waits for all others (NCCL)."""

    @property
    def all_actors(self) -> list[ActorRef]:
        """Every actor of the run."""
        reward_actors = [actor for pool in self.reward_pools.values() for actor in pool]
        return [*self.rollout_actors, *reward_actors, *self.learner_actors]

    def get_pool(self, actor: ActorRef) -> list[ActorRef]:
        """The list of interchangeable actors that `actor` belongs to; changes to it are seen by every user."""
        if actor.objective:
            return self.reward_pools[actor.objective]
        return self.rollout_actors if actor.role == "rollout" else self.learner_actors


async def call_with_timeout(call: Awaitable[Any], timeout_s: float, caller_label: str) -> Any:
    """Await a call to an actor for at most `timeout_s` seconds.

    Raises the actor's own RlufError unchanged, DeadlineError past the deadline, ActorLostError when its process is
    gone, ResourceError when memory or the object store is full, ActorError for any other failure. Each names
    `caller_label`: an actor, and in parentheses what it was doing.
    """
    actor_name = caller_label.partition(" (")[0]
    try:
        return await asyncio.wait_for(call, timeout_s)
    except TimeoutError as error:
        raise DeadlineError(
            f"waited {timeout_s:g} s for {caller_label} without a reply; raise the deadline in timeouts, or check the "
            "actor's log in the Ray dashboard"
        ) from error
    except RayTaskError as error:
        translated = _translate_task_error(error, caller_label, actor_name)
        # Only an unexpected exception needs the actor's traceback; the other messages are complete.
        raise translated from (error if type(translated) is ActorError else None)
    except OutOfMemoryError as error:
        logger.debug("%s: out of memory:\n%s", caller_label, error)
        raise ResourceError(
            f"{caller_label} was killed by Ray because its machine ran out of memory ({_take_first_sentence(error)}); "
            "stop other programs there, or lower algorithm.micro_batch_tokens, rollout.kv_cache_gib or learner.workers"
        ) from error
    except RayActorError as error:
        logger.debug("%s: died:\n%s", caller_label, error)
        message = f"{caller_label} died: {_explain_actor_death(error)}; see its log in the Ray dashboard"
        # Ray reports a failing constructor as a dead actor. A restart would fail in the same way, so it is no loss.
        constructor_failed = "The actor died because of an error raised in its creation task" in str(error)
        raise (ActorError(message) if constructor_failed else ActorLostError(message, actor_name)) from error
    except ObjectLostError as error:
        raise ActorLostError(f"{caller_label} lost an object: {_take_first_sentence(error)}") from error
    except RayError as error:
        raise ActorError(
            f"{caller_label} failed: {_explain_actor_death(error)}; see its log in the Ray dashboard"
        ) from error


def _translate_task_error(error: RayTaskError, caller_label: str, actor_name: str) -> RlufError:
    """The error to raise for an exception inside an actor's method."""
    cause = error.cause
    if isinstance(cause, ActorLostError):
        return ActorLostError(str(cause), actor_name)
    if isinstance(cause, RlufError):
        return cause
    if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
        return _build_object_store_full_error(caller_label, cause)
    if isinstance(cause, ObjectLostError):
        return ActorLostError(f"{caller_label} could not read an object: {_take_first_sentence(error)}")
    logger.debug("%s: failed:\n%s", caller_label, error)
    message = "; ".join([f"{type(cause).__name__}: {cause}", *getattr(cause, "__notes__", ())])
    return ActorError(f"{caller_label} failed: {message}; run.log has the traceback")


async def gather_calls(
    calls: Sequence[tuple[ActorRef, Awaitable[Any]]], timeout_s: float, activity: str, *, wait_for_all: bool = False
) -> list[Any]:
    """Await one call per actor concurrently; the first failure is raised and names its actor.

    With `wait_for_all` a failure is raised only after every call has ended, so that none is outstanding on a retry.
    """
    waits = [call_with_timeout(call, timeout_s, f"{actor} ({activity})") for actor, call in calls]
    results = await asyncio.gather(*waits, return_exceptions=wait_for_all)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)


async def switch_gpu_phase(settings: Settings, actor_groups: ActorGroups, phase: GpuPhase) -> float:
    """Offload one side of colocated GPUs and load the other for `phase`; returns the seconds it took.

    Does nothing where engines and learners have GPUs of their own. Raises DeadlineError past timeouts.call_s,
    naming the actor and what it was doing.
    """
    if not settings.is_colocated:
        return 0.0
    start_time = time.monotonic()
    async with actor_groups.phase_lock:
        for phase_action in list_phase_transitions(actor_groups.phase, phase):
            await _run_phase_action(settings, actor_groups, phase_action)
        actor_groups.phase = phase
    return time.monotonic() - start_time


async def _run_phase_action(settings: Settings, actor_groups: ActorGroups, phase_action: PhaseAction) -> None:
    on_engines = phase_action.action in ("sleep", "wake")
    actors = actor_groups.rollout_actors if on_engines else actor_groups.learner_actors
    arguments = (phase_action.components,) if phase_action.components else ()
    calls = [(actor, getattr(actor.handle, phase_action.action).remote(*arguments)) for actor in actors]
    activity = f"GPU phase: {phase_action.action} {' '.join(phase_action.components)}".rstrip()
    await gather_calls(calls, settings.timeouts.call_s, activity)


async def fetch_group(group_ref: Any) -> Any:
    """The group behind a reference. Raises ActorLostError when the machine that stored it is gone."""
    return await call_with_timeout(group_ref, FETCH_TIMEOUT_S, OBJECT_STORE_LABEL)


def put_object(value: T) -> ObjectRef[T]:
    """Put `value` into the object store. Raises ResourceError when the store is full."""
    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise _build_object_store_full_error("the driver", error) from None


def _build_object_store_full_error(caller_label: str, error: RayError) -> ResourceError:
    return ResourceError(
        f"{caller_label} found Ray's object store full, with no disk to spill to ({_take_first_sentence(error)}); free "
        "the disk that holds Ray's folder, or lower algorithm.prompts_per_step or algorithm.max_staleness"
    )


def _take_first_sentence(error: RayError) -> str:
    return str(error).strip().partition(", which exceeds")[0].splitlines()[0]


def _explain_actor_death(error: RayError) -> str:
    """Why an actor died, in one line: the exception of its constructor, else Ray's description of its process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line is Ray's summary; an exception line further down is the cause, and the last one the innermost.
    exception_lines = [line for line in lines[1:] if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (exception_lines or lines or ["no reason given"])[-1 if exception_lines else 0]
