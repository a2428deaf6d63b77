"""The policy as a model: loading with packed attention, log-probabilities of responses, companion files of its folder.

In packed attention the samples of a group share the tokens of their prompt. A packed micro-batch contains each prompt
once, followed by the responses of its samples. All layers work on those T tokens; only attention needs to know which
tokens may attend to which. Here each sample becomes one row (prompt, then its own response) of a padded [N, L] table of
token indices, plain causal attention runs on the rows, and every token takes its result from one of them. Padding comes
last in a row, so causality alone hides it and no mask is built. The cost is N * L^2 instead of T^2, and all other
layers compute a prompt once instead of once per sample. On CPUs, where attention to long prompts costs more than all
other layers, prompts and responses are separate rows, so that attention computes a prompt once too. On GPUs the rows
have no padding (torch's variable-length attention): with uneven lengths the padded table is 4 to 12 times larger than
the rows in it.

The attention function is registered with transformers as PACKED_ATTENTION; transformers passes extra keyword arguments
of the model's `forward` to it by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rluf.algorithms.packing import PackedBatch
from rluf.errors import ModelError
from rluf.models.hub import describe_model_error, list_model_file_errors
from rluf.models.lora import add_lora_adapters

PACKED_ATTENTION = "rluf_packed"
"""Value of `attn_implementation` for models that read packed batches."""
COMPANION_FILE_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
    "generation_config.json", "*.py",
)  # fmt: skip
"""Files other than weights and config that a trained policy copies unchanged from its base."""
LOGPROB_CHUNK_TOKENS = 256
"""Tokens whose float32 logits exist at once."""


def register_packed_attention() -> None:
    """Register compute_packed_attention with transformers. Calling it again is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, compute_packed_attention)


def compute_packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_token_index: Tensor | None = None,
    token_output_index: Tensor | None = None,
    flat_token_index: Tensor | None = None,
    flat_output_index: Tensor | None = None,
    sequence_starts: Tensor | None = None,
    prompt_token_index: Tensor | None = None,
    response_token_index: Tensor | None = None,
    split_output_index: Tensor | None = None,
    response_mask: Tensor | None = None,
    scaling: float | None = None,
    **unused_kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of `sequence_token_index`; result [1, T, H, D].

    `query` is [1, H, T, D]; `key` and `value` [1, H_kv, T, D] with H a multiple of H_kv. `sequence_token_index` [N, L]
    contains token indices, padded at the end; `token_output_index` [T] is the index of each token's result in the
    flattened [N * L] output. The next three describe the same rows without padding (PackedBatch) and are used on GPUs
    in half precision. The last four separate prompts from responses, so that the queries of a prompt are computed once
    per group instead of once per sample; PackedBatch passes them on CPUs. Raises ModelError for a model whose attention
    is more than causal softmax attention over the whole sequence.
    """
    if sequence_token_index is None or token_output_index is None:
        raise ModelError(
            f"{type(module).__name__} got no sequence_token_index: the model does not pass the fields of a packed "
            "batch to its attention"
        )
    _reject_unsupported_attention(module, int(sequence_token_index.shape[1]), unused_kwargs)
    head_count, head_size, dtype = query.shape[1], value.shape[3], query.dtype
    if query.is_cuda and dtype != torch.float32 and flat_token_index is not None and flat_output_index is not None:
        flat_states = [states[0].transpose(0, 1).index_select(0, flat_token_index) for states in (query, key, value)]
        max_length = int(sequence_token_index.shape[1])
        output = compute_sequence_attention(flat_states, sequence_starts, max_length, scaling)
        return output.index_select(0, flat_output_index)[None], None
    if query.device.type == "cpu":
        # PyTorch's CPU kernel is 2.5 times faster in float32 than in bfloat16 here, and more accurate.
        query, key, value = query.float(), key.float(), value.float()

    def compute_row_attention(query_index: Tensor, key_index: Tensor, mask: Tensor | None) -> Tensor:
        """Attention outputs [rows * columns, H * D] of the queries of `query_index`; causal without a mask."""
        output = functional.scaled_dot_product_attention(
            _gather_sequences(query, query_index),
            _gather_sequences(key, key_index),
            _gather_sequences(value, key_index),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        return output.transpose(1, 2).reshape(query_index.numel(), head_count * head_size).to(dtype)

    if prompt_token_index is not None and response_token_index is not None and split_output_index is not None:
        prompt_output = compute_row_attention(prompt_token_index, prompt_token_index, None)
        response_output = compute_row_attention(response_token_index, sequence_token_index, response_mask)
        flat_output, token_output_index = torch.cat([prompt_output, response_output]), split_output_index
    else:
        flat_output = compute_row_attention(sequence_token_index, sequence_token_index, None)
    return flat_output.index_select(0, token_output_index).view(1, -1, head_count, head_size), None


def compute_sequence_attention(
    flat_states: Sequence[Tensor], sequence_starts: Tensor | None, max_length: int, scaling: float | None
) -> Tensor:
    """Causal attention [S, H, D] within each of N sequences that follow one another, without padding. GPUs only.

    `flat_states` are query [S, H, D], key and value [S, H_kv, D]; `sequence_starts` [N + 1] (int32) ends with S, and
    `max_length` is at least the length of the longest sequence.
    """
    from torch.nn.attention.varlen import varlen_attn

    output: Tensor = varlen_attn(
        *flat_states,
        sequence_starts,
        sequence_starts,
        max_length,
        max_length,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=True,
    )
    return output


def _gather_sequences(states: Tensor, sequence_token_index: Tensor) -> Tensor:
    """[1, H, T, D] -> [N, H, L, D] by the token indices [N, L]."""
    head_count, head_size = states.shape[1], states.shape[3]
    token_states = states[0].transpose(0, 1).reshape(-1, head_count * head_size)
    # Flattened, so that the backward is an index_add; indexing with a 2-d tensor needs an accumulating index_put.
    row_states = token_states.index_select(0, sequence_token_index.reshape(-1))
    return row_states.view(*sequence_token_index.shape, head_count, head_size).transpose(1, 2)


def _reject_unsupported_attention(module: nn.Module, max_sequence_tokens: int, unused_kwargs: dict[str, Any]) -> None:
    """Raise ModelError for sliding windows shorter than a sequence and for attention variants."""
    window = unused_kwargs.get("sliding_window")
    if window is not None and window < max_sequence_tokens:
        raise ModelError(
            f"{type(module).__name__} has a sliding window of {window} tokens, but a sequence has "
            f"{max_sequence_tokens}; lower rollout.max_prompt_tokens and rollout.max_response_tokens so that their sum "
            "fits the window"
        )
    for variant in ("softcap", "s_aux", "position_bias"):
        if unused_kwargs.get(variant) is not None:
            raise ModelError(f"{type(module).__name__} uses {variant} in its attention, which packing does not support")


def load_policy(
    model_folder: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    lora_rank: int = 0,
    is_packed: bool = True,
) -> nn.Module:
    """Causal language model of a Hugging Face folder; with packed attention if `is_packed`.

    Otherwise it reads one sample per row (batch_layout.py). Before training call `remove_noise`. With `lora_rank` only
    the adapters are trainable. Raises ModelError when the folder cannot be read, lacks a weight, or contains another
    kind of model.
    """
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    try:
        loaded: tuple[nn.Module, Mapping[str, Any]] = AutoModelForCausalLM.from_pretrained(
            str(model_folder),
            dtype=dtype,
            # Eager attention has every variant (windows, soft caps, sinks), which PyTorch's fused kernel ignores.
            attn_implementation=PACKED_ATTENTION if is_packed else "eager",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except list_model_file_errors() as error:
        raise ModelError(
            f"no causal language model could be read from {model_folder}: {describe_model_error(error)}"
        ) from error
    model, loading_info = loaded
    if missing_names := sorted(loading_info["missing_keys"]):
        raise ModelError(
            f"model {model_folder} lacks {len(missing_names)} weights: {', '.join(missing_names[:4])}; they would be "
            "random, so download or save the model again"
        )
    damaged_name = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if damaged_name is not None:
        raise ModelError(
            f"{damaged_name} of {model_folder} has values that are not finite; download or save the model again"
        )
    if gradient_checkpointing:
        # The reentrant variant needs inputs that require gradients, which frozen embeddings (LoRA) do not give.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return add_lora_adapters(model, lora_rank) if lora_rank else model


def remove_noise(model: nn.Module) -> None:
    """Switch off dropout, noise on routers and sampled experts, after a training framework has set its mode.

    The learner must give a token the probability that the engine gave it, and the engine has none of these.
    """
    model.eval()
    for module in model.modules():
        # transformers recomputes activations only in modules that are in training mode.
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        if module.training:
            if hasattr(module, "config"):
                # Falcon's layers read their dropout from the config. It is saved with the policy: only copies change.
                module.config = copy(module.config)
                _set_noise_to_zero(module.config)
            _set_noise_to_zero(module)


def _set_noise_to_zero(holder: object) -> None:
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(holder, name, 0.0)


def has_packed_attention(model: Any) -> bool:
    """Whether `model`, or the model inside a DeepSpeed engine, reads packed batches."""
    config = getattr(model, "module", model).config
    return bool(config.get_text_config()._attn_implementation == PACKED_ATTENTION)


def copy_companion_files(source_folder: Path, target_folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings from one model folder to another."""
    for pattern in COMPANION_FILE_PATTERNS:
        for file in source_folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target_folder / file.name)


class _TargetLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature)[target] in float32, chunk by chunk; saves only the logits for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_ids: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, target_ids)
        ctx.temperature = temperature
        logprobs = torch.empty(len(target_ids), dtype=torch.float32, device=logits.device)
        chunks = zip(*(tensor.split(LOGPROB_CHUNK_TOKENS) for tensor in (logits, target_ids, logprobs)), strict=True)
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
            *(tensor.split(LOGPROB_CHUNK_TOKENS) for tensor in (logits, target_ids, scaled_grads, logit_grads)),
            strict=True,
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

    A model without packed attention (load_policy) reads the samples as rows [N, L], padded at the end: in a causal
    model padding changes nothing before it, so no mask is needed.
    """
    if not has_packed_attention(model):
        rows = batch.input_ids[0][batch.sequence_token_index]
        columns = batch.position_ids[0][batch.logit_index]
        logit_columns = torch.unique(columns)
        logits = model(input_ids=rows, logits_to_keep=logit_columns, use_cache=False).logits
        if logits.shape[1] != len(logit_columns):  # models that ignore logits_to_keep
            logits = logits[:, logit_columns]
        token_logits = logits[batch.sequence_index, torch.searchsorted(logit_columns, columns)]
        return compute_target_logprobs(token_logits, batch.target_ids, temperature)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        # Logits of the predicting tokens only: with a large vocabulary the prompts' logits would dominate memory.
        logits_to_keep=batch.logit_index,
        use_cache=False,
        **batch.attention_inputs,
    )
    return compute_target_logprobs(output.logits[0], batch.target_ids, temperature)
