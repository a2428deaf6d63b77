"""LoRA adapters on a policy, and the plain weights that they amount to: engines and saved folders know no adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

ADAPTER = "default"
ALPHA = 2.0
"""lora_alpha / rank: how strongly adapters count."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The low-rank change of one weight [out, in]: scale * up [out, rank] @ down [rank, in]."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float

    def merged(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """`weight` with the change added in float32, in its own type; `down` and `up` are the whole tensors."""
        change: Tensor = self.scale * (up.float() @ down.float())
        return (weight.float() + change).to(weight.dtype)


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Put an adapter of `rank` beside every linear layer but the output head; all other weights are frozen.

    Adapters begin as no change. Source: Hu et al., arXiv 2106.09685.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=int(ALPHA * rank), target_modules="all-linear", lora_dropout=0.0)
    adapted: nn.Module = inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    return adapted


def adapters(model: nn.Module) -> Mapping[str, Adapter]:
    """Adapters of `model` by the plain name of the weight they change; empty without LoRA."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and ADAPTER in module.lora_A:
            down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            found[f"{name}.weight"] = Adapter(down, up, float(module.scaling[ADAPTER]))
    return found


def plain_name(name: str) -> str | None:
    """Name of a parameter in a checkpoint without adapters; None for an adapter's own."""
    if ".lora_A." in name or ".lora_B." in name:
        return None
    return name.replace(".base_layer.", ".")
