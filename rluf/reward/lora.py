"""LoRA adapters for reward training: few trainable weights for a large backbone, merged into the checkpoint.

W + (alpha / r) B A with alpha = 2 r on every linear layer of the trainable layers (Hu et al. 2021). PEFT injects the
adapters in place, so the model's class does not change; reading the merged checkpoint does not need PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from rluf.reward.backbone import get_layer_list
from rluf.reward.linear_probe import get_linear_head

ALPHA_PER_RANK = 2
BASE_LAYER_INFIX, LORA_A_SUFFIX, LORA_B_SUFFIX = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora_adapters(model: PreTrainedModel, rank: int, frozen_layers: int, dropout: float) -> None:
    """Add adapters of `rank` to the linear layers above the lowest `frozen_layers`; only these and the head train."""
    from peft import LoraConfig, inject_adapter_in_model

    head, all_layers = get_linear_head(model), get_layer_list(model)
    module_names = {id(module): name for name, module in model.named_modules()}
    # Full module names: PEFT matches a short name in every layer, the frozen ones included.
    target_modules = [
        f"{module_names[id(layer)]}.{inner_name}"
        for layer in list(all_layers)[frozen_layers:]
        for inner_name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    config = LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, lora_dropout=dropout, target_modules=target_modules)
    inject_adapter_in_model(config, model)
    # Injection freezes all weights but the adapters'; the new head has to train.
    head.requires_grad_(requires_grad=True)


def merge_lora_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge adapters into the weights (by name) of an equivalent plain model; other weights are unchanged."""
    merged_weights = {}
    for name, tensor in weights.items():
        if name.endswith((LORA_A_SUFFIX, LORA_B_SUFFIX)):
            continue
        # PEFT renames the wrapped weight: layer.query.weight becomes layer.query.base_layer.weight.
        plain_name = name.replace(BASE_LAYER_INFIX, ".")
        merged_weight = tensor.float()
        module_name = plain_name.removesuffix(".weight")
        if module_name + LORA_A_SUFFIX in weights and plain_name.endswith(".weight"):
            lora_a, lora_b = weights[module_name + LORA_A_SUFFIX], weights[module_name + LORA_B_SUFFIX]
            merged_weight = merged_weight + ALPHA_PER_RANK * (lora_b.float() @ lora_a.float())
        merged_weights[plain_name] = merged_weight
    return merged_weights
