"""The pumps between the actors: admit, score, learn, publish, watch.

One asyncio program in the driver. Groups of samples stay in the object store; the driver holds references to them and
small numbers (lengths, scores, advantages). `algorithm.staleness` makes it synchronous (0) or asynchronous (> 0).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ray import ObjectRef

from actors.publisher import Publisher
from actors.supervisor import Crew, Member, everyone, within
from rluf.config.settings import Settings
from rluf.objectives.combine import Standardiser, combine, signal
from rluf.policy.advantages import advantages
from rluf.policy.packing import plan_micro_batches
from rluf.policy.staleness import capacity
from rluf.types import Group, GroupInfo, Prompt, Score

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group as the driver sees it: a reference to its samples, their lengths, and each objective's scores [G]."""

    ref: ObjectRef[Group]
    info: GroupInfo
    scores: Mapping[str, tuple[Score, ...]]


@dataclass(slots=True)
class Clock:
    """Seconds spent in each phase of one step, for the phase split."""

    started: float = field(default_factory=time.monotonic)
    generated: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    def lap(self, phase: str, since: float) -> float:
        """Add the seconds since `since` to a phase; returns now."""
        now = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - since
        return now


def prompt_order(times: Sequence[int], seed: int) -> Iterator[int]:
    """Indices of prompts without end: each pass is a new shuffle from `seed` that has prompt i times[i] times."""
    for epoch in itertools.count():
        order = [index for index, count in enumerate(times) for _ in range(count)]
        random.Random(f"{seed}-{epoch}").shuffle(order)
        yield from order


class Pipeline:
    """Moves prompts through rollout, reward and learner actors."""

    def __init__(self, settings: Settings, crew: Crew, prompts: Sequence[Prompt]) -> None:
        """Serve `prompts` (training split) to `crew`."""
        self.settings, self.crew, self.prompts = settings, crew, prompts
        self.version = 0
        self.standardiser: Standardiser | None = None
        self.publisher = Publisher(settings, crew)
        times = settings.algorithm.times
        self._order = prompt_order([times.get(prompt.topic, 1) for prompt in prompts], settings.seed)
        self._load = {str(member): 0 for member in crew.rollouts}
        self._turn = itertools.count()
        self._ready: asyncio.Queue[ScoredGroup] = asyncio.Queue()
        self._running: set[asyncio.Task[None]] = set()
        self._accepted = 0
        self._generated_at = time.monotonic()

    async def group(self, prompt: Prompt, samples: int, seed: int) -> ScoredGroup:
        """Roll out one prompt on the least busy engine and score it by all objectives at once."""
        member = min(self.crew.rollouts, key=lambda m: (self._load[str(m)], m.index))
        self._load[str(member)] += samples
        try:
            ref, info_ref = member.handle.generate.options(num_returns=2).remote(prompt, samples, seed)
            deadline = self.settings.rollout.deadline_s
            info: GroupInfo = await within(info_ref, deadline, f"{member} (prompt {prompt.id})")
        finally:
            self._load[str(member)] -= samples
        self._generated_at = time.monotonic()
        turn = next(self._turn)
        scorers = {name: pool[turn % len(pool)] for name, pool in self.crew.rewards.items()}
        calls = [(m, m.handle.score.remote(ref)) for m in scorers.values()]
        found = await everyone(calls, deadline, f"scoring prompt {prompt.id}")
        return ScoredGroup(ref, info, {name: tuple(s) for name, s in zip(scorers, found, strict=True)})

    async def respond(
        self, prompts: Sequence[Prompt], samples: int, seed: int, done: Callable[[], None]
    ) -> list[tuple[Group, ScoredGroup]]:
        """Responses of the policy in the engines to each prompt, with scores; `done` is called after each prompt."""
        width = max(1, self.settings.rollout.concurrency * len(self.crew.rollouts) // samples)
        gate = asyncio.Semaphore(width)

        async def one(index: int, prompt: Prompt) -> tuple[Group, ScoredGroup]:
            async with gate:
                scored = await self.group(prompt, samples, seed + index)
            done()
            return await within(scored.ref, 60.0, "the object store"), scored

        return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))

    def admit(self, seed: int) -> None:
        """Send prompt groups to engines while the staleness rule leaves room."""
        algorithm = self.settings.algorithm
        slots = self.settings.rollout.concurrency * len(self.crew.rollouts) // algorithm.samples_per_prompt
        left = algorithm.steps * algorithm.prompts_per_step - self._accepted - len(self._running)
        room = capacity(
            concurrency=max(1, slots),
            running=len(self._running),
            accepted=self._accepted,
            version=self.version,
            batch=algorithm.prompts_per_step,
            staleness=algorithm.staleness,
        )
        for _ in range(min(room, left)):
            prompt = self.prompts[next(self._order)]
            task = asyncio.create_task(self._admitted(prompt, seed + 1000 * (self._accepted + len(self._running))))
            self._running.add(task)

    async def _admitted(self, prompt: Prompt, seed: int) -> None:
        scored = await self.group(prompt, self.settings.algorithm.samples_per_prompt, seed)
        self._accepted += 1
        task = asyncio.current_task()
        if task is not None:
            self._running.discard(task)
        await self._ready.put(scored)
        self.admit(self.settings.seed)

    async def _batch(self) -> list[ScoredGroup]:
        """Wait for one batch of scored groups; a failed rollout or score ends the wait with its error."""
        batch: list[ScoredGroup] = []
        self.admit(self.settings.seed)
        while len(batch) < self.settings.algorithm.prompts_per_step:
            getter = asyncio.create_task(self._ready.get())
            done, _ = await asyncio.wait({getter, *self._running}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {getter}:
                task.result()
            if getter in done:
                batch.append(getter.result())
            else:
                getter.cancel()
        return sorted(batch, key=lambda scored: scored.info.prompt_id)

    async def step(self, number: int) -> dict[str, float]:
        """One optimiser step: a batch, advantages, learners, publish. Returns the metrics of the step."""
        clock = Clock()
        batch = await self._batch()
        self._generated_at = max(self._generated_at, clock.started)
        clock.phases["generate_s"] = self._generated_at - clock.started
        now = clock.lap("score_s", self._generated_at)
        if self.standardiser is None:
            self.standardiser = Standardiser.fit(_signals(batch))
        weights = self.settings.objectives.weights
        rewards = [combine(_signals([scored]), weights(scored.info.topic), self.standardiser) for scored in batch]
        gains = [advantages(self.settings.algorithm.name, reward) for reward in rewards]
        learnt = await self._learn(number, batch, gains)
        now = clock.lap("learn_s", now)
        self.version += 1
        probe = await self.publisher.publish(self.version, batch[0].ref)
        clock.lap("publish_s", now)
        metrics = {f"{name}": fmean(s.value for g in batch for s in g.scores[name]) for name in self.crew.rewards}
        metrics |= {f"{name}_raw": fmean(s.raw for g in batch for s in g.scores[name]) for name in self.crew.rewards}
        lengths = [n for scored in batch for n in scored.info.response_tokens]
        return {
            "step": number,
            "version": self.version,
            **metrics,
            "reward": fmean(r for reward in rewards for r in reward),
            "response_tokens": sum(lengths),
            "response_length": fmean(lengths),
            "prompt_tokens": sum(g.info.prompt_tokens * len(g.info.response_tokens) for g in batch),
            "samples": len(lengths),
            "staleness": max(self.version - 1 - scored.info.version for scored in batch),
            "probe": probe,
            **learnt,
            **clock.phases,
            "step_s": time.monotonic() - clock.started,
        }

    async def _learn(
        self, number: int, batch: Sequence[ScoredGroup], gains: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        """Send each rank its micro-batches; the token tensors come from the object store, not through the driver."""
        plan = plan_micro_batches(
            [g.info.prompt_tokens for g in batch],
            [g.info.response_tokens for g in batch],
            ranks=len(self.crew.learners),
            token_budget=self.settings.algorithm.micro_batch_tokens,
        )
        refs, gains = [g.ref for g in batch], [list(g) for g in gains]
        calls: list[tuple[Member, Any]] = [
            (m, m.handle.step.remote(refs, gains, plan[m.index], number)) for m in self.crew.learners
        ]
        found: list[dict[str, float]] = await everyone(
            calls, self.settings.learner.deadline_s, f"learning step {number}"
        )
        return found[0]

    async def close(self) -> None:
        """Cancel what is still running."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def save(self, path: str) -> None:
        """Let the learners write the policy as a Hugging Face folder."""
        calls = [(m, m.handle.save.remote(path)) for m in self.crew.learners]
        await everyone(calls, self.settings.learner.deadline_s, f"saving to {path}")


def _signals(batch: Sequence[ScoredGroup]) -> dict[str, list[float]]:
    names = batch[0].scores.keys()
    return {name: [signal(score) for scored in batch for score in scored.scores[name]] for name in names}
