"""Frozen lower layers computed once: their output for every training row is kept and replayed in each epoch.

The rows' hidden states after the frozen layers never change, so running those layers again in every epoch (and for
every look at dev) is lost work. Holds rows x tokens x hidden x 2 bytes (bfloat16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rluf.reward.backbone import hidden_of, layer_list
from rluf.reward.text import Encoded, TextEncoder, token_batches

LIMIT_BYTES = 2 << 30
"""More than this is not kept: the frozen layers then run in every epoch."""


class FrozenPrefix:
    """Replays the output of a model's `layers` lowest layers for the rows of the batch at hand."""

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        self.model = model
        self.stack = layer_list(model)
        self.layers = layers
        self.current: torch.Tensor | None = None
        self._tuple = False

    @classmethod
    def worthwhile(cls, model: PreTrainedModel, layers: int, tokens: int) -> bool:
        """Whether there is a frozen layer and `tokens` hidden states fit in LIMIT_BYTES."""
        return layers > 0 and tokens * int(model.config.hidden_size) * 2 <= LIMIT_BYTES

    @torch.no_grad()
    def compute(self, encoder: TextEncoder, rows: Sequence[Encoded], batch_tokens: int) -> list[torch.Tensor]:
        """Hidden states [T, H] of each row after the frozen layers, without dropout, on the CPU in bfloat16."""
        kept: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        device = next(self.model.parameters()).device
        caught: list[torch.Tensor] = []

        def catch(_module: nn.Module, _args: Any, output: Any) -> None:
            self._tuple = isinstance(output, tuple)
            caught.append(hidden_of(output))

        hook = self.stack[self.layers - 1].register_forward_hook(catch)
        was_training = self.model.training
        self.model.eval()
        try:
            with _passing_through(self.stack[self.layers :]):
                for batch in token_batches([len(row) for row in rows], batch_tokens):
                    inputs = encoder.collate([rows[i] for i in batch])
                    self.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
                    hidden = caught.pop().to("cpu", torch.bfloat16)
                    for place, index in enumerate(batch):
                        kept[index] = hidden[place, : len(rows[index])].clone()
        finally:
            hook.remove()
            self.model.train(was_training)
        return kept

    def load(self, hidden: Sequence[torch.Tensor]) -> None:
        """Set the batch to replay: hidden states of its rows, padded here on the right to [B, T, H]."""
        first = next(self.model.parameters())
        self.current = nn.utils.rnn.pad_sequence(list(hidden), batch_first=True).to(first.device, first.dtype)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Within: the frozen layers do nothing but hand out what `load` was last given."""

        def replay(_hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return (self.current,) if self._tuple else self.current

        with _passing_through(self.stack[: self.layers - 1]), _forward(self.stack[self.layers - 1], replay):
            yield


@contextmanager
def _passing_through(layers: Sequence[nn.Module] | nn.ModuleList) -> Iterator[None]:
    """Within: these layers return their input."""

    def same(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden

    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = same
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            _restore(layer, forward)


@contextmanager
def _forward(layer: nn.Module, forward: Any) -> Iterator[None]:
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        _restore(layer, before)


def _restore(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward
