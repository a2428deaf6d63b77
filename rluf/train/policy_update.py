"""The learners' part of a step: learner inputs from rewards, one optimizer step, saving the policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.algorithms.advantages import MAX_KL_PER_TOKEN, AdvantageInputs, SampleKL
from rluf.algorithms.losses import update_kl_coef
from rluf.algorithms.packing import MicroBatch, plan_micro_batches
from rluf.algorithms.registry import (
    LearnerInputs,
    build_learner_inputs,
    mask_truncated,
    requires_reference_kl,
    scale_mini_batch_weights,
    split_mini_batches,
)
from rluf.checkpoint.format import POLICY_FOLDER
from rluf.errors import ActorError, ActorLostError
from rluf.train.actor_calls import gather_calls, put_object, switch_gpu_phase
from rluf.train.work_buffer import CountingIterator, iter_prompt_order

if TYPE_CHECKING:
    from ray import ObjectRef

    from rluf.config.policy import AlgorithmSettings
    from rluf.config.settings import Settings
    from rluf.objectives.aggregator import StepRewards
    from rluf.tracking.timeline import RunTimeline
    from rluf.train.actor_calls import ActorGroups, ActorRef
    from rluf.train.work_buffer import ScoredGroup
    from rluf.types import Group, GroupInfo

HEALTH_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class PlannedUpdate:
    """The updates of a step before they run: groups, micro-batches of each rank, and per-step learner inputs.

    `response_count` is the number of responses that engines sampled for it; `mini_batch_sizes` are the micro-batches of
    each mini-batch, equal on all ranks; empty for a single one.
    """

    group_refs: list[ObjectRef[Group]]
    micro_batches: list[list[MicroBatch]]
    learner_inputs: LearnerInputs
    response_count: int = 0
    mini_batch_sizes: Sequence[int] = ()


def count_demonstrations(step: int, algorithm: AlgorithmSettings) -> int:
    """Demonstrations of a step (counted from 1): all of them at first, decaying linearly to none.

    Source: the decaying weight of demonstrations in DAPG, arXiv 1709.10087, section IV-B.
    """
    return round(algorithm.demonstrations * (1 - (step - 1) / algorithm.steps))


class PolicyUpdater:
    """Computes learner inputs and runs optimizer steps on all learner ranks.

    Token tensors travel from the object store to the learners; the driver holds references and small numbers.
    """

    def __init__(
        self,
        settings: Settings,
        actor_groups: ActorGroups,
        timeline: RunTimeline,
        demonstrations: Sequence[Group] = (),
        shared_prefix_tokens: int = 0,
    ) -> None:
        """Add a few of `demonstrations` to each step. All prompts have the first `shared_prefix_tokens` in common."""
        self.shared_prefix_tokens = shared_prefix_tokens
        self.kl_coef = settings.algorithm.kl_coef
        self.sample_kl: dict[tuple[int, int], float] = {}
        """KL to the reference (nats) of each sample of the last step, by (group, sample)."""
        self._settings, self._actor_groups, self._timeline = settings, actor_groups, timeline
        self._demonstrations = [(put_object(group), group.info) for group in demonstrations]
        self._demonstration_cursor = CountingIterator(iter_prompt_order([1] * len(demonstrations), settings.seed))

    def get_state(self) -> dict[str, Any]:
        """KL coefficient and position in the demonstrations, as plain JSON."""
        return {"kl_coef": self.kl_coef, "demonstration_cursor": self._demonstration_cursor.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.kl_coef = float(state["kl_coef"])
        self._demonstration_cursor.skip(int(state["demonstration_cursor"]))

    async def plan_update(self, step: int, batch: Sequence[ScoredGroup], step_rewards: StepRewards) -> PlannedUpdate:
        """Advantages and micro-batches of a step.

        Where advantages depend on the KL of each response, the learners compute it first. A demonstration joins as a
        group of one sample with advantage 1.
        """
        algorithm = self._settings.algorithm
        groups = [(scored.group_ref, scored.info) for scored in batch]
        if self._demonstrations:
            count = count_demonstrations(step, algorithm)
            groups += [self._demonstrations[next(self._demonstration_cursor)] for _ in range(count)]
        infos, group_refs = [info for _, info in groups], [group_ref for group_ref, _ in groups]
        mini_batches = split_mini_batches(len(infos), algorithm.mini_batches)
        micro_batches, mini_batch_sizes = self._plan_mini_batches(infos, mini_batches)
        sample_kl: list[list[SampleKL]] = []
        if requires_reference_kl(algorithm):
            # With the micro-batches of the update: the learners cache the reference log-probabilities by their number.
            sample_kl = (await self.compute_reference_kl(group_refs, infos, micro_batches))[: len(batch)]
        has_gate = bool(self._settings.aggregation.gate_judges)
        advantage_inputs = AdvantageInputs(
            rewards=step_rewards.rewards,
            response_lengths=[scored.info.response_token_counts for scored in batch],
            sample_kl=sample_kl,
            passed_judges=[scored.info.passed_judges for scored in batch] if has_gate else (),
            objective_rewards=step_rewards.normalized_signals,
            objective_weights=step_rewards.objective_weights,
            kl_coef=self.kl_coef if algorithm.kl_penalty == "reward" else 0.0,
            max_response_kl=MAX_KL_PER_TOKEN * self._settings.rollout.max_response_tokens,
        )
        learner_inputs = build_learner_inputs(
            algorithm,
            advantage_inputs,
            max_response_tokens=self._settings.rollout.max_response_tokens,
            kl_coef=self.kl_coef,
            use_gdpo=self._settings.aggregation.method == "gdpo",
            demonstration_lengths=[info.response_token_counts[0] for info in infos[len(batch) :]],
        )
        if algorithm.truncated == "mask":
            learner_inputs = mask_truncated(learner_inputs, [info.finished for info in infos])
        response_lengths = [info.response_token_counts for info in infos]
        learner_inputs = scale_mini_batch_weights(learner_inputs, response_lengths, mini_batches)
        response_count = sum(len(scored.info.response_token_counts) for scored in batch)
        return PlannedUpdate(group_refs, micro_batches, learner_inputs, response_count, mini_batch_sizes)

    async def apply_update(self, step: int, update: PlannedUpdate) -> dict[str, float]:
        """The updates of a step on all ranks; returns their metrics and adapts the KL coefficient."""
        start_time = time.monotonic()
        results = await self.call_learners(
            f"training step {step}",
            lambda actor: actor.handle.train_step.options(name=f"{actor}: step {step}").remote(
                update.group_refs,
                update.learner_inputs,
                update.micro_batches[actor.index],
                step,
                mini_batch_sizes=list(update.mini_batch_sizes),
            ),
        )
        for actor in self._actor_groups.learner_actors:
            self._timeline.add_span(str(actor), f"step {step}", start_time, time.monotonic())
        metrics: dict[str, float] = results[0]
        if not update.response_count:
            return metrics
        self.sample_kl = {}
        if "kl" in metrics:
            kl_by_rank = await self.call_learners(
                "reading each sample's KL", lambda actor: actor.handle.get_sample_kl.remote()
            )
            self.sample_kl = {(group, sample): kl for rank in kl_by_rank for group, sample, kl in rank}
            metrics["kl_coef"] = self.kl_coef
            algorithm = self._settings.algorithm
            self.kl_coef = update_kl_coef(
                self.kl_coef, metrics["kl"], algorithm.kl_target, update.response_count, algorithm.kl_horizon_samples
            )
        return metrics

    def _plan_mini_batches(
        self, infos: Sequence[GroupInfo], mini_batches: Sequence[Sequence[int]]
    ) -> tuple[list[list[MicroBatch]], list[int]]:
        """Micro-batches of each rank, mini-batch after mini-batch, and their number in each mini-batch."""
        by_rank: list[list[MicroBatch]] = [[] for _ in self._actor_groups.learner_actors]
        sizes = []
        for groups in mini_batches:
            plans = self.plan_micro_batches([infos[group] for group in groups])
            sizes.append(len(plans[0]))
            for rank_plan, plan in zip(by_rank, plans, strict=True):
                rank_plan += [[(groups[group], sample) for group, sample in micro_batch] for micro_batch in plan]
        return by_rank, sizes

    def plan_micro_batches(self, infos: Sequence[GroupInfo]) -> list[list[MicroBatch]]:
        """Micro-batches of each rank, for the groups that `infos` describe."""
        return plan_micro_batches(
            [info.prompt_token_count for info in infos],
            [info.response_token_counts for info in infos],
            world_size=len(self._actor_groups.learner_actors),
            token_budget=self._settings.algorithm.micro_batch_tokens,
            shared_prefix_tokens=self.shared_prefix_tokens,
        )

    async def compute_reference_kl(
        self,
        group_refs: list[ObjectRef[Group]],
        infos: Sequence[GroupInfo],
        micro_batches: list[list[MicroBatch]],
        *,
        use_learner_policy: bool = False,
    ) -> list[list[SampleKL]]:
        """KL of each sample to the reference policy [groups][samples]; 0 for an empty response."""
        kl_by_rank = await self.call_learners(
            "computing the KL to the reference policy",
            lambda actor: actor.handle.measure_reference_kl.remote(
                group_refs, micro_batches[actor.index], use_learner_policy=use_learner_policy
            ),
        )
        sample_kl = [[SampleKL(0.0) for _ in info.response_token_counts] for info in infos]
        for group_index, sample_index, kl in (entry for rank in kl_by_rank for entry in rank):
            sample_kl[group_index][sample_index] = kl
        return sample_kl

    async def call_learners(self, activity: str, make_call: Callable[[ActorRef], Any]) -> list[Any]:
        """Run `make_call` on every learner rank; results by rank. Raises ActorLostError when a rank is gone."""
        learners, timeout_s = self._actor_groups.learner_actors, self._settings.timeouts.call_s
        await switch_gpu_phase(self._settings, self._actor_groups, "learn")
        try:
            return await gather_calls([(actor, make_call(actor)) for actor in learners], timeout_s, activity)
        except ActorError as error:
            if not isinstance(error, ActorLostError):
                # When one rank dies, another may fail first in a collective call. The loss is what a restart can fix,
                # so look for it before the failure is raised. Health checks have a thread of their own, so ranks that
                # still hang in the call answer too.
                checks = [(a, a.handle.get_health.options(concurrency_group="health").remote()) for a in learners]
                await gather_calls(checks, HEALTH_TIMEOUT_S, "health")
            raise

    async def save_policy(self, path: str) -> None:
        """Let the learners write the policy as a Hugging Face folder."""
        await self.call_learners(f"saving to {path}", lambda actor: actor.handle.save_policy.remote(path))

    async def save_checkpoint(self, folder: Path) -> list[dict[str, Any]]:
        """Let the learners write policy and optimizer state into `folder`; returns the ranks' optimizer schedules."""
        await self.save_policy(str(folder / POLICY_FOLDER))
        return await self.call_learners(
            f"saving to {folder}", lambda actor: actor.handle.save_optimizer_state.remote(str(folder))
        )
