"""REINFORCE++: rewards whitened over all response tokens of the batch, with or without a group-mean baseline."""

from __future__ import annotations

import math

from rluf.algorithms.advantages.base import AdvantageInputs, Advantages, SampleValues, subtract_mean

VARIANCE_EPSILON = 1e-8


def reinforce_pp(inputs: AdvantageInputs) -> Advantages:
    """Whitened token returns R_i - kl_coef * (KL to go); no critic, no group baseline.

    Source: arXiv 2501.03262, section 3; whitening as in verl: (x - mean) / sqrt(var + 1e-8) over all response tokens,
    variance with n - 1.
    """
    return _whiten_over_tokens(inputs.rewards, inputs, inputs.kl_coef if inputs.sample_kl else 0.0)


def reinforce_pp_baseline(inputs: AdvantageInputs) -> Advantages:
    """Group mean subtracted first, then whitened over the batch; a KL in the reward is applied per response.

    Source: arXiv 2501.03262, section 3.2.
    """
    return _whiten_over_tokens([subtract_mean(rewards) for rewards in inputs.kl_penalized_rewards], inputs, 0.0)


def _whiten_over_tokens(rewards: SampleValues, inputs: AdvantageInputs, kl_coef: float) -> Advantages:
    """Whiten x = reward - kl_coef * (KL to go) over tokens, from sums per sample."""
    flat_rewards = [reward for group_rewards in rewards for reward in group_rewards]
    lengths = [length for group in inputs.response_lengths for length in group] or [1] * len(flat_rewards)
    kl_sums, squared_sums = [0.0] * len(flat_rewards), [0.0] * len(flat_rewards)
    if kl_coef:
        kl_sums = [sample.kl_to_go_sum for group in inputs.sample_kl for sample in group]
        squared_sums = [sample.kl_to_go_squared_sum for group in inputs.sample_kl for sample in group]
    token_count = sum(lengths)
    if token_count < 2 or (not kl_coef and min(flat_rewards) == max(flat_rewards)):
        return Advantages([[0.0] * len(group_rewards) for group_rewards in rewards])
    # Closed form of the token mean and variance of x from sums per response, so that no token leaves the learners:
    # over the n tokens of a response with reward r, sum x = n r - c t and sum (x - m)^2 =
    # n (r - m)^2 - 2 c (r - m) t + c^2 s, where t and s are the sums of the KL to go and of its square.
    samples = list(zip(lengths, flat_rewards, kl_sums, squared_sums, strict=True))
    mean = math.fsum(n * r - kl_coef * t for n, r, t, _ in samples) / token_count
    squared_deviation = math.fsum(
        n * (r - mean) ** 2 - 2 * kl_coef * (r - mean) * t + kl_coef**2 * s for n, r, t, s in samples
    )
    scale = 1.0 / math.sqrt(max(0.0, squared_deviation) / (token_count - 1) + VARIANCE_EPSILON)
    return Advantages(
        [[(reward - mean) * scale for reward in group_rewards] for group_rewards in rewards],
        kl_to_go_coef=kl_coef * scale,
    )
