"""Distribute the samples of a step over ranks and micro-batches, and pack one micro-batch into tensors.

Planning needs lengths only, so the driver can do it; packing needs token ids. Samples of a group in the same
micro-batch share the tokens of the prompt, so groups stay together where the token budget allows; prompts with a common
beginning share that too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rluf.types import Group, Prompt, Sample


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One packed micro-batch: T tokens, K response tokens, N samples of up to L tokens.

    Each prompt appears once, followed by the responses of its samples; the `position_ids` of every response continue
    from the end of the prompt. The beginning that a prompt shares with an earlier one is not repeated. Tensors over K
    follow the order of the samples in the micro-batch.
    """

    input_ids: Tensor
    """Token ids [1, T]."""
    position_ids: Tensor
    """Position of each token in its own sequence [1, T]."""
    sequence_token_index: Tensor
    """Token index of each sample's prompt and response, padded at the end with index 0 [N, L]."""
    token_output_index: Tensor
    """Index in the flattened [N * L] attention output that each token takes its result from [T]."""
    flat_token_index: Tensor
    """sequence_token_index without the padding, sequence after sequence [S]."""
    flat_output_index: Tensor
    """Index in the [S] attention output of flat_token_index that each token takes its result from [T]."""
    sequence_starts: Tensor
    """Start of each sequence in flat_token_index, and S [N + 1] (int32)."""
    prompt_token_index: Tensor
    """Token index of each prompt, padded at the end with index 0 [P, L_prompt]."""
    response_token_index: Tensor
    """Token index of each sample's response, padded at the end with index 0 [N, L_response]."""
    split_output_index: Tensor
    """Index of each token's result in the attention outputs of prompts, then of responses [T]."""
    logit_index: Tensor
    """Index of the token whose logits predict each response token [K]."""
    target_ids: Tensor
    """Response token ids [K]."""
    sequence_index: Tensor
    """Sample (0..N-1) that each response token belongs to [K]."""
    advantages: Tensor
    """Advantage of the sample [K]."""
    loss_weights: Tensor
    """Weight of each token in the loss of the step [K]; 0 in an idle batch, which keeps ranks in lockstep."""
    rollout_logprobs: Tensor
    """Log-probability under the engine that sampled the token [K] (nats); NaN in demonstrations."""

    @property
    def attention_inputs(self) -> dict[str, Tensor]:
        """The tensors that packed attention reads, by the name of its argument."""
        inputs = {
            "sequence_token_index": self.sequence_token_index,
            "token_output_index": self.token_output_index,
            "flat_token_index": self.flat_token_index,
            "flat_output_index": self.flat_output_index,
            "sequence_starts": self.sequence_starts,
        }
        # With a mask the kernel cannot skip the later half of a response, so short prompts are cheaper as whole rows.
        has_long_prompts = 2 * self.prompt_token_index.shape[1] >= self.response_token_index.shape[1]
        if self.input_ids.device.type == "cpu" and has_long_prompts:
            inputs["prompt_token_index"] = self.prompt_token_index
            inputs["response_token_index"] = self.response_token_index
            inputs["split_output_index"] = self.split_output_index
            inputs["response_mask"] = self._build_response_mask()
        return inputs

    def _build_response_mask(self) -> Tensor:
        """Additive mask [N, 1, L_response, L]: a response token attends to its prompt and to itself and before it."""
        last_columns = self.position_ids[0][self.response_token_index][:, None, :, None]
        columns = torch.arange(self.sequence_token_index.shape[1], device=self.input_ids.device)
        return torch.zeros(()).masked_fill(columns > last_columns, -math.inf)

    @property
    def token_count(self) -> int:
        """Packed tokens that contribute to the loss (0 for an idle batch)."""
        return self.input_ids.numel() if bool((self.loss_weights > 0).any()) else 0

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        if self.input_ids.device == device:
            return self
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


MicroBatch = list[tuple[int, int]]
"""(group index, sample index) pairs that are packed together; empty for a rank that only has to stay in lockstep."""


@dataclass(frozen=True, slots=True)
class _GroupChunk:
    """Samples of one group that stay together, and their tokens, the prompt included."""

    sample_indices: tuple[tuple[int, int], ...]
    token_count: int


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A micro-batch of a step: its number, its (group, sample) pairs, and the tensors of its response tokens [K].

    `start_logprobs` are the policy's before the first of several updates, `ref_logprobs` None without a reference.
    """

    number: int
    samples: MicroBatch
    packed: PackedBatch
    ref_logprobs: Tensor | None
    start_logprobs: Tensor | None = None


def plan_micro_batches(
    prompt_token_counts: Sequence[int],
    response_token_counts: Sequence[Sequence[int]],
    *,
    world_size: int,
    token_budget: int,
    shared_prefix_tokens: int = 0,
) -> list[list[MicroBatch]]:
    """Micro-batches of each rank: every sample in exactly one, the same number on every rank, tokens balanced.

    `prompt_token_counts` [groups] and `response_token_counts` [groups][samples] are lengths in tokens. A micro-batch
    takes at most `token_budget` tokens (a prompt counts once for the samples of its group in it); a single longer
    sample gets a micro-batch of its own. With fewer samples than ranks some micro-batches are empty. The same lengths
    give the same plan, and the loads do not depend on the order of groups. All prompts begin with the same
    `shared_prefix_tokens` tokens (count_common_prefix), which a micro-batch contains once.
    """
    # The prefix takes its tokens from the budget of each micro-batch; a group adds the rest of its prompt.
    token_budget = max(1, token_budget - shared_prefix_tokens)
    prompt_token_counts = [max(0, count - shared_prefix_tokens) for count in prompt_token_counts]
    total_tokens = sum(
        prompt + sum(responses) for prompt, responses in zip(prompt_token_counts, response_token_counts, strict=True)
    )
    # Over several ranks a group larger than an even share is split, or one rank would get it while others idle.
    max_chunk_tokens = token_budget if world_size == 1 else min(token_budget, -(-total_tokens // world_size))
    chunks = [
        chunk
        for group_index, (prompt_tokens, response_tokens) in enumerate(
            zip(prompt_token_counts, response_token_counts, strict=True)
        )
        for chunk in _split_group(group_index, prompt_tokens, response_tokens, max_chunk_tokens)
    ]

    def sort_key(chunk: _GroupChunk) -> tuple[object, ...]:
        """Longest first; ties by lengths before indices, so that the loads do not depend on the order of groups."""
        group_index = chunk.sample_indices[0][0]
        sample_positions = [sample for _, sample in chunk.sample_indices]
        lengths = (prompt_token_counts[group_index], tuple(response_token_counts[group_index]))
        return (-chunk.token_count, *lengths, sample_positions, group_index)

    chunks.sort(key=sort_key)
    # Lower bound by tokens. Chunks cannot be divided, so the bound may be too low and one more round is tried.
    bins_per_rank = max(1, -(-sum(chunk.token_count for chunk in chunks) // (world_size * token_budget)))
    while (bins := _fill_bins(chunks, bins_per_rank * world_size, token_budget)) is None:
        bins_per_rank += 1
    return _assign_bins_to_ranks(bins, world_size, bins_per_rank)


def _split_group(
    group_index: int, prompt_token_count: int, response_token_counts: Sequence[int], max_tokens: int
) -> list[_GroupChunk]:
    """Split a group into chunks of at most `max_tokens` tokens by first-fit decreasing."""
    chunks: list[tuple[list[tuple[int, int]], int]] = []
    by_falling_length = sorted(range(len(response_token_counts)), key=lambda s: (-response_token_counts[s], s))
    for sample_index in by_falling_length:
        response_tokens = response_token_counts[sample_index]
        for chunk_index, (sample_indices, token_count) in enumerate(chunks):
            if token_count + response_tokens <= max_tokens:
                sample_indices.append((group_index, sample_index))
                chunks[chunk_index] = (sample_indices, token_count + response_tokens)
                break
        else:
            chunks.append(([(group_index, sample_index)], prompt_token_count + response_tokens))
    return [_GroupChunk(tuple(sorted(sample_indices)), token_count) for sample_indices, token_count in chunks]


def _fill_bins(chunks: Sequence[_GroupChunk], bin_count: int, token_budget: int) -> list[tuple[int, MicroBatch]] | None:
    """Put each chunk (longest first) into the emptiest bin; None if a bin with several exceeds the budget."""
    loads = [0] * bin_count
    bins: list[MicroBatch] = [[] for _ in range(bin_count)]
    for chunk in chunks:
        lightest = min(range(bin_count), key=loads.__getitem__)
        # An empty bin takes any chunk: a single sample longer than the budget must go somewhere.
        if bins[lightest] and loads[lightest] + chunk.token_count > token_budget:
            return None
        bins[lightest].extend(chunk.sample_indices)
        loads[lightest] += chunk.token_count
    return list(zip(loads, bins, strict=True))


def _assign_bins_to_ranks(
    bins: Sequence[tuple[int, MicroBatch]], world_size: int, bins_per_rank: int
) -> list[list[MicroBatch]]:
    """Give every rank `bins_per_rank` bins: heaviest first, each to the rank with the fewest tokens so far."""
    rank_loads = [0] * world_size
    plan: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for load, micro_batch in sorted(bins, key=lambda b: (-b[0], b[1])):
        free_ranks = (r for r in range(world_size) if len(plan[r]) < bins_per_rank)
        rank = min(free_ranks, key=lambda r: (rank_loads[r], r))
        plan[rank].append(micro_batch)
        rank_loads[rank] += load
    return plan


def pack_micro_batch(
    micro_batch: Sequence[tuple[int, int]],
    groups: Mapping[int, Group],
    advantages: Sequence[Sequence[float]],
    loss_weights: Sequence[Sequence[float]] | None = None,
) -> PackedBatch:
    """Tensors of the (group, sample) pairs of one micro-batch.

    `groups` contains at least the groups of the pairs; `advantages` and `loss_weights` [groups][samples] are those of
    the whole step. The weight of a response applies to each of its tokens (algorithms.registry.compute_token_weights),
    so the sum over all micro-batches of all ranks does not depend on how the step was split; without `loss_weights` it
    is GRPO's mean over the tokens of each response, then over samples. Rollout logprobs of a demonstration are NaN.
    Samples without response tokens are left out. An empty micro-batch gives an idle batch of one token with weight 0,
    so that the rank stays in lockstep. Raises ValueError when a sample's logprobs and response tokens differ in number.
    """
    step_samples = sum(len(group_advantages) for group_advantages in advantages)
    samples_by_group: dict[int, list[int]] = {}
    for group_index, sample_index in list_packed_samples(micro_batch, groups):
        samples_by_group.setdefault(group_index, []).append(sample_index)
    if not samples_by_group:
        return _build_idle_batch()
    builder = _PackedBatchBuilder()
    for group_index, sample_indices in samples_by_group.items():
        samples = groups[group_index].samples
        # Once per group: the responses share the positions of the prompt, and attention separates them.
        builder.add_prompt(samples[sample_indices[0]].prompt_ids)
        for sample_index in sample_indices:
            sample = samples[sample_index]
            length = len(sample.response_ids)
            # NaN, not 0, which would be the log-probability of a certain token.
            rollout_logprobs = sample.rollout_logprobs or (math.nan,) * length
            if len(rollout_logprobs) != length:
                raise ValueError(
                    f"sample {sample_index} of prompt {sample.prompt_id}: expected {length} rollout logprobs, one per "
                    f"response token, got {len(sample.rollout_logprobs)}"
                )
            if loss_weights is None:
                token_weight = 1.0 / (length * step_samples)
            else:
                token_weight = loss_weights[group_index][sample_index]
            builder.add_response(sample.response_ids)
            builder.rollout_logprobs += rollout_logprobs
            builder.advantages += [advantages[group_index][sample_index]] * length
            builder.loss_weights += [token_weight] * length
    return builder.build()


def pack_probe_batch(prompt_ids: list[int], responses: list[list[int]]) -> PackedBatch:
    """A packed batch of responses to one prompt, without rewards."""
    samples = tuple(
        Sample("probe", tuple(prompt_ids), tuple(ids), (0.0,) * len(ids), (), "stop", "") for ids in responses
    )
    group = Group(Prompt("probe", (), tuple(prompt_ids), "", ""), samples, 0)
    return pack_micro_batch([(0, index) for index in range(len(samples))], {0: group}, [[0.0] * len(samples)])


def list_packed_samples(micro_batch: Sequence[tuple[int, int]], groups: Mapping[int, Group]) -> list[tuple[int, int]]:
    """Samples that pack_micro_batch packs, in its order: group by group, without empty responses."""
    by_group: dict[int, list[tuple[int, int]]] = {}
    for group_index, sample_index in micro_batch:
        if groups[group_index].samples[sample_index].response_ids:
            by_group.setdefault(group_index, []).append((group_index, sample_index))
    return [pair for pairs in by_group.values() for pair in pairs]


def count_shared_prefix(first_ids: Sequence[int], second_ids: Sequence[int]) -> int:
    """Number of leading tokens that two sequences have in common."""
    pairs = enumerate(zip(first_ids, second_ids, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(first_ids), len(second_ids)))


def count_common_prefix(prompts: Iterable[Prompt]) -> int:
    """Leading tokens that all prompts have in common, such as a system message; 0 for a single prompt."""
    # A prompt without the prefix would make its micro-batch longer than planned, so all of them are read.
    prefix: Sequence[int] | None = None
    prompt_count = 0
    for prompt in prompts:
        prefix = prompt.token_ids if prefix is None else _shorten_prefix(prefix, prompt.token_ids)
        prompt_count += 1
    return len(prefix) if prefix is not None and prompt_count > 1 else 0


def _shorten_prefix(prefix: Sequence[int], token_ids: Sequence[int]) -> Sequence[int]:
    # Comparing slices is fast, and almost every prompt has the whole prefix.
    is_common = token_ids[: len(prefix)] == prefix
    return prefix if is_common else prefix[: count_shared_prefix(prefix, token_ids)]


def _pad_rows(rows: Sequence[list[int]]) -> Tensor:
    """Rows of token indices as a table, padded at the end with index 0."""
    max_length = max(map(len, rows))
    return torch.tensor([row + [0] * (max_length - len(row)) for row in rows])


class _PackedBatchBuilder:
    """Build a packed micro-batch: one prompt, then its responses, then the next prompt.

    The beginning that a prompt shares with an earlier one, as chats with the same system message do, reuses the earlier
    tokens: in a causal model the hidden state of a token depends only on the tokens before it.
    """

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.position_ids: list[int] = []
        self.sequence_token_index: list[list[int]] = []
        self.prompt_rows: list[list[int]] = []
        self.response_rows: list[list[int]] = []
        self.split_positions: list[tuple[bool, int, int]] = []
        """(is in a response, row, column) of each token in prompt_rows or response_rows."""
        self.output_positions: list[tuple[int, int]] = []
        """(sequence, column) of the attention output that each token takes its result from."""
        self.logit_index: list[int] = []
        self.target_ids: list[int] = []
        self.sequence_index: list[int] = []
        self.rollout_logprobs: list[float] = []
        self.advantages: list[float] = []
        self.loss_weights: list[float] = []
        self._prompt_token_index: list[int] = []
        self._earlier_prompts: list[tuple[Sequence[int], list[int]]] = []

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        """Append a prompt; its new tokens take their attention output from the first response that follows."""
        shared_tokens, earlier_index = max(
            (count_shared_prefix(token_ids, earlier_ids), token_index)
            for earlier_ids, token_index in [((), []), *self._earlier_prompts]
        )
        start = len(self.input_ids)
        new_tokens = range(start, start + len(token_ids) - shared_tokens)
        self._prompt_token_index = [*earlier_index[:shared_tokens], *new_tokens]
        self._earlier_prompts.append((token_ids, self._prompt_token_index))
        self.input_ids += token_ids[shared_tokens:]
        self.position_ids += range(shared_tokens, len(token_ids))
        # All responses of the prompt compute the same output for its tokens, so the first one (the next sequence) is
        # as good as any.
        next_sequence = len(self.sequence_token_index)
        new_columns = range(shared_tokens, len(token_ids))
        self.output_positions += [(next_sequence, column) for column in new_columns]
        self.split_positions += [(False, len(self.prompt_rows), column) for column in new_columns]
        self.prompt_rows.append(self._prompt_token_index)

    def add_response(self, token_ids: Sequence[int]) -> None:
        """Append a response to the last prompt."""
        start, prompt_length = len(self.input_ids), len(self._prompt_token_index)
        sequence = len(self.sequence_token_index)
        token_index = range(start, start + len(token_ids))
        self.output_positions += [(sequence, prompt_length + offset) for offset in range(len(token_ids))]
        self.split_positions += [(True, sequence, offset) for offset in range(len(token_ids))]
        self.response_rows.append([*token_index])
        # The logit at position t predicts token t + 1: the last prompt token predicts the first response token, and
        # the logits of the last response token are not needed.
        self.logit_index += [self._prompt_token_index[-1], *token_index[:-1]]
        self.sequence_index += [sequence] * len(token_ids)
        self.sequence_token_index.append([*self._prompt_token_index, *token_index])
        self.input_ids += token_ids
        self.position_ids += range(prompt_length, prompt_length + len(token_ids))
        self.target_ids += token_ids

    def build(self) -> PackedBatch:
        """The tensors of everything added so far."""
        sequence_token_index = _pad_rows(self.sequence_token_index)
        prompt_token_index, response_token_index = _pad_rows(self.prompt_rows), _pad_rows(self.response_rows)
        row_length = sequence_token_index.shape[1]
        output_index = [sequence * row_length + column for sequence, column in self.output_positions]
        prompt_outputs = prompt_token_index.numel()
        split_output_index = [
            prompt_outputs + row * response_token_index.shape[1] + column
            if is_response
            else row * prompt_token_index.shape[1] + column
            for is_response, row, column in self.split_positions
        ]
        starts = [0, *itertools.accumulate(len(indices) for indices in self.sequence_token_index)]
        return PackedBatch(
            input_ids=torch.tensor([self.input_ids]),
            position_ids=torch.tensor([self.position_ids]),
            sequence_token_index=sequence_token_index,
            token_output_index=torch.tensor(output_index),
            flat_token_index=torch.tensor(list(itertools.chain.from_iterable(self.sequence_token_index))),
            flat_output_index=torch.tensor([starts[sequence] + column for sequence, column in self.output_positions]),
            sequence_starts=torch.tensor(starts, dtype=torch.int32),
            prompt_token_index=prompt_token_index,
            response_token_index=response_token_index,
            split_output_index=torch.tensor(split_output_index),
            logit_index=torch.tensor(self.logit_index),
            target_ids=torch.tensor(self.target_ids),
            sequence_index=torch.tensor(self.sequence_index),
            advantages=torch.tensor(self.advantages, dtype=torch.float32),
            loss_weights=torch.tensor(self.loss_weights, dtype=torch.float32),
            rollout_logprobs=torch.tensor(self.rollout_logprobs, dtype=torch.float32),
        )


def _build_idle_batch() -> PackedBatch:
    """A batch of one token with weight 0, for a rank that has no samples."""
    # Collectives run per micro-batch: a rank that skipped its forward and backward would leave the others waiting.
    builder = _PackedBatchBuilder()
    builder.add_prompt((0,))
    builder.add_response((0,))
    builder.rollout_logprobs, builder.advantages, builder.loss_weights = [0.0], [0.0], [0.0]
    return builder.build()


@dataclass(frozen=True, slots=True)
class BadPromptSearch:
    """Losses of the micro-batches of one update, and what they contain."""

    batch_losses: Sequence[Tensor]
    micro_batches: Sequence[MicroBatch]
    groups_by_index: dict[int, Group]

    def list_prompts(self) -> list[str]:
        """Ids of the prompts in micro-batches whose loss is not finite."""
        pairs = zip(self.batch_losses, self.micro_batches, strict=True)
        bad_batches = [micro_batch for loss, micro_batch in pairs if not torch.isfinite(loss)]
        return list(dict.fromkeys(self.groups_by_index[i].prompt.id for batch in bad_batches for i, _ in batch))
