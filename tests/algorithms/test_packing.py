"""Plans cover each sample once and are balanced; packing changes neither probabilities nor gradients."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from rluf.algorithms import policy_model
from rluf.algorithms.losses import compute_policy_loss
from rluf.algorithms.packing import MicroBatch, count_common_prefix, pack_micro_batch, plan_micro_batches
from rluf.algorithms.policy_model import compute_response_logprobs, load_policy
from rluf.config.policy import AlgorithmSettings
from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.types import Group, Prompt, Sample

LENGTHS = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 50), min_size=1, max_size=6)), min_size=1, max_size=12
)


def count_tokens(micro_batch: MicroBatch, lengths: list[tuple[int, list[int]]]) -> int:
    prompt_tokens = sum(lengths[g][0] for g in {g for g, _ in micro_batch})
    return prompt_tokens + sum(lengths[g][1][s] for g, s in micro_batch)


def make_plan(lengths: list[tuple[int, list[int]]], world_size: int, budget: int) -> list[list[MicroBatch]]:
    prompts, responses = [prompt for prompt, _ in lengths], [response for _, response in lengths]
    return plan_micro_batches(prompts, responses, world_size=world_size, token_budget=budget)


@given(lengths=LENGTHS, world_size=st.integers(1, 5), budget=st.integers(64, 400))
def test_plan_covers_each_sample_once_with_equal_counts_within_budget(
    lengths: list[tuple[int, list[int]]], world_size: int, budget: int
) -> None:
    plan = make_plan(lengths, world_size, budget)
    planned_samples = [pair for rank in plan for micro_batch in rank for pair in micro_batch]
    assert sorted(planned_samples) == [
        (g, s) for g, (_, responses) in enumerate(lengths) for s in range(len(responses))
    ]
    assert len(plan) == world_size and len({len(rank) for rank in plan}) == 1
    for micro_batch in (m for rank in plan for m in rank):
        assert count_tokens(micro_batch, lengths) <= budget or len(micro_batch) == 1


@example(lengths=[(1, [1, 2]), (2, [1, 1, 1])], world_size=4, seed=0)  # chunks of equal length, other prompt lengths
@given(lengths=LENGTHS, world_size=st.integers(1, 4), seed=st.integers(0, 5))
def test_loads_do_not_depend_on_the_order_of_groups(
    lengths: list[tuple[int, list[int]]], world_size: int, seed: int
) -> None:
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    loads = [
        sorted(count_tokens(m, order) for rank in make_plan(order, world_size, 128) for m in rank)
        for order in (lengths, shuffled)
    ]
    assert loads[0] == loads[1]


@pytest.mark.parametrize("prefix", [0, 1, 20, 52])
@given(lengths=LENGTHS, world_size=st.integers(1, 3), budget=st.integers(64, 400))
def test_a_shared_prefix_counts_once_per_micro_batch_in_plan_and_tensors(
    prefix: int, lengths: list[tuple[int, list[int]]], world_size: int, budget: int
) -> None:
    system_message = tuple(range(100, 100 + prefix))
    groups = {
        index: Group(
            prompt := Prompt(str(index), (), (*system_message, *(3 + index,) * own_tokens), "", ""),
            tuple(Sample("", prompt.token_ids, (2,) * n, (-1.0,) * n, ((0, 0),), "stop", "") for n in responses),
            0,
        )
        for index, (own_tokens, responses) in enumerate(lengths)
    }
    prompts = [group.prompt for group in groups.values()]
    assert count_common_prefix(prompts) == (prefix if len(prompts) > 1 else 0)
    prompt_counts, response_counts = [prefix + own_tokens for own_tokens, _ in lengths], [r for _, r in lengths]
    plan = plan_micro_batches(
        prompt_counts, response_counts, world_size=world_size, token_budget=budget, shared_prefix_tokens=prefix
    )
    planned_samples = [pair for rank in plan for micro_batch in rank for pair in micro_batch]
    assert sorted(planned_samples) == [(g, s) for g, group in groups.items() for s in range(len(group.samples))]
    advantages = [[1.0] * len(responses) for _, responses in lengths]
    for micro_batch in (m for rank in plan for m in rank):
        packed = pack_micro_batch(micro_batch, groups, advantages)
        assert packed.input_ids.numel() <= budget or len(micro_batch) == 1


def make_prompts(*token_ids: Sequence[int]) -> list[Prompt]:
    return [Prompt(str(i), (), tuple(ids), "", "train") for i, ids in enumerate(token_ids)]


@pytest.mark.parametrize("position", [0, 1, 7, 500, 998, 999])
@pytest.mark.parametrize(
    ("other", "expected"), [((7, 8), 0), ((1, 2, 3, 9, 9), 3), ((1, 2), 2), ((), 0), ((1, 2, 3, 4, 5, 6), 5)]
)
def test_the_common_prefix_is_that_of_every_prompt(position: int, other: tuple[int, ...], expected: int) -> None:
    token_ids: list[Sequence[int]] = [(1, 2, 3, 4, 5, 100 + i) for i in range(1000)]
    token_ids[position] = other
    assert count_common_prefix(make_prompts(*token_ids)) == expected
    assert count_common_prefix(make_prompts(*token_ids[:1])) == count_common_prefix([]) == 0


def test_no_micro_batch_exceeds_the_budget_where_few_prompts_lack_the_prefix() -> None:
    system_message = tuple(range(100, 160))
    prompts = make_prompts(*((*system_message, i) if i % 125 else tuple(range(300, 361)) for i in range(1, 1001)))
    sizes = [len(prompt.token_ids) for prompt in prompts]
    prefix = count_common_prefix(prompts)
    plan = plan_micro_batches(sizes, [[4]] * 1000, world_size=2, token_budget=256, shared_prefix_tokens=prefix)
    groups = {
        i: Group(prompt, (Sample("", prompt.token_ids, (2,) * 4, (-1.0,) * 4, ((0, 0),), "stop", ""),), 0)
        for i, prompt in enumerate(prompts)
    }
    packed = [pack_micro_batch(batch, groups, [[1.0]] * 1000).input_ids.numel() for rank in plan for batch in rank]
    assert max(packed) <= 256


def test_quickstart_prompts_with_an_example_need_two_micro_batches_instead_of_three() -> None:
    prompts, responses = [69] * 12, [[31] * 4] * 12
    plans = [
        plan_micro_batches(prompts, responses, world_size=1, token_budget=1024, shared_prefix_tokens=prefix)
        for prefix in (0, 53)
    ]
    assert [len(plan[0]) for plan in plans] == [3, 2]


def test_ranks_get_equal_shares_and_groups_stay_together() -> None:
    lengths = [(45, [35] * 4)] * 12
    plan = make_plan(lengths, 2, 1024)
    totals = [sum(count_tokens(m, lengths) for m in rank) for rank in plan]
    assert totals == [6 * 185, 6 * 185]


def test_one_group_is_split_over_ranks() -> None:
    plan = make_plan([(10, [30] * 4)], 2, 1000)
    assert [[len(m) for m in rank] for rank in plan] == [[2], [2]]


def test_more_ranks_than_samples_leave_empty_micro_batches() -> None:
    plan = make_plan([(4, [5])], 3, 64)
    assert sorted(len(m) for rank in plan for m in rank) == [0, 0, 1]


def make_group(index: int, prompt_length: int, response_lengths: list[int]) -> Group:
    """A group of random tokens, with logprobs as if an engine had sampled them."""
    rng = random.Random(index)
    prompt_ids = tuple(rng.randrange(3, 250) for _ in range(prompt_length))
    samples = tuple(
        Sample(
            str(index),
            prompt_ids,
            tuple(rng.randrange(3, 250) for _ in range(length)),
            tuple(-rng.uniform(3, 7) for _ in range(length)),
            ((0, 0),),
            "stop",
            "",
        )
        for length in response_lengths
    )
    return Group(Prompt(str(index), (), prompt_ids, "", "train"), samples, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(folder: Path) -> nn.Module:
    return load_policy(folder, dtype=torch.float32).train()


GROUPS = {i: make_group(i, p, r) for i, (p, r) in enumerate([(7, [3, 9, 1]), (12, [5, 5]), (3, [11, 2, 4, 6])])}
ADVANTAGES = [[1.0, -0.5, 0.3], [0.7, -0.7], [-1.0, 0.2, 0.0, 0.9]]
SAMPLES = [(g, s) for g, group in GROUPS.items() for s in range(len(group.samples))]


def compute_packed_logprobs(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    batch = pack_micro_batch(micro_batch, GROUPS, ADVANTAGES)
    return compute_response_logprobs(model, batch)


def test_packed_batch_contains_each_prompt_once_and_no_padding() -> None:
    batch = pack_micro_batch(SAMPLES, GROUPS, ADVANTAGES)
    assert batch.token_count == 7 + 13 + 12 + 10 + 3 + 23
    assert batch.loss_weights.sum().item() == pytest.approx(1.0)
    assert batch.position_ids[0, :11].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 7]
    assert batch.target_ids.tolist() == [t for g, s in SAMPLES for t in GROUPS[g].samples[s].response_ids]


def test_packed_logprobs_equal_those_of_single_samples_in_plain_transformers(model: nn.Module, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for group, index in SAMPLES:
        sample = GROUPS[group].samples[index]
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([[*sample.prompt_ids, *sample.response_ids]])).logits[0]
        all_logprobs = logits[len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        expected.append(all_logprobs.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0])
    with torch.no_grad():
        packed_logprobs = compute_packed_logprobs(model, SAMPLES)
    assert torch.allclose(packed_logprobs, torch.cat(expected), atol=1e-5)


def compute_gradients(model: nn.Module, plan: list[MicroBatch]) -> dict[str, Tensor]:
    model.zero_grad()
    for micro_batch in plan:
        batch = pack_micro_batch(micro_batch, GROUPS, ADVANTAGES)
        logprobs = compute_packed_logprobs(model, micro_batch) if micro_batch else torch.zeros(1, requires_grad=True)
        compute_policy_loss(logprobs, logprobs.detach() - 0.1, batch, AlgorithmSettings()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", [[[m] for m in SAMPLES], [SAMPLES[::-1]], [SAMPLES[::2], [], SAMPLES[1::2]]])
def test_gradient_does_not_depend_on_the_split(model: nn.Module, plan: list[MicroBatch]) -> None:
    single_batch, split_batches = compute_gradients(model, [SAMPLES]), compute_gradients(model, plan)
    for name, expected in single_batch.items():
        assert torch.allclose(split_batches[name], expected, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradient_with_shared_prompts_equals_that_of_padded_rows_in_plain_transformers(
    model: nn.Module, folder: Path, side: str
) -> None:
    """One row per sample, each with its own prompt, padded and masked, as in trainers without packing."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = [GROUPS[group].samples[index] for group, index in SAMPLES]
    max_length = max(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    ids, mask, starts = [], [], []
    for sample in samples:
        row = [*sample.prompt_ids, *sample.response_ids]
        pad = max_length - len(row)
        before, after = (pad, 0) if side == "left" else (0, pad)
        ids.append([2] * before + row + [2] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
        starts.append(before + len(sample.prompt_ids))
    attention_mask = torch.tensor(mask)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = plain(
        input_ids=torch.tensor(ids), attention_mask=attention_mask, position_ids=positions
    ).logits.log_softmax(-1)
    response_logprobs = [
        logits[row, start - 1 : start - 1 + len(sample.response_ids)].gather(
            -1, torch.tensor(sample.response_ids)[:, None]
        )[:, 0]
        for row, (sample, start) in enumerate(zip(samples, starts, strict=True))
    ]
    logprobs = torch.cat(response_logprobs)
    batch = pack_micro_batch(SAMPLES, GROUPS, ADVANTAGES)
    compute_policy_loss(logprobs, logprobs.detach() - 0.1, batch, AlgorithmSettings()).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, gradient in compute_gradients(model, [SAMPLES]).items():
        assert torch.allclose(gradient, expected[name], atol=1e-6, rtol=1e-4), name


def test_prompts_with_a_common_prefix_share_it_and_no_gradient_changes(model: nn.Module) -> None:
    """One system message, then prompts of which one is a prefix of another and two are the same."""
    system_ids = tuple(range(40, 60))
    user_ids = {0: (5, 6, 7), 1: (5, 6, 7, 8, 9), 2: (5, 4), 3: (5, 4)}
    groups = {}
    for index, ids in user_ids.items():
        group = make_group(index, 1, [4, 6])
        prompt_ids = (*system_ids, *ids)
        samples = tuple(dataclasses.replace(sample, prompt_ids=prompt_ids) for sample in group.samples)
        groups[index] = Group(dataclasses.replace(group.prompt, token_ids=prompt_ids), samples, 0)
    advantages = [[1.0, -0.5], [0.7, -0.7], [0.2, 0.9], [-1.0, 0.4]]
    micro_batch = [(group, sample) for group in groups for sample in range(2)]
    packed = pack_micro_batch(micro_batch, groups, advantages)
    assert packed.token_count == 20 + 3 + 2 + 1 + 4 * 10
    prompt_of_second_group = [packed.input_ids[0, token].item() for token in packed.sequence_token_index[2]][:25]
    assert prompt_of_second_group == [*system_ids, *user_ids[1]]
    positions = [packed.position_ids[0, token].item() for token in packed.sequence_token_index[4]][:26]
    assert positions == list(range(26))
    gradients: list[dict[str, Tensor]] = []
    for plan in ([micro_batch], [[pair] for pair in micro_batch]):
        model.zero_grad()
        for planned_samples in plan:
            batch = pack_micro_batch(planned_samples, groups, advantages)
            logprobs = compute_response_logprobs(model, batch)
            compute_policy_loss(logprobs, logprobs.detach() - 0.1, batch, AlgorithmSettings()).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6, rtol=1e-4), name


def test_idle_batch_has_weight_zero() -> None:
    batch = pack_micro_batch([], GROUPS, ADVANTAGES)
    assert batch.token_count == 0
    assert batch.loss_weights.sum().item() == 0.0


def test_empty_response_is_left_out() -> None:
    empty = Sample("0", (3, 4), (), (), (), "stop", "")
    groups = {0: Group(Prompt("0", (), (3, 4), "", ""), (empty,), 0)}
    assert pack_micro_batch([(0, 0)], groups, [[1.0]]).token_count == 0


def test_a_demonstration_has_no_rollout_logprobs() -> None:
    sample = Sample("0", (3,), (4, 5), (), (), "stop", "")
    batch = pack_micro_batch([(0, 0)], {0: Group(Prompt("0", (), (3,), "", ""), (sample,), 0)}, [[1.0]])
    assert batch.rollout_logprobs.isnan().all() and batch.token_count == 3
    assert batch.advantages.tolist() == [1.0, 1.0]


def test_logprobs_of_another_length_are_refused() -> None:
    sample = Sample("0", (3,), (4, 5), (-1.0,), (), "stop", "")
    groups = {0: Group(Prompt("0", (), (3,), "", ""), (sample,), 0)}
    with pytest.raises(ValueError, match=r"expected 2 rollout logprobs.*got 1"):
        pack_micro_batch([(0, 0)], groups, [[1.0]])


def test_forward_without_packed_indices_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="sequence_token_index"):
        model(input_ids=torch.tensor([[3, 4, 5]]))


def test_gradient_checkpointing_changes_no_gradient(model: nn.Module, folder: Path) -> None:
    checkpointing = load_policy(folder, dtype=torch.float32, gradient_checkpointing=True).train()
    expected, gradients = compute_gradients(model, [SAMPLES]), compute_gradients(checkpointing, [SAMPLES])
    for name, grad in expected.items():
        assert torch.allclose(gradients[name], grad, atol=1e-6), name


def attend_one_by_one(flat_states: Any, sequence_starts: Tensor, max_length: int, scaling: float | None) -> Tensor:
    """What the kernel on GPUs computes, one sequence after the other."""
    bounds = sequence_starts.tolist()
    outputs = []
    for start, end in itertools.pairwise(bounds):
        assert 0 < end - start <= max_length
        query, key, value = (states[start:end].transpose(0, 1)[None] for states in flat_states)
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1))
    assert bounds[-1] == len(flat_states[0])
    return torch.cat(outputs)


class OnGpu(Tensor):  # type: ignore[misc]
    """A CPU tensor that says it is on a GPU, so that packed attention takes the path without padding."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("pairs", [SAMPLES, SAMPLES[:1], list(reversed(SAMPLES)), []])
def test_rows_without_padding_give_the_attention_of_padded_rows(
    pairs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shared prompts and prefixes; outputs and gradients."""
    monkeypatch.setattr(policy_model, "compute_sequence_attention", attend_one_by_one)
    batch = pack_micro_batch(pairs, GROUPS, ADVANTAGES)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, batch.input_ids.numel(), 8) for heads in (4, 2, 2)]
    weights, results = torch.randn(1, batch.input_ids.numel(), 4, 8), []
    for on_gpu in (False, True):
        # Float32 on a GPU takes the padded rows too, so the rows without padding are computed in float64.
        inputs = [(state.double() if on_gpu else state.clone()).requires_grad_() for state in states]
        passed = [value.as_subclass(OnGpu) for value in inputs] if on_gpu else inputs
        output, _ = policy_model.compute_packed_attention(nn.Module(), *passed, None, **batch.attention_inputs)
        (output * weights).sum().backward()
        results.append([output.detach().as_subclass(Tensor), *(value.grad for value in inputs)])
    for padded, flat in zip(*results, strict=True):
        assert torch.allclose(padded, flat.float(), atol=1e-5)


@pytest.mark.parametrize("pairs", [SAMPLES, SAMPLES[:3], SAMPLES[3:5], SAMPLES[6:], list(reversed(SAMPLES)), []])
@pytest.mark.parametrize("common_prefix", [0, 5])
def test_prompts_and_responses_as_separate_rows_give_the_attention_of_whole_rows(
    pairs: list[tuple[int, int]], common_prefix: int
) -> None:
    """Outputs and gradients, with prompts that share a beginning or not."""
    groups = {}
    for index, group in GROUPS.items():
        prompt_ids = (*range(40, 40 + common_prefix), *group.prompt.token_ids)
        samples = tuple(dataclasses.replace(sample, prompt_ids=prompt_ids) for sample in group.samples)
        groups[index] = Group(dataclasses.replace(group.prompt, token_ids=prompt_ids), samples, 0)
    batch = pack_micro_batch(pairs, groups, ADVANTAGES)
    split_names = {"prompt_token_index", "response_token_index", "split_output_index", "response_mask"}
    split_inputs = batch.attention_inputs
    assert split_names <= set(split_inputs)
    row_inputs = {name: value for name, value in split_inputs.items() if name not in split_names}
    torch.manual_seed(0)
    states = [torch.randn(1, heads, batch.input_ids.numel(), 8) for heads in (4, 2, 2)]
    weights, results = torch.randn(1, batch.input_ids.numel(), 4, 8), []
    for inputs in (row_inputs, split_inputs):
        leaves = [state.clone().requires_grad_() for state in states]
        output, _ = policy_model.compute_packed_attention(nn.Module(), *leaves, None, **inputs)
        (output * weights).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for whole_rows, separate_rows in zip(*results, strict=True):
        assert torch.allclose(whole_rows, separate_rows, atol=1e-5)


def test_responses_far_longer_than_their_prompts_stay_whole_rows() -> None:
    """The mask would double their cost."""
    batch = pack_micro_batch([(0, 0)], {0: make_group(0, 4, [9])}, [[1.0]])
    assert "response_mask" not in batch.attention_inputs


def test_the_kernel_on_gpus_accepts_the_inputs_and_has_a_gradient() -> None:
    """Traced with torch's fake tensors: names, shapes, grouped heads and backward of the kernel's own signature."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        states = [torch.empty(11, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
        starts = torch.empty(3, dtype=torch.int32)
        output = policy_model.compute_sequence_attention(states, starts, 6, 0.25)
        assert output.shape == (11, 4, 16)
        output.sum().backward()
        assert [state.grad.shape for state in states] == [state.shape for state in states]
