"""The critic of PPO: the policy's body with a head that says what a response will earn from each token on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rluf.errors import ModelError


class Critic(nn.Module):
    """Values from packed batches. It starts as the policy's body with a head of zeros, so its first opinion is 0."""

    def __init__(self, model: nn.Module) -> None:
        """Take over the body of the causal language model `model`. Raises ModelError where it has none of its own."""
        super().__init__()
        body = getattr(model, "base_model", model)
        if body is model:
            raise ModelError(f"{type(model).__name__} has no body apart from its head; algorithm.name=ppo needs one")
        self.body = body
        self.head = nn.Linear(int(model.config.hidden_size), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, position_ids: Tensor, rows: Tensor, places: Tensor, keep: Tensor) -> Tensor:
        """Value [K] (float32) before each response token; arguments are those of a Batch."""
        output = self.body(input_ids=input_ids, position_ids=position_ids, use_cache=False, rows=rows, places=places)
        found: Tensor = self.head(output.last_hidden_state[0].index_select(0, keep)).float()[:, 0]
        return found


def value_loss(values: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights * (V - return)^2 / 2, a scalar; PPO's value clip has nothing to do with one update a batch.

    Tokens that no engine sampled (NaN returns, in demonstrations) do not count.
    """
    counted = ~returns.isnan()
    gap = torch.where(counted, values - returns, torch.zeros_like(values))
    return 0.5 * (weights * gap.square()).sum()
