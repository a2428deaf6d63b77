"""Cache the output of frozen lower layers for every training row and replay it in each epoch.

The hidden states after the frozen layers never change, so running those layers again in every epoch (and for every dev
evaluation) is wasted work. The cache takes rows x tokens x hidden size x 2 bytes (bfloat16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rluf.reward.backbone import get_hidden_states, get_layer_list
from rluf.reward.text import EncodedItem, TextEncoder, plan_token_batches

MAX_CACHE_BYTES = 2 << 30
"""Largest cache; above it the frozen layers run in every epoch."""


class FrozenPrefix:
    """Replay the cached output of a model's lowest `layer_count` layers for the rows of a batch."""

    def __init__(self, model: PreTrainedModel, layer_count: int) -> None:
        self.model = model
        self.all_layers = get_layer_list(model)
        self.layer_count = layer_count
        self.batch_states: torch.Tensor | None = None
        self._returns_tuple = False

    @classmethod
    def is_worthwhile(cls, model: PreTrainedModel, layer_count: int, token_count: int) -> bool:
        """Whether any layer is frozen and the hidden states of `token_count` tokens fit in MAX_CACHE_BYTES."""
        return layer_count > 0 and token_count * int(model.config.hidden_size) * 2 <= MAX_CACHE_BYTES

    @torch.no_grad()
    def compute_hidden_states(
        self, encoder: TextEncoder, rows: Sequence[EncodedItem], batch_tokens: int
    ) -> list[torch.Tensor]:
        """Hidden states [T, H] of each row after the frozen layers, without dropout, on the CPU in bfloat16."""
        states_by_row: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        device = next(self.model.parameters()).device
        captured_states: list[torch.Tensor] = []

        def capture_output(_module: nn.Module, _args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            captured_states.append(get_hidden_states(output))

        hook = self.all_layers[self.layer_count - 1].register_forward_hook(capture_output)
        was_training = self.model.training
        self.model.eval()
        try:
            # The layers above are bypassed: only the frozen part of the model is computed here.
            with _bypass_layers(self.all_layers[self.layer_count :]):
                for batch in plan_token_batches([len(row) for row in rows], batch_tokens):
                    inputs = encoder.collate([rows[index] for index in batch])
                    self.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
                    batch_states = captured_states.pop().to("cpu", torch.bfloat16)
                    for batch_index, row_index in enumerate(batch):
                        # Cloned, so that a row does not keep the padded tensor of its whole batch in memory.
                        states_by_row[row_index] = batch_states[batch_index, : len(rows[row_index])].clone()
        finally:
            hook.remove()
            self.model.train(was_training)
        return states_by_row

    def load_batch(self, hidden_states: Sequence[torch.Tensor]) -> None:
        """Set the batch to replay: hidden states of its rows, padded here on the right to [B, T, H]."""
        parameter = next(self.model.parameters())
        padded_states = nn.utils.rnn.pad_sequence(list(hidden_states), batch_first=True)
        self.batch_states = padded_states.to(parameter.device, parameter.dtype)

    @contextmanager
    def replay_batch(self) -> Iterator[None]:
        """Within the context, the frozen layers return the batch last passed to `load_batch`."""

        def return_batch_states(_hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return (self.batch_states,) if self._returns_tuple else self.batch_states

        # Only forward methods are replaced: parameters and module names stay as DeepSpeed has registered them.
        last_frozen_layer = self.all_layers[self.layer_count - 1]
        with (
            _bypass_layers(self.all_layers[: self.layer_count - 1]),
            _override_forward(last_frozen_layer, return_batch_states),
        ):
            yield


@contextmanager
def _bypass_layers(layers: Sequence[nn.Module] | nn.ModuleList) -> Iterator[None]:
    """Within the context, these layers return their input."""

    def return_input(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden

    previous_forwards = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = return_input
    try:
        yield
    finally:
        for layer, forward in zip(layers, previous_forwards, strict=True):
            _restore_forward(layer, forward)


@contextmanager
def _override_forward(layer: nn.Module, forward: Any) -> Iterator[None]:
    previous_forward = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        _restore_forward(layer, previous_forward)


def _restore_forward(layer: nn.Module, forward: Any) -> None:
    # Without an override of its own, the instance attribute is deleted, so that the class's method is found again.
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward
