"""LoRA adapters on a policy, and the merged weights they amount to, for engines and folders without adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

ADAPTER_NAME = "default"
ALPHA_PER_RANK = 2.0
"""lora_alpha / rank, the scale of the low-rank update."""


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """Low-rank update of one weight [out, in]: scaling * lora_b [out, rank] @ lora_a [rank, in]."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scaling: float

    def merge_into(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """`weight` plus the update, in the dtype of `weight`; `lora_a` and `lora_b` are the gathered tensors."""
        # Added in float32: in bfloat16 most small updates of a weight near 1 would be rounded away.
        update: Tensor = self.scaling * (lora_b.float() @ lora_a.float())
        return (weight.float() + update).to(weight.dtype)


def add_lora_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Add an adapter of `rank` to every linear layer except the output head, and freeze all other weights.

    The initial adapters change nothing (lora_b is zero). Source: Hu et al., arXiv 2106.09685.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=int(ALPHA_PER_RANK * rank), target_modules="all-linear", lora_dropout=0.0)
    adapted_model: nn.Module = inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    return adapted_model


def find_lora_adapters(model: nn.Module) -> Mapping[str, LoraAdapter]:
    """Adapters of `model` by the name of the weight they change; empty without LoRA."""
    adapters = {}
    for module_name, module in model.named_modules():
        if hasattr(module, "lora_A") and ADAPTER_NAME in module.lora_A:
            lora_a, lora_b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
            adapters[f"{module_name}.weight"] = LoraAdapter(lora_a, lora_b, float(module.scaling[ADAPTER_NAME]))
    return adapters


def get_checkpoint_name(parameter_name: str) -> str | None:
    """Name of a parameter in a checkpoint without adapters; None for the matrices of an adapter."""
    if ".lora_A." in parameter_name or ".lora_B." in parameter_name:
        return None
    # PEFT wraps an adapted linear layer and moves its weight one level down.
    return parameter_name.replace(".base_layer.", ".")
