"""Offline training without reward models: KTO on reactions, DPO on preference pairs, SFT on loved responses.

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
from rluf.algorithms.packing import count_common_prefix
from rluf.algorithms.registry import build_learner_inputs
from rluf.errors import DataError
from rluf.models.turn_end import find_response_end_id
from rluf.train.actor_calls import put_object
from rluf.train.policy_update import PlannedUpdate
from rluf.train.prompts import SkippedRows, build_group_from_row
from rluf.train.work_buffer import CountingIterator, iter_prompt_order
from rluf.types import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rluf.config.settings import Settings
    from rluf.train.controller import TrainController

METRIC_NAMES = (
    "loss", "policy_loss", "demonstration_nll", "grad_norm", "learning_rate", "skipped", "micro_batches", "reference_s",
    "backward_s", "optimizer_s", "learner_tokens", "learner_tokens_per_s", "learner_mfu", "gpu_peak_gib",
    "sync_logprob_gap", "sync_check_s",
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
                f"{len(self.liked)} and {len(self.others)} short enough; add data"
            )


OfflineData = ReactionGroups | Sequence[Group]
"""Reactions for KTO, pairs (chosen, rejected) for DPO, loved responses for SFT."""


def load_offline_data(data_folder: Path, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> OfflineData:
    """Logged responses of the training split for an offline algorithm; rows over the limits of `rollout` are skipped.

    Raises DataError where none is left.
    """
    name, rollout = settings.algorithm.name, settings.rollout
    file = data_folder / ("helpfulness" if name == "dpo" else "love") / "train.parquet"
    columns = ("chosen", "rejected") if name == "dpo" else ("response",)
    groups_by_label: dict[bool, list[Group]] = {True: [], False: []}
    skipped = SkippedRows("logged response", rollout.max_prompt_tokens, rollout.max_response_tokens)
    end_id = find_response_end_id(tokenizer)
    for row in pq.read_table(file).to_pylist() if file.is_file() else []:
        group = build_group_from_row(row, columns, tokenizer, end_id, skipped)
        if group is not None:
            groups_by_label[name == "dpo" or row["label"] == 1].append(group)
    liked, others = groups_by_label[True], groups_by_label[False]
    try:
        data: OfflineData = ReactionGroups(liked, others) if name == "kto" else liked
        if not liked:
            kind = "pair" if name == "dpo" else "loved response"
            raise DataError(f"algorithm.name={name} found no {kind} short enough in {file}; add data")
    except DataError as error:
        raise DataError(f"{error}{skipped.describe()}") from None
    skipped.warn(len(liked) + len(others))
    return data


class OfflineTrainer:
    """Runs the steps of an offline algorithm on the actors of a controller."""

    def __init__(self, controller: TrainController, data: OfflineData) -> None:
        """Train on `data` with the learners of `controller`, which evaluates and saves the policy."""
        self._controller, self._settings, self._data = controller, controller.settings, data
        algorithm = self._settings.algorithm
        self._batch_size = algorithm.prompts_per_step * algorithm.samples_per_prompt
        groups_by_kind = (data.liked, data.others) if isinstance(data, ReactionGroups) else (data, ())
        self._liked_cursor, self._other_cursor = (
            CountingIterator(iter_prompt_order([1] * len(groups), self._settings.seed)) for groups in groups_by_kind
        )

    async def run_step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its metrics. `samples` and `response_tokens` count logged responses."""
        controller, name = self._controller, self._settings.algorithm.name
        timer = controller.start_timer()
        groups, rewards = self.collect_batch(step)
        all_groups = [*groups, *(build_mismatched_pairs(groups) if name == "kto" else [])]
        group_refs, infos = [put_object(group) for group in all_groups], [group.info for group in all_groups]
        policy_updater, kl_metrics = controller.policy_updater, {}
        # Prompts of the log need not begin as the prompts of the engines do.
        policy_updater.shared_prefix_tokens = count_common_prefix(group.prompt for group in all_groups)

        async def plan_update() -> PlannedUpdate:
            sample_kl: list[list[SampleKL]] = []
            if name != "sft":
                # No engine sampled these responses: their KL is that of the learner's policy.
                sample_kl = await policy_updater.compute_reference_kl(
                    group_refs, infos, policy_updater.plan_micro_batches(infos), use_learner_policy=True
                )
            learner_inputs = build_learner_inputs(
                self._settings.algorithm,
                build_offline_advantage_inputs(groups, rewards, sample_kl),
                max_response_tokens=self._settings.rollout.max_response_tokens,
                kl_coef=0.0,
            )
            kl_metrics.update(summarize_offline_kl(rewards, sample_kl))
            micro_batches = policy_updater.plan_micro_batches(infos[: len(groups)])
            return PlannedUpdate(group_refs[: len(groups)], micro_batches, learner_inputs)

        metrics = await controller.update_and_sync(step, group_refs[0], plan_update, timer)
        controller.snapshot = controller.get_state()
        return {
            "step": step,
            "version": controller.version,
            "samples": sum(map(len, rewards)),
            "response_tokens": sum(sum(info.response_token_counts) for info in infos[: len(groups)]),
            **kl_metrics,
            **{name: metrics[name] for name in METRIC_NAMES if name in metrics},
            **timer.phase_seconds,
            "step_s": time.monotonic() - timer.start_time,
        }

    def collect_batch(self, step: int) -> tuple[list[Group], list[list[float]]]:
        """The groups of a step and the rewards of their responses: 1 (liked, chosen) or 0.

        KTO gets as many of one as of the other; DPO gets half as many pairs as others get responses.
        """
        data = self._data
        if not isinstance(data, ReactionGroups):
            rewards = [1.0, 0.0] if self._settings.algorithm.name == "dpo" else [1.0]
            count = max(1, self._batch_size // len(rewards))
            self._liked_cursor.skip((step - 1) * count - self._liked_cursor.count)
            return [data[next(self._liked_cursor)] for _ in range(count)], [list(rewards) for _ in range(count)]
        liked_count = (self._batch_size + 1) // 2
        # A resumed run begins after step 1: skip what the steps before it were trained on.
        self._liked_cursor.skip((step - 1) * liked_count - self._liked_cursor.count)
        self._other_cursor.skip((step - 1) * (self._batch_size - liked_count) - self._other_cursor.count)
        # Alternating rather than sampled: KTO gives both kinds the same weight, so a batch needs equal numbers of them.
        labels = [float(index % 2 == 0) for index in range(self._batch_size)]
        groups = [
            data.liked[next(self._liked_cursor)] if label else data.others[next(self._other_cursor)] for label in labels
        ]
        return groups, [[label] for label in labels]


def build_mismatched_pairs(groups: Sequence[Group]) -> list[Group]:
    """Each prompt with the next group's response; their KL estimates how far the policy has moved in general.

    Source: the estimate of the reference point z_0 in KTO, arXiv 2402.01306.
    """
    pairs = []
    for group, next_group in zip(groups, [*groups[1:], groups[0]], strict=True):
        sample = replace(next_group.samples[0], prompt_id=group.prompt.id, prompt_ids=group.prompt.token_ids)
        pairs.append(replace(group, samples=(sample,)))
    return pairs


def build_offline_advantage_inputs(
    groups: Sequence[Group], rewards: Sequence[Sequence[float]], sample_kl: Sequence[Sequence[SampleKL]]
) -> AdvantageInputs:
    """Advantage inputs of logged groups; `sample_kl` is that of the groups, then of their mismatched pairs (KTO)."""
    mismatched_kl = [row[0].kl_sum for row in sample_kl[len(groups) :]]
    return AdvantageInputs(
        rewards=rewards,
        response_lengths=[[len(sample.response_ids) for sample in group.samples] for group in groups],
        sample_kl=sample_kl[: len(groups)],
        mismatched_kl=fmean(mismatched_kl) if mismatched_kl else 0.0,
    )


def summarize_offline_kl(
    rewards: Sequence[Sequence[float]], sample_kl: Sequence[Sequence[SampleKL]]
) -> dict[str, float]:
    """Mean log pi/ref (nats) of responses with reward 1 and 0; of pairs also how often the chosen one has more."""
    if not sample_kl:
        return {}
    kl_by_reward: dict[float, list[float]] = {1.0: [], 0.0: []}
    for row, group_kl in zip(rewards, sample_kl, strict=False):
        for reward, kl in zip(row, group_kl, strict=True):
            kl_by_reward[reward].append(kl.kl_sum)
    metrics = {"liked_kl": fmean(kl_by_reward[1.0]), "other_kl": fmean(kl_by_reward[0.0])}
    if len(rewards[0]) == 2:
        pairs = zip(kl_by_reward[1.0], kl_by_reward[0.0], strict=True)
        metrics["preference_accuracy"] = fmean(
            (chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in pairs
        )
    return metrics
