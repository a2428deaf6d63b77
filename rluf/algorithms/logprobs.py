"""Log-probabilities of chosen tokens without a float32 copy of the whole logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rluf.algorithms.batch import Batch

CHUNK = 256
"""Tokens whose float32 logits exist at once."""


class _Chosen(torch.autograd.Function):
    """log softmax(logits / temperature)[target], in float32 by chunks of tokens; keeps only the logits for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        found = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for chunk, wanted, out in zip(*(t.split(CHUNK) for t in (logits, targets, found)), strict=True):
            out.copy_(torch.log_softmax(_scaled(chunk, temperature), dim=-1).gather(-1, wanted[:, None])[:, 0])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        pieces = (t.split(CHUNK) for t in (logits, targets, (grads[0] / ctx.temperature)[:, None], result))
        for chunk, wanted, grad, out in zip(*pieces, strict=True):
            slope = torch.softmax(_scaled(chunk, ctx.temperature), dim=-1).mul_(-grad)
            out.copy_(slope.scatter_add_(-1, wanted[:, None], grad))
        return result, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def chosen_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability [K] (nats, float32) of `targets` [K] under `logits` [K, V] of any float type.

    `temperature` must be the one the tokens were sampled with, so that policy and engine speak of one distribution.
    """
    chosen: Tensor = _Chosen.apply(logits, targets, temperature)
    return chosen


def response_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [K] of the response tokens of a packed batch; logits are computed for these only.

    `model` must read packed batches (rluf.algorithms.attention).
    """
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=batch.keep,
        use_cache=False,
        rows=batch.rows,
        places=batch.places,
    )
    return chosen_logprobs(output.logits[0], batch.targets, temperature)
