"""GDPO: each objective is normalised within the group by itself, so that none hides another's differences."""

from __future__ import annotations

from statistics import fmean

from rluf.algorithms.advantages.base import Gains, Outcomes, centred, sample_deviation

EPSILON = 1e-4


def gdpo(outcomes: Outcomes) -> Gains:
    """A_i = sum_k w_k (r_k,i - mean_k) / (std_k + 1e-4) over the group, then whitened over the batch with + 1e-4.

    Standard deviations have n - 1. Rewards that sum to the same but are made of other parts stay apart. Source: arXiv
    2601.05242; TRL's multi_objective_aggregation="normalize_then_sum" has the same formula. A KL in the reward counts
    as one more part. Raises ValueError without parts.
    """
    if not outcomes.parts:
        raise ValueError("GDPO needs the signals of each objective, but none were given")
    summed = []
    for group, weights in enumerate(outcomes.weights):
        total = [0.0] * len(outcomes.rewards[group])
        for name in sorted(outcomes.parts):
            row = outcomes.parts[name][group]
            scale = weights[name] / (sample_deviation(row) + EPSILON)
            total = [a + scale * b for a, b in zip(total, centred(row), strict=True)]
        if outcomes.kl_coef and outcomes.drifts:
            drifts = centred([-outcomes.kl_coef * drift.kl for drift in outcomes.drifts[group]])
            total = [a + b for a, b in zip(total, drifts, strict=True)]
        summed.append(total)
    flat = [value for row in summed for value in row]
    mean, deviation = fmean(flat), sample_deviation(flat)
    if not any(flat):
        return Gains(summed)
    return Gains([[(value - mean) / (deviation + EPSILON) for value in row] for row in summed])
