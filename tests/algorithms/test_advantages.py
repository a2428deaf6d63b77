"""Each estimator against an independent formula on the same numbers, and properties of all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import explained_variance_score
from torch import Tensor

from rluf.algorithms.advantages import (
    ADVANTAGE_ESTIMATORS,
    AdvantageInputs,
    Advantages,
    SampleKL,
    SampleValues,
    compute_advantages,
)
from rluf.algorithms.critic import (
    build_token_rewards,
    compute_explained_variance,
    compute_gae,
    compute_value_loss,
    is_diverging,
    sum_moments,
    whiten_advantages,
)
from rluf.errors import RlufError, SettingsError

CENTERED_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "lite_ppo", "gdpo", "crpg")
"""Estimators whose values are zero where rewards are equal."""
GROUPS = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.lists(st.floats(0, 1), min_size=size, max_size=size), min_size=1, max_size=6)
)
REWARDS = [[1.0, 2.0, 3.0, 4.0], [0.3, 0.3, 0.3, 0.9], [-5.0, 0.25, 1.5, 0.0]]
LENGTHS = [[3, 1, 4, 2], [5, 9, 2, 6], [5, 3, 5, 8]]


def make_inputs(rewards: SampleValues, lengths: Sequence[Sequence[int]] | None = None) -> AdvantageInputs:
    lengths = lengths or [[1] * len(row) for row in rewards]
    return AdvantageInputs(
        rewards,
        response_lengths=lengths,
        objective_rewards={"only": rewards},
        objective_weights=[{"only": 1.0}] * len(rewards),
    )


def estimate(name: str, rewards: SampleValues, lengths: Sequence[Sequence[int]] | None = None) -> Tensor:
    return torch.tensor(compute_advantages(name, make_inputs(rewards, lengths)).sample_advantages, dtype=torch.float64)


def reward_table() -> Tensor:
    return torch.tensor(REWARDS, dtype=torch.float64)


def test_grpo_worked_example() -> None:
    # mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25
    assert estimate("grpo", [[1.0, 2.0, 3.0, 4.0]])[0].tolist() == pytest.approx(
        [-1.5 / (math.sqrt(1.25) + 1e-6), -0.5 / (math.sqrt(1.25) + 1e-6), 0.4472132, 1.3416396], abs=1e-6
    )


def test_grpo_dr_grpo_and_rloo_equal_their_papers() -> None:
    rewards = reward_table()
    centered = rewards - rewards.mean(1, keepdim=True)
    group_std = rewards.std(1, keepdim=True, correction=0)
    assert torch.allclose(estimate("grpo", REWARDS), centered / (group_std + 1e-6), atol=1e-6)
    assert torch.allclose(estimate("dr_grpo", REWARDS), centered, atol=1e-6)
    mean_of_others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    assert torch.allclose(estimate("rloo", REWARDS), rewards - mean_of_others, atol=1e-6)


def test_lite_ppo_and_gdpo_equal_trl() -> None:
    """trl.GRPOTrainer: scale_rewards="batch", and multi_objective_aggregation="normalize_then_sum"."""
    rewards = reward_table()
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    assert torch.allclose(estimate("lite_ppo", REWARDS), expected, atol=1e-6)
    other = torch.tensor([[0.0, 1.0, 0.0, 1.0], [4.0, 0.0, 0.0, 9.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    stacked = torch.stack([rewards, other], dim=-1)
    normalized = (stacked - stacked.mean(1, keepdim=True)) / (stacked.std(1, keepdim=True) + 1e-4)
    totals = (normalized * weights).sum(-1)
    expected = (totals - totals.mean()) / (totals.std() + 1e-4)
    inputs = AdvantageInputs(
        REWARDS, objective_rewards={"a": REWARDS, "b": other.tolist()}, objective_weights=[{"a": 0.3, "b": 0.7}] * 3
    )
    assert torch.allclose(
        torch.tensor(compute_advantages("gdpo", inputs).sample_advantages).double(), expected, atol=1e-6
    )


def masked_whiten(returns: Tensor, mask: Tensor) -> Tensor:
    """verl's masked_whiten: over all tokens of the mask, variance with n - 1, + 1e-8 under the root."""
    counted = returns[mask]
    return (returns - counted.mean()) * torch.rsqrt(counted.var() + 1e-8)


def test_reinforce_pp_equals_verl_token_by_token_with_kl_in_the_reward() -> None:
    rng = random.Random(3)
    kl_coef, max_length = 0.05, 9
    flat_rewards = [reward for row in REWARDS for reward in row]
    lengths = [length for row in LENGTHS for length in row]
    token_kl = [[rng.uniform(-0.5, 1.0) for _ in range(length)] for length in lengths]
    mask = torch.arange(max_length)[None] < torch.tensor(lengths)[:, None]
    token_rewards = torch.zeros(len(flat_rewards), max_length, dtype=torch.float64)
    for row, (reward, sample_kl) in enumerate(zip(flat_rewards, token_kl, strict=True)):
        token_rewards[row, : len(sample_kl)] = -kl_coef * torch.tensor(sample_kl, dtype=torch.float64)
        token_rewards[row, len(sample_kl) - 1] += reward
    returns = token_rewards.flip(1).cumsum(1).flip(1)
    expected = masked_whiten(returns, mask)
    kl_to_go = [[sum(sample_kl[t:]) for t in range(len(sample_kl))] for sample_kl in token_kl]
    statistics = [
        SampleKL(sum(sample_kl), sum(to_go), sum(value * value for value in to_go))
        for sample_kl, to_go in zip(token_kl, kl_to_go, strict=True)
    ]
    groups = [statistics[start : start + 4] for start in range(0, 12, 4)]
    result = compute_advantages("reinforce_pp", AdvantageInputs(REWARDS, LENGTHS, groups, kl_coef=kl_coef))
    sample_advantages = [value for group in result.sample_advantages for value in group]
    for row, to_go in enumerate(kl_to_go):
        token_advantages = [sample_advantages[row] - result.kl_to_go_coef * value for value in to_go]
        assert token_advantages == pytest.approx(expected[row, : len(to_go)].tolist(), abs=1e-6)


def test_reinforce_pp_baseline_equals_verl() -> None:
    rewards = reward_table()
    lengths = torch.tensor(LENGTHS).flatten()
    mask = torch.arange(9)[None] < lengths[:, None]
    centered = (rewards - rewards.mean(1, keepdim=True)).flatten()[:, None] * mask
    expected = masked_whiten(centered, mask)[:, 0].view(3, 4)
    assert torch.allclose(estimate("reinforce_pp_baseline", REWARDS, LENGTHS), expected, atol=1e-6)


def test_kl_in_the_reward_is_subtracted_per_response() -> None:
    inputs = AdvantageInputs([[1.0, 1.0]], sample_kl=[[SampleKL(1.0), SampleKL(3.0)]], kl_coef=0.1)
    assert compute_advantages("rloo", inputs).sample_advantages[0] == pytest.approx([0.2, -0.2])


def make_cgpo_inputs(rewards: SampleValues, passed: Sequence[Sequence[bool]], kl: SampleValues) -> AdvantageInputs:
    lengths = [[4] * len(row) for row in rewards]
    return AdvantageInputs(rewards, lengths, [[SampleKL(v) for v in row] for row in kl], passed, max_response_kl=4.0)


def test_cgpo_by_hand() -> None:
    """Two prompts: rewards, verdicts and KL chosen so that each rule decides somewhere."""
    rewards = [[0.8, 0.5, 0.9], [0.2, 0.6, 0.4]]
    passed = [[True, True, False], [True, True, True]]
    kl = [[1.0, -2.0, 0.0], [2.0, 5.0, 0.0]]
    step = make_cgpo_inputs(rewards, passed, kl)
    # w: 0.8 * 0.75, 0.5 * 1 (the factor stops at 1), 0 (judge); 0.2 * 0.5, 0 (beyond the limit), 0.4
    weights = torch.tensor([[0.6, 0.5, 0.0], [0.1, 0.0, 0.4]], dtype=torch.float64)
    assert torch.allclose(
        torch.tensor(compute_advantages("crpg", step).sample_advantages).double(), weights - 1.6 / 6, atol=1e-6
    )
    # best of those that pass within the limit: 0.8 and 0.4
    assert compute_advantages("crraft", step).sample_advantages == [[0.8, 0.0, 0.0], [0.0, 0.0, 0.4]]
    # first prompt: best passing 0.8 against the failing 0.9; second: best 0.6 against the worst of all, 0.2
    first_weight = 0.1 / (1 + math.exp(0.1 * (1.0 - 0.0)))
    second_weight = 0.1 / (1 + math.exp(0.1 * (5.0 - 2.0)))
    first_group, second_group = compute_advantages("codpo", step).sample_advantages
    assert first_group == pytest.approx([first_weight + 5.0 / 4, 0.0, -first_weight], abs=1e-9)
    assert second_group == pytest.approx([-second_weight, second_weight + 5.0 / 4, 0.0], abs=1e-9)


def test_cgpo_prefers_no_failed_response_to_a_truncated_one() -> None:
    # The penalty of truncated responses makes their calibrated rewards negative.
    inputs = AdvantageInputs(
        [[-0.3, 0.6, 0.4], [-0.3, -0.1, 0.9]], passed_judges=[[True, False, True], [True, True, False]]
    )
    crpg_advantages = compute_advantages("crpg", inputs).sample_advantages
    assert crpg_advantages[0][0] == crpg_advantages[0][1] == crpg_advantages[1][2] < crpg_advantages[0][2]
    assert compute_advantages("crraft", inputs).sample_advantages == [[0.0, 0.0, 0.4], [0.0, 0.0, 0.0]]


def test_codpo_weights_are_the_gradient_of_its_loss() -> None:
    chosen = torch.tensor([-1.0, -0.5, -2.0, -0.7], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.4, -1.4, -0.2, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.5], dtype=torch.float64)
    margin = (chosen.sum() - reference[0] * 4) - (rejected.sum() - reference[1] * 4)
    loss = -torch.nn.functional.logsigmoid(0.1 * margin) - 5.0 / 4 * chosen.sum()
    loss.backward()
    kl = [[(chosen.sum() - reference[0] * 4).item(), (rejected.sum() - reference[1] * 4).item()]]
    chosen_weight, rejected_weight = compute_advantages(
        "codpo", make_cgpo_inputs([[0.9, 0.1]], [[True, True]], kl)
    ).sample_advantages[0]
    assert chosen.grad is not None and rejected.grad is not None
    assert (-chosen.grad).tolist() == pytest.approx([chosen_weight] * 4, abs=1e-9)
    assert (-rejected.grad).tolist() == pytest.approx([rejected_weight] * 4, abs=1e-9)


def test_cgpo_skips_prompts_without_a_passing_response() -> None:
    step = make_cgpo_inputs([[0.3, 0.7]], [[False, False]], [[0.0, 0.0]])
    assert (
        compute_advantages("crraft", step).sample_advantages
        == compute_advantages("codpo", step).sample_advantages
        == [[0.0, 0.0]]
    )
    assert compute_advantages(
        "codpo", make_cgpo_inputs([[0.5, 0.5]], [[True, True]], [[0.0, 0.0]])
    ).sample_advantages == [[0.0, 0.0]]


@pytest.mark.parametrize("name", CENTERED_ESTIMATORS)
@pytest.mark.parametrize("reward", [0.0, 0.1, -3.7, 1e9])
def test_equal_rewards_give_no_advantage(name: str, reward: float) -> None:
    assert compute_advantages(name, make_inputs([[reward] * 7, [reward] * 3])).sample_advantages == [
        [0.0] * 7,
        [0.0] * 3,
    ]


@pytest.mark.parametrize("name", sorted(ADVANTAGE_ESTIMATORS))
@given(rewards=GROUPS, seed=st.integers(0, 3))
def test_order_of_groups_and_samples_does_not_matter(name: str, rewards: list[list[float]], seed: int) -> None:
    """Up to ties, which CRRAFT and CODPO break by order."""
    if name in ("crraft", "codpo") and any(len(set(row)) < len(row) for row in rewards):
        return
    rng = random.Random(seed)
    group_order = rng.sample(range(len(rewards)), len(rewards))
    sample_order = [rng.sample(range(len(row)), len(row)) for row in rewards]
    shuffled = [[rewards[group][sample] for sample in sample_order[group]] for group in group_order]
    advantages = compute_advantages(name, make_inputs(rewards)).sample_advantages
    shuffled_advantages = compute_advantages(name, make_inputs(shuffled)).sample_advantages
    for position, group in enumerate(group_order):
        expected = [advantages[group][sample] for sample in sample_order[group]]
        assert shuffled_advantages[position] == pytest.approx(expected, abs=1e-6, rel=1e-6)


def first_reward_only(inputs: AdvantageInputs) -> Advantages:
    """A plug-in estimator: the first sample of each group gets its reward."""
    return Advantages([[rewards[0], *[0.0] * (len(rewards) - 1)] for rewards in inputs.rewards])


def test_an_estimator_can_be_a_plugin() -> None:
    reference = f"{__name__}:first_reward_only"
    assert compute_advantages(reference, make_inputs([[3.0, 1.0]])).sample_advantages == [[3.0, 0.0]]


BAD_ADVANTAGES: dict[str, Any] = {
    "a list": [[1.0, 0.0], [1.0]],
    "nothing": None,
    "a missing group": Advantages([[1.0, 0.0]]),
    "groups in another order": Advantages([[1.0], [1.0, 0.0]]),
    "flat": Advantages([1.0, 0.0, 1.0]),  # type: ignore[list-item]
    "nan": Advantages([[1.0, math.nan], [1.0]]),
    "infinity": Advantages([[1.0, math.inf], [1.0]]),
    "none": Advantages([[1.0, None], [1.0]]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("kind", BAD_ADVANTAGES)
def test_a_plugin_that_returns_anything_else_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "first_reward_only", lambda _: BAD_ADVANTAGES[kind])
    message = r"first_reward_only': expected Advantages with one finite number .* groups of \[2, 1\]"
    with pytest.raises(SettingsError, match=message):
        compute_advantages(f"{__name__}:first_reward_only", make_inputs([[3.0, 1.0], [2.0]]))


def test_a_plugin_that_fails_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "first_reward_only", lambda inputs: inputs.reward)
    message = r"first_reward_only' failed with AttributeError in test_advantages.py, line \d+: .* no attribute 'reward'"
    with pytest.raises(SettingsError, match=message):
        compute_advantages(f"{__name__}:first_reward_only", make_inputs([[3.0, 1.0], [2.0]]))


def test_a_plugin_may_return_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "first_reward_only", lambda _: Advantages([np.array([1.0, 0.0]), torch.ones(1)]))
    advantages = compute_advantages(f"{__name__}:first_reward_only", make_inputs([[3.0, 1.0], [2.0]]))
    assert advantages.sample_advantages == [[1.0, 0.0], [1.0]]


def test_unknown_estimator_and_bad_rewards_are_refused() -> None:
    with pytest.raises(SettingsError, match="'grop'"):
        compute_advantages("grop", make_inputs([[1.0]]))
    with pytest.raises(ValueError, match="finite"):
        make_inputs([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="at least one"):
        make_inputs([[]])
    with pytest.raises(ValueError, match="lengths: expected the shape"):
        AdvantageInputs([[1.0]], response_lengths=[[1, 2]])
    with pytest.raises(ValueError, match="GDPO"):
        compute_advantages("gdpo", AdvantageInputs([[1.0]]))


GATED_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "lite_ppo", "gdpo")


@pytest.mark.parametrize("estimator", GATED_ESTIMATORS)
@pytest.mark.parametrize("failed_reward", [-2.5, -1e6, 0.1, 1e6])
def test_a_failed_judge_does_not_squeeze_the_advantages_of_those_that_passed(
    estimator: str, failed_reward: float
) -> None:
    def build_inputs(rewards: SampleValues, verdicts: Sequence[Sequence[bool]]) -> AdvantageInputs:
        lengths, weights = [[5] * len(row) for row in rewards], [{"love": 1.0}] * len(rewards)
        return AdvantageInputs(
            rewards, lengths, passed_judges=verdicts, objective_rewards={"love": rewards}, objective_weights=weights
        )

    rewards = [[0.6, 0.2, -0.2, failed_reward], [1.0, 0.0, 0.5, 0.2]]
    gated = compute_advantages(estimator, build_inputs(rewards, [[True, True, True, False], [True] * 4]))
    alone = compute_advantages(estimator, build_inputs([rewards[0][:3], rewards[1]], ()))
    first, second = gated.sample_advantages
    differences = [value - first[2] for value in first[:3]]
    assert differences == pytest.approx([value - alone.sample_advantages[0][2] for value in alone.sample_advantages[0]])
    assert second == pytest.approx(alone.sample_advantages[1])
    assert first[3] < min(first[:3]) and first[3] == pytest.approx(-1.5)


@pytest.mark.parametrize("passed", [True, False])
def test_a_group_with_equal_verdicts_has_no_gate_penalty(passed: bool) -> None:
    inputs = AdvantageInputs([[0.1, 0.9]], passed_judges=[[passed, passed]])
    expected = compute_advantages("grpo", AdvantageInputs([[0.1, 0.9]])).sample_advantages if passed else [[0.0, 0.0]]
    assert compute_advantages("grpo", inputs).sample_advantages == expected


def test_gae_equals_trl_and_verl_on_a_padded_batch() -> None:
    """Their loop over time: delta, lastgaelam, then masked whitening."""
    generator = torch.Generator().manual_seed(2)
    lengths, gae_lambda, kl_coef = [5, 1, 8], 0.9, 0.1
    values = [torch.randn(length, generator=generator) for length in lengths]
    token_kl = [torch.randn(length, generator=generator) for length in lengths]
    scores = [1.5, -0.5, 0.25]
    mask = torch.arange(8)[None] < torch.tensor(lengths)[:, None]
    rewards, padded_values = torch.zeros(3, 8), torch.zeros(3, 8)
    for row, length in enumerate(lengths):
        rewards[row, :length], padded_values[row, :length] = -kl_coef * token_kl[row], values[row]
        rewards[row, length - 1] += scores[row]
    last_gae, reversed_gae = torch.zeros(3), []
    for t in reversed(range(8)):
        next_values = padded_values[:, t + 1] if t < 7 else torch.zeros(3)
        last_gae = rewards[:, t] + next_values - padded_values[:, t] + gae_lambda * last_gae
        reversed_gae.append(last_gae)
    expected = torch.stack(reversed_gae[::-1], dim=1)
    sequence_index = torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)])
    token_rewards = build_token_rewards(
        torch.tensor(scores)[sequence_index], torch.cat(token_kl), sequence_index, kl_coef
    )
    assert torch.allclose(token_rewards, rewards[mask], atol=1e-6)
    advantages = compute_gae(token_rewards, torch.cat(values), sequence_index, gae_lambda)
    assert torch.allclose(advantages, expected[mask], atol=1e-6)
    moments = sum_moments(advantages, torch.ones(14, dtype=torch.bool))
    assert torch.allclose(whiten_advantages(advantages, moments), masked_whiten(expected, mask)[mask], atol=1e-6)


def judge_critic(returns: torch.Tensor, values: torch.Tensor) -> tuple[float, bool]:
    counted = torch.ones_like(returns, dtype=torch.bool)
    moments = sum_moments(returns, counted), sum_moments(returns - values, counted)
    return compute_explained_variance(*moments), is_diverging(*moments)


def test_a_diverging_critic_is_seen() -> None:
    returns, noise = torch.randn(2, 200, generator=torch.Generator().manual_seed(1))
    assert judge_critic(returns, returns) == (1.0, False)
    assert judge_critic(returns, torch.zeros(200)) == (pytest.approx(0.0), False)
    explained = explained_variance_score(returns, returns + 0.5 * noise)
    assert judge_critic(returns, returns + 0.5 * noise) == (pytest.approx(explained, abs=0.01), False)
    assert judge_critic(returns, 2 * noise)[1] is False
    assert judge_critic(returns, 10 * noise)[1]
    assert judge_critic(returns, torch.full((200,), 20.0)) == (pytest.approx(0.0, abs=1e-6), True)
    # All rewards are equal, as of a sparse reward that none gets: small values are not a divergence.
    assert judge_critic(torch.zeros(200), 0.01 * noise)[1] is False


def test_returns_of_gae_would_hide_a_diverging_critic() -> None:
    """They follow the values that they are compared with."""
    sequence_index, values = torch.zeros(200, dtype=torch.long), torch.linspace(10, 30, 200)
    rewards = build_token_rewards(torch.ones(200), torch.zeros(200), sequence_index, 0.0)
    gae_returns = compute_gae(rewards, values, sequence_index) + values
    assert judge_critic(gae_returns, values)[1] is False
    sampled_returns = compute_gae(rewards, torch.zeros(200), sequence_index, gae_lambda=1.0)
    assert sampled_returns.tolist() == [1.0] * 200
    assert judge_critic(sampled_returns, values)[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 9])
def test_values_that_are_not_finite_stop_the_run_by_name(value: float, position: int) -> None:
    values = torch.zeros(10)
    values[position] = value
    with pytest.raises(RlufError, match=r"values of PPO's critic are not finite.*learner\.critic_learning_rate"):
        judge_critic(torch.ones(10), values)


def test_value_loss_by_hand() -> None:
    # errors 1 and -2; the third token has no return
    values = torch.tensor([1.0, 0.0, 5.0], requires_grad=True)
    loss = compute_value_loss(values, torch.tensor([0.0, 2.0, math.nan]), torch.tensor([0.5, 0.25, 0.25]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0.5, -0.5, 0.0])


def test_kto_weights_are_the_gradient_of_trls_loss() -> None:
    """TRL: 1 - sigmoid(beta (log ratio - KL)) for liked, 1 - sigmoid(beta (KL - log ratio)) for others."""
    log_ratios = torch.tensor([1.5, -3.0, 0.2, 40.0], dtype=torch.float64, requires_grad=True)
    labels, reference_kl = [1.0, 0.0, 0.0, 1.0], torch.tensor(0.7)
    is_liked = torch.tensor(labels).bool()
    signed = torch.where(is_liked, log_ratios - reference_kl, reference_kl - log_ratios)
    (1 - torch.sigmoid(0.1 * signed)).sum().backward()
    sample_kl = [[SampleKL(value)] for value in log_ratios.tolist()]
    inputs = AdvantageInputs([[label] for label in labels], sample_kl=sample_kl, mismatched_kl=0.7)
    weights = [row[0] for row in compute_advantages("kto", inputs).sample_advantages]
    assert log_ratios.grad is not None
    assert weights == pytest.approx((-log_ratios.grad).tolist(), abs=1e-9)
    negative_reference = AdvantageInputs([[1.0]], sample_kl=[[SampleKL(0.0)]], mismatched_kl=-5.0)
    assert compute_advantages("kto", negative_reference).sample_advantages == [[pytest.approx(0.1 * 0.25)]]


def test_dpo_weights_are_the_gradient_of_its_loss() -> None:
    """As TRL's DPOTrainer (loss_type sigmoid): -logsigmoid(beta (chosen log ratio - rejected log ratio))."""
    log_ratios = torch.tensor([[1.5, -3.0], [-40.0, 2.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    torch.nn.functional.logsigmoid(0.1 * (log_ratios[:, 0] - log_ratios[:, 1])).sum().backward()
    sample_kl = [[SampleKL(value) for value in row] for row in log_ratios.tolist()]
    weights = compute_advantages("dpo", AdvantageInputs([[1.0, 0.0]] * 3, sample_kl=sample_kl)).sample_advantages
    assert log_ratios.grad is not None
    assert weights == [pytest.approx(row, abs=1e-12) for row in log_ratios.grad.tolist()]
