"""The actors of a run as the driver sees them: handles by role, calls with a deadline, retries after a lost actor.

A rollout or reward actor is replaced while the others continue; its calls are repeated by `ActorCalls` with their own
seeds, so that no sample is lost or counted twice. Learners hold the weights and their optimizer state: losing
one ends the attempt with ActorLostError, and the loop resumes from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

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

if TYPE_CHECKING:
    from rluf.tracking.timeline import RunTimeline
    from rluf.train.actor_supervisor import ActorSupervisor

logger = logging.getLogger(__name__)

T = TypeVar("T")
FETCH_TIMEOUT_S = 60.0
"""Deadline for reading one group of samples from the object store."""
OBJECT_STORE_LABEL = "the object store"
RESTART_WINDOW_S = 3600.0
"""Restarts are counted within this many seconds."""
MAX_NAMED_PROMPTS = 3


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


class RestartBudget:
    """Recent losses of each actor, and the prompts that were in flight on it each time."""

    def __init__(self, max_restarts: int) -> None:
        """Allow `max_restarts` restarts of one actor within RESTART_WINDOW_S."""
        self.max_restarts = max_restarts
        self._loss_times: defaultdict[str, list[float]] = defaultdict(list)
        self._in_flight_prompts: defaultdict[str, dict[str, set[str]]] = defaultdict(dict)

    def record_in_flight(self, actor_name: str, actor_start: str, prompt_id: str) -> None:
        """Record that a prompt was in flight on `actor_start`, one start of `actor_name`, when it was lost."""
        self._in_flight_prompts[actor_name].setdefault(actor_start, set()).add(prompt_id)

    def record_failure(self, actor_name: str, reason: str, now: float) -> None:
        """Record that an actor was lost at `now` (seconds).

        Raises ActorError when the budget is exceeded, naming the prompts that were in flight at every loss: on a
        failing machine they differ from loss to loss, bad data is among them each time.
        """
        loss_times = [*(t for t in self._loss_times[actor_name] if now - t < RESTART_WINDOW_S), now]
        self._loss_times[actor_name] = loss_times
        if len(loss_times) <= self.max_restarts:
            return
        prompts_by_loss = list(self._in_flight_prompts[actor_name].values())
        # With a single loss every prompt that was in flight would be named.
        common_prompts = sorted(set.intersection(*prompts_by_loss)) if len(prompts_by_loss) > 1 else []
        hint = ""
        if common_prompts:
            hint = f"prompt {', '.join(common_prompts[:MAX_NAMED_PROMPTS])} was in flight each time, check it; "
        raise ActorError(
            f"{actor_name} was lost {len(loss_times)} times within an hour, more than "
            f"cluster.max_restarts_per_hour={self.max_restarts}; {hint}last time: {reason}"
        )


class ActorRestarter:
    """Replaces lost rollout and reward actors of one run."""

    def __init__(
        self, supervisor: ActorSupervisor, budget: RestartBudget, sync_engine: Callable[[ActorRef], Awaitable[None]]
    ) -> None:
        """`sync_engine` brings a new rollout actor to the current weights; `weight_lock` is locked while it runs."""
        self.weight_lock = asyncio.Lock()
        """Lock of the engine pool: from the start of an update to the end of the weight sync, and while a new engine
        gets its weights."""
        self.restart_seconds: list[float] = []
        self._supervisor, self._budget, self._sync_engine = supervisor, budget, sync_engine
        # On a shared GPU the learner occupies the memory that a new engine needs.
        self._engines_fixed = supervisor.settings.weight_sync.transport == "cuda_ipc"
        self._restart_tasks: dict[str, asyncio.Task[None]] = {}
        supervisor.on_loss = self.handle_loss

    def handle_loss(self, error: ActorLostError, prompt_id: str = "") -> None:
        """Start a replacement for the actor that `error` names, unless one is under way already.

        Raises the error again for a learner, and for an engine that cannot be replaced alone: one that shares its GPU
        with a learner, or that others wait for in a broadcast. ActorError when the actor's restart budget is spent.
        """
        actor_groups = self._supervisor.actor_groups
        actor_name = error.actor_name.partition(",")[0]
        if prompt_id and error.actor_name:
            self._budget.record_in_flight(actor_name, error.actor_name, prompt_id)
        lost_actor = next((actor for actor in actor_groups.all_actors if str(actor) == error.actor_name), None)
        if lost_actor is None:
            # Several calls fail when an actor dies. The name includes the start, so a late report of an earlier start
            # does not hit the replacement either.
            return
        is_engine = lost_actor in actor_groups.rollout_actors
        engines_fixed = self._engines_fixed or actor_groups.in_collective_sync
        if lost_actor in actor_groups.learner_actors or (is_engine and engines_fixed):
            raise error
        self._budget.record_failure(actor_name, str(error), time.monotonic())
        actor_groups.get_pool(lost_actor).remove(lost_actor)
        logger.warning("%s: lost: %s; restarting it and retrying its in-flight work", lost_actor, error)
        self._restart_tasks[actor_name] = asyncio.create_task(self._restart_actor(lost_actor))

    async def _restart_actor(self, lost_actor: ActorRef) -> None:
        start_time = time.monotonic()
        new_actor = await self._supervisor.replace_actor(lost_actor)
        # Locked until the engine is in the pool: a weight sync in between would start without it, and the
        # engine would serve old weights.
        async with self.weight_lock:
            if new_actor.role == "rollout":
                await self._sync_engine(new_actor)
            pool = self._supervisor.actor_groups.get_pool(new_actor)
            pool.append(new_actor)
            pool.sort(key=lambda actor: actor.index)
        self.restart_seconds.append(time.monotonic() - start_time)
        logger.info("%s: restarted after %.1f s", new_actor, self.restart_seconds[-1])

    async def wait_until_healthy(self) -> None:
        """Wait until every pool has an actor. Raises the error of a replacement that failed."""
        actor_groups = self._supervisor.actor_groups
        while True:
            for task in self._restart_tasks.values():
                if task.done():
                    task.result()
            if actor_groups.rollout_actors and all(actor_groups.reward_pools.values()):
                return
            restarting = [task for task in self._restart_tasks.values() if not task.done()]
            await asyncio.wait(restarting, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Cancel replacements that are under way."""
        self._supervisor.on_loss = None
        for task in self._restart_tasks.values():
            task.cancel()
        await asyncio.gather(*self._restart_tasks.values(), return_exceptions=True)


class LeastBusyPicker:
    """Picks the actor of a pool with the least pending work in logarithmic time; ties go to the lowest index.

    A scan of 1,024 engines for each of thousands of calls per second would occupy the driver.
    """

    def __init__(self) -> None:
        """Start with no pending work."""
        self._pending_work: defaultdict[str, int] = defaultdict(int)
        self._pools: dict[int, tuple[list[ActorRef], set[str], list[tuple[int, int, str, ActorRef]]]] = {}

    def select_actor(self, pool: Sequence[ActorRef]) -> ActorRef:
        """The least busy actor of `pool`, a live list: members that left or joined since the last call count."""
        members, _, heap = self._pools.get(id(pool), ([], set(), []))
        if members != pool or len(heap) > 4 * len(members):
            members = list(pool)
            heap = [self._build_entry(actor) for actor in members]
            heapq.heapify(heap)
            self._pools[id(pool)] = (members, {entry[2] for entry in heap}, heap)
        # An entry is out of date when its actor got work since; where work was finished, a newer entry exists.
        while heap[0][0] != self._pending_work[heap[0][2]]:
            heapq.heapreplace(heap, self._build_entry(heap[0][3]))
        return heap[0][3]

    def add_work(self, pool: Sequence[ActorRef], actor: ActorRef, work_units: int) -> None:
        """Add pending work to an actor of `pool`; negative `work_units` remove it."""
        self._pending_work[str(actor)] += work_units
        _, member_names, heap = self._pools.get(id(pool), ([], set(), []))
        # Work of a lost actor ends after it has left the pool.
        if work_units < 0 and str(actor) in member_names:
            heapq.heappush(heap, self._build_entry(actor))

    def _build_entry(self, actor: ActorRef) -> tuple[int, int, str, ActorRef]:
        name = str(actor)
        return (self._pending_work[name], actor.index, name, actor)


class ActorCalls:
    """Calls to pools of interchangeable actors; a call whose actor is lost is repeated on another actor."""

    def __init__(self, restarter: ActorRestarter, timeline: RunTimeline) -> None:
        """`restarter` replaces lost actors; a span of every successful call is added to `timeline`."""
        self._restarter, self._timeline = restarter, timeline
        self._picker = LeastBusyPicker()

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
            # `pool` is the live list of the actor groups: a retry sees replaced actors.
            actor = self._picker.select_actor(pool)
            self._picker.add_work(pool, actor, work_units)
            start_time = time.monotonic()
            try:
                options = {"name": f"{actor}: {task_name}", "num_returns": 2 if keep_first_ref else 1}
                refs = getattr(actor.handle, method).options(**options).remote(*args)
                first_ref, value_ref = refs if keep_first_ref else (None, refs)
                value = await call_with_timeout(value_ref, timeout_s, f"{actor} ({activity})")
            finally:
                self._picker.add_work(pool, actor, -work_units)
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
