"""Low-rank adapters: a large backbone learns with a few million weights, and the checkpoint has them merged.

W + (alpha / r) B A with alpha = 2 r on every linear layer of the layers that train (Hu et al. 2021). PEFT puts the
adapters in, in place, so that the model stays the class it was; the merged checkpoint needs no PEFT to be read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from rluf.reward.backbone import layer_list
from rluf.reward.linear_probe import linear_head

ALPHA_PER_RANK = 2
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(model: PreTrainedModel, rank: int, frozen: int, dropout: float) -> None:
    """Put adapters of `rank` on the linear layers above the `frozen` lowest layers; these and the head train."""
    from peft import LoraConfig, inject_adapter_in_model

    head, stack = linear_head(model), layer_list(model)
    names = {id(module): name for name, module in model.named_modules()}
    targets = [
        name
        for layer in list(stack)[frozen:]
        for inner, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and (name := f"{names[id(layer)]}.{inner}")
    ]
    config = LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, lora_dropout=dropout, target_modules=targets)
    inject_adapter_in_model(config, model)
    head.requires_grad_(requires_grad=True)


def merged(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights [by name] of a model without adapters that computes the same; weights without any come back as is."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith((DOWN, UP)):
            continue
        stem = name.replace(BASE, ".")
        whole = tensor.float()
        adapter = stem.removesuffix(".weight")
        if adapter + DOWN in weights and stem.endswith(".weight"):
            whole = whole + ALPHA_PER_RANK * (weights[adapter + UP].float() @ weights[adapter + DOWN].float())
        found[stem] = whole
    return found
