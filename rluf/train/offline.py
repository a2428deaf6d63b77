"""Offline training (KTO): optimizer steps on logged responses by whether users loved them, without reward models.

Engines answer the test prompts before and after training only. The batch of a step follows from the seed and the number
of the step, so a checkpoint needs no position in the log.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from rluf.algorithms.advantages import AdvantageInputs, SampleKL
from rluf.algorithms.registry import build_learner_inputs
from rluf.errors import DataError
from rluf.train.actor_calls import put_object
from rluf.train.policy_update import PlannedUpdate
from rluf.train.prompts import fits_limits, group_from_row
from rluf.train.work_buffer import CountingIterator, prompt_order
from rluf.types import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rluf.config.settings import Settings
    from rluf.train.controller import TrainController

METRIC_NAMES = (
    "loss", "policy_loss", "demonstration_nll", "grad_norm", "learning_rate", "skipped", "micro_batches", "reference_s",
    "backward_s", "optimizer_s", "learner_tokens", "learner_tokens_per_s", "sync_logprob_gap", "sync_check_s",
)  # fmt: skip
"""Metrics of the update and the weight sync that have a meaning without sampled responses."""


@dataclass(frozen=True, slots=True)
class ReactionGroups:
    """Logged responses as groups of one sample without rollout log-probabilities, by whether users loved them."""

    liked: Sequence[Group]
    others: Sequence[Group]

    def __post_init__(self) -> None:
        """Raise DataError where one kind is missing."""
        if not (self.liked and self.others):
            raise DataError(
                "algorithm.name=kto needs liked and other responses in the log, but found "
                f"{len(self.liked)} and {len(self.others)} short enough; raise rollout.max_response_tokens or add data"
            )


def load_reactions(data_folder: Path, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> ReactionGroups:
    """Responses of the training split by whether they were loved; rows over the limits of `rollout` are skipped."""
    groups_by_label: dict[bool, list[Group]] = {True: [], False: []}
    for row in pq.read_table(data_folder / "love" / "train.parquet").to_pylist():
        group = group_from_row(row, "response", tokenizer)
        if fits_limits(group, settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens):
            groups_by_label[row["label"] == 1].append(group)
    return ReactionGroups(groups_by_label[True], groups_by_label[False])


class OfflineTrainer:
    """Runs the steps of an offline algorithm on the actors of a controller."""

    def __init__(self, controller: TrainController, reactions: ReactionGroups) -> None:
        """Train on `reactions` with the learners of `controller`, which evaluates and saves the policy."""
        self._controller, self._settings, self._reactions = controller, controller.settings, reactions
        algorithm = self._settings.algorithm
        self._batch_size = algorithm.prompts_per_step * algorithm.samples_per_prompt
        self._liked_cursor, self._other_cursor = (
            CountingIterator(prompt_order([1] * len(groups), self._settings.seed))
            for groups in (reactions.liked, reactions.others)
        )

    async def run_step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its metrics. `samples` and `response_tokens` count logged responses."""
        controller = self._controller
        timer = controller.start_timer()
        groups, labels = self.collect_batch(step)
        all_groups = [*groups, *mismatched_pairs(groups)]
        group_refs, infos = [put_object(group) for group in all_groups], [group.info for group in all_groups]
        policy_updater, kl_metrics = controller.policy_updater, {}

        async def plan_update() -> PlannedUpdate:
            # No engine sampled these responses: their KL is that of the learner's policy.
            sample_kl = await policy_updater.compute_reference_kl(
                group_refs, infos, policy_updater.plan_micro_batches(infos), use_learner_policy=True
            )
            learner_inputs = build_learner_inputs(
                self._settings.algorithm,
                offline_advantage_inputs(groups, labels, [row[0] for row in sample_kl]),
                max_response_tokens=self._settings.rollout.max_response_tokens,
                kl_coef=0.0,
            )
            for name, is_liked in (("liked_kl", 1.0), ("other_kl", 0.0)):
                rows = zip(labels, sample_kl, strict=False)
                kl_metrics[name] = fmean(row[0].kl_sum for label, row in rows if label == is_liked)
            micro_batches = policy_updater.plan_micro_batches(infos[: len(groups)])
            return PlannedUpdate(group_refs[: len(groups)], micro_batches, learner_inputs)

        metrics = await controller.update_and_sync(step, group_refs[0], plan_update, timer)
        controller.snapshot = controller.state()
        return {
            "step": step,
            "version": controller.version,
            "samples": len(groups),
            "response_tokens": sum(info.response_token_counts[0] for info in infos[: len(groups)]),
            **kl_metrics,
            **{name: metrics[name] for name in METRIC_NAMES if name in metrics},
            **timer.phase_seconds,
            "step_s": time.monotonic() - timer.start_time,
        }

    def collect_batch(self, step: int) -> tuple[list[Group], list[float]]:
        """The groups of a step and their labels: liked (1.0) or not (0.0), as many of one as of the other."""
        liked_count = (self._batch_size + 1) // 2
        # A resumed run begins after step 1: skip what the steps before it were trained on.
        self._liked_cursor.skip((step - 1) * liked_count - self._liked_cursor.count)
        self._other_cursor.skip((step - 1) * (self._batch_size - liked_count) - self._other_cursor.count)
        # Alternating rather than sampled: KTO gives both kinds the same weight, so a batch needs equal numbers of them.
        labels = [float(index % 2 == 0) for index in range(self._batch_size)]
        groups = [
            self._reactions.liked[next(self._liked_cursor)]
            if label
            else self._reactions.others[next(self._other_cursor)]
            for label in labels
        ]
        return groups, labels


def mismatched_pairs(groups: Sequence[Group]) -> list[Group]:
    """Each prompt with the next group's response; their KL estimates how far the policy has moved in general.

    Source: the estimate of the reference point z_0 in KTO, arXiv 2402.01306.
    """
    pairs = []
    for group, next_group in zip(groups, [*groups[1:], groups[0]], strict=True):
        sample = replace(next_group.samples[0], prompt_id=group.prompt.id, prompt_ids=group.prompt.token_ids)
        pairs.append(replace(group, samples=(sample,)))
    return pairs


def offline_advantage_inputs(
    groups: Sequence[Group], labels: Sequence[float], sample_kl: Sequence[SampleKL]
) -> AdvantageInputs:
    """Advantage inputs of logged groups; `sample_kl` is that of the groups, then of their mismatched pairs."""
    group_count = len(groups)
    return AdvantageInputs(
        rewards=[[label] for label in labels],
        response_lengths=[[len(group.samples[0].response_ids)] for group in groups],
        sample_kl=[[kl] for kl in sample_kl[:group_count]],
        mismatched_kl=fmean(kl.kl_sum for kl in sample_kl[group_count:]),
    )
