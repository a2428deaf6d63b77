"""Actors that were lost come back: who may be started again, with which weights, and what happens to their prompts.

A rollout or reward actor is replaced while the others go on: its prompts are sent out again with their own seeds, so
that no sample is lost or counted twice. Learners hold the weights and their optimiser; losing one ends the attempt with
LostError, and the loop goes on from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import ObjectRef

from rluf.checkpoint.format import POLICY
from rluf.config.settings import Settings
from rluf.errors import ActorError, LostError
from rluf.objectives.aggregator import Combined
from rluf.train.actor_groups import Crew, Member, Supervisor, everyone, within
from rluf.train.controller import Pipeline, ScoredGroup
from rluf.train.prompt_store import ids_of
from rluf.train.prompts import Reactions
from rluf.train.weight_sync import Publisher
from rluf.types import Group, GroupInfo, Prompt

logger = logging.getLogger(__name__)

WINDOW_S = 3600.0
"""Restarts are counted within this many seconds."""


class Budget:
    """How often each actor was lost lately, and which prompts were in flight on it each time."""

    def __init__(self, limit: int) -> None:
        """At most `limit` restarts of one actor within WINDOW_S."""
        self.limit = limit
        self._times: defaultdict[str, list[float]] = defaultdict(list)
        self._victims: defaultdict[str, dict[str, set[str]]] = defaultdict(dict)

    def blame(self, place: str, who: str, prompt: str) -> None:
        """Note that `prompt` was in flight on `who` (one start of the actor in `place`) when it was lost."""
        self._victims[place].setdefault(who, set()).add(prompt)

    def spend(self, place: str, reason: str, now: float) -> None:
        """Note that the actor in `place` was lost at `now` (seconds).

        Raises ActorError when that was once too often, with the prompts that were there each time: a machine that fails
        loses now these and now those, bad data is always there.
        """
        recent = [*(t for t in self._times[place] if now - t < WINDOW_S), now]
        self._times[place] = recent
        if len(recent) <= self.limit:
            return
        deaths = list(self._victims[place].values())
        always = sorted(set.intersection(*deaths)) if len(deaths) > 1 else []
        look = f"prompt {', '.join(always[:3])} was there each time, look at it; " if always else ""
        raise ActorError(
            f"{place} was lost {len(recent)} times within an hour, more than cluster.restarts_per_hour={self.limit}; "
            f"{look}the last time: {reason}"
        )


class Reviver:
    """Replaces lost rollout and reward actors of one crew."""

    def __init__(self, supervisor: Supervisor, budget: Budget, publish_to: Callable[[Member], Awaitable[None]]) -> None:
        """`publish_to` brings a fresh rollout actor to the present weights; it runs while `weights` is held."""
        self.weights = asyncio.Lock()
        self.seconds: list[float] = []
        self._supervisor, self._budget, self._publish_to = supervisor, budget, publish_to
        # NCCL's group of GPUs takes no new members; on a shared GPU a learner sits where a new engine would start.
        self._fixed = supervisor.settings.publish.engine in ("nccl", "ipc")
        self._revivals: dict[str, asyncio.Task[None]] = {}
        supervisor.on_loss = self.lost

    def lost(self, error: LostError, prompt: str = "") -> None:
        """Start a replacement for the actor that `error` names, unless that is under way; `prompt` was in flight there.

        Raises the error again for a learner, or an engine in a group that takes no new one; ActorError when the
        actor's budget is spent.
        """
        crew = self._supervisor.crew
        place = error.who.partition(",")[0]
        if prompt and error.who:
            self._budget.blame(place, error.who, prompt)
        member = next((m for m in crew.members if str(m) == error.who), None)
        if member is None:
            return
        if member in crew.learners or (member in crew.rollouts and self._fixed):
            raise error
        self._budget.spend(place, str(error), time.monotonic())
        crew.pool(member).remove(member)
        logger.warning("%s; starting it again, what it was doing is done again", error)
        self._revivals[place] = asyncio.create_task(self._revive(member))

    async def _revive(self, member: Member) -> None:
        began = time.monotonic()
        fresh = await self._supervisor.replace(member)
        async with self.weights:
            if fresh.role == "rollout":
                await self._publish_to(fresh)
            pool = self._supervisor.crew.pool(fresh)
            pool.append(fresh)
            pool.sort(key=lambda m: m.index)
        self.seconds.append(time.monotonic() - began)
        logger.info("%s is back after %.1f s", fresh, self.seconds[-1])

    async def staffed(self) -> None:
        """Wait until every pool has an actor. Raises what went wrong with a replacement."""
        crew = self._supervisor.crew
        while True:
            for task in self._revivals.values():
                if task.done():
                    task.result()
            if crew.rollouts and all(crew.rewards.values()):
                return
            await asyncio.wait(
                [task for task in self._revivals.values() if not task.done()], return_when=asyncio.FIRST_COMPLETED
            )

    async def close(self) -> None:
        """Give up replacements that are under way."""
        self._supervisor.on_loss = None
        for task in self._revivals.values():
            task.cancel()
        await asyncio.gather(*self._revivals.values(), return_exceptions=True)


class LastingPublisher(Publisher):
    """A publisher that goes on without an engine that dies in the middle; its replacement is published to later."""

    def __init__(self, settings: Settings, crew: Crew, lost: Callable[[LostError], None]) -> None:
        """`lost` is told of dead engines."""
        super().__init__(settings, crew)
        self._lost = lost

    async def prepare(self, group: ObjectRef[Group]) -> None:
        """As Publisher.prepare; where an engine has not been read since a resumption, all are read again."""
        while True:
            try:
                await super().prepare(group)
                if any(str(member) not in self._readings for member in self.crew.rollouts):
                    self._readings = await self._read()
                    self._worst = max(self._worst, *(reading.gap for reading in self._readings.values()))
                return
            except LostError as error:
                self._lost(error)

    async def publish(self, version: int) -> dict[str, float]:
        """As Publisher.publish, begun again when an engine is lost."""
        while True:
            try:
                return await super().publish(version)
            except LostError as error:
                self._lost(error)

    async def _engines(self, method: str, seconds: float, *args: object) -> list[Any]:
        """Wait for every engine before a loss is raised, so that no old call is under way when phase 1 begins again."""
        members = list(self.crew.rollouts)
        calls = [within(self._call(m, method, *args), seconds, f"{m} (publish: {method})") for m in members]
        found = await asyncio.gather(*calls, return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return list(found)

    async def _probe(self, version: int) -> float:
        return await super()._probe(version) if self.crew.rollouts else 0.0

    async def meet(self, member: Member, version: int, *, behind: bool) -> None:
        """Bring one fresh engine to the learners' weights, which are `version`, if it is `behind`, and probe it."""
        alone = Publisher(self.settings, Crew(rollouts=[member], learners=self.crew.learners))
        alone.restore(self.state())
        if self._responses:
            alone._readings = await alone._read()
            alone._worst = alone._worst or max(reading.gap for reading in alone._readings.values())
        if behind:
            await alone.publish(version)
        self._readings |= alone._readings
        self._worst = max([self._worst, *(reading.gap for reading in alone._readings.values())])


class Counted:
    """An endless iterator that knows how far it has come."""

    def __init__(self, source: Iterator[int]) -> None:
        """Count what is taken from `source`."""
        self.taken = 0
        self._source = source

    def __iter__(self) -> Counted:
        """Itself."""
        return self

    def __next__(self) -> int:
        """The next one."""
        self.taken += 1
        return next(self._source)

    def skip(self, count: int) -> None:
        """Take `count` and forget them."""
        for _ in range(count):
            next(self)


class LastingPipeline(Pipeline):
    """A pipeline that outlives its rollout and reward actors and can say where it is, so that a run can go on there."""

    def __init__(
        self,
        settings: Settings,
        supervisor: Supervisor,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Group] = (),
        reactions: Reactions | None = None,
        *,
        budget: Budget | None = None,
    ) -> None:
        """As Pipeline, for the crew of `supervisor`."""
        super().__init__(settings, supervisor.crew, prompts, demonstrations, reactions)
        self.reviver = Reviver(supervisor, budget or Budget(settings.cluster.restarts_per_hour), self._welcome)
        self.publisher: LastingPublisher = LastingPublisher(settings, supervisor.crew, self.reviver.lost)
        self.learning = False
        self._began = 0
        self._behind = False
        self._order: Counted = Counted(self._order)
        self._next_shown: Counted = Counted(self._next_shown)
        self._liked, self._others = (Counted(order) for order in self._reaction_order)
        self._reaction_order = [self._liked, self._others]
        self._load = defaultdict(int, self._load)
        self._place = {name: place for place, name in enumerate(ids_of(prompts))}
        self._unlearnt: dict[int, tuple[str, int]] = {}
        self._again: dict[int, tuple[str, int]] = {}
        self.snapshot = self.state()

    def state(self) -> dict[str, Any]:
        """Where the pipeline is between two steps, as plain JSON; prompts sent out and not learnt from are listed."""
        return {
            "order": self._order.taken,
            "shown": self._next_shown.taken,
            "reactions": [self._liked.taken, self._others.taken],
            "unlearnt": [[number, *sent] for number, sent in (self._again | self._unlearnt).items()],
            "publisher": self.publisher.state(),
            "algorithm": self.algorithm_state(),
        }

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Go on after optimiser step `step`, whose weights engines and learners have already.

        But engines that are sent adapters begin with the base model until `catch_up`.
        """
        self._order.skip(int(state["order"]))
        self._next_shown.skip(int(state["shown"]))
        for order, taken in zip((self._liked, self._others), state["reactions"], strict=True):
            order.skip(int(taken))
        self._again = {int(number): (str(name), int(seed)) for number, name, seed in state["unlearnt"]}
        self._started = self._order.taken
        self._accepted = step * self.settings.algorithm.prompts_per_step
        self.publisher.restore(state["publisher"])
        self._behind = self.settings.publish.engine == "adapter"
        self.version, self._began = step, 0 if self._behind else step
        self.restore_algorithm(state["algorithm"])
        self.snapshot = self.state()

    async def catch_up(self) -> None:
        """Send the learnt adapter to engines that a resumption left with the base model."""
        if self._behind:
            async with self.reviver.weights:
                await self.publisher.send(self.version)
            self._behind = False

    async def _welcome(self, member: Member) -> None:
        if self.crew.learners:
            await self.publisher.meet(member, self.version, behind=self.version > self._began)

    async def roll_out(self, prompt: Prompt, samples: int, seed: int) -> tuple[ObjectRef[Group], GroupInfo]:
        """As Pipeline.roll_out, begun again with the same seed when its engine is lost."""
        while True:
            await self.reviver.staffed()
            try:
                return await super().roll_out(prompt, samples, seed)
            except LostError as error:
                self.reviver.lost(error, prompt.id)

    async def score(self, ref: ObjectRef[Group], info: GroupInfo) -> ScoredGroup:
        """As Pipeline.score, begun again when a reward actor is lost."""
        while True:
            await self.reviver.staffed()
            try:
                return await super().score(ref, info)
            except LostError as error:
                if not error.who:
                    raise
                self.reviver.lost(error, info.prompt_id)

    def admit(self, seed: int) -> None:
        """As Pipeline.admit, after the prompts that were in flight at the checkpoint."""
        again, self._again = self._again, {}
        for number, (name, own) in again.items():
            self._running.add(asyncio.create_task(self._admitted(self.prompts[self._place[name]], own, number)))
        super().admit(seed)

    async def _admitted(self, prompt: Prompt, seed: int, number: int) -> None:
        self._unlearnt[number] = (prompt.id, seed)
        await super()._admitted(prompt, seed, number)

    def _usable(self, scored: ScoredGroup) -> bool:
        if super()._usable(scored):
            return True
        del self._unlearnt[scored.number]
        return False

    async def step(self, number: int) -> dict[str, float]:
        """As Pipeline.step; from learning to the end of publishing no engine is brought back."""
        await self.catch_up()
        try:
            row = await super().step(number)
        finally:
            if self.learning:
                self.reviver.weights.release()
                self.learning = False
        self.snapshot = self.state()
        return row

    async def _learn(self, number: int, batch: Sequence[ScoredGroup], combined: Combined) -> dict[str, float]:
        await self.reviver.weights.acquire()
        self.learning = True
        try:
            row = await super()._learn(number, batch, combined)
        except ActorError as error:
            if not isinstance(error, LostError):  # a rank may fail because another one has gone
                await everyone([(m, m.handle.health.remote()) for m in self.crew.learners], 30.0, "health")
            raise
        for scored in batch:
            del self._unlearnt[scored.number]
        return row

    async def close(self) -> None:
        """Cancel what is still running, replacements too."""
        await self.reviver.close()
        await super().close()

    async def save_checkpoint(self, folder: Path) -> list[dict[str, Any]]:
        """Let the learners write the policy and their optimisers into `folder`; returns each rank's schedule."""
        await self.save(str(folder / POLICY))
        calls = [(m, m.handle.save_state.remote(str(folder))) for m in self.crew.learners]
        return await everyone(calls, self.settings.learner.deadline_s, f"saving to {folder}")
