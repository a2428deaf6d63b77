"""Policy losses per token (PPO, GSPO, CISPO, REINFORCE), and sums over the responses of a packed micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rluf.config.policy import AlgorithmSettings


def ppo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) [K] and where the clip removed the gradient [K].

    rho = exp(logprobs - old_logprobs) per token. With `dual_clip` c the loss of a token with A < 0 is at most c |A|.
    Source: arXiv 1707.06347, eq. 7; two clips as in DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729, eq. 5.
    """
    del sequence_index
    return clip_surrogate(torch.exp(logprobs - old_logprobs), advantages, algorithm)


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """GSPO: the clipped surrogate [K] with one ratio per response, s_i = exp(mean of logprobs - old_logprobs).

    Requires the sequence_mean loss aggregation (token weight 1 / length), which build_learner_inputs selects. Source:
    arXiv 2507.18071, eq. 5 and 7.
    """
    return clip_surrogate(torch.exp(mean_by_sequence(logprobs - old_logprobs, sequence_index)), advantages, algorithm)


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """CISPO: -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logprobs [K] and where the ratio was clipped [K].

    The clipped ratio is a constant weight, so a clipped token keeps its gradient. Source: MiniMax-M1, arXiv 2506.13585,
    eq. 4 and 5.
    """
    del sequence_index
    ratio = torch.exp(logprobs.detach() - old_logprobs)
    ratio_weight = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    return -ratio_weight * advantages * logprobs, ratio_weight != ratio


def reinforce(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence_index: Tensor, algorithm: AlgorithmSettings
) -> tuple[Tensor, Tensor]:
    """-A logprobs [K], without any clip. Also the loss of CGPO's optimizers, whose advantages are their weights.

    Source: R. J. Williams, "Simple statistical gradient-following algorithms", 1992.
    """
    del old_logprobs, sequence_index, algorithm
    return -advantages * logprobs, torch.zeros_like(advantages, dtype=torch.bool)


def clip_surrogate(ratio: Tensor, advantages: Tensor, algorithm: AlgorithmSettings) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate of the given ratios [K] and where a clip removed the gradient [K]."""
    unclipped = ratio * advantages
    bounded = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high) * advantages
    surrogate, is_clipped = torch.minimum(unclipped, bounded), bounded < unclipped
    if algorithm.dual_clip is not None:
        # For A < 0 the minimum above is unbounded as the ratio grows: one stale token could dominate a step.
        floor = algorithm.dual_clip * advantages
        below_floor = (advantages < 0) & (floor > surrogate)
        surrogate, is_clipped = torch.where(below_floor, floor, surrogate), is_clipped | below_floor
    return -surrogate, is_clipped


def sum_by_sequence(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Sum of `values` [K] over the response of each token, repeated at its tokens [K].

    `sequence_index` [K] is the response that each token belongs to.
    """
    count = int(sequence_index.max()) + 1 if len(sequence_index) else 0
    return values.new_zeros(count).index_add(0, sequence_index, values)[sequence_index]


def mean_by_sequence(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Mean of `values` [K] over the response of each token, repeated at its tokens [K]."""
    return sum_by_sequence(values, sequence_index) / sum_by_sequence(torch.ones_like(values), sequence_index)


def suffix_sums(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Sum of `values` [K] from each token to the end of its response, itself included [K], float64.

    Tokens of a response are consecutive.
    """
    # Without a loop: the total of the response minus an exclusive prefix sum, counted from the start of the response.
    # In float64, since prefix sums over the whole micro-batch are large and their difference is small.
    values = values.double()
    exclusive_prefix = values.cumsum(0) - values
    is_first_token = torch.ones_like(sequence_index, dtype=torch.bool)
    is_first_token[1:] = sequence_index[1:] != sequence_index[:-1]
    start_prefix = exclusive_prefix
    if len(values):
        start_prefix = exclusive_prefix[is_first_token][is_first_token.cumsum(0) - 1]
    return sum_by_sequence(values, sequence_index) - (exclusive_prefix - start_prefix)
