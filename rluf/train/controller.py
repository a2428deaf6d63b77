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
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from ray import ObjectRef

from rluf.algorithms.advantages import Drift, Outcomes
from rluf.algorithms.losses import adapted
from rluf.algorithms.packing import MicroBatch, plan_micro_batches
from rluf.algorithms.registry import METHODS, Lesson, make_lesson, needs_drifts, varied
from rluf.algorithms.staleness import capacity
from rluf.config.derived import scored_together
from rluf.config.policy import AlgorithmSettings
from rluf.config.settings import Settings
from rluf.errors import StallError
from rluf.objectives.aggregation import signal
from rluf.objectives.aggregator import Combined, Combiner, Opinions
from rluf.tracking.timeline import STEPS, Timeline
from rluf.train.actor_groups import Crew, Member, everyone, kept, within
from rluf.train.gpu_phases import turn
from rluf.train.offline_batches import LoggedBatches, mismatched, outcomes_of
from rluf.train.profiling import pump
from rluf.train.prompt_store import topics_of
from rluf.train.prompts import Reactions
from rluf.train.weight_sync import Publisher
from rluf.types import Group, GroupInfo, Prompt, Score

logger = logging.getLogger(__name__)

REFILLS = 10
"""Batches' worth of groups that may be dropped in one step before all are taken (verl allows as many)."""
QUEUE = 1.5
"""Groups sent to the engines for each one they can hold: the rest wait there, and take the places of samples that end
before the longest of their group."""
BASELINE_SEED = 2_000_003


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group as the driver sees it: a reference to its samples, their lengths, and each objective's scores [G]."""

    ref: ObjectRef[Group]
    info: GroupInfo
    scores: Mapping[str, tuple[Score, ...]]
    number: int = 0
    """Its place in the order of admission, which tells groups of one prompt apart."""

    def opinions(self, pessimism: float) -> Opinions:
        """What the combination of objectives needs of this group; `pessimism` see objectives.aggregation.signal."""
        signals = {name: [signal(score, pessimism) for score in scores] for name, scores in self.scores.items()}
        return Opinions(self.info.prompt_id, self.info.topic, signals, self.info.passed)


@dataclass(slots=True)
class Clock:
    """Seconds spent in each phase of one step, for the phase split."""

    started: float = field(default_factory=time.monotonic)
    generated: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)

    def lap(self, phase: str, since: float, now: float | None = None) -> float:
        """Add the seconds from `since` until now to a phase; returns now."""
        now = time.monotonic() if now is None else now
        self.phases[phase] = self.phases.get(phase, 0.0) + now - since
        self.timeline.add(STEPS, phase.removesuffix("_s"), since, now)
        return now


def prompt_order(times: Sequence[int], seed: int) -> Iterator[int]:
    """Indices of prompts without end: each pass is a new shuffle from `seed` that has prompt i times[i] times."""
    for epoch in itertools.count():
        order = [index for index, count in enumerate(times) for _ in range(count)]
        random.Random(f"{seed}-{epoch}").shuffle(order)
        yield from order


def demonstrations_at(step: int, algorithm: AlgorithmSettings) -> int:
    """Demonstrations of the step (counted from 1): all at first, falling to none, so that rewards have the last word.

    Source: the decaying weight of demonstrations in DAPG, arXiv 1709.10087, section IV-B.
    """
    return round(algorithm.demonstrations * (1 - (step - 1) / algorithm.steps))


class Pipeline:
    """Moves prompts through rollout, reward and learner actors."""

    def __init__(
        self,
        settings: Settings,
        crew: Crew,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Group] = (),
        reactions: Reactions | None = None,
    ) -> None:
        """Serve `prompts` (training split) to `crew`; each step learns from a few of `demonstrations` too.

        Reward-free methods learn from `reactions` instead.
        """
        self.settings, self.crew, self.prompts = settings, crew, prompts
        scored = {name for pool in scored_together(settings) if pool[0] in crew.rewards for name in pool}
        self.objectives = tuple(name for name in settings.objectives.named if name in scored)
        """Those that have reward actors: objectives of weight 0 need none."""
        self.version = 0
        self.combiner = Combiner(settings.objectives)
        self.kl_coef = settings.algorithm.kl_coef
        self.publisher = Publisher(settings, crew)
        times = settings.algorithm.times
        self._order = prompt_order([times.get(topic, 1) for topic in topics_of(prompts)], settings.seed)
        self._shown = [(kept(shown), shown.info) for shown in demonstrations]
        self._next_shown = prompt_order([1] * len(demonstrations), settings.seed)
        self._reactions = reactions or Reactions((), ())
        sizes = (len(self._reactions.liked), len(self._reactions.others))
        self._reaction_order = [prompt_order([1] * size, settings.seed) for size in sizes]
        self._logged: LoggedBatches | None = None
        self._load = {str(member): 0 for member in crew.rollouts}
        self._turn = itertools.count()
        self._ready: asyncio.Queue[ScoredGroup] = asyncio.Queue()
        self._running: set[asyncio.Task[None]] = set()
        self._accepted = self._started = self._dropped = 0
        self.generated_at = time.monotonic()
        """When the last samples came (time.monotonic)."""
        self.values: dict[str, list[list[float]]] = {}
        """Values of the last step's samples [groups][samples]: of each objective, reward, response_length, and kl to
        the reference (nats; absent where the step learnt from the log instead)."""
        self.learnt: list[ObjectRef[Group]] = []
        """The groups that the last step drew, in the object store."""
        self._distances: dict[tuple[int, int], float] = {}
        self.timeline = Timeline()

    async def group(self, prompt: Prompt, samples: int, seed: int) -> ScoredGroup:
        """Roll out one prompt on the least busy engine and score it by all objectives at once."""
        ref, info = await self.roll_out(prompt, samples, seed)
        return await self.score(ref, info)

    async def roll_out(self, prompt: Prompt, samples: int, seed: int) -> tuple[ObjectRef[Group], GroupInfo]:
        """Sample a group on the least busy engine; the samples stay in the object store."""
        member = min(self.crew.rollouts, key=lambda m: (self._load[str(m)], m.index))
        self._load[str(member)] += samples
        begun = time.monotonic()
        try:
            call = member.handle.generate.options(num_returns=2, name=f"{member}: generate v{self.version}")
            ref, info_ref = call.remote(prompt, samples, seed)
            deadline = self.settings.rollout.deadline_s
            info: GroupInfo = await within(info_ref, deadline, f"{member} (prompt {prompt.id})")
        finally:
            self._load[str(member)] -= samples
        self.generated_at = drawn = time.monotonic()
        self.timeline.add(str(member), f"prompt {prompt.id}", begun, drawn)
        return ref, info

    async def score(self, ref: ObjectRef[Group], info: GroupInfo) -> ScoredGroup:
        """Let all objectives score a group at once, on the next actor of each pool."""
        deadline, begun = self.settings.rollout.deadline_s, time.monotonic()
        turn = next(self._turn)
        scorers = {name: pool[turn % len(pool)] for name, pool in self.crew.rewards.items()}
        named = f"score v{info.version}"
        calls = [(m, m.handle.score.options(name=f"{m}: {named}").remote(ref)) for m in scorers.values()]
        found = await everyone(calls, deadline, f"scoring prompt {info.prompt_id}")
        for scorer in scorers.values():
            self.timeline.add(str(scorer), f"prompt {info.prompt_id}", begun, time.monotonic())
        scores = {name: tuple(scores) for part in found for name, scores in part.items()}
        return ScoredGroup(ref, info, {name: scores[name] for name in self.objectives})

    async def respond(
        self, prompts: Sequence[Prompt], samples: int, seed: int, done: Callable[[], None]
    ) -> list[tuple[Group, ScoredGroup]]:
        """Responses of the policy in the engines to each prompt, with scores; `done` is called after each prompt."""
        await turn(self.settings, self.crew, "generate")
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
        places = self.settings.rollout.concurrency * len(self.crew.rollouts) // algorithm.samples_per_prompt
        left = algorithm.steps * algorithm.prompts_per_step - self._accepted - len(self._running)
        room = capacity(
            concurrency=max(1, int(places * QUEUE)),
            running=len(self._running),
            accepted=self._accepted,
            version=self.version,
            batch=algorithm.prompts_per_step,
            staleness=algorithm.staleness,
        )
        for _ in range(min(room, left)):
            prompt = self.prompts[next(self._order)]
            task = asyncio.create_task(self._admitted(prompt, seed + 1000 * self._started, self._started))
            self._started += 1
            self._running.add(task)

    async def _admitted(self, prompt: Prompt, seed: int, number: int) -> None:
        scored = await self.group(prompt, self.settings.algorithm.samples_per_prompt, seed)
        scored = replace(scored, number=number)
        self._accepted += 1
        task = asyncio.current_task()
        if task is not None:
            self._running.discard(task)
        await self._ready.put(scored)
        self.admit(self.settings.seed)

    async def _batch(self) -> list[ScoredGroup]:
        """Wait for one batch of scored groups; a failed rollout or score ends the wait with its error.

        Raises StallError when no group comes for as long as drawing, scoring and starting an actor again may take.
        """
        batch: list[ScoredGroup] = []
        await turn(self.settings, self.crew, "generate")
        patience = 2 * self.settings.rollout.deadline_s + self.settings.cluster.start_deadline_s
        self.admit(self.settings.seed)
        while len(batch) < self.settings.algorithm.prompts_per_step:
            getter = asyncio.create_task(self._ready.get())
            waits = {getter, *self._running}
            done, _ = await asyncio.wait(waits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                getter.cancel()
                raise StallError(
                    f"waited {patience:g} s for a group of step {self.version + 1}: {len(batch)} of "
                    f"{self.settings.algorithm.prompts_per_step} are there, {len(self._running)} in flight; look at "
                    "the rollout and reward actors' logs in the Ray dashboard, or raise rollout.deadline_s"
                )
            for task in done - {getter}:
                task.result()
            if getter not in done:
                getter.cancel()
            elif self._usable(getter.result()):
                batch.append(getter.result())
            else:
                self._accepted -= 1
                self._dropped += 1
                self.admit(self.settings.seed)
        return sorted(batch, key=lambda scored: (scored.info.prompt_id, scored.number))

    def _usable(self, scored: ScoredGroup) -> bool:
        """Whether a group joins the batch: young enough, and for DAPO with scores that differ.

        After REFILLS batches' worth of dropped groups in a step all are taken, so that a step always ends.
        """
        algorithm, opinions = self.settings.algorithm, self._opinions(scored)
        if self._dropped >= REFILLS * algorithm.prompts_per_step:
            return True
        if algorithm.too_old == "drop" and self.version - scored.info.version > algorithm.staleness:
            return False
        weights = self.settings.objectives.weights(opinions.topic)
        return not METHODS[algorithm.name].refills or varied(opinions.signals, weights) or mixed(opinions.passed)

    def _opinions(self, scored: ScoredGroup) -> Opinions:
        return scored.opinions(self.settings.objectives.pessimism)

    async def _baselines(self) -> None:
        """Let the base policy answer each prompt once, for rewards that are calibrated against its reply."""
        if self.settings.objectives.combine != "calibrated" or self.version:
            return
        base = self.settings.seed + BASELINE_SEED
        for _, scored in await self.respond(self.prompts, 1, base, lambda: None):
            self.combiner.remember(scored.info.prompt_id, self._opinions(scored).signals)

    async def step(self, number: int) -> dict[str, float]:
        """One optimiser step: a batch, advantages, learners, publish. Returns the metrics of the step."""
        clock = Clock(timeline=self.timeline)
        self._dropped = 0
        await self._baselines()
        with pump(f"generate and score, step {number}"):
            batch = await self._batch()
        self.generated_at = max(self.generated_at, clock.started)
        clock.lap("generate_s", clock.started, self.generated_at)
        now = clock.lap("score_s", self.generated_at)
        method = METHODS[self.settings.algorithm.name]
        combined = self.combiner.combine([self._opinions(scored) for scored in batch], gate=not method.drifts)
        await self.publisher.prepare(batch[0].ref)
        with pump(f"learn, step {number}"):
            learnt = await self._learn(number, batch, combined)
        now = clock.lap("learn_s", now)
        self.learnt = [scored.ref for scored in batch]
        self.version += 1
        with pump(f"publish v{self.version}"):
            probe = await self.publisher.publish(self.version)
        clock.lap("publish_s", now)
        metrics = {f"{name}": fmean(s.value for g in batch for s in g.scores[name]) for name in self.objectives}
        metrics |= {f"{name}_raw": fmean(s.raw for g in batch for s in g.scores[name]) for name in self.objectives}
        lengths = [n for scored in batch for n in scored.info.response_tokens]
        self._keep_values(batch, combined)
        return {
            "step": number,
            "version": self.version,
            **metrics,
            **combined.metrics,
            "reward": fmean(r for reward in combined.rewards for r in reward),
            "response_tokens": sum(lengths),
            "response_length": fmean(lengths),
            "prompt_tokens": sum(g.info.prompt_tokens * len(g.info.response_tokens) for g in batch),
            "samples": len(lengths),
            "staleness": max(self.version - 1 - scored.info.version for scored in batch),
            "dropped_groups": self._dropped,
            **learnt,
            **probe,
            **clock.phases,
            "step_s": time.monotonic() - clock.started,
        }

    def _keep_values(self, batch: Sequence[ScoredGroup], combined: Combined) -> None:
        self.values = {name: [[s.value for s in group.scores[name]] for group in batch] for name in batch[0].scores}
        self.values["reward"] = [list(row) for row in combined.rewards]
        self.values["response_length"] = [[*map(float, group.info.response_tokens)] for group in batch]
        if self._distances:
            self.values["kl"] = [
                [self._distances.get((place, sample), 0.0) for sample in range(len(group.info.response_tokens))]
                for place, group in enumerate(batch)
            ]

    async def _learn(self, number: int, batch: Sequence[ScoredGroup], combined: Combined) -> dict[str, float]:
        """Send each rank its micro-batches; the token tensors come from the object store, not through the driver.

        Where advantages depend on the KL of each response, the learners first say how far it lies from the reference.
        A demonstration joins as a group of one sample with advantage 1.
        """
        algorithm, held = self.settings.algorithm, [(g.ref, g.info) for g in batch]
        if METHODS[algorithm.name].logged:
            return await self._learn_from_log(number)
        if self._shown:
            shown = demonstrations_at(number, algorithm)
            held += [self._shown[next(self._next_shown)] for _ in range(shown)]
        plan = self._plan([info for _, info in held])
        refs = [ref for ref, _ in held]
        outcomes = Outcomes(
            rewards=combined.rewards,
            lengths=[scored.info.response_tokens for scored in batch],
            drifts=(await self._drifts(refs, plan, held))[: len(batch)] if needs_drifts(algorithm) else (),
            passed=[scored.info.passed for scored in batch] if self.settings.objectives.judges else (),
            parts=combined.parts,
            weights=combined.weights,
            kl_coef=self.kl_coef if algorithm.kl_in == "reward" else 0.0,
            kl_limit=algorithm.kl_limit,
        )
        lesson = make_lesson(
            algorithm,
            outcomes,
            longest=self.settings.rollout.max_response_tokens,
            kl_coef=self.kl_coef,
            by_objective=self.settings.objectives.combine == "gdpo",
            shown=[info.response_tokens[0] for _, info in held[len(batch) :]],
        )
        learnt = await self._taught(number, refs, lesson, plan)
        told = await self._learners("telling each sample's KL", lambda m: m.handle.distances.remote())
        self._distances = {(group, sample): kl for rank in told for group, sample, kl in rank}
        samples = sum(len(scored.info.response_tokens) for scored in batch)
        learnt["kl_coef"] = self.kl_coef
        self.kl_coef = adapted(self.kl_coef, learnt["kl"], algorithm.kl_target, samples)
        return learnt

    async def _learn_from_log(self, number: int) -> dict[str, float]:
        """A step of reward-free learning: logged responses in place of the policy's own, which are only watched."""
        algorithm = self.settings.algorithm
        if self._logged is None:
            self._logged = LoggedBatches(self._reactions, *self._reaction_order)
        groups, labels = self._logged.next(algorithm.prompts_per_step * algorithm.samples_per_prompt)
        both = [(kept(group), group.info) for group in (*groups, *mismatched(groups))]
        refs = [ref for ref, _ in both]
        drifts = await self._drifts(refs, self._plan([info for _, info in both]), both, own=True)
        outcomes = outcomes_of(groups, labels, [row[0] for row in drifts])
        longest = self.settings.rollout.max_response_tokens
        lesson = make_lesson(algorithm, outcomes, longest=longest, kl_coef=self.kl_coef)
        plan = self._plan([group.info for group in groups])
        learnt = await self._taught(number, refs[: len(groups)], lesson, plan)
        pairs = list(zip(drifts, labels, strict=False))
        return learnt | {
            "liked_drift": fmean(row[0].kl for row, label in pairs if label),
            "other_drift": fmean(row[0].kl for row, label in pairs if not label),
        }

    def _plan(self, infos: Sequence[GroupInfo]) -> list[list[MicroBatch]]:
        return plan_micro_batches(
            [info.prompt_tokens for info in infos],
            [info.response_tokens for info in infos],
            ranks=len(self.crew.learners),
            token_budget=self.settings.algorithm.micro_batch_tokens,
        )

    async def _taught(
        self, number: int, refs: Sequence[ObjectRef[Group]], lesson: Lesson, plan: Sequence[list[MicroBatch]]
    ) -> dict[str, float]:
        """One optimiser step on all ranks."""
        begun = time.monotonic()
        held = list(refs)
        found = await self._learners(
            f"learning step {number}",
            lambda m: m.handle.step.options(name=f"{m}: step {number}").remote(held, lesson, plan[m.index], number),
        )
        for member in self.crew.learners:
            self.timeline.add(str(member), f"step {number}", begun, time.monotonic())
        learnt: dict[str, float] = found[0]
        return learnt

    async def _drifts(
        self,
        refs: Sequence[ObjectRef[Group]],
        plan: Sequence[list[MicroBatch]],
        held: Sequence[tuple[ObjectRef[Group], GroupInfo]],
        *,
        own: bool = False,
    ) -> list[list[Drift]]:
        """How far each sample held lies from the reference policy; 0 for an empty response."""
        drifts = [[Drift(0.0) for _ in info.response_tokens] for _, info in held]
        found = await self._learners(
            "measuring the KL", lambda m: m.handle.drifts.remote(list(refs), plan[m.index], own=own)
        )
        for group, sample, drift in (entry for rank in found for entry in rank):
            drifts[group][sample] = drift
        return drifts

    async def _learners(self, doing: str, call: Callable[[Member], Any]) -> list[Any]:
        await turn(self.settings, self.crew, "learn")
        calls: list[tuple[Member, Any]] = [(m, call(m)) for m in self.crew.learners]
        return await everyone(calls, self.settings.learner.deadline_s, doing)

    def algorithm_state(self) -> dict[str, Any]:
        """What the algorithm has learnt besides weights, as plain JSON, for a checkpoint."""
        return {"kl_coef": self.kl_coef, "combiner": self.combiner.state()}

    def restore_algorithm(self, state: Mapping[str, Any]) -> None:
        """Put back what `algorithm_state` gave."""
        self.kl_coef = float(state["kl_coef"])
        self.combiner.restore(state["combiner"])

    async def close(self) -> None:
        """Cancel what is still running."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def save(self, path: str) -> None:
        """Let the learners write the policy as a Hugging Face folder."""
        await self._learners(f"saving to {path}", lambda m: m.handle.save.remote(path))


def mixed(passed: Sequence[bool]) -> bool:
    """Whether judges tell a group's samples apart."""
    return len(set(passed)) > 1
