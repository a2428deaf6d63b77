"""Policy folders on disk: read for training, written whole or not at all."""

from __future__ import annotations

import errno
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from rluf.errors import ModelError, ResourceError, RlufError
from rluf.paths import sync
from rluf.policy.attention import ATTENTION, register
from rluf.policy.lora import add_lora

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says on a full disk, or a spent quota; safetensors hands the number on in its message."""
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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, synced to disk, when the block ends without error.

    A folder that was there before is replaced. Files become as readable as the folder (safetensors keeps its files to
    their owner). Raises ResourceError on a full disk, ModelError when it refuses otherwise.
    """
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        yield part
        readable = part.stat().st_mode & 0o666
        for file in (p for p in part.rglob("*") if p.is_file()):
            file.chmod(readable)
            sync(file)
        sync(part)
        if path.is_dir():
            stale = path.with_name(f"{part.name}.old")
            path.rename(stale)
            part.rename(path)
            shutil.rmtree(stale, ignore_errors=True)
        else:
            part.rename(path)
        sync(path.parent)
    except OSError as error:
        raise unwritten("the policy", path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def unwritten(what: str, path: Path, error: Exception) -> RlufError:
    """The error to raise when `what` could not be written to `path`: ResourceError on a full disk, else ModelError."""
    full = getattr(error, "errno", None) in FULL or any(f"os error {number}" in str(error) for number in FULL)
    kind = ResourceError if full else ModelError
    return kind(f"{what} could not be written to {path}: {error}; free some disk, earlier checkpoints are kept")
