"""LoRA adapters, and the merged weights they amount to, for engines and folders without adapters.

W + (alpha / r) B A with alpha = 2 r (Hu et al., arXiv 2106.09685). PEFT injects the adapters in place, so the model's
class does not change; reading merged weights does not need PEFT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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


def add_lora_adapters(
    model: nn.Module, rank: int, *, target_modules: str | Sequence[str] = "all-linear", dropout: float = 0.0
) -> nn.Module:
    """Add an adapter of `rank` to every linear layer except the output head, and freeze all other weights.

    `target_modules` names other layers in full: PEFT matches a short name in every layer. The initial adapters change
    nothing (lora_b is zero).
    """
    from peft import LoraConfig, inject_adapter_in_model

    module_names = target_modules if isinstance(target_modules, str) else list(target_modules)
    lora_alpha = int(ALPHA_PER_RANK * rank)
    lora_config = LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=module_names, lora_dropout=dropout)
    adapted_model: nn.Module = inject_adapter_in_model(lora_config, model, adapter_name=ADAPTER_NAME)
    return adapted_model


def find_lora_adapters(model: nn.Module) -> Mapping[str, LoraAdapter]:
    """Adapters of `model` by the name of the weight they change; empty without LoRA."""
    adapters = {}
    for module_name, module in model.named_modules():
        if hasattr(module, "lora_A") and ADAPTER_NAME in module.lora_A:
            lora_a, lora_b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
            adapters[f"{module_name}.weight"] = LoraAdapter(lora_a, lora_b, float(module.scaling[ADAPTER_NAME]))
    return adapters


@contextlib.contextmanager
def disable_lora_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context `model` computes without its adapters, as the model that they were added to."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        # Not enable_adapters(False): that also freezes the adapters' weights.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def get_checkpoint_name(parameter_name: str) -> str | None:
    """Name of a parameter in a checkpoint without adapters; None for the matrices of an adapter."""
    if ".lora_A." in parameter_name or ".lora_B." in parameter_name:
        return None
    # PEFT wraps an adapted linear layer and moves its weight one level down.
    return parameter_name.replace(".base_layer.", ".")


def merge_lora_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge adapters into the weights (by name) of an equivalent plain model, in float32; others are unchanged."""
    merged_weights = {}
    for weight_name, tensor in weights.items():
        checkpoint_name = get_checkpoint_name(weight_name)
        if checkpoint_name is None:
            continue
        module_name = checkpoint_name.removesuffix(".weight")
        lora_a, lora_b = (weights.get(f"{module_name}.lora_{matrix}.{ADAPTER_NAME}.weight") for matrix in "AB")
        merged_weight = tensor.float()
        if lora_a is not None and lora_b is not None and checkpoint_name.endswith(".weight"):
            merged_weight = merged_weight + ALPHA_PER_RANK * (lora_b.float() @ lora_a.float())
        merged_weights[checkpoint_name] = merged_weight
    return merged_weights
