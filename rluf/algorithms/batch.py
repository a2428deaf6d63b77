"""Packed micro-batches: tokens without padding, and the per-token inputs of the loss."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One packed micro-batch: T tokens, K response tokens, N samples of up to L tokens.

    Each prompt appears once, followed by the responses of its samples; the `position_ids` of every response continue
    from the end of the prompt. The beginning that a prompt shares with an earlier one is not repeated. Tensors over K
    follow the order of the samples in the micro-batch.
    """

    input_ids: Tensor
    """Token ids [1, T]."""
    position_ids: Tensor
    """Position of each token in its own sequence [1, T]."""
    sequence_token_index: Tensor
    """Token index of each sample's prompt and response, padded at the end with index 0 [N, L]."""
    token_output_index: Tensor
    """Index in the flattened [N * L] attention output that each token takes its result from [T]."""
    logit_index: Tensor
    """Index of the token whose logits predict each response token [K]."""
    target_ids: Tensor
    """Response token ids [K]."""
    sequence_index: Tensor
    """Sample (0..N-1) that each response token belongs to [K]."""
    advantages: Tensor
    """Advantage of the sample [K]."""
    loss_weights: Tensor
    """Weight of each token in the loss of the step [K]; 0 in an idle batch, which keeps ranks in lockstep."""
    rollout_logprobs: Tensor
    """Log-probability under the engine that sampled the token [K] (nats); NaN in demonstrations."""

    @property
    def token_count(self) -> int:
        """Packed tokens that contribute to the loss (0 for an idle batch)."""
        return self.input_ids.numel() if bool((self.loss_weights > 0).any()) else 0

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        if self.input_ids.device == device:
            return self
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})
