"""Each estimator against an independent formula on the same numbers, and what must hold for all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rluf.algorithms.advantages import ESTIMATORS, Drift, Outcomes, advantages
from rluf.algorithms.advantages.base import Rows
from rluf.algorithms.advantages.gae import gae, moments, token_rewards, whitened
from rluf.algorithms.critic import value_loss
from rluf.errors import SettingsError

BASED = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "batch_std", "gdpo", "crpg")
"""Estimators whose values are advantages: zero where rewards are equal."""
GROUPS = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.lists(st.floats(0, 1), min_size=size, max_size=size), min_size=1, max_size=6)
)
REWARDS = [[1.0, 2.0, 3.0, 4.0], [0.3, 0.3, 0.3, 0.9], [-5.0, 0.25, 1.5, 0.0]]
LENGTHS = [[3, 1, 4, 2], [5, 9, 2, 6], [5, 3, 5, 8]]


def outcomes(rewards: Rows, lengths: Sequence[Sequence[int]] | None = None) -> Outcomes:
    lengths = lengths or [[1] * len(row) for row in rewards]
    return Outcomes(rewards, lengths=lengths, parts={"only": rewards}, weights=[{"only": 1.0}] * len(rewards))


def values(name: str, rewards: Rows, lengths: Sequence[Sequence[int]] | None = None) -> Tensor:
    return torch.tensor(advantages(name, outcomes(rewards, lengths)).values, dtype=torch.float64)


def table() -> Tensor:
    return torch.tensor(REWARDS, dtype=torch.float64)


def test_grpo_worked_example() -> None:
    # mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25
    assert values("grpo", [[1.0, 2.0, 3.0, 4.0]])[0].tolist() == pytest.approx(
        [-1.5 / (math.sqrt(1.25) + 1e-6), -0.5 / (math.sqrt(1.25) + 1e-6), 0.4472132, 1.3416396], abs=1e-6
    )


def test_grpo_dr_grpo_and_rloo_equal_their_papers() -> None:
    rewards = table()
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=0)
    assert torch.allclose(values("grpo", REWARDS), centred / (spread + 1e-6), atol=1e-6)
    assert torch.allclose(values("dr_grpo", REWARDS), centred, atol=1e-6)
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    assert torch.allclose(values("rloo", REWARDS), rewards - others, atol=1e-6)


def test_batch_std_and_gdpo_equal_trl() -> None:
    """trl.GRPOTrainer: scale_rewards="batch", and multi_objective_aggregation="normalize_then_sum"."""
    rewards = table()
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    assert torch.allclose(values("batch_std", REWARDS), expected, atol=1e-6)
    other = torch.tensor([[0.0, 1.0, 0.0, 1.0], [4.0, 0.0, 0.0, 9.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    stacked = torch.stack([rewards, other], dim=-1)
    normal = (stacked - stacked.mean(1, keepdim=True)) / (stacked.std(1, keepdim=True) + 1e-4)
    summed = (normal * weights).sum(-1)
    expected = (summed - summed.mean()) / (summed.std() + 1e-4)
    found = Outcomes(REWARDS, parts={"a": REWARDS, "b": other.tolist()}, weights=[{"a": 0.3, "b": 0.7}] * 3)
    assert torch.allclose(torch.tensor(advantages("gdpo", found).values).double(), expected, atol=1e-6)


def masked_whiten(returns: Tensor, mask: Tensor) -> Tensor:
    """verl's masked_whiten: over all tokens of the mask, variance with n - 1, + 1e-8 under the root."""
    chosen = returns[mask]
    return (returns - chosen.mean()) * torch.rsqrt(chosen.var() + 1e-8)


def test_reinforce_pp_equals_verl_token_by_token_with_kl_in_the_reward() -> None:
    draw = random.Random(3)
    beta, longest = 0.05, 9
    flat = [reward for row in REWARDS for reward in row]
    sizes = [length for row in LENGTHS for length in row]
    kl = [[draw.uniform(-0.5, 1.0) for _ in range(length)] for length in sizes]
    mask = torch.arange(longest)[None] < torch.tensor(sizes)[:, None]
    rewards = torch.zeros(len(flat), longest, dtype=torch.float64)
    for row, (reward, steps) in enumerate(zip(flat, kl, strict=True)):
        rewards[row, : len(steps)] = -beta * torch.tensor(steps, dtype=torch.float64)
        rewards[row, len(steps) - 1] += reward
    returns = rewards.flip(1).cumsum(1).flip(1)
    expected = masked_whiten(returns, mask)
    togo = [[sum(steps[t:]) for t in range(len(steps))] for steps in kl]
    drifts = [Drift(sum(steps), sum(row), sum(v * v for v in row)) for steps, row in zip(kl, togo, strict=True)]
    rows = [drifts[start : start + 4] for start in range(0, 12, 4)]
    found = advantages("reinforce_pp", Outcomes(REWARDS, LENGTHS, rows, kl_coef=beta))
    gains = [value for row in found.values for value in row]
    for row, steps in enumerate(togo):
        ours = [gains[row] - found.slope * value for value in steps]
        assert ours == pytest.approx(expected[row, : len(steps)].tolist(), abs=1e-6)


def test_reinforce_pp_baseline_equals_verl() -> None:
    rewards = table()
    sizes = torch.tensor(LENGTHS).flatten()
    mask = torch.arange(9)[None] < sizes[:, None]
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()[:, None] * mask
    expected = masked_whiten(centred, mask)[:, 0].view(3, 4)
    assert torch.allclose(values("reinforce_pp_baseline", REWARDS, LENGTHS), expected, atol=1e-6)


def test_kl_in_the_reward_is_taken_off_by_response() -> None:
    drifts = [[Drift(1.0), Drift(3.0)]]
    found = advantages("rloo", Outcomes([[1.0, 1.0]], drifts=drifts, kl_coef=0.1)).values
    assert found[0] == pytest.approx([0.2, -0.2])


def cgpo(rewards: Rows, passed: Sequence[Sequence[bool]], kl: Rows) -> Outcomes:
    lengths = [[4] * len(row) for row in rewards]
    return Outcomes(rewards, lengths, [[Drift(v) for v in row] for row in kl], passed, kl_limit=4.0)


def test_cgpo_by_hand() -> None:
    """Two prompts: rewards, verdicts and drifts chosen so that each rule decides somewhere."""
    rewards = [[0.8, 0.5, 0.9], [0.2, 0.6, 0.4]]
    passed = [[True, True, False], [True, True, True]]
    kl = [[1.0, -2.0, 0.0], [2.0, 5.0, 0.0]]
    step = cgpo(rewards, passed, kl)
    # w: 0.8 * 0.75, 0.5 * 1 (the factor stops at 1), 0 (judge); 0.2 * 0.5, 0 (beyond the limit), 0.4
    weights = torch.tensor([[0.6, 0.5, 0.0], [0.1, 0.0, 0.4]], dtype=torch.float64)
    assert torch.allclose(torch.tensor(advantages("crpg", step).values).double(), weights - 1.6 / 6, atol=1e-6)
    # best of those that pass within the limit: 0.8 and 0.4
    assert advantages("crraft", step).values == [[0.8, 0.0, 0.0], [0.0, 0.0, 0.4]]
    # first prompt: best passing 0.8 against the failing 0.9; second: best 0.6 against the worst of all, 0.2
    first = 0.1 / (1 + math.exp(0.1 * (1.0 - 0.0)))
    second = 0.1 / (1 + math.exp(0.1 * (5.0 - 2.0)))
    found = advantages("codpo", step).values
    assert found[0] == pytest.approx([first + 5.0 / 4, 0.0, -first], abs=1e-9)
    assert found[1] == pytest.approx([-second, second + 5.0 / 4, 0.0], abs=1e-9)


def test_codpo_weights_are_the_gradient_of_its_loss() -> None:
    chosen = torch.tensor([-1.0, -0.5, -2.0, -0.7], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.4, -1.4, -0.2, -3.0], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([-1.5, -1.5], dtype=torch.float64)
    gap = (chosen.sum() - base[0] * 4) - (rejected.sum() - base[1] * 4)
    loss = -torch.nn.functional.logsigmoid(0.1 * gap) - 5.0 / 4 * chosen.sum()
    loss.backward()
    kl = [[(chosen.sum() - base[0] * 4).item(), (rejected.sum() - base[1] * 4).item()]]
    good, bad = advantages("codpo", cgpo([[0.9, 0.1]], [[True, True]], kl)).values[0]
    assert chosen.grad is not None and rejected.grad is not None
    assert (-chosen.grad).tolist() == pytest.approx([good] * 4, abs=1e-9)
    assert (-rejected.grad).tolist() == pytest.approx([bad] * 4, abs=1e-9)


def test_cgpo_skips_prompts_without_a_passing_response() -> None:
    step = cgpo([[0.3, 0.7]], [[False, False]], [[0.0, 0.0]])
    assert advantages("crraft", step).values == advantages("codpo", step).values == [[0.0, 0.0]]
    assert advantages("codpo", cgpo([[0.5, 0.5]], [[True, True]], [[0.0, 0.0]])).values == [[0.0, 0.0]]


@pytest.mark.parametrize("name", BASED)
@pytest.mark.parametrize("reward", [0.0, 0.1, -3.7, 1e9])
def test_equal_rewards_give_no_advantage(name: str, reward: float) -> None:
    assert advantages(name, outcomes([[reward] * 7, [reward] * 3])).values == [[0.0] * 7, [0.0] * 3]


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@given(rewards=GROUPS, seed=st.integers(0, 3))
def test_order_of_groups_and_samples_does_not_matter(name: str, rewards: list[list[float]], seed: int) -> None:
    """Up to ties, which CRRAFT and CODPO break by order."""
    if name in ("crraft", "codpo") and any(len(set(row)) < len(row) for row in rewards):
        return
    draw = random.Random(seed)
    groups = draw.sample(range(len(rewards)), len(rewards))
    order = [draw.sample(range(len(row)), len(row)) for row in rewards]
    turned = [[rewards[g][s] for s in order[g]] for g in groups]
    found, again = advantages(name, outcomes(rewards)).values, advantages(name, outcomes(turned)).values
    for place, g in enumerate(groups):
        assert again[place] == pytest.approx([found[g][s] for s in order[g]], abs=1e-6, rel=1e-6)


def test_unknown_estimator_and_bad_rewards_are_refused() -> None:
    with pytest.raises(SettingsError, match="'grop'"):
        advantages("grop", outcomes([[1.0]]))
    with pytest.raises(ValueError, match="finite"):
        outcomes([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="at least one"):
        outcomes([[]])
    with pytest.raises(ValueError, match="lengths must have the shape"):
        Outcomes([[1.0]], lengths=[[1, 2]])
    with pytest.raises(ValueError, match="GDPO"):
        advantages("gdpo", Outcomes([[1.0]]))


def test_gae_equals_trl_and_verl_on_a_padded_batch() -> None:
    """Their loop over time: delta, lastgaelam, then masked whitening."""
    draw = torch.Generator().manual_seed(2)
    sizes, lam, beta = [5, 1, 8], 0.9, 0.1
    values = [torch.randn(n, generator=draw) for n in sizes]
    drifts = [torch.randn(n, generator=draw) for n in sizes]
    scores = [1.5, -0.5, 0.25]
    mask = torch.arange(8)[None] < torch.tensor(sizes)[:, None]
    rewards, padded = torch.zeros(3, 8), torch.zeros(3, 8)
    for row, n in enumerate(sizes):
        rewards[row, :n], padded[row, :n] = -beta * drifts[row], values[row]
        rewards[row, n - 1] += scores[row]
    last, reversed_ = torch.zeros(3), []
    for t in reversed(range(8)):
        following = padded[:, t + 1] if t < 7 else torch.zeros(3)
        last = rewards[:, t] + following - padded[:, t] + lam * last
        reversed_.append(last)
    expected = torch.stack(reversed_[::-1], dim=1)
    numbers = torch.tensor([row for row, n in enumerate(sizes) for _ in range(n)])
    flat = token_rewards(torch.tensor(scores)[numbers], torch.cat(drifts), numbers, beta)
    assert torch.allclose(flat, rewards[mask], atol=1e-6)
    found = gae(flat, torch.cat(values), numbers, lam)
    assert torch.allclose(found, expected[mask], atol=1e-6)
    everything = torch.ones(14, dtype=torch.bool)
    assert torch.allclose(whitened(found, moments(found, everything)), masked_whiten(expected, mask)[mask], atol=1e-6)


def test_value_loss_by_hand() -> None:
    # gaps 1 and -2; the third token has no return
    values = torch.tensor([1.0, 0.0, 5.0], requires_grad=True)
    loss = value_loss(values, torch.tensor([0.0, 2.0, math.nan]), torch.tensor([0.5, 0.25, 0.25]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0.5, -0.5, 0.0])


def test_kto_weights_are_the_gradient_of_trls_loss() -> None:
    """TRL: 1 - sigmoid(beta (log ratio - KL)) for liked, 1 - sigmoid(beta (KL - log ratio)) for others."""
    ratios = torch.tensor([1.5, -3.0, 0.2, 40.0], dtype=torch.float64, requires_grad=True)
    labels, zero = [1.0, 0.0, 0.0, 1.0], torch.tensor(0.7)
    liked = torch.tensor(labels).bool()
    signed = torch.where(liked, ratios - zero, zero - ratios)
    (1 - torch.sigmoid(0.1 * signed)).sum().backward()
    drifts = [[Drift(value)] for value in ratios.tolist()]
    found = advantages("kto", Outcomes([[label] for label in labels], drifts=drifts, mismatched=0.7)).values
    assert ratios.grad is not None
    assert [row[0] for row in found] == pytest.approx((-ratios.grad).tolist(), abs=1e-9)
    below = advantages("kto", Outcomes([[1.0]], drifts=[[Drift(0.0)]], mismatched=-5.0)).values
    assert below == [[pytest.approx(0.1 * 0.25)]]
