"""Group-relative estimators without a critic: GRPO, Dr. GRPO, RLOO, Lite-PPO and GDPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rluf.algorithms.advantages.base import AdvantageInputs, Advantages, compute_sample_std, subtract_mean

GRPO_STD_EPSILON = 1e-6
"""Added to GRPO's standard deviation of a group, as in its reference implementations."""
STD_EPSILON = 1e-4
"""Added to the standard deviations of Lite-PPO and GDPO, as in TRL."""


def grpo(inputs: AdvantageInputs) -> Advantages:
    """(R_i - mean) / (std + 1e-6) over the group, population standard deviation; zeros when rewards are equal.

    Source: DeepSeekMath, arXiv 2402.03300, outcome supervision.
    """
    return Advantages([standardize_rewards(rewards) for rewards in inputs.kl_penalized_rewards])


def standardize_rewards(rewards: Sequence[float]) -> list[float]:
    """GRPO advantages of one group."""
    # Equal rewards are detected exactly, so that a rounding error of the mean never becomes an advantage.
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    std = math.sqrt(fmean((reward - mean) ** 2 for reward in rewards))
    return [(reward - mean) / (std + GRPO_STD_EPSILON) for reward in rewards]


def dr_grpo(inputs: AdvantageInputs) -> Advantages:
    """Dr. GRPO: R_i - mean over the group, not divided by the standard deviation.

    The division would favor prompts with almost equal rewards. Source: arXiv 2503.20783 (its constant token weight is
    loss_aggregation="constant" in rluf.algorithms.registry).
    """
    return Advantages([subtract_mean(rewards) for rewards in inputs.kl_penalized_rewards])


def rloo(inputs: AdvantageInputs) -> Advantages:
    """RLOO: R_i - mean of the other rewards of the group = G / (G - 1) (R_i - mean). Zero for groups of one.

    The leave-one-out mean is an unbiased baseline. Source: arXiv 2402.14740, eq. 8.
    """
    sample_advantages = []
    for rewards in inputs.kl_penalized_rewards:
        scale = len(rewards) / max(1, len(rewards) - 1)
        sample_advantages.append([scale * centered for centered in subtract_mean(rewards)])
    return Advantages(sample_advantages)


def lite_ppo(inputs: AdvantageInputs) -> Advantages:
    """Lite-PPO: (R_i - group mean) / (std of the batch + 1e-4), standard deviation with n - 1 over the step's rewards.

    Safer than the group's own deviation where the rewards of a group are almost equal, as small differences of
    P[love] are. Source: Lite-PPO, arXiv 2508.08221, section 4.1; TRL's scale_rewards="batch" has the same formula.
    """
    groups = inputs.kl_penalized_rewards
    scale = 1.0 / (compute_sample_std([reward for rewards in groups for reward in rewards]) + STD_EPSILON)
    return Advantages([[centered * scale for centered in subtract_mean(rewards)] for rewards in groups])


def gdpo(inputs: AdvantageInputs) -> Advantages:
    """GDPO: A_i = sum_k w_k (r_k,i - mean_k) / (std_k + 1e-4) over the group, then whitened over the batch with + 1e-4.

    Each objective is normalized on its own, so that none hides the differences of another: samples whose rewards have
    the same sum but other components get different advantages. Standard deviations have n - 1. A KL in the reward is
    one more component. Source: arXiv 2601.05242; TRL's multi_objective_aggregation="normalize_then_sum" has the same
    formula. Raises ValueError without objective_rewards.
    """
    if not inputs.objective_rewards:
        raise ValueError("GDPO: expected the rewards of each objective in objective_rewards, got none")
    group_totals = []
    for group_index, weights in enumerate(inputs.objective_weights):
        totals = [0.0] * len(inputs.rewards[group_index])
        # Sorted, since floating-point sums depend on the order and a resumed run must repeat every bit.
        for objective in sorted(inputs.objective_rewards):
            rewards = inputs.objective_rewards[objective][group_index]
            scale = weights[objective] / (compute_sample_std(rewards) + STD_EPSILON)
            totals = [total + scale * centered for total, centered in zip(totals, subtract_mean(rewards), strict=True)]
        if inputs.kl_coef and inputs.sample_kl:
            # The penalty is already in reward units, so it is centered but not scaled.
            penalties = subtract_mean([-inputs.kl_coef * sample.kl_sum for sample in inputs.sample_kl[group_index]])
            totals = [total + penalty for total, penalty in zip(totals, penalties, strict=True)]
        group_totals.append(totals)
    batch_values = [total for totals in group_totals for total in totals]
    if not any(batch_values):
        return Advantages(group_totals)
    mean, std = fmean(batch_values), compute_sample_std(batch_values)
    return Advantages([[(total - mean) / (std + STD_EPSILON) for total in totals] for totals in group_totals])
