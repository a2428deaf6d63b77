"""Moving average of the policy and refreshed reference policy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rluf.models.weight_average import WeightAverage, copy_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_of_trained_weights_by_hand(dtype: torch.dtype, decay: float) -> None:
    module = nn.Linear(2, 2).to(dtype)
    module.bias.requires_grad_(False)
    average, expected = WeightAverage(module, decay), module.weight.detach().float().clone()
    assert list(average.tensors) == ["weight"]
    for step in range(1, 4):
        with torch.no_grad():
            module.weight.fill_(step)
        average.update(module)
        expected = decay * expected + (1 - decay) * step
    assert torch.allclose(average.tensors["weight"], expected)
    restored = WeightAverage(module, decay)
    restored.restore({name: tensor.clone() for name, tensor in average.tensors.items()})
    restored.copy_to(module)
    assert torch.allclose(module.weight.float(), expected, rtol=1e-2)


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.fill_(1.0)
    average = WeightAverage(module, 0.999)
    with torch.no_grad():
        module.weight.fill_(1.5)
    for _ in range(100):
        average.update(module)
    assert average.tensors["weight"].item() == pytest.approx(1.5 - 0.5 * 0.999**100, abs=1e-4)


def test_a_refreshed_reference_has_the_weights_of_the_policy() -> None:
    policy, reference = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    copy_weights(policy, reference)
    assert torch.equal(policy.weight, reference.weight) and torch.equal(policy.bias, reference.bias)
    assert not reference.weight.requires_grad


def test_an_average_leaves_its_device() -> None:
    average = WeightAverage(nn.Linear(3, 2), 0.9)
    average.move_to("meta")
    assert {tensor.device.type for tensor in average.tensors.values()} == {"meta"}
