"""A pretrained model with a one-logit head: loading, freezing, and what makes it quick on a CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rluf.errors import ModelError
from rluf.reward.text import TextEncoder
from rluf.types import Message

logger = logging.getLogger(__name__)

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout")
"""Names that backbones give their dropout."""


def load_classifier(
    folder: Path,
    *,
    trained: bool,
    device: str = "cpu",
    dropout: float | None = None,
    seed: int = 0,
    layers: int = 0,
    heads: int = 1,
) -> PreTrainedModel:
    """The folder's model as AutoModelForSequenceClassification with `heads` logits, in float32.

    `layers` keeps that many of its lowest layers (0 keeps all): middle layers often tell more than the last ones.

    With `trained`, every weight must be in the folder; otherwise the head is drawn from `seed`. `dropout` replaces
    the backbone's own. Raises ModelError for a folder that is not such a model.
    """
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        config.num_labels = heads
        _keep_layers(config, layers)
        if dropout is not None:
            for key in DROPOUTS:
                if hasattr(config, key):
                    setattr(config, key, dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="eager" if device == "cpu" else None,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} holds no model that can score text: {error}; check the path") from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if trained and info["missing_keys"]:
        raise ModelError(
            f"{folder} lacks the weights {', '.join(sorted(info['missing_keys'])[:4])}; it is a backbone, not a "
            "trained reward model: train one with python -m rluf.reward"
        )
    found: PreTrainedModel = model
    return found.to(device)


def _keep_layers(config: Any, layers: int) -> None:
    """Make the config that of the lowest `layers` layers. Raises ModelError when the model has fewer."""
    if not layers:
        return
    if layers > config.num_hidden_layers:
        raise ModelError(f"layers={layers} is more than the {config.num_hidden_layers} layers there are; lower it")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def encoder_for(
    model: PreTrainedModel,
    folder: Path,
    max_tokens: int,
    *,
    next_turn: bool = False,
    alone: bool = True,
    response_alone: bool = False,
) -> TextEncoder:
    """The text encoder of a model folder; also tells the model its pad id, which decoders need to find the end.

    Unless it is `alone`, next_turn is meant for the decoders of an ensemble, so an encoder leaves it out.
    """
    from rluf.models.hub import load_tokenizer

    longest = getattr(model.config, "max_position_embeddings", max_tokens)
    tokenizer = load_tokenizer(folder)
    next_turn = next_turn and (alone or tokenizer.cls_token_id is None)
    longest = min(max_tokens, int(longest))
    encoder = TextEncoder(tokenizer, longest, next_turn=next_turn, response_alone=response_alone)
    model.config.pad_token_id = encoder.pad_id
    return encoder


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The backbone's layers, lowest first: its longest module list. Raises ModelError if there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers, so frozen_share must be 0")
    return max(lists, key=len)


def freeze(model: PreTrainedModel, share: float) -> int:
    """Freeze the embeddings and a share (below 1) of the layers, lowest first, rounded down; 0 freezes nothing.

    Returns how many layers are frozen.
    """
    if share <= 0:
        return 0
    stack = layer_list(model)
    layers = int(share * len(stack))
    frozen = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings = getattr(model.base_model, "embeddings", None)
    if isinstance(embeddings, nn.Module):
        frozen.append(embeddings)
    for module in [*frozen, *stack[:layers]]:
        module.requires_grad_(requires_grad=False)
    return layers


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
