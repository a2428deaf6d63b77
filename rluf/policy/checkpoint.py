"""Policy folders on disk: read for training, written whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from rluf.errors import ModelError
from rluf.policy.attention import ATTENTION, register

logger = logging.getLogger(__name__)

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
    folder: Path, *, dtype: torch.dtype, trust_remote_code: bool = False, gradient_checkpointing: bool = False
) -> nn.Module:
    """Causal language model of a Hugging Face folder, reading packed batches, dropout off.

    Dropout is off because the learner must give a token the probability that the engine gave it. Raises ModelError when
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
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no causal language model could be read from {folder}: {error}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings of model folder `source` into `target`."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, synced to disk, when the block ends without error.

    A folder that was there before is replaced. Raises ModelError when the disk refuses.
    """
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        yield part
        for file in [*(p for p in part.rglob("*") if p.is_file()), part]:
            _sync(file)
        if path.is_dir():
            stale = path.with_name(f"{part.name}.old")
            path.rename(stale)
            part.rename(path)
            shutil.rmtree(stale, ignore_errors=True)
        else:
            part.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise ModelError(f"the policy could not be written to {path}: {error}; free some disk") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
