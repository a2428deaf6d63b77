"""Ensembles whose members are depths of one untouched backbone: one forward pass through the deepest serves them all.

Decoders also read each conversation once for all of its messages that are to be scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from rluf.errors import ModelError
from rluf.objectives.backbone import layer_list
from rluf.objectives.calibration import Floats
from rluf.objectives.probe import HEADS, HeadInput, linear_head, read_out
from rluf.objectives.text import Encoded, TextEncoder, shared_batches


@dataclass(frozen=True, slots=True)
class Pass:
    """The model that is run, the deepest of the members that it serves, and how deep each reads."""

    members: tuple[int, ...]
    """Their numbers, the deepest last."""
    models: tuple[PreTrainedModel, ...]
    depths: tuple[int, ...]
    """Empty for one member, which is read at its own head."""
    linear: bool
    """Whether the heads are linear, so that they can be applied apart from the model."""

    @property
    def model(self) -> PreTrainedModel:
        """The model that is run."""
        return self.models[-1]


def passes(models: Sequence[PreTrainedModel]) -> list[Pass]:
    """The passes that serve all models, each model once."""
    linear = [_is_linear(model) for model in models]
    depth = [len(layer_list(model)) if len(models) > 1 else 0 for model in models]
    left, found = sorted(range(len(models)), key=lambda number: -depth[number]), []
    while left:
        deep = left[0]
        others = [number for number in left[1:] if linear[deep] and linear[number]]
        alike = [number for number in others if _begins(models[deep], models[number])]
        served = tuple(sorted([*alike, deep], key=lambda number: depth[number]))
        depths = tuple(depth[number] for number in served) if alike else ()
        found.append(Pass(served, tuple(models[number] for number in served), depths, linear[deep]))
        left = [number for number in left if number not in served]
    return found


def _is_linear(model: PreTrainedModel) -> bool:
    try:
        linear_head(model)
    except ModelError:
        return False
    return True


def _begins(deep: PreTrainedModel, low: PreTrainedModel) -> bool:
    """Whether `low` is the lowest layers of `deep` with another head."""
    if type(deep) is not type(low) or read_out(deep) is None or len(layer_list(low)) >= len(layer_list(deep)):
        return False
    mine, theirs = deep.state_dict(), low.state_dict()
    body = [name for name in theirs if name.partition(".")[0] not in HEADS]
    return all(name in mine and torch.equal(mine[name], theirs[name]) for name in body)


@torch.inference_mode()
def pass_logits(run: Pass, encoder: TextEncoder, rows: Sequence[Encoded], batch_tokens: int) -> Floats:
    """Logits [members of the pass, N, heads] of rows, in order."""
    heads = [linear_head(model) for model in run.models]
    weights = [_numbers(head.weight).T for head in heads]
    biases = [0.0 if head.bias is None else _numbers(head.bias) for head in heads]
    result = np.zeros((len(heads), len(rows), heads[0].out_features))
    device = next(run.model.parameters()).device
    caught = HeadInput(run.model, run.depths)
    try:
        for batch, takers in shared_batches(rows, causal=not encoder.pair, batch_tokens=batch_tokens):
            inputs = encoder.collate([rows[index] for index in batch])
            run.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            read = caught.take([(place, len(rows[index]) - 1) for place, index in takers])
            for member in range(len(heads)):
                result[member, [index for _, index in takers]] = read[member] @ weights[member] + biases[member]
    finally:
        caught.close()
    return result


def _numbers(parameter: torch.Tensor) -> Floats:
    return parameter.detach().float().cpu().numpy().astype(np.float64)
