"""CGPO's three optimisers, as the weight that each response's log-likelihood gets.

All three take calibrated rewards in (0, 1), the judges' verdicts, and each response's drift from the reference in nats.
Their losses are linear in log pi, or (CODPO) have a gradient that is, with a factor known when the batch is sampled;
so what the learner needs is one number a response. Source: arXiv 2409.20370, section 4. Masks are true exclusions, not
products with 0, under which a failing response could win a maximum among negative rewards.
"""

from __future__ import annotations

import math
from statistics import fmean

from rluf.algorithms.advantages.base import Gains, Outcomes

BETA = 0.1
"""CODPO's inverse temperature."""
LIKELIHOOD = 5.0
"""CODPO's weight of the chosen response's mean log-likelihood."""


def crpg(outcomes: Outcomes) -> Gains:
    """Calibrated-regularised policy gradient: A_i = w_i - mean of w over the step.

    w_i = J_i * R_i * clip(1 - kl_i / kl_limit, 0, 1), where J_i is 1 when every judge passes and 0 otherwise.
    """
    rows = [
        [
            reward * outcomes.passes(g, s) * min(1.0, max(0.0, 1.0 - outcomes.drift(g, s) / outcomes.kl_limit))
            for s, reward in enumerate(rewards)
        ]
        for g, rewards in enumerate(outcomes.rewards)
    ]
    flat = [weight for row in rows for weight in row]
    mean = flat[0] if min(flat) == max(flat) else fmean(flat)
    return Gains([[weight - mean for weight in row] for row in rows])


def crraft(outcomes: Outcomes) -> Gains:
    """Calibrated-regularised reward-ranked fine-tuning: each prompt's best allowed response, weighed by its reward.

    Responses that fail a judge or drift more than kl_limit are out; a prompt with none left is skipped.
    """
    found = []
    for g, rewards in enumerate(outcomes.rewards):
        allowed = [
            s for s in range(len(rewards)) if outcomes.passes(g, s) and outcomes.drift(g, s) <= outcomes.kl_limit
        ]
        best = max(allowed, key=lambda s: rewards[s], default=None)
        found.append([rewards[s] if s == best else 0.0 for s in range(len(rewards))])
    return Gains(found)


def codpo(outcomes: Outcomes) -> Gains:
    """Constrained online DPO: the best passing response against the worst failing one (the worst of all if none fails).

    loss = -log s(BETA h) - LIKELIHOOD / |y+| log pi(y+), h = (log pi/ref)(y+) - (log pi/ref)(y-). Its gradient is that
    of -(BETA s(-BETA h) + LIKELIHOOD / |y+|) log pi(y+) + BETA s(-BETA h) log pi(y-), which gives the two weights. A
    prompt without a passing response, or whose best is also its worst, is skipped.
    """
    found = []
    for g, rewards in enumerate(outcomes.rewards):
        row = [0.0] * len(rewards)
        passing = [s for s in range(len(rewards)) if outcomes.passes(g, s)]
        failing = [s for s in range(len(rewards)) if not outcomes.passes(g, s)]
        good = max(passing, key=lambda s: rewards[s], default=None)
        bad = min(failing or range(len(rewards)), key=lambda s: rewards[s])
        if good is not None and good != bad and (failing or rewards[good] > rewards[bad]):
            gap = outcomes.drift(g, good) - outcomes.drift(g, bad)
            push = BETA / (1.0 + math.exp(min(700.0, BETA * gap)))
            length = outcomes.lengths[g][good] if outcomes.lengths else 1
            row[good], row[bad] = push + LIKELIHOOD / max(1, length), -push
        found.append(row)
    return Gains(found)
