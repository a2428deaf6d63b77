"""Load and freeze a pretrained backbone with a one-logit classification head; CPU speed settings."""

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

DROPOUT_CONFIG_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout")
"""Config keys under which Hugging Face backbones store their dropout rates."""


def load_classifier(
    folder: Path,
    *,
    require_all_weights: bool,
    device: str = "cpu",
    dropout: float | None = None,
    seed: int = 0,
    layer_count: int = 0,
    head_count: int = 1,
) -> PreTrainedModel:
    """Load a model folder as AutoModelForSequenceClassification with `head_count` logits, in float32.

    `layer_count` retains only the lowest layers (0 retains all); middle layers are often more informative than the
    last ones. With `require_all_weights` every weight must be in the folder; otherwise a missing head is initialized
    from `seed`. `dropout` overrides the backbone's own rates. Raises ModelError if the folder has no such model.
    """
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        config.num_labels = head_count
        _truncate_layers(config, layer_count)
        if dropout is not None:
            for key in DROPOUT_CONFIG_KEYS:
                if hasattr(config, key):
                    setattr(config, key, dropout)
        # A missing head is initialized by the global generator: fork it, so that loading changes no other random draw.
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
        raise ModelError(
            f"{folder} does not contain a sequence classification model: {error}; check the path"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if require_all_weights and info["missing_keys"]:
        raise ModelError(
            f"{folder} lacks the weights {', '.join(sorted(info['missing_keys'])[:4])}; it is a backbone, not a "
            "trained reward model; train one with python -m rluf.reward"
        )
    classifier: PreTrainedModel = model
    return classifier.to(device)


def _truncate_layers(config: Any, layer_count: int) -> None:
    """Limit the config to the lowest `layer_count` layers. Raises ModelError if the model has fewer."""
    if not layer_count:
        return
    if layer_count > config.num_hidden_layers:
        raise ModelError(f"layers={layer_count} exceeds the {config.num_hidden_layers} layers of the model; lower it")
    config.num_hidden_layers = layer_count
    # Hybrid decoders list the attention type of every layer and refuse a list of another length.
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layer_count]


def build_text_encoder(
    model: PreTrainedModel,
    folder: Path,
    max_tokens: int,
    *,
    read_at_next_turn: bool = False,
    is_single_model: bool = True,
    response_only: bool = False,
) -> TextEncoder:
    """Build the text encoder of a model folder and set the model's pad token id, which decoders need to pool.

    In an ensemble (`is_single_model` false), read_at_next_turn applies to the decoders only; encoders ignore it.
    """
    from rluf.models.hub import load_tokenizer

    position_limit = int(getattr(model.config, "max_position_embeddings", max_tokens))
    tokenizer = load_tokenizer(folder)
    read_at_next_turn = read_at_next_turn and (is_single_model or tokenizer.cls_token_id is None)
    encoder = TextEncoder(
        tokenizer,
        min(max_tokens, position_limit),
        read_at_next_turn=read_at_next_turn,
        response_only=response_only,
    )
    model.config.pad_token_id = encoder.pad_id
    return encoder


def get_layer_list(model: nn.Module) -> nn.ModuleList:
    """Layers of the backbone, lowest first: its longest ModuleList. Raises ModelError if there is none."""
    module_lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not module_lists:
        raise ModelError(f"{type(model).__name__} has no list of layers, so frozen_share must be 0")
    return max(module_lists, key=len)


def freeze_lowest_layers(model: PreTrainedModel, layer_share: float) -> int:
    """Freeze the embeddings and a share of the layers, lowest first, rounded down; 0 freezes nothing.

    Returns the number of frozen layers.
    """
    if layer_share <= 0:
        return 0
    all_layers = get_layer_list(model)
    frozen_count = int(layer_share * len(all_layers))
    frozen_modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # Encoders wrap their embedding tables in a module with a LayerNorm of its own, which must be frozen as well.
    embeddings = getattr(model.base_model, "embeddings", None)
    if isinstance(embeddings, nn.Module):
        frozen_modules.append(embeddings)
    for module in [*frozen_modules, *all_layers[:frozen_count]]:
        module.requires_grad_(requires_grad=False)
    return frozen_count


def enable_fast_cpu_matmul() -> None:
    """Run the float32 matrix products of this process through oneDNN: twice as fast as MKL on AMD CPUs.

    On CPUs with AMX tiles oneDNN would also round the inputs to bfloat16, so the default is left unchanged there.
    """
    if torch.backends.mkldnn.is_available() and not torch.cpu.get_capabilities().get("amx_tile", False):
        torch.set_float32_matmul_precision("medium")


def build_warmup_items() -> list[tuple[list[Message], str]]:
    """Two short items, one with an empty response, for the first forward pass of a freshly loaded model."""
    question: list[Message] = [{"role": "user", "content": "How are you?"}]
    return [(question, "Well, thank you."), (question, "")]


def get_hidden_states(output: Any) -> torch.Tensor:
    """Hidden states [B, T, H] of a layer output, which is a tensor or a tuple that starts with one."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
