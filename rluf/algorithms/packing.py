"""How the samples of a step are dealt to ranks and micro-batches, and how one micro-batch becomes tensors.

Planning looks at lengths only, so that the driver can do it; packing looks at tokens. Samples of a group that share a
micro-batch share the prompt's tokens, so groups stay together where the token budget lets them; prompts that begin
alike share their beginning too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rluf.algorithms.batch import Batch
from rluf.types import Group

MicroBatch = list[tuple[int, int]]
"""(group index, sample index) pairs that are packed together; empty where a rank only keeps step with the others."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Samples of one group that stay together, and the tokens they take with their prompt."""

    members: tuple[tuple[int, int], ...]
    tokens: int


def plan_micro_batches(
    prompt_tokens: Sequence[int], response_tokens: Sequence[Sequence[int]], *, ranks: int, token_budget: int
) -> list[list[MicroBatch]]:
    """Micro-batches of each rank: every sample in exactly one, the same number on every rank, tokens balanced.

    `prompt_tokens` [groups] and `response_tokens` [groups][samples] are lengths in tokens. A micro-batch takes at most
    `token_budget` tokens (a prompt counts once for the samples of its group in it), unless a single sample is longer:
    that one goes alone. With fewer samples than ranks some micro-batches are empty. The same lengths give the same
    plan, and the loads do not depend on the order of groups.
    """
    total = sum(p + sum(r) for p, r in zip(prompt_tokens, response_tokens, strict=True))
    share = token_budget if ranks == 1 else min(token_budget, -(-total // ranks))
    pieces = [
        piece
        for group, (prompt, responses) in enumerate(zip(prompt_tokens, response_tokens, strict=True))
        for piece in _pieces(group, prompt, responses, share)
    ]
    pieces.sort(key=lambda piece: (-piece.tokens, piece.members))
    rounds = max(1, -(-sum(piece.tokens for piece in pieces) // (ranks * token_budget)))
    while (bins := _fill(pieces, rounds * ranks, token_budget)) is None:
        rounds += 1
    return _deal(bins, ranks, rounds)


def _pieces(group: int, prompt: int, responses: Sequence[int], limit: int) -> list[_Piece]:
    """Split a group into as few pieces of at most `limit` tokens as first-fit by falling length finds."""
    found: list[tuple[list[tuple[int, int]], int]] = []
    for sample in sorted(range(len(responses)), key=lambda s: (-responses[s], s)):
        for index, (members, tokens) in enumerate(found):
            if tokens + responses[sample] <= limit:
                members.append((group, sample))
                found[index] = (members, tokens + responses[sample])
                break
        else:
            found.append(([(group, sample)], prompt + responses[sample]))
    return [_Piece(tuple(sorted(members)), tokens) for members, tokens in found]


def _fill(pieces: Sequence[_Piece], count: int, budget: int) -> list[tuple[int, MicroBatch]] | None:
    """Put each piece (longest first) into the emptiest of `count` bins; None if a bin of several runs over `budget`."""
    loads = [0] * count
    bins: list[MicroBatch] = [[] for _ in range(count)]
    for piece in pieces:
        lightest = min(range(count), key=loads.__getitem__)
        if bins[lightest] and loads[lightest] + piece.tokens > budget:
            return None
        bins[lightest].extend(piece.members)
        loads[lightest] += piece.tokens
    return list(zip(loads, bins, strict=True))


def _deal(bins: Sequence[tuple[int, MicroBatch]], ranks: int, rounds: int) -> list[list[MicroBatch]]:
    """Deal `rounds` bins to every rank, heaviest first to the rank with least so far."""
    loads = [0] * ranks
    plan: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    for load, members in sorted(bins, key=lambda b: (-b[0], b[1])):
        rank = min((r for r in range(ranks) if len(plan[r]) < rounds), key=lambda r: (loads[r], r))
        plan[rank].append(members)
        loads[rank] += load
    return plan


def pack(
    members: Sequence[tuple[int, int]],
    groups: Mapping[int, Group],
    advantages: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """Tensors of one micro-batch of (group, sample) `members`.

    `groups` holds at least the groups named; `advantages` and `weights` [groups][samples] are those of the whole step.
    A response's weight is what each of its tokens counts in the loss (algorithms.registry.token_weights), so the sum
    over all micro-batches of all ranks does not depend on how the step was split; without `weights` it is GRPO's mean
    over each response's tokens, then over samples. A demonstration's rollout logprobs are NaN.
    Samples without response tokens take no part. No members give a batch of one token and weight 0, with which a rank
    keeps step. Raises ValueError when a sample has another number of logprobs than response tokens.
    """
    total = sum(len(row) for row in advantages)
    by_group: dict[int, list[int]] = {}
    for group, index in packed_order(members, groups):
        by_group.setdefault(group, []).append(index)
    if not by_group:
        return _idle()
    layout = _Layout()
    for group, chosen in by_group.items():
        layout.add_prompt(groups[group].samples[chosen[0]].prompt_ids)
        for index in chosen:
            sample = groups[group].samples[index]
            length = len(sample.response_ids)
            sampled = sample.rollout_logprobs or (math.nan,) * length
            if len(sampled) != length:
                raise ValueError(
                    f"sample {index} of prompt {sample.prompt_id} has {length} response tokens but "
                    f"{len(sample.rollout_logprobs)} rollout logprobs"
                )
            layout.add_response(sample.response_ids)
            layout.logprobs += sampled
            layout.advantages += [advantages[group][index]] * length
            layout.weights += [1.0 / (length * total) if weights is None else weights[group][index]] * length
    return layout.batch()


def packed_order(members: Sequence[tuple[int, int]], groups: Mapping[int, Group]) -> list[tuple[int, int]]:
    """The members that `pack` packs, in its order: group by group as they first come, without empty responses."""
    by_group: dict[int, list[tuple[int, int]]] = {}
    for group, index in members:
        if groups[group].samples[index].response_ids:
            by_group.setdefault(group, []).append((group, index))
    return [member for chosen in by_group.values() for member in chosen]


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


class _Layout:
    """Grows a packed micro-batch: one prompt, then its responses, then the next prompt.

    A prompt that begins as an earlier one does, as chats with one system message do, has no tokens of its own for that
    part: what comes before a token alone decides what a causal model computes at it.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.rows: list[list[int]] = []
        self.homes: list[tuple[int, int]] = []
        self.keep: list[int] = []
        self.targets: list[int] = []
        self.sequences: list[int] = []
        self.logprobs: list[float] = []
        self.advantages: list[float] = []
        self.weights: list[float] = []
        self._prompt: list[int] = []
        self._earlier: list[tuple[Sequence[int], list[int]]] = []

    def add_prompt(self, ids: Sequence[int]) -> None:
        """Append a prompt; its own tokens take their attention from the row of the first response that follows."""
        known = max((shared_prefix(ids, other), places) for other, places in [((), []), *self._earlier])
        shared, start = known[0], len(self.ids)
        self._prompt = [*known[1][:shared], *range(start, start + len(ids) - shared)]
        self._earlier.append((ids, self._prompt))
        self.ids += ids[shared:]
        self.positions += range(shared, len(ids))
        self.homes += [(len(self.rows), column) for column in range(shared, len(ids))]

    def add_response(self, ids: Sequence[int]) -> None:
        """Append a response to the last prompt."""
        start, length = len(self.ids), len(self._prompt)
        here = range(start, start + len(ids))
        self.homes += [(len(self.rows), length + offset) for offset in range(len(ids))]
        self.keep += [self._prompt[-1], *here[:-1]]
        self.sequences += [len(self.rows)] * len(ids)
        self.rows.append([*self._prompt, *here])
        self.ids += ids
        self.positions += range(length, length + len(ids))
        self.targets += ids

    def batch(self) -> Batch:
        """The tensors."""
        longest = max(len(row) for row in self.rows)
        rows = [row + [0] * (longest - len(row)) for row in self.rows]
        return Batch(
            input_ids=torch.tensor([self.ids]),
            position_ids=torch.tensor([self.positions]),
            rows=torch.tensor(rows),
            places=torch.tensor([row * longest + column for row, column in self.homes]),
            keep=torch.tensor(self.keep),
            targets=torch.tensor(self.targets),
            sequences=torch.tensor(self.sequences),
            advantages=torch.tensor(self.advantages, dtype=torch.float32),
            loss_weights=torch.tensor(self.weights, dtype=torch.float32),
            rollout_logprobs=torch.tensor(self.logprobs, dtype=torch.float32),
        )


def _idle() -> Batch:
    """A batch that costs one token and weighs nothing."""
    layout = _Layout()
    layout.add_prompt((0,))
    layout.add_response((0,))
    layout.logprobs, layout.advantages, layout.weights = [0.0], [0.0], [0.0]
    return layout.batch()
