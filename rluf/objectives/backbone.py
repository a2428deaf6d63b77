"""A pretrained model with a one-logit head: loading, freezing, and what makes it quick on a CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rluf.errors import ModelError
from rluf.objectives.text import TextEncoder
from rluf.types import Message

logger = logging.getLogger(__name__)


def load_classifier(
    folder: Path, *, trained: bool, device: str = "cpu", dropout: float | None = None, seed: int = 0
) -> PreTrainedModel:
    """The folder's model as AutoModelForSequenceClassification with one logit, in float32.

    With `trained`, every weight must be in the folder; otherwise the head is drawn from `seed`. `dropout` replaces
    the backbone's own. Raises ModelError for a folder that is not such a model.
    """
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        config.num_labels = 1
        if dropout is not None:
            for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout"):
                if hasattr(config, key):
                    setattr(config, key, dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                attn_implementation="eager" if device == "cpu" else None,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} holds no model that can score text: {error}; check the path") from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if trained and info["missing_keys"]:
        raise ModelError(
            f"{folder} lacks the weights {', '.join(sorted(info['missing_keys'])[:4])}; it is a backbone, not a trained "
            "reward model: train one with python -m rluf.reward"
        )
    found: PreTrainedModel = model
    return found.to(device)


def encoder_for(model: PreTrainedModel, folder: Path, max_tokens: int) -> TextEncoder:
    """The text encoder of a model folder; also tells the model its pad id, which decoders need to find the end."""
    from rluf.models import load_tokenizer

    longest = getattr(model.config, "max_position_embeddings", max_tokens)
    encoder = TextEncoder(load_tokenizer(folder), min(max_tokens, int(longest)))
    model.config.pad_token_id = encoder.pad_id
    return encoder


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The backbone's layers, lowest first: its largest module list at the outermost level. Raises ModelError if none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers, so frozen_layers must be 0")
    return max(lists, key=len)


def freeze(model: PreTrainedModel, layers: int) -> int:
    """Freeze the embeddings and the `layers` lowest layers (0 freezes nothing); returns trainable parameters.

    Raises ModelError when that would leave no layer to train.
    """
    if layers:
        stack = layer_list(model)
        if layers >= len(stack):
            raise ModelError(
                f"frozen_layers={layers} leaves nothing to train in a backbone of {len(stack)} layers; "
                f"set it below {len(stack)}"
            )
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(requires_grad=False)
        embeddings = getattr(model.base_model, "embeddings", None)
        for module in [*([embeddings] if isinstance(embeddings, nn.Module) else []), *stack[:layers]]:
            module.requires_grad_(requires_grad=False)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def quick_cpu_matmul() -> None:
    """Let float32 matrix products of this process go through oneDNN: twice as fast as MKL on AMD CPUs.

    On CPUs with AMX tiles oneDNN would also round the inputs to bfloat16, so there the default stays.
    """
    if torch.backends.mkldnn.is_available() and not torch.cpu.get_capabilities().get("amx_tile", False):
        torch.set_float32_matmul_precision("medium")


def probe_items() -> list[tuple[list[Message], str]]:
    """Two short items, one with an empty response, to try a freshly loaded model with."""
    question: list[Message] = [{"role": "user", "content": "How are you?"}]
    return [(question, "Well, thank you."), (question, "")]


def hidden_of(output: Any) -> torch.Tensor:
    """Hidden states [B, T, H] from a layer's output, which is a tensor or a tuple that starts with it."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
