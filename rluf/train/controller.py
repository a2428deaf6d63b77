"""The training step: sample and score prompts, aggregate rewards, update the policy, sync weights to the engines.

One asyncio program in the driver. Groups of samples stay in the object store; the driver holds references to them and
small numbers (lengths, scores, advantages). `algorithm.max_staleness` makes it synchronous (0) or asynchronous (> 0).

    WorkBuffer        admission, running groups, prompts in flight, scored groups
    ActorCalls        calls to rollout and reward actors, repeated when an actor is lost
    RewardAggregator  scores of all objectives -> one reward per sample
    PolicyUpdater     rewards -> advantages, micro-batches, optimizer step on the learners
    WeightSync        learner weights -> engines, verified
    ActorRestarter    replaces lost actors; its weight lock keeps engines from joining during update and sync
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import ray

from rluf.algorithms.registry import find_algorithm
from rluf.checkpoint.format import ControllerState
from rluf.config.derived import group_objectives_by_pool
from rluf.objectives.aggregator import GroupScores, RewardAggregator, StepRewards
from rluf.objectives.judges import judge_group
from rluf.tracking.console import PhaseProgress
from rluf.tracking.timeline import STEPS_ROW, RunTimeline, record_ray_span
from rluf.train.actor_calls import ActorCalls, ActorRef, ActorRestarter, RestartBudget, fetch_group, switch_gpu_phase
from rluf.train.actor_supervisor import ActorSupervisor
from rluf.train.policy_update import PlannedUpdate, PolicyUpdater
from rluf.train.prompts import count_common_prompt_tokens, list_prompt_topics
from rluf.train.response_cache import ResponseCache
from rluf.train.weight_sync import WeightSync
from rluf.train.work_buffer import (
    CountingIterator,
    ScoredGroup,
    WorkBuffer,
    compute_admission_capacity,
    iter_prompt_order,
)

if TYPE_CHECKING:
    from ray import ObjectRef

    from rluf.config.settings import Settings
    from rluf.types import Group, GroupInfo, Prompt

MAX_DROPPED_BATCHES = 10
"""Batches' worth of groups that may be dropped in one step before all are accepted (verl allows as many)."""
ENGINE_QUEUE_FACTOR = 1.5
"""Groups sent to the engines for each one they can run at once: the rest waits inside the engine, so that the slot of a
finished sample is refilled while the longest sample of its group still runs."""
BASELINE_SEED_OFFSET = 2_000_003
REFERENCE_PROMPTS = 96
"""Training prompts without an objective of their own whose base replies fix the scale of every objective. With 4
replies each, the effective weight of love varies 1.2 to 1.3-fold between draws (benchmarks/learning.py)."""
REFERENCE_SEED_OFFSET = 3_000_017

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepTimer:
    """Seconds spent in each phase of one step."""

    start_time: float = field(default_factory=time.monotonic)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    timeline: RunTimeline = field(default_factory=RunTimeline)

    def record(self, phase: str, start_time: float, end_time: float | None = None) -> float:
        """Add the seconds from `start_time` to `end_time` (default: now) to a phase; returns the end time."""
        end_time = time.monotonic() if end_time is None else end_time
        self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + end_time - start_time
        self.timeline.add_span(STEPS_ROW, phase.removesuffix("_s"), start_time, end_time)
        return end_time


class TrainController:
    """Runs training steps; survives lost rollout and reward actors, and its state can be saved between steps."""

    def __init__(
        self,
        settings: Settings,
        supervisor: ActorSupervisor,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Group] = (),
        *,
        restart_budget: RestartBudget | None = None,
    ) -> None:
        """Train on `prompts` with the actors of `supervisor`.

        A few of `demonstrations` are added to each step. `restart_budget` outlives the controller where a run starts
        again from a checkpoint.
        """
        self.settings, self.prompts, self.actor_groups = settings, prompts, supervisor.actor_groups
        scored_objectives = {
            name
            for pool in group_objectives_by_pool(settings)
            if pool[0] in self.actor_groups.reward_pools
            for name in pool
        }
        self.objectives = tuple(name for name in settings.objectives.by_objective if name in scored_objectives)
        """Objectives with reward actors: all of the settings, unless the supervisor was given fewer."""
        self.version = 0
        """Weight version of the engines: the number of optimizer steps done."""
        self.timeline = RunTimeline()
        budget = restart_budget or RestartBudget(settings.cluster.max_restarts_per_hour)
        self.actor_restarter = ActorRestarter(supervisor, budget, self._sync_new_engine)
        self.actor_calls = ActorCalls(self.actor_restarter, self.timeline)
        self.weight_sync = WeightSync(settings, self.actor_groups, self.actor_calls)
        self.reward_aggregator = RewardAggregator(settings.objectives, settings.aggregation)
        self.policy_updater = PolicyUpdater(
            settings,
            self.actor_groups,
            self.timeline,
            demonstrations,
            count_common_prompt_tokens(prompts, demonstrations),
        )
        weights = settings.algorithm.topic_weights
        repeats = [weights.get(topic, 1) for topic in list_prompt_topics(prompts)]
        self.work_buffer = WorkBuffer(
            prompts,
            CountingIterator(iter_prompt_order(repeats, settings.seed)),
            seed=settings.seed,
            group_limit=settings.algorithm.steps * settings.algorithm.prompts_per_step,
            run_group=self._run_group,
            admission_capacity=self._compute_admission_capacity,
        )
        self.update_in_progress = False
        """Whether a step is between the start of its update and the end of its weight sync."""
        self.last_generated_at = time.monotonic()
        """Time of the last completed rollout (time.monotonic)."""
        self.sample_values: dict[str, list[list[float]]] = {}
        """Values of the last step's samples [groups][samples]: of each objective, reward, response_length, and kl to
        the reference (nats)."""
        self.last_batch_refs: list[ObjectRef[Group]] = []
        """The groups of the last step, in the object store."""
        self._engine_start_version = 0
        self._adapter_sync_pending = self._is_probe_ready = False
        self.snapshot = self.get_state()
        """State after the last whole step: what a checkpoint stores, whatever has been admitted since."""

    async def run_step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        await self.sync_adapter_after_resume()
        timer = self.start_timer()
        await self._score_baseline_replies()
        with record_ray_span(f"generate and score, step {step}"):
            batch = await self._collect_batch(step)
        # With staleness the batch may have been sampled during the last step; generation then took no time of this one.
        generated_at = max(self.last_generated_at, timer.start_time)
        timer.record("generate_s", timer.start_time, generated_at)
        timer.record("score_s", generated_at)
        algorithm = find_algorithm(self.settings.algorithm.name)
        step_rewards = self.reward_aggregator.aggregate(
            [self._build_group_scores(scored_group) for scored_group in batch],
            apply_gate=algorithm.uses_critic,
        )
        update_metrics = await self.update_and_sync(
            step, batch[0].group_ref, lambda: self.policy_updater.plan_update(step, batch, step_rewards), timer
        )
        self.work_buffer.mark_trained(batch)
        self.last_batch_refs = [scored_group.group_ref for scored_group in batch]
        self.sample_values = self._collect_sample_values(batch, step_rewards)
        self.snapshot = self.get_state()
        return {
            "step": step,
            "version": self.version,
            **self._compute_batch_metrics(batch, step_rewards),
            **update_metrics,
            **timer.phase_seconds,
            "step_s": time.monotonic() - timer.start_time,
        }

    def start_timer(self) -> StepTimer:
        """A timer for a step that begins now; it adds its phases to the timeline."""
        return StepTimer(timeline=self.timeline)

    async def update_and_sync(
        self,
        step: int,
        probe_ref: ObjectRef[Group],
        plan_update: Callable[[], Awaitable[PlannedUpdate]],
        timer: StepTimer,
    ) -> dict[str, float]:
        """Plan and apply an update on the learners, then send the weights to the engines; returns the metrics of both.

        Responses of the first step's `probe_ref` are those on which every sync compares learner and engines.
        """
        phase_start = time.monotonic()
        if not self._is_probe_ready:
            await self.weight_sync.prepare_probe(probe_ref)
            self._is_probe_ready = True  # engines that join later are measured when they get their weights
        async with self._engine_restarts_blocked():
            with record_ray_span(f"learn, step {step}"):
                metrics = await self.policy_updater.apply_update(step, await plan_update())
            phase_start = timer.record("learn_s", phase_start)
            self.version += 1
            with record_ray_span(f"weight sync v{self.version}"):
                metrics |= await self.weight_sync.sync(self.version)
            timer.record("weight_sync_s", phase_start)
        return metrics

    async def generate_and_score(
        self,
        prompts: Sequence[Prompt],
        sample_count: int,
        seed: int,
        on_prompt_done: Callable[[], None],
        temperature: float | None = None,
        cache: ResponseCache | None = None,
    ) -> list[tuple[Group, ScoredGroup]]:
        """Scored responses of the engines' policy to each prompt; `on_prompt_done` is called after each prompt.

        `temperature` None is rollout.temperature. With `cache`, which must be that of the engines' policy, responses
        sampled by an earlier run are only scored.
        """
        sampled_at = self.settings.rollout.temperature if temperature is None else temperature
        cached_groups = cache.load(prompts, sample_count, seed, sampled_at) if cache else None
        if cached_groups is None:
            await switch_gpu_phase(self.settings, self.actor_groups, "generate")
        engine_count = len(self.actor_groups.rollout_actors)
        concurrent_prompts = max(1, self.settings.rollout.concurrency * engine_count // sample_count)
        semaphore, gate_judges = asyncio.Semaphore(concurrent_prompts), self.settings.aggregation.gate_judges

        async def respond_to_prompt(index: int, prompt: Prompt) -> tuple[Group, ScoredGroup]:
            async with semaphore:
                if cached_groups is not None:
                    group = cached_groups[index]
                    info = judge_group(gate_judges, group) if gate_judges else group.info
                    scored_group = await self._score_group(ray.put(group), info)
                else:
                    scored_group = await self.sample_and_score(prompt, sample_count, seed + index, temperature)
            on_prompt_done()
            return await fetch_group(scored_group.group_ref), scored_group

        scored = list(await asyncio.gather(*(respond_to_prompt(i, prompt) for i, prompt in enumerate(prompts))))
        if cache and cached_groups is None:
            cache.save([group for group, _ in scored], sample_count, seed, sampled_at)
        return scored

    async def sample_and_score(
        self, prompt: Prompt, sample_count: int, seed: int, temperature: float | None = None
    ) -> ScoredGroup:
        """Roll out one prompt on the least busy engine and score it by all objectives at once."""
        group_ref, info = await self.actor_calls.call(
            self.actor_groups.rollout_actors,
            "generate_group",
            prompt,
            sample_count,
            seed,
            temperature,
            timeout_s=self.settings.timeouts.call_s,
            task_name=f"generate v{self.version}",
            activity=f"prompt {prompt.id}",
            prompt_id=prompt.id,
            work_units=sample_count,
            keep_first_ref=True,
        )
        self.last_generated_at = time.monotonic()
        return await self._score_group(group_ref, info)

    async def _score_group(self, group_ref: ObjectRef[Group], info: GroupInfo) -> ScoredGroup:
        calls = (
            self.actor_calls.call(
                pool,
                "score_group",
                group_ref,
                timeout_s=self.settings.timeouts.call_s,
                task_name=f"score v{info.weight_version}",
                activity=f"scoring prompt {info.prompt_id}",
                prompt_id=info.prompt_id,
            )
            for pool in self.actor_groups.reward_pools.values()
        )
        scores = {name: tuple(scores) for result in await asyncio.gather(*calls) for name, scores in result.items()}
        return ScoredGroup(group_ref, info, {name: scores[name] for name in self.objectives})

    async def _run_group(self, prompt: Prompt, seed: int) -> ScoredGroup:
        return await self.sample_and_score(prompt, self.settings.algorithm.samples_per_prompt, seed)

    def _compute_admission_capacity(self, running_count: int, accepted_count: int) -> int:
        """Groups that may start now by the staleness rule."""
        algorithm, rollout = self.settings.algorithm, self.settings.rollout
        engine_slots = rollout.concurrency * len(self.actor_groups.rollout_actors) // algorithm.samples_per_prompt
        return compute_admission_capacity(
            concurrency=max(1, int(engine_slots * ENGINE_QUEUE_FACTOR)),
            running_groups=running_count,
            accepted_groups=accepted_count,
            weight_version=self.version,
            groups_per_step=algorithm.prompts_per_step,
            max_staleness=algorithm.max_staleness,
        )

    async def _collect_batch(self, step: int) -> list[ScoredGroup]:
        await switch_gpu_phase(self.settings, self.actor_groups, "generate")
        # As long as sampling, scoring and starting an actor again may take.
        timeout_s = 2 * self.settings.timeouts.call_s + self.settings.timeouts.actor_start_s
        return await self.work_buffer.collect_batch(
            step, self.settings.algorithm.prompts_per_step, accept_group=self._accept_group, timeout_s=timeout_s
        )

    def _accept_group(self, scored_group: ScoredGroup) -> bool:
        """Whether a group joins the batch: not too stale, and with dynamic sampling (DAPO) rewards that differ.

        After MAX_DROPPED_BATCHES batches' worth of dropped groups all are accepted, so that a step always ends.
        """
        algorithm, group_scores = self.settings.algorithm, self._build_group_scores(scored_group)
        if self.work_buffer.dropped_count >= MAX_DROPPED_BATCHES * algorithm.prompts_per_step:
            return True
        staleness = self.version - scored_group.info.weight_version
        if staleness > algorithm.max_staleness:
            return False
        if not find_algorithm(algorithm.name).dynamic_sampling:
            return True
        spread = self.reward_aggregator.measure_spread(group_scores)
        return spread > algorithm.min_reward_spread or has_mixed_verdicts(group_scores.gate_verdicts)

    def _build_group_scores(self, scored_group: ScoredGroup) -> GroupScores:
        return scored_group.build_group_scores(
            self.settings.aggregation.uncertainty_penalty,
            penalize_truncated=self.settings.algorithm.truncated == "penalize",
            max_tokens=self.settings.rollout.max_response_tokens,
            overlong_buffer=self.settings.algorithm.overlong_buffer,
        )

    async def sample_reference(self, cache: ResponseCache | None = None) -> list[Group]:
        """Before the first step, sample and score the base policy's replies to training prompts.

        They fix zero and scale of every objective. The prompts are those of an own order with the topic mix of
        training, until REFERENCE_PROMPTS have no objective of their own.
        """
        owners, topics = self.settings.aggregation.topic_objectives, list_prompt_topics(self.prompts)
        repeats = [self.settings.algorithm.topic_weights.get(topic, 1) for topic in topics]
        plain_count, prompts = 0, []
        for index in iter_prompt_order(repeats, self.settings.seed + REFERENCE_SEED_OFFSET):
            prompts.append(self.prompts[index])
            plain_count += topics[index] not in owners
            if plain_count == REFERENCE_PROMPTS or len(prompts) == 2 * REFERENCE_PROMPTS:
                break
        with PhaseProgress("reference sample", len(prompts), unit="prompt") as progress:
            scored = await self.generate_and_score(
                prompts,
                self.settings.algorithm.samples_per_prompt,
                self.settings.seed + REFERENCE_SEED_OFFSET,
                progress.advance,
                cache=cache,
            )
        self.reward_aggregator.fit_reference([self._build_group_scores(scored_group) for _, scored_group in scored])
        for name, row in self.reward_aggregator.describe_reference().items():
            logger.info("reference sample: objective=%s %s", name, " ".join(f"{k}={v:.4g}" for k, v in row.items()))
            if row["weight"] > 0 and row["within_sd"] == 0:
                logger.warning(
                    "objective %s: all responses of the base policy to a prompt have the same score (mean %.4g), so it "
                    "cannot change the policy until they differ; check its function, rule or model",
                    name,
                    row["mean"],
                )
        self.snapshot = self.get_state()
        return [group for group, _ in scored]

    async def _score_baseline_replies(self) -> None:
        """Before the first step, score one reply of the base policy per prompt where rewards are calibrated by it."""
        if self.settings.aggregation.method != "calibrated" or self.version:
            return
        seed = self.settings.seed + BASELINE_SEED_OFFSET
        for _, scored_group in await self.generate_and_score(self.prompts, 1, seed, lambda: None):
            signals = self._build_group_scores(scored_group).signals
            self.reward_aggregator.record_baseline(scored_group.info.prompt_id, signals)

    @contextlib.asynccontextmanager
    async def _engine_restarts_blocked(self) -> AsyncIterator[None]:
        """From the start of the update to the end of the weight sync, no restarted engine joins the pool.

        Its own weight transfer would interleave with the learners' step, or the running sync would leave it out.
        """
        async with self.actor_restarter.weight_lock:
            self.update_in_progress = True
            try:
                yield
            finally:
                self.update_in_progress = False

    async def sync_adapter_after_resume(self) -> None:
        """Send the trained LoRA adapter to engines that a resume started with the base model."""
        if self._adapter_sync_pending:
            async with self.actor_restarter.weight_lock:
                await self.weight_sync.transfer(self.version)
            self._adapter_sync_pending = False

    async def apply_policy_average(self) -> None:
        """After the last step, replace the policy on learners and engines by its average, if there is one."""
        if not self.settings.learner.ema_decay:
            return
        await self.policy_updater.call_learners(
            "averaging the policy", lambda actor: actor.handle.apply_policy_average.remote()
        )
        async with self.actor_restarter.weight_lock:
            # Without a step there is no probe, and the average is the policy.
            await (self.weight_sync.sync if self._is_probe_ready else self.weight_sync.transfer)(self.version)

    async def _sync_new_engine(self, engine: ActorRef) -> None:
        if self.actor_groups.learner_actors:
            needs_weights = self.version > self._engine_start_version
            await self.weight_sync.sync_new_engine(engine, self.version, needs_weights=needs_weights)

    def _compute_batch_metrics(self, batch: Sequence[ScoredGroup], step_rewards: StepRewards) -> dict[str, float]:
        """Metrics of the samples of a step: scores, rewards, lengths, staleness."""
        scores = {name: [score for group in batch for score in group.scores[name]] for name in self.objectives}
        response_lengths = [length for group in batch for length in group.info.response_token_counts]
        return {
            **{name: fmean(score.value for score in scores[name]) for name in self.objectives},
            **{f"{name}_raw": fmean(score.raw_logit for score in scores[name]) for name in self.objectives},
            **step_rewards.metrics,
            "reward": fmean(reward for row in step_rewards.rewards for reward in row),
            "response_tokens": sum(response_lengths),
            "response_length": fmean(response_lengths),
            "truncated_share": fmean(not finished for group in batch for finished in group.info.finished),
            "prompt_tokens": sum(g.info.prompt_token_count * len(g.info.response_token_counts) for g in batch),
            "samples": len(response_lengths),
            # The update has raised the version by one since the batch was trained on.
            "staleness": max(self.version - 1 - group.info.weight_version for group in batch),
            "dropped_groups": self.work_buffer.dropped_count,
        }

    def _collect_sample_values(
        self, batch: Sequence[ScoredGroup], step_rewards: StepRewards
    ) -> dict[str, list[list[float]]]:
        sample_values = {name: [[s.value for s in group.scores[name]] for group in batch] for name in batch[0].scores}
        sample_values["reward"] = [list(row) for row in step_rewards.rewards]
        sample_values["response_length"] = [[*map(float, group.info.response_token_counts)] for group in batch]
        if sample_kl := self.policy_updater.sample_kl:
            sample_values["kl"] = [
                [sample_kl.get((group_index, i), 0.0) for i in range(len(group.info.response_token_counts))]
                for group_index, group in enumerate(batch)
            ]
        return sample_values

    def get_state(self) -> ControllerState:
        """Position of the run between two steps, for a checkpoint."""
        return ControllerState(
            work_buffer=self.work_buffer.get_state(),
            policy_updater=self.policy_updater.get_state(),
            reward_aggregator=self.reward_aggregator.get_state(),
            weight_sync=self.weight_sync.get_state(),
        )

    def restore(self, state: ControllerState, step: int) -> None:
        """Continue after optimizer step `step`, whose weights engines and learners have already.

        Engines that receive LoRA adapters have the base model until `sync_adapter_after_resume`.
        """
        self.work_buffer.restore(state.work_buffer, step * self.settings.algorithm.prompts_per_step)
        self.policy_updater.restore(state.policy_updater)
        self.reward_aggregator.restore(state.reward_aggregator)
        self.weight_sync.restore(state.weight_sync)
        self._adapter_sync_pending = self.settings.weight_sync.transport == "lora"
        self.version, self._engine_start_version = step, 0 if self._adapter_sync_pending else step
        self.snapshot = self.get_state()

    async def save_policy(self, path: str) -> None:
        """Let the learners write the policy as a Hugging Face folder."""
        await self.policy_updater.save_policy(path)

    async def save_checkpoint(self, folder: Path) -> list[dict[str, Any]]:
        """Let the learners write policy and optimizer state into `folder`; returns the ranks' optimizer schedules."""
        return await self.policy_updater.save_checkpoint(folder)

    async def close(self) -> None:
        """Cancel running groups and replacements."""
        await self.actor_restarter.close()
        await self.work_buffer.close()


def has_mixed_verdicts(verdicts: Sequence[bool]) -> bool:
    """Whether judge verdicts differ between a group's samples."""
    return len(set(verdicts)) > 1
