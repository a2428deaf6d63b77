"""Actor fault tolerance: restart policy, weight restore, calls that are repeated after a lost actor.

A rollout or reward actor is replaced while the others continue; its calls are repeated by `ActorCalls` with their own
seeds, so that no sample is lost or counted twice. Learners hold the weights and their optimizer state: losing
one ends the attempt with ActorLostError, and the loop resumes from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rluf.errors import ActorError, ActorLostError
from rluf.train.actor_calls import ActorRef, call_with_timeout
from rluf.train.actor_supervisor import ActorSupervisor

if TYPE_CHECKING:
    from rluf.tracking.timeline import RunTimeline

logger = logging.getLogger(__name__)

T = TypeVar("T")
RESTART_WINDOW_S = 3600.0
"""Restarts are counted within this many seconds."""
MAX_NAMED_PROMPTS = 3


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
