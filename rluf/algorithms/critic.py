"""PPO's critic: the policy's backbone with a head that predicts the return of a response from each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rluf.errors import ModelError


class CriticModel(nn.Module):
    """Value model over packed batches, initialized from the policy with a zero head, so its first values are 0."""

    def __init__(self, model: nn.Module) -> None:
        """Take over the backbone of the causal language model `model`. Raises ModelError where it has no own one."""
        super().__init__()
        backbone = getattr(model, "base_model", model)
        if backbone is model:
            raise ModelError(
                f"{type(model).__name__} has no backbone separate from its head, which algorithm.name=ppo needs"
            )
        self.backbone = backbone
        self.value_head = nn.Linear(int(model.config.hidden_size), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        sequence_token_index: Tensor,
        token_output_index: Tensor,
        logit_index: Tensor,
    ) -> Tensor:
        """Value [K] (float32) before each response token; the arguments are fields of a PackedBatch."""
        output = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            sequence_token_index=sequence_token_index,
            token_output_index=token_output_index,
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
