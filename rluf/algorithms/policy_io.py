"""Policy folders on disk: load the model for training, copy the files that stay unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from rluf.algorithms.attention import ATTENTION, register
from rluf.algorithms.lora import add_lora
from rluf.errors import ModelError

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
"""Files beside the weights that a trained policy takes over from its base unchanged."""


def load_policy(
    folder: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    lora_rank: int = 0,
) -> nn.Module:
    """Causal language model of a Hugging Face folder, reading packed batches, dropout off.

    Dropout is off because the learner must give a token the probability that the engine gave it. With `lora_rank` only
    adapters are trained. Raises ModelError when
    the folder cannot be read or holds another kind of model.
    """
    from transformers import AutoModelForCausalLM

    register()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation=ATTENTION,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no causal language model could be read from {folder}: {error}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return add_lora(model, lora_rank) if lora_rank else model


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings of model folder `source` into `target`."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
