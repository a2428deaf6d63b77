"""The supervisor starts, watches and stops the actors of a run.

It lives in the driver. Actors belong to the job, so Ray ends them when the driver dies; the supervisor ends
them in order when the driver stops. It holds handles and small numbers only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.learner import LearnerActor
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from cluster.placement import PlacementGroups, actor_options
from rluf.checkpoint.format import RunCheckpoint
from rluf.config.derived import group_objectives_by_pool
from rluf.config.settings import Settings
from rluf.errors import ActorLostError, DeadlineError
from rluf.train.actor_calls import ActorGroups, ActorRef, call_with_timeout, gather_calls

logger = logging.getLogger(__name__)

T = TypeVar("T")
STOP_TIMEOUT_S = 10.0
HEALTH_CHECK_INTERVAL_S = 30.0
"""Seconds between health checks; loading a large model may keep an actor from answering for longer than ten."""
MAX_MISSED_HEALTH_CHECKS = 2
"""Missed checks in a row after which an actor counts as lost: one alone may be a machine that is busy for a moment."""
ACTOR_CLASSES: dict[str, type] = {"rollout": RolloutActor, "reward": RewardActor, "learner": LearnerActor}


class ActorSupervisor:
    """Owner of one run's actors. An async context manager: on leaving, every actor is ended."""

    def __init__(
        self,
        settings: Settings,
        model_path: Path,
        reward_folders: Mapping[str, Path | None],
        *,
        with_learners: bool,
        checkpoint: RunCheckpoint | None = None,
    ) -> None:
        """Plan the actors of `settings`; `reward_folders` has the model folder of each objective, None for a judge.

        With `checkpoint`, engines and learners start from it; `model_path` stays the reference policy.
        """
        self.settings = settings
        self.actor_groups = ActorGroups()
        self.on_loss: Callable[[ActorLostError], None] | None = None
        self._model_path = model_path
        self._reward_folders = dict(reward_folders)
        reward_pools = group_objectives_by_pool(settings)
        self._pool_objectives = {pool[0]: pool for pool in reward_pools if pool[0] in reward_folders}
        self._with_learners = with_learners
        self._checkpoint = checkpoint
        self._placement_groups: PlacementGroups | None = None

    async def __aenter__(self) -> ActorSupervisor:
        """Start all actors and wait until each is ready."""
        try:
            self._placement_groups = PlacementGroups(self.settings, with_learners=self._with_learners)
            await self._placement_groups.wait_until_ready(self.settings.timeouts.actor_start_s)
            self._create_actors()
            await self._wait_until_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, error_type: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """End all actors."""
        # After a lost process the other ranks may hang in a collective call and never serve a shutdown request.
        await self.stop(graceful=not isinstance(error, ActorLostError))

    def _create_actors(self) -> None:
        settings, actor_groups = self.settings, self.actor_groups
        actor_groups.rollout_actors = [self._create_actor("rollout", i) for i in range(settings.rollout.engines)]
        for objective in self._pool_objectives:
            replicas = settings.objectives.by_objective[objective].replicas
            pool = [self._create_actor("reward", i, objective) for i in range(replicas)]
            actor_groups.reward_pools[objective] = pool
        if self._with_learners:
            actor_groups.learner_actors = [self._create_actor("learner", i) for i in range(settings.learner.workers)]

    def _create_actor(self, role: str, index: int, objective: str = "", restarts: int = 0) -> ActorRef:
        """Create one actor; it is not ready yet."""
        settings_json, model_path, checkpoint = self.settings.model_dump_json(), str(self._model_path), self._checkpoint
        name_parts = ("rluf", objective, role, str(index), str(restarts or ""))
        options = {
            "name": "-".join(name for name in name_parts if name),
            **actor_options(self.settings, role, objective),
            **(self._placement_groups.scheduling_options(role, index) if self._placement_groups else {}),
        }
        arguments: tuple[object, ...]
        if role == "rollout":
            arguments = (index, settings_json, model_path)
            if checkpoint is not None:
                # A LoRA engine serves the base model; the trained adapter is sent by the first weight sync.
                merged = self.settings.weight_sync.transport != "lora"
                start_path = str(checkpoint.policy_folder) if merged else model_path
                arguments = (index, settings_json, start_path, checkpoint.step)
        elif role == "reward":
            folders = {name: self._reward_folders[name] for name in self._pool_objectives[objective]}
            paths = {name: None if folder is None else str(folder) for name, folder in folders.items()}
            arguments = (settings_json, paths)
        else:
            checkpoint_path = None if checkpoint is None else str(checkpoint.folder)
            arguments = (index, self.settings.learner.workers, settings_json, model_path, checkpoint_path)
        handle = _build_remote_class(ACTOR_CLASSES[role]).options(**options).remote(*arguments)
        return ActorRef(f"{objective} reward" if objective else role, index, handle, objective, restarts)

    async def replace_actor(self, lost_actor: ActorRef) -> ActorRef:
        """Kill a rollout or reward actor, start another in its place, and wait until it is ready.

        The new actor has the weights the run began with and is not in the actor groups yet.
        """
        # The process may be silent rather than gone; two actors with one GPU or one name must not exist.
        ray.kill(lost_actor.handle)
        role = "reward" if lost_actor.objective else lost_actor.role
        new_actor = self._create_actor(role, lost_actor.index, lost_actor.objective, lost_actor.restarts + 1)
        ready_call = new_actor.handle.start.remote()
        await call_with_timeout(ready_call, self.settings.timeouts.actor_start_s, f"{new_actor} (starting)")
        return new_actor

    async def _wait_until_ready(self) -> None:
        timeout_s, actor_groups = self.settings.timeouts.actor_start_s, self.actor_groups
        all_actors, engines = actor_groups.all_actors, actor_groups.rollout_actors
        logger.info("actors: waiting for %d to be placed and ready (deadline %g s)", len(all_actors), timeout_s)
        ready_calls = [(actor, actor.handle.start.remote()) for actor in all_actors if actor.role != "learner"]
        ready_wait = gather_calls(ready_calls, timeout_s, "starting")
        if self._with_learners and self.settings.is_colocated:
            # Engine and learner together do not fit into a shared GPU: the engine sleeps before the learner loads.
            await ready_wait
            sleep_calls = [(actor, actor.handle.sleep.remote()) for actor in engines]
            await gather_calls(sleep_calls, timeout_s, "freeing GPU memory for the learners")
            await self._join_learners(timeout_s)
            actor_groups.phase = "learn"
        else:
            await asyncio.gather(ready_wait, self._join_learners(timeout_s))
        logger.info("actors: ready: %s", ", ".join(map(str, all_actors)))

    async def _join_learners(self, timeout_s: float) -> None:
        """Form the learners' process group around rank 0's address."""
        learners = self.actor_groups.learner_actors
        if not learners:
            return
        address_call = learners[0].handle.find_rendezvous_address.remote()
        host, port = await call_with_timeout(address_call, timeout_s, f"{learners[0]} (address)")
        setup_calls = [(actor, actor.handle.setup.remote(host, port)) for actor in learners]
        await gather_calls(setup_calls, timeout_s, "joining the process group")

    async def run_monitored(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` while watching every actor; a dead or silent actor ends the work with its error."""
        work_task, watch_task = asyncio.ensure_future(work), asyncio.ensure_future(self.watch_health())
        try:
            await asyncio.wait({work_task, watch_task}, return_when=asyncio.FIRST_COMPLETED)
            if not work_task.done():
                watch_task.result()
            return await work_task
        finally:
            work_task.cancel()
            watch_task.cancel()
            await asyncio.gather(work_task, watch_task, return_exceptions=True)

    async def watch_health(self) -> None:
        """Check every actor's health each HEALTH_CHECK_INTERVAL_S seconds.

        An actor that is gone or misses MAX_MISSED_HEALTH_CHECKS checks in a row is reported to `on_loss`; without
        `on_loss` it is raised as ActorLostError.
        """
        interval_s = HEALTH_CHECK_INTERVAL_S
        missed_checks: dict[str, int] = {}
        while True:
            await asyncio.sleep(interval_s)
            actors = self.actor_groups.all_actors
            checks = await asyncio.gather(*(self._is_alive(actor, interval_s) for actor in actors))
            for actor, is_alive in zip(actors, checks, strict=True):
                name = str(actor)
                missed_checks[name] = 0 if is_alive else missed_checks.get(name, 0) + 1
                if missed_checks[name] >= MAX_MISSED_HEALTH_CHECKS:
                    silent_s = MAX_MISSED_HEALTH_CHECKS * interval_s
                    message = f"{name} answered no health check for {silent_s:g} s; check its log in the Ray dashboard"
                    self._report_loss(ActorLostError(message, name))

    async def _is_alive(self, actor: ActorRef, timeout_s: float) -> bool:
        try:
            check = actor.handle.get_health.options(concurrency_group="health").remote()
            await call_with_timeout(check, timeout_s, f"{actor} (health)")
        except DeadlineError:
            logger.warning("%s: missed a health check of %g s", actor, timeout_s)
            return False
        except ActorLostError as error:
            self._report_loss(error)
        return True

    def _report_loss(self, error: ActorLostError) -> None:
        if self.on_loss is None:
            raise error
        self.on_loss(error)

    async def stop(self, *, graceful: bool = True) -> None:
        """Ask engines and learners to shut down, wait at most STOP_TIMEOUT_S seconds, then kill every actor."""
        actor_groups, self.actor_groups = self.actor_groups, ActorGroups()
        actors_to_ask = (*actor_groups.rollout_actors, *actor_groups.learner_actors) if graceful else ()
        shutdown_calls = [actor.handle.shutdown.remote() for actor in actors_to_ask]
        if shutdown_calls:
            with contextlib.suppress(TimeoutError, GetTimeoutError):
                await asyncio.wait_for(asyncio.gather(*map(_ignore_ray_errors, shutdown_calls)), STOP_TIMEOUT_S)
        for actor in actor_groups.all_actors:
            ray.kill(actor.handle)
        if self._placement_groups is not None:
            self._placement_groups.release()


def _build_remote_class(actor_class: type) -> Any:
    """A Ray actor class whose health check has a thread of its own, so that a long step does not block it."""
    return ray.remote(concurrency_groups={"health": 1})(actor_class)


async def _ignore_ray_errors(call: Awaitable[Any]) -> None:
    with contextlib.suppress(RayError):
        await call
