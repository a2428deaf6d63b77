"""KTO: learning from liked and other responses of the log, without a reward model and without pairs."""

from __future__ import annotations

import math

from rluf.algorithms.advantages.base import Gains, Outcomes

BETA = 0.1


def kto(outcomes: Outcomes) -> Gains:
    """Weight of each logged response's log-likelihood; a reward above 0.5 marks one that was liked.

    With z = BETA log pi/ref of the response and z0 = max(0, BETA times the mean of log pi/ref over mismatched pairs of
    prompt and response), the loss is 1 - s(z - z0) where liked and 1 - s(z0 - z) where not. Its gradient is that of
    -w log pi, w = BETA s(z - z0) (1 - s(z - z0)), negative where the response was not liked. Both kinds weigh alike, so
    as many of each should come. Source: arXiv 2402.01306, eq. 8; `drifts` and `mismatched` are in nats, of the policy.
    """
    zero = max(0.0, outcomes.mismatched)
    found = []
    for g, rewards in enumerate(outcomes.rewards):
        row = []
        for s, reward in enumerate(rewards):
            gap = min(700.0, max(-700.0, BETA * (outcomes.drift(g, s) - zero)))
            share = 1.0 / (1.0 + math.exp(-gap))
            weight = BETA * share * (1.0 - share)
            row.append(weight if reward > 0.5 else -weight)
        found.append(row)
    return Gains(found)
