"""CGPO's three optimizers (CRPG, CRRAFT, CODPO), as weights of the log-likelihood of each response.

All three take calibrated rewards in (0, 1), the judges' verdicts, and the KL of each response to the reference in nats.
Their losses are linear in log pi, or (CODPO) have a gradient that is, with a factor known when the batch is sampled, so
the learner needs one number per response. Source: arXiv 2409.20370, section 4. Masks exclude a response instead of
multiplying its reward by 0, since a failing response with product 0 could be the maximum among negative rewards.
"""

from __future__ import annotations

import math
from statistics import fmean

from rluf.algorithms.advantages.base import AdvantageInputs, Advantages

CODPO_BETA = 0.1
"""Inverse temperature of CODPO's preference loss."""
CODPO_LIKELIHOOD_WEIGHT = 5.0
"""Weight of the mean log-likelihood of CODPO's chosen response."""
MAX_EXPONENT = 700.0
"""Largest argument of exp() that does not overflow a float64."""


def crpg(inputs: AdvantageInputs) -> Advantages:
    """Calibrated-regularized policy gradient: A_i = w_i - mean of w over the step.

    w_i = J_i * R_i * clip(1 - kl_i / max_response_kl, 0, 1), where J_i is 1 when every judge passes and 0 otherwise.
    """
    group_weights = [
        [
            reward
            * inputs.has_passed_judges(group_index, sample_index)
            * min(1.0, max(0.0, 1.0 - inputs.get_response_kl(group_index, sample_index) / inputs.max_response_kl))
            for sample_index, reward in enumerate(rewards)
        ]
        for group_index, rewards in enumerate(inputs.rewards)
    ]
    step_weights = [weight for weights in group_weights for weight in weights]
    # fmean of equal floats can differ from them in the last bit: return exact zeros then.
    mean = step_weights[0] if min(step_weights) == max(step_weights) else fmean(step_weights)
    return Advantages([[weight - mean for weight in weights] for weights in group_weights])


def crraft(inputs: AdvantageInputs) -> Advantages:
    """Calibrated-regularized reward-ranked fine-tuning: the best allowed response of each prompt, weighted by reward.

    Responses that fail a judge or have a KL above max_response_kl are excluded; a prompt without any other is skipped.
    """
    sample_advantages = []
    for group_index, rewards in enumerate(inputs.rewards):
        allowed_samples = [
            index
            for index in range(len(rewards))
            if inputs.has_passed_judges(group_index, index)
            and inputs.get_response_kl(group_index, index) <= inputs.max_response_kl
        ]
        best_sample = max(allowed_samples, key=lambda index: rewards[index], default=None)
        sample_advantages.append([reward if index == best_sample else 0.0 for index, reward in enumerate(rewards)])
    return Advantages(sample_advantages)


def codpo(inputs: AdvantageInputs) -> Advantages:
    """Constrained online DPO: the best passing response against the worst failing one (the worst if none fails).

    loss = -log s(BETA h) - LIKELIHOOD / |y+| log pi(y+), h = (log pi/ref)(y+) - (log pi/ref)(y-). Its gradient is that
    of -(BETA s(-BETA h) + LIKELIHOOD / |y+|) log pi(y+) + BETA s(-BETA h) log pi(y-), which gives the two weights. A
    prompt without a passing response, or whose best response is also its worst, is skipped.
    """
    sample_advantages = []
    for group_index, rewards in enumerate(inputs.rewards):
        group_advantages = [0.0] * len(rewards)
        passing = [index for index in range(len(rewards)) if inputs.has_passed_judges(group_index, index)]
        failing = [index for index in range(len(rewards)) if not inputs.has_passed_judges(group_index, index)]
        chosen = max(passing, key=lambda index: rewards[index], default=None)
        rejected = min(failing or range(len(rewards)), key=lambda index: rewards[index])
        # Without a failing response, equal rewards express no preference.
        if chosen is not None and chosen != rejected and (failing or rewards[chosen] > rewards[rejected]):
            margin = inputs.get_response_kl(group_index, chosen) - inputs.get_response_kl(group_index, rejected)
            preference_weight = CODPO_BETA / (1.0 + math.exp(min(MAX_EXPONENT, CODPO_BETA * margin)))
            length = inputs.response_lengths[group_index][chosen] if inputs.response_lengths else 1
            group_advantages[chosen] = preference_weight + CODPO_LIKELIHOOD_WEIGHT / max(1, length)
            group_advantages[rejected] = -preference_weight
        sample_advantages.append(group_advantages)
    return Advantages(sample_advantages)
