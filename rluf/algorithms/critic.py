"""PPO's critic and its advantages: a value head on the policy's backbone, and generalized advantage estimation.

The driver knows rewards only; the learners own the critic and turn them into advantages per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rluf.errors import ModelError, RlufError

GAMMA = 1.0
"""Discount factor: responses are short and their reward arrives at the end."""
GAE_LAMBDA = 0.95
"""Lambda of generalized advantage estimation, as in PPO's paper; 1 is the Monte Carlo return."""
VARIANCE_EPSILON = 1e-8
MIN_RETURN_VARIANCE = 0.01
"""Smaller variances of returns count as this: rewards have about unit scale, and any error exceeds equal returns."""
MAX_ERROR_RATIO = 10.0
"""Mean squared error over mean squared return above which a critic counts as diverging; that of its first values, 0, is
1."""


class CriticModel(nn.Module):
    """Value model over packed batches, initialized from the policy with a zero head, so its first values are 0."""

    def __init__(self, model: nn.Module) -> None:
        """Take over the backbone of the causal language model `model`. Raises ModelError where it has no own one."""
        super().__init__()
        backbone = getattr(model, "base_model", model)
        if backbone is model:
            raise ModelError(
                f"{type(model).__name__} has no backbone separate from its head; algorithm.name=ppo needs one"
            )
        self.backbone = backbone
        self.value_head = nn.Linear(int(model.config.hidden_size), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logit_index: Tensor,
        **attention_inputs: Tensor,
    ) -> Tensor:
        """Value [K] (float32) before each response token; the arguments are fields of a PackedBatch."""
        output = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            **attention_inputs,
        )
        # The token that predicts a response token is also the state before it.
        hidden_states = output.last_hidden_state[0].index_select(0, logit_index)
        values: Tensor = self.value_head(hidden_states).float()[:, 0]
        return values


def compute_value_loss(values: Tensor, returns: Tensor, loss_weights: Tensor) -> Tensor:
    """Sum of loss_weights * (V - return)^2 / 2, a scalar.

    PPO's value clip is left out: with one update per batch it has no effect. Tokens with NaN returns (demonstrations,
    which no engine sampled) do not count.
    """
    counted = ~returns.isnan()
    # Masked before the square and the weights: 0 * NaN is NaN, in the sum and in the gradient.
    errors = torch.where(counted, values - returns, torch.zeros_like(values))
    return 0.5 * (loss_weights * errors.square()).sum()


def build_token_rewards(rewards: Tensor, token_kl: Tensor, sequence_index: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token [K]: -kl_coef * token_kl (k1), plus the reward of the response at its last token.

    `rewards` [K] repeats the reward of a response at each of its tokens; `sequence_index` [K] is the response of each
    token. Source: arXiv 1909.08593, section 2.2, per token as in InstructGPT, arXiv 2203.02155.
    """
    is_last_token = torch.ones_like(sequence_index, dtype=torch.bool)
    is_last_token[:-1] = sequence_index[1:] != sequence_index[:-1]
    return rewards * is_last_token - kl_coef * token_kl


def compute_gae(rewards: Tensor, values: Tensor, sequence_index: Tensor, gae_lambda: float = GAE_LAMBDA) -> Tensor:
    """Advantages [K]: sum_l (GAMMA lambda)^l d_(t+l), d_t = r_t + GAMMA V_(t+1) - V_t, with V = 0 after the end.

    `values` [K] are the critic's before each token. Tokens of a response are consecutive. Source: arXiv 1506.02438,
    eq. 16.
    """
    reversed_advantages: list[float] = []
    next_advantage = next_value = 0.0
    current_sequence: int | None = None
    # One pass from the last token to the first, over plain floats: the recursion is sequential, and a loop over 0-d
    # tensors pays a kernel launch per operation.
    tokens = list(zip(rewards.tolist(), values.tolist(), sequence_index.tolist(), strict=True))
    for reward, value, sequence in reversed(tokens):
        if sequence != current_sequence:
            next_advantage, next_value, current_sequence = 0.0, 0.0, sequence
        next_advantage = reward + GAMMA * next_value - value + GAMMA * gae_lambda * next_advantage
        next_value = value
        reversed_advantages.append(next_advantage)
    return torch.tensor(reversed_advantages[::-1], dtype=torch.float32, device=rewards.device)


def sum_moments(advantages: Tensor, counted_mask: Tensor) -> Tensor:
    """Count, sum and sum of squares [3] of the `advantages` [K] in `counted_mask` [K], for an all-reduce over ranks."""
    counted = advantages[counted_mask].double()
    return torch.stack([counted_mask.sum().double(), counted.sum(), counted.square().sum()])


def whiten_advantages(advantages: Tensor, total_moments: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8) with the sum_moments of the whole step, variance with n - 1, as in verl."""
    mean = float(total_moments[1]) / max(1.0, float(total_moments[0]))
    return (advantages - mean) / (_compute_variance(total_moments) + VARIANCE_EPSILON) ** 0.5


def compute_explained_variance(return_moments: Tensor, error_moments: Tensor) -> float:
    """1 - Var(return - value) / Var(return) over tokens: 1 for a perfect critic, 0 for one that knows nothing.

    The arguments are sum_moments of all ranks. Returns are Monte Carlo: a diverging critic distorts those of GAE.
    Raises RlufError where they are not finite.
    """
    if not torch.stack([return_moments, error_moments]).isfinite().all():
        raise RlufError(
            "the values of PPO's critic are not finite: it has diverged; lower learner.critic_learning_rate, with "
            "--resume from the last good checkpoint and run.resume_with=[learner.critic_learning_rate]"
        )
    return 1 - _compute_variance(error_moments) / max(MIN_RETURN_VARIANCE, _compute_variance(return_moments))


def is_diverging(return_moments: Tensor, error_moments: Tensor) -> bool:
    """Whether the errors of the values are far larger than the returns."""
    return float(error_moments[2]) > MAX_ERROR_RATIO * max(
        float(return_moments[2]), MIN_RETURN_VARIANCE * float(return_moments[0])
    )


def _compute_variance(moments: Tensor) -> float:
    count = max(2.0, float(moments[0]))
    mean = float(moments[1]) / max(1.0, float(moments[0]))
    return max(0.0, float(moments[2]) - count * mean**2) / (count - 1)
