"""Policy folders on disk: load the model for training, copy the files that training does not change."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from rluf.algorithms.attention import PACKED_ATTENTION, register_packed_attention
from rluf.algorithms.lora import add_lora_adapters
from rluf.errors import ModelError

COMPANION_FILE_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
"""Files other than weights and config that a trained policy copies unchanged from its base."""


def load_policy(
    model_folder: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    lora_rank: int = 0,
) -> nn.Module:
    """Causal language model of a Hugging Face folder with packed attention and without dropout.

    With `lora_rank` only the adapters are trainable. Raises ModelError when the folder cannot be read or contains
    another kind of model.
    """
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            str(model_folder),
            dtype=dtype,
            attn_implementation=PACKED_ATTENTION,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no causal language model could be read from {model_folder}: {error}") from error
    # The learner must give a token the probability that the engine gave it, and the engine has no dropout.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        # The reentrant variant needs inputs that require gradients, which frozen embeddings (LoRA) do not give.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return add_lora_adapters(model, lora_rank) if lora_rank else model


def copy_companion_files(source_folder: Path, target_folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings from one model folder to another."""
    for pattern in COMPANION_FILE_PATTERNS:
        for file in source_folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target_folder / file.name)
