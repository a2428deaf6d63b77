"""Batches of logged responses for offline algorithms (KTO): liked and other responses, and mismatched pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from rluf.algorithms.advantages import AdvantageInputs, SampleKL
from rluf.errors import DataError
from rluf.types import Group

if TYPE_CHECKING:
    from rluf.train.prompts import ReactionGroups


class OfflineBatches:
    """Batches of logged responses, one sample per group, with as many liked as other ones."""

    def __init__(self, reaction_groups: ReactionGroups, liked_order: Iterator[int], other_order: Iterator[int]) -> None:
        """Take groups in the order of two endless index streams. Raises DataError where one kind is missing."""
        liked_count, other_count = len(reaction_groups.liked), len(reaction_groups.others)
        if not (liked_count and other_count):
            raise DataError(
                "algorithm.name=kto needs liked and other responses in the log, but found "
                f"{liked_count} and {other_count} short enough; raise rollout.max_response_tokens or add data"
            )
        self._reaction_groups, self._liked_order, self._other_order = reaction_groups, liked_order, other_order

    def next_batch(self, count: int) -> tuple[list[Group], list[float]]:
        """The next `count` groups and their labels: liked (1.0) or not (0.0)."""
        # Alternating rather than sampled: KTO gives both kinds the same weight, so a batch needs equal numbers of them.
        labels = [float(index % 2 == 0) for index in range(count)]
        groups = [
            self._reaction_groups.liked[next(self._liked_order)]
            if label
            else self._reaction_groups.others[next(self._other_order)]
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
