"""Copies of a policy's weights that a run maintains: their moving average, and a reference policy that is refreshed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of the trained weights of a module, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the present weights; `decay` is the share of the average that an update retains."""
        self.decay = decay
        self.tensors = {name: tensor.float().clone() for name, tensor in _get_trained_weights(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average toward the present weights."""
        for name, tensor in _get_trained_weights(module).items():
            self.tensors[name].lerp_(tensor.float(), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Replace the weights of `module` by the average."""
        for name, tensor in _get_trained_weights(module).items():
            tensor.copy_(self.tensors[name])

    def move_to(self, device: torch.device | str) -> None:
        """Move the average to `device`: it must leave a GPU for an engine on the same one."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the average from the `tensors` of another one."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def _get_trained_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy all weights of `source` to `target`, a module of the same class."""
    target_weights = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        target_weights[name].copy_(parameter)
