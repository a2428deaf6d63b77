"""Log-probabilities of chosen tokens without a float32 copy of the whole logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256
"""Tokens whose float32 logits exist at once."""


class _Chosen(torch.autograd.Function):
    """log softmax(logits / temperature)[target], in float32 by chunks of tokens; keeps logits and normalisers only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        parts, norms = [], []
        for chunk, wanted in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True):
            scaled = chunk.float() / temperature
            norm = torch.logsumexp(scaled, dim=-1)
            parts.append(scaled.gather(-1, wanted[:, None])[:, 0] - norm)
            norms.append(norm)
        ctx.save_for_backward(logits, targets, torch.cat(norms))
        ctx.temperature = temperature
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, norms = ctx.saved_tensors
        result = torch.empty_like(logits)
        pieces = (t.split(CHUNK) for t in (logits, targets, norms, grads[0] / ctx.temperature, result))
        for chunk, wanted, norm, grad, out in zip(*pieces, strict=True):
            slope = chunk.float().div_(ctx.temperature).sub_(norm[:, None]).exp_().mul_(-grad[:, None])
            out.copy_(slope.scatter_add_(-1, wanted[:, None], grad[:, None]))
        return result, None, None


def chosen_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability [K] (nats, float32) of `targets` [K] under `logits` [K, V] of any float type.

    `temperature` must be the one the tokens were sampled with, so that policy and engine speak of one distribution.
    """
    chosen: Tensor = _Chosen.apply(logits, targets, temperature)  # type: ignore[no-untyped-call]
    return chosen
