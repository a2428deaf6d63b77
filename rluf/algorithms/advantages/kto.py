"""KTO: offline training on liked and disliked responses of the log, without a reward model and without pairs."""

from __future__ import annotations

import math

from rluf.algorithms.advantages.base import AdvantageInputs, Advantages

KTO_BETA = 0.1
"""Inverse temperature of KTO's loss."""
LIKED_THRESHOLD = 0.5
"""Rewards of logged responses are 1 (liked) or 0 (not liked)."""
MAX_EXPONENT = 700.0
"""Largest argument of exp() that does not overflow a float64."""


def kto(inputs: AdvantageInputs) -> Advantages:
    """Weight of each logged response's log-likelihood; a reward above 0.5 marks a liked response.

    With z = BETA log pi/ref of the response and z0 = max(0, BETA times the mean of log pi/ref over mismatched pairs of
    prompt and response), the loss is 1 - s(z - z0) where liked and 1 - s(z0 - z) where not. Its gradient is that of
    -w log pi, w = BETA s(z - z0) (1 - s(z - z0)), negative where the response was not liked. Both classes have equal
    weight, so a batch should contain equal numbers of them. Source: arXiv 2402.01306, eq. 8; `sample_kl` and
    `mismatched_kl` are in nats, of the policy being trained.
    """
    # The reference point z0 estimates a KL divergence, which is not negative although its sample mean can be.
    reference_point = max(0.0, inputs.mismatched_kl)
    sample_advantages = []
    for group_index, rewards in enumerate(inputs.rewards):
        group_advantages = []
        for sample_index, reward in enumerate(rewards):
            margin = KTO_BETA * (inputs.get_response_kl(group_index, sample_index) - reference_point)
            sigmoid = 1.0 / (1.0 + math.exp(-min(MAX_EXPONENT, max(-MAX_EXPONENT, margin))))
            weight = KTO_BETA * sigmoid * (1.0 - sigmoid)
            group_advantages.append(weight if reward > LIKED_THRESHOLD else -weight)
        sample_advantages.append(group_advantages)
    return Advantages(sample_advantages)
