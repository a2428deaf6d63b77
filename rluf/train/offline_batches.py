"""What reward-free learning takes from the log: liked and other responses, dealt alternately, and mismatched pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from rluf.algorithms.advantages import Drift, Outcomes
from rluf.errors import DataError
from rluf.types import Group

if TYPE_CHECKING:
    from rluf.train.prompts import Reactions


class LoggedBatches:
    """Batches of logged responses, one sample a group, as many liked ones as others."""

    def __init__(self, reactions: Reactions, liked: Iterator[int], others: Iterator[int]) -> None:
        """Deal `reactions` in the order of two endless index streams. Raises DataError where one kind is missing."""
        if not (reactions.liked and reactions.others):
            raise DataError(
                f"algorithm.name=kto needs liked and other responses in the log, but found {len(reactions.liked)} and "
                f"{len(reactions.others)} short enough; raise rollout.max_response_tokens or bring more data"
            )
        self._reactions, self._liked, self._others = reactions, liked, others

    def next(self, count: int) -> tuple[list[Group], list[float]]:
        """The next `count` groups and whether each was liked (1.0) or not (0.0)."""
        labels = [float(index % 2 == 0) for index in range(count)]
        kinds = {1.0: (self._reactions.liked, self._liked), 0.0: (self._reactions.others, self._others)}
        return [kinds[label][0][next(kinds[label][1])] for label in labels], labels


def mismatched(groups: Sequence[Group]) -> list[Group]:
    """Each prompt with the next group's response: pairs that tell how far the policy has moved in general."""
    found = []
    for group, other in zip(groups, [*groups[1:], groups[0]], strict=True):
        sample = replace(other.samples[0], prompt_id=group.prompt.id, prompt_ids=group.prompt.token_ids)
        found.append(replace(group, samples=(sample,)))
    return found


def outcomes_of(groups: Sequence[Group], labels: Sequence[float], drifts: Sequence[Drift]) -> Outcomes:
    """Outcomes of logged groups; `drifts` are those of the groups, then of their mismatched pairs."""
    return Outcomes(
        rewards=[[label] for label in labels],
        lengths=[[len(group.samples[0].response_ids)] for group in groups],
        drifts=[[drift] for drift in drifts[: len(groups)]],
        mismatched=fmean(drift.kl for drift in drifts[len(groups) :]),
    )
