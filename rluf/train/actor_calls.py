"""Calls to actors: deadline, translation of Ray's errors, selection of an actor, and retry after a lost actor."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import (
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rluf.errors import ActorError, ActorLostError, DeadlineError, ResourceError, RlufError

if TYPE_CHECKING:
    from rluf.tracking.timeline import RunTimeline
    from rluf.train.actor_groups import ActorRef
    from rluf.train.fault_tolerance import ActorRestarter

logger = logging.getLogger(__name__)

T = TypeVar("T")
FETCH_TIMEOUT_S = 60.0
"""Deadline for reading one group of samples from the object store."""
OBJECT_STORE_LABEL = "the object store"


class ActorCalls:
    """Calls to pools of interchangeable actors; a call whose actor is lost is repeated on another actor."""

    def __init__(self, restarter: ActorRestarter, timeline: RunTimeline) -> None:
        """`restarter` replaces lost actors; a span of every successful call is added to `timeline`."""
        self._restarter, self._timeline = restarter, timeline
        self._pending_work: defaultdict[str, int] = defaultdict(int)

    async def call(
        self,
        pool: Sequence[ActorRef],
        method: str,
        *args: object,
        timeout_s: float,
        task_name: str,
        activity: str,
        prompt_id: str,
        work_units: int = 1,
        keep_first_ref: bool = False,
    ) -> Any:
        """Call `method` on the least busy actor of `pool`; repeat on another one as long as actors are lost.

        `work_units` is the load the call adds to its actor, `task_name` names the task in Ray's dashboard, `activity`
        stands in errors, `prompt_id` is reported as in flight when the actor is lost. With `keep_first_ref` the method
        returns a pair: its first value stays in the object store and its reference is returned in its place.
        """

        async def call_once() -> Any:
            # `pool` is the live list of the actor groups: a retry sees replaced actors. Ties go to the lowest index.
            actor = min(pool, key=lambda candidate: (self._pending_work[str(candidate)], candidate.index))
            self._pending_work[str(actor)] += work_units
            start_time = time.monotonic()
            try:
                options = {"name": f"{actor}: {task_name}", "num_returns": 2 if keep_first_ref else 1}
                refs = getattr(actor.handle, method).options(**options).remote(*args)
                first_ref, value_ref = refs if keep_first_ref else (None, refs)
                value = await call_with_timeout(value_ref, timeout_s, f"{actor} ({activity})")
            finally:
                self._pending_work[str(actor)] -= work_units
            self._timeline.add_span(str(actor), f"prompt {prompt_id}", start_time, time.monotonic())
            return (first_ref, value) if keep_first_ref else value

        return await self.retry_on_loss(call_once, prompt_id=prompt_id)

    async def retry_on_loss(
        self, operation: Callable[[], Awaitable[T]], *, prompt_id: str = "", wait_until_healthy: bool = True
    ) -> T:
        """Await `operation`, again for as long as it ends with a lost actor that can be replaced.

        Before each attempt, wait until every pool has an actor; not so with `wait_until_healthy` False, for operations
        that work with the actors that are left. Raises ActorLostError for a learner and for a lost object, ActorError
        when the actor's restart budget is spent.
        """
        while True:
            if wait_until_healthy:
                await self._restarter.wait_until_healthy()
            try:
                return await operation()
            except ActorLostError as error:
                # Without an actor name an object was lost: repeating the same call would miss it again, forever.
                if not error.actor_name:
                    raise
                self._restarter.handle_loss(error, prompt_id)


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
            f"{caller_label} was killed by Ray because its machine ran out of memory ({_first_sentence(error)}); stop "
            "other programs there, or lower algorithm.micro_batch_tokens, rollout.kv_cache_gib or learner.workers"
        ) from error
    except RayActorError as error:
        logger.debug("%s: died:\n%s", caller_label, error)
        message = f"{caller_label} died: {_death_reason(error)}; see its log in the Ray dashboard"
        # Ray reports a failing constructor as a dead actor. A restart would fail in the same way, so it is no loss.
        constructor_failed = "The actor died because of an error raised in its creation task" in str(error)
        raise (ActorError(message) if constructor_failed else ActorLostError(message, actor_name)) from error
    except ObjectLostError as error:
        raise ActorLostError(f"{caller_label} lost an object: {_first_sentence(error)}") from error
    except RayError as error:
        raise ActorError(f"{caller_label} failed: {_death_reason(error)}; see its log in the Ray dashboard") from error


def _translate_task_error(error: RayTaskError, caller_label: str, actor_name: str) -> RlufError:
    """The error to raise for an exception inside an actor's method."""
    cause = error.cause
    if isinstance(cause, ActorLostError):
        return ActorLostError(str(cause), actor_name)
    if isinstance(cause, RlufError):
        return cause
    if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
        return _object_store_full_error(caller_label, cause)
    if isinstance(cause, ObjectLostError):
        return ActorLostError(f"{caller_label} could not read an object: {_first_sentence(error)}")
    logger.debug("%s: failed:\n%s", caller_label, error)
    return ActorError(f"{caller_label} failed: {type(cause).__name__}: {cause}; run.log has the traceback")


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


async def fetch_group(group_ref: Any) -> Any:
    """The group behind a reference. Raises ActorLostError when the machine that stored it is gone."""
    return await call_with_timeout(group_ref, FETCH_TIMEOUT_S, OBJECT_STORE_LABEL)


def put_object(value: T) -> ObjectRef[T]:
    """Put `value` into the object store. Raises ResourceError when the store is full."""
    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise _object_store_full_error("the driver", error) from None


def _object_store_full_error(caller_label: str, error: RayError) -> ResourceError:
    return ResourceError(
        f"{caller_label} found Ray's object store full, with no disk to spill to ({_first_sentence(error)}); free the "
        "disk that holds Ray's folder, or lower algorithm.prompts_per_step or algorithm.max_staleness"
    )


def _first_sentence(error: RayError) -> str:
    return str(error).strip().partition(", which exceeds")[0].splitlines()[0]


def _death_reason(error: RayError) -> str:
    """Why an actor died, in one line: the exception of its constructor, else Ray's description of its process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line is Ray's summary; an exception line further down is the cause, and the last one the innermost.
    exception_lines = [line for line in lines[1:] if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (exception_lines or lines or ["no reason given"])[-1 if exception_lines else 0]
