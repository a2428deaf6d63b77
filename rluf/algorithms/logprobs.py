"""Log-probabilities of target tokens without a float32 copy of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rluf.algorithms.packing import PackedBatch

CHUNK_TOKENS = 256
"""Tokens whose float32 logits exist at once."""


class _TargetLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature)[target] in float32, chunk by chunk; saves only the logits for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_ids: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, target_ids)
        ctx.temperature = temperature
        logprobs = torch.empty(len(target_ids), dtype=torch.float32, device=logits.device)
        chunks = zip(*(tensor.split(CHUNK_TOKENS) for tensor in (logits, target_ids, logprobs)), strict=True)
        for chunk_logits, chunk_targets, output in chunks:
            all_logprobs = torch.log_softmax(_scale_by_temperature(chunk_logits, temperature), dim=-1)
            output.copy_(all_logprobs.gather(-1, chunk_targets[:, None])[:, 0])
        return logprobs

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor, None, None]:
        # Gradient of log softmax: grad * (onehot - softmax) / temperature. The division by the temperature is applied
        # once, to the incoming gradient [K], instead of to the result [K, V].
        logits, target_ids = ctx.saved_tensors
        logit_grads = torch.empty_like(logits)
        scaled_grads = (output_grads[0] / ctx.temperature)[:, None]
        chunks = zip(
            *(tensor.split(CHUNK_TOKENS) for tensor in (logits, target_ids, scaled_grads, logit_grads)), strict=True
        )
        for chunk_logits, chunk_targets, grad, output in chunks:
            chunk_grads = torch.softmax(_scale_by_temperature(chunk_logits, ctx.temperature), dim=-1).mul_(-grad)
            output.copy_(chunk_grads.scatter_add_(-1, chunk_targets[:, None], grad))
        return logit_grads, None, None


def _scale_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def compute_target_logprobs(logits: Tensor, target_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability [K] (nats, float32) of `target_ids` [K] under `logits` [K, V] of any float type.

    `temperature` must be the sampling temperature, so that policy and engine describe the same distribution.
    """
    logprobs: Tensor = _TargetLogprobs.apply(logits, target_ids, temperature)
    return logprobs


def compute_response_logprobs(model: Any, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [K] of the response tokens of a packed batch.

    `model` must use packed attention (rluf.algorithms.policy_io).
    """
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        # Logits of the predicting tokens only: with a large vocabulary the prompts' logits would dominate memory.
        logits_to_keep=batch.logit_index,
        use_cache=False,
        sequence_token_index=batch.sequence_token_index,
        token_output_index=batch.token_output_index,
    )
    return compute_target_logprobs(output.logits[0], batch.target_ids, temperature)
