"""What a learner rank takes: packed tokens without padding, and what the loss needs for each response token."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed micro-batch: T tokens, K response tokens, N samples of up to L tokens.

    Each prompt appears once, then the responses of its samples; `position_ids` go on from the prompt's end at each
    response. What a prompt has in common with the beginning of an earlier one is not repeated. Tensors over K follow
    the order of the samples in the micro-batch.
    """

    input_ids: Tensor
    """Token ids [1, T]."""
    position_ids: Tensor
    """Position of each token in its own sequence [1, T]."""
    rows: Tensor
    """Token index of each sample's prompt and response, padded at the end with index 0 [N, L]."""
    places: Tensor
    """Where each token lies in the flattened rows [T]."""
    keep: Tensor
    """Index of the token whose logits predict each response token [K]."""
    targets: Tensor
    """Response token ids [K]."""
    sequences: Tensor
    """Which sample (0..N-1) each response token belongs to [K]."""
    advantages: Tensor
    """Advantage of the sample [K]."""
    loss_weights: Tensor
    """1 / (response tokens of the sample * samples of the step) [K]; 0 in a batch that only keeps ranks in step."""
    rollout_logprobs: Tensor
    """Log-probability under the engine that sampled it [K] (nats); NaN in a demonstration, which none sampled."""

    @property
    def tokens(self) -> int:
        """Packed tokens that count (0 for a batch that only keeps ranks in step)."""
        return self.input_ids.numel() if bool((self.loss_weights > 0).any()) else 0

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        if self.input_ids.device == device:
            return self
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})
