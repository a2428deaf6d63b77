"""Dropout from random bits has the rate, scale and gradient of torch's, and a seed fixes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from rluf.models import dropout
from rluf.models.dropout import CpuDropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_rate_scale_and_gradient_are_those_of_dropout(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    values = torch.ones(401, 501, dtype=dtype, requires_grad=True)
    with CpuDropout():
        output = functional.dropout(values, rate)
    output.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, output)
    remaining = output != 0
    assert output[remaining].unique().tolist() == pytest.approx([1 / (1 - rate)], rel=0.01)
    share_error = math.sqrt(rate * (1 - rate) / values.numel())
    assert float(remaining.float().mean()) == pytest.approx(1 - rate, abs=4 * share_error)
    # Neighbors share a random word, and must be independent all the same.
    for distance in (1, 2, 3, 4):
        both = remaining.flatten()[distance:] & remaining.flatten()[:-distance]
        assert float(both.float().mean()) == pytest.approx((1 - rate) ** 2, abs=5 * share_error)


def test_a_seed_fixes_the_mask_and_the_next_mask_differs() -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        with CpuDropout():
            outputs.append([functional.dropout(torch.ones(1000), 0.3) for _ in range(2)])
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[0][1])


def test_evaluation_and_the_rates_zero_and_one_stay_as_they_are() -> None:
    values = torch.randn(100)
    with CpuDropout():
        assert torch.equal(functional.dropout(values, 0.1, training=False), values)
        assert torch.equal(functional.dropout(values, 0.0), values)
        assert not functional.dropout(values, 1.0).any()
        in_place = values.clone()
        assert functional.dropout(in_place, 0.5, inplace=True) is in_place
        assert not torch.equal(in_place, values)
        with pytest.raises(ValueError, match="between 0 and 1"):
            functional.dropout(values, 1.5)


def test_every_dropout_of_an_encoder_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50,
        attn_implementation="eager",
    )  # fmt: skip
    model, shapes = BertModel(config), []
    drop_out = dropout._drop_out

    def record(values: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        shapes.append(values.shape)
        return drop_out(values, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dropout, "_drop_out", record)
    with CpuDropout():
        model.train()(torch.arange(40).view(2, 20))
    # Of the embeddings; in each layer of the attention weights, the attention's output and the layer's output.
    hidden, attention = torch.Size([2, 20, 32]), torch.Size([2, 2, 20, 20])
    assert shapes == [hidden, *[attention, hidden, hidden] * 2]
