"""Planning covers each sample once and in balance; packing changes neither probabilities nor gradients."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rluf.algorithms.logprobs import response_logprobs
from rluf.algorithms.losses import policy_loss
from rluf.algorithms.packing import MicroBatch, pack, plan_micro_batches
from rluf.algorithms.policy_io import load_policy
from rluf.config.policy import AlgorithmSettings
from rluf.errors import ModelError
from rluf.models.hub import resolve_model
from rluf.types import Group, Prompt, Sample

LENGTHS = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 50), min_size=1, max_size=6)), min_size=1, max_size=12
)


def cost(micro_batch: MicroBatch, lengths: list[tuple[int, list[int]]]) -> int:
    prompts = sum(lengths[g][0] for g in {g for g, _ in micro_batch})
    return prompts + sum(lengths[g][1][s] for g, s in micro_batch)


def planned(lengths: list[tuple[int, list[int]]], ranks: int, budget: int) -> list[list[MicroBatch]]:
    return plan_micro_batches([p for p, _ in lengths], [r for _, r in lengths], ranks=ranks, token_budget=budget)


@given(lengths=LENGTHS, ranks=st.integers(1, 5), budget=st.integers(64, 400))
def test_plan_covers_each_sample_once_with_equal_counts_within_budget(
    lengths: list[tuple[int, list[int]]], ranks: int, budget: int
) -> None:
    plan = planned(lengths, ranks, budget)
    every = [member for rank in plan for micro_batch in rank for member in micro_batch]
    assert sorted(every) == [(g, s) for g, (_, responses) in enumerate(lengths) for s in range(len(responses))]
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    for micro_batch in (m for rank in plan for m in rank):
        assert cost(micro_batch, lengths) <= budget or len(micro_batch) == 1


@given(lengths=LENGTHS, ranks=st.integers(1, 4), seed=st.integers(0, 5))
def test_loads_do_not_depend_on_the_order_of_groups(
    lengths: list[tuple[int, list[int]]], ranks: int, seed: int
) -> None:
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    loads = [
        sorted(cost(m, order) for rank in planned(order, ranks, 128) for m in rank) for order in (lengths, shuffled)
    ]
    assert loads[0] == loads[1]


def test_ranks_get_equal_shares_and_groups_stay_together() -> None:
    lengths = [(45, [35] * 4)] * 12
    plan = planned(lengths, 2, 1024)
    totals = [sum(cost(m, lengths) for m in rank) for rank in plan]
    assert totals == [6 * 185, 6 * 185]


def test_one_group_is_split_over_ranks() -> None:
    plan = planned([(10, [30] * 4)], 2, 1000)
    assert [[len(m) for m in rank] for rank in plan] == [[2], [2]]


def test_more_ranks_than_samples_leave_empty_micro_batches() -> None:
    plan = planned([(4, [5])], 3, 64)
    assert sorted(len(m) for rank in plan for m in rank) == [0, 0, 1]


def make_group(index: int, prompt: int, responses: list[int]) -> Group:
    """A group of random tokens; logprobs as if an engine had sampled them."""
    draw = random.Random(index)
    ids = tuple(draw.randrange(3, 250) for _ in range(prompt))
    samples = tuple(
        Sample(
            str(index),
            ids,
            tuple(draw.randrange(3, 250) for _ in range(length)),
            tuple(-draw.uniform(3, 7) for _ in range(length)),
            ((0, 0),),
            "stop",
            "",
        )
        for length in responses
    )
    return Group(Prompt(str(index), (), ids, "", "train"), samples, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(folder: Path) -> nn.Module:
    return load_policy(folder, dtype=torch.float32).train()


GROUPS = {i: make_group(i, p, r) for i, (p, r) in enumerate([(7, [3, 9, 1]), (12, [5, 5]), (3, [11, 2, 4, 6])])}
ADVANTAGES = [[1.0, -0.5, 0.3], [0.7, -0.7], [-1.0, 0.2, 0.0, 0.9]]
MEMBERS = [(g, s) for g, group in GROUPS.items() for s in range(len(group.samples))]


def packed_logprobs(model: nn.Module, members: MicroBatch) -> Tensor:
    batch = pack(members, GROUPS, ADVANTAGES)
    return response_logprobs(model, batch)


def test_packed_batch_holds_each_prompt_once_and_nothing_else() -> None:
    batch = pack(MEMBERS, GROUPS, ADVANTAGES)
    assert batch.tokens == 7 + 13 + 12 + 10 + 3 + 23
    assert batch.loss_weights.sum().item() == pytest.approx(1.0)
    assert batch.position_ids[0, :11].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 7]
    assert batch.targets.tolist() == [t for g, s in MEMBERS for t in GROUPS[g].samples[s].response_ids]


def test_packed_logprobs_equal_those_of_each_sample_alone_in_plain_transformers(model: nn.Module, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for group, index in MEMBERS:
        sample = GROUPS[group].samples[index]
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([[*sample.prompt_ids, *sample.response_ids]])).logits[0]
        every = logits[len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        expected.append(every.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0])
    with torch.no_grad():
        found = packed_logprobs(model, MEMBERS)
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)


def gradients(model: nn.Module, plan: list[MicroBatch]) -> dict[str, Tensor]:
    model.zero_grad()
    for members in plan:
        batch = pack(members, GROUPS, ADVANTAGES)
        logprobs = packed_logprobs(model, members) if members else torch.zeros(1, requires_grad=True)
        policy_loss(logprobs, logprobs.detach() - 0.1, batch, AlgorithmSettings()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", [[[m] for m in MEMBERS], [MEMBERS[::-1]], [MEMBERS[::2], [], MEMBERS[1::2]]])
def test_gradient_does_not_depend_on_the_split(model: nn.Module, plan: list[MicroBatch]) -> None:
    whole, split = gradients(model, [MEMBERS]), gradients(model, plan)
    for name, expected in whole.items():
        assert torch.allclose(split[name], expected, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradient_with_shared_prompts_equals_that_of_padded_rows_in_plain_transformers(
    model: nn.Module, folder: Path, side: str
) -> None:
    """One row a sample, each with its own prompt, padded and masked: what trainers without packing compute."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = [GROUPS[group].samples[index] for group, index in MEMBERS]
    longest = max(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    ids, mask, starts = [], [], []
    for sample in samples:
        row = [*sample.prompt_ids, *sample.response_ids]
        pad = longest - len(row)
        before, after = (pad, 0) if side == "left" else (0, pad)
        ids.append([2] * before + row + [2] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
        starts.append(before + len(sample.prompt_ids))
    held = torch.tensor(mask)
    positions = (held.cumsum(1) - 1).clamp(min=0)
    logits = plain(input_ids=torch.tensor(ids), attention_mask=held, position_ids=positions).logits.log_softmax(-1)
    found = [
        logits[row, start - 1 : start - 1 + len(sample.response_ids)].gather(
            -1, torch.tensor(sample.response_ids)[:, None]
        )[:, 0]
        for row, (sample, start) in enumerate(zip(samples, starts, strict=True))
    ]
    logprobs = torch.cat(found)
    batch = pack(MEMBERS, GROUPS, ADVANTAGES)
    policy_loss(logprobs, logprobs.detach() - 0.1, batch, AlgorithmSettings()).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, gradient in gradients(model, [MEMBERS]).items():
        assert torch.allclose(gradient, expected[name], atol=1e-6, rtol=1e-4), name


def test_prompts_that_begin_alike_share_that_part_and_no_gradient_changes(model: nn.Module) -> None:
    """One system message, then prompts of which one is the beginning of another and two are the same."""
    head = tuple(range(40, 60))
    tails = {0: (5, 6, 7), 1: (5, 6, 7, 8, 9), 2: (5, 4), 3: (5, 4)}
    groups = {}
    for index, tail in tails.items():
        made = make_group(index, 1, [4, 6])
        ids = (*head, *tail)
        samples = tuple(dataclasses.replace(sample, prompt_ids=ids) for sample in made.samples)
        groups[index] = Group(dataclasses.replace(made.prompt, token_ids=ids), samples, 0)
    gains = [[1.0, -0.5], [0.7, -0.7], [0.2, 0.9], [-1.0, 0.4]]
    members = [(group, sample) for group in groups for sample in range(2)]
    whole = pack(members, groups, gains)
    assert whole.tokens == 20 + 3 + 2 + 1 + 4 * 10
    assert [whole.input_ids[0, place].item() for place in whole.rows[2]][:25] == [*head, *tails[1]]
    assert [whole.position_ids[0, place].item() for place in whole.rows[4]][:26] == list(range(26))
    found: list[dict[str, Tensor]] = []
    for plan in ([members], [[member] for member in members]):
        model.zero_grad()
        for part in plan:
            batch = pack(part, groups, gains)
            logprobs = response_logprobs(model, batch)
            policy_loss(logprobs, logprobs.detach() - 0.1, batch, AlgorithmSettings()).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6, rtol=1e-4), name


def test_idle_batch_has_weight_zero() -> None:
    batch = pack([], GROUPS, ADVANTAGES)
    assert batch.tokens == 0
    assert batch.loss_weights.sum().item() == 0.0


def test_empty_response_takes_no_part() -> None:
    empty = Sample("0", (3, 4), (), (), (), "stop", "")
    groups = {0: Group(Prompt("0", (), (3, 4), "", ""), (empty,), 0)}
    assert pack([(0, 0)], groups, [[1.0]]).tokens == 0


def test_a_demonstration_has_no_rollout_logprobs() -> None:
    sample = Sample("0", (3,), (4, 5), (), (), "stop", "")
    batch = pack([(0, 0)], {0: Group(Prompt("0", (), (3,), "", ""), (sample,), 0)}, [[1.0]])
    assert batch.rollout_logprobs.isnan().all() and batch.tokens == 3
    assert batch.advantages.tolist() == [1.0, 1.0]


def test_logprobs_of_another_length_are_refused() -> None:
    sample = Sample("0", (3,), (4, 5), (-1.0,), (), "stop", "")
    groups = {0: Group(Prompt("0", (), (3,), "", ""), (sample,), 0)}
    with pytest.raises(ValueError, match="2 response tokens but 1"):
        pack([(0, 0)], groups, [[1.0]])


def test_forward_without_layout_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="rows and places"):
        model(input_ids=torch.tensor([[3, 4, 5]]))


def test_gradient_checkpointing_changes_no_gradient(model: nn.Module, folder: Path) -> None:
    thrifty = load_policy(folder, dtype=torch.float32, gradient_checkpointing=True).train()
    expected, found = gradients(model, [MEMBERS]), gradients(thrifty, [MEMBERS])
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, atol=1e-6), name
