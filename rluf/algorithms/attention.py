"""Attention over packed sequences without padding elsewhere, with prompts shared by the samples of a group.

A packed micro-batch holds each prompt once, followed by its samples' responses. All layers work on those T tokens; only
attention needs to know who may look at whom. Here each sample becomes one row (prompt, then its own response) of a
padded [N, L] table of token indices, plain causal attention runs on the rows, and every token takes its result from
one of them. Padding comes last in a row, so causality alone hides it and no mask is built. Cost N * L^2 instead of T^2,
and a prompt's share of all other layers is paid once instead of once a sample.

The function is registered with transformers under ATTENTION, which hands extra keyword arguments of `forward` to it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from rluf.errors import ModelError

ATTENTION = "rluf_packed"
"""Value of `attn_implementation` for models that read packed batches."""


def register() -> None:
    """Make ATTENTION known to transformers. Calling it again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Tensor | None = None,
    places: Tensor | None = None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of `rows`; result [1, T, H, D].

    `query` is [1, H, T, D]; `key` and `value` [1, H_kv, T, D] with H a multiple of H_kv. `rows` [N, L] holds token
    indices, padded at the end; `places` [T] says where in the flattened [N * L] result each token's value lies.
    Raises ModelError for a model whose attention is more than causal softmax attention over the whole sequence.
    """
    if rows is None or places is None:
        raise ModelError("attention over packed sequences was called without rows and places; forward a packed Batch")
    _refuse_other_kinds(module, int(rows.shape[1]), unused)
    heads, size, dtype = query.shape[1], value.shape[3], query.dtype
    if query.device.type == "cpu":
        # PyTorch's CPU kernel is 2.5 times faster in float32 than in bfloat16 here, and closer to the truth.
        query, key, value = query.float(), key.float(), value.float()
    result = functional.scaled_dot_product_attention(
        _gather(query, rows), _gather(key, rows), _gather(value, rows), is_causal=True, scale=scaling, enable_gqa=True
    )
    flat = result.transpose(1, 2).reshape(rows.numel(), heads * size).to(dtype)
    return flat.index_select(0, places).view(1, -1, heads, size), None


def _gather(states: Tensor, rows: Tensor) -> Tensor:
    """[1, H, T, D] -> [N, H, L, D] by the token indices of `rows` [N, L]."""
    heads, size = states.shape[1], states.shape[3]
    tokens = states[0].transpose(0, 1).reshape(-1, heads * size)
    return tokens.index_select(0, rows.reshape(-1)).view(*rows.shape, heads, size).transpose(1, 2)


def _refuse_other_kinds(module: nn.Module, longest: int, unused: dict[str, Any]) -> None:
    window = unused.get("sliding_window")
    if window is not None and window < longest:
        raise ModelError(
            f"{type(module).__name__} looks back {window} tokens, but a sequence has {longest}; lower "
            "rollout.max_prompt_tokens and rollout.max_response_tokens so that their sum fits the window"
        )
    for kind in ("softcap", "s_aux", "position_bias"):
        if unused.get(kind) is not None:
            raise ModelError(f"{type(module).__name__} needs {kind} in its attention, which packing does not support")
