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
from rluf.reward.backbone import layer_list
from rluf.reward.calibration import Floats
from rluf.reward.linear_probe import HEADS, HeadInput, linear_head, read_out
from rluf.reward.text import Encoded, TextEncoder, shared_batches


@dataclass(frozen=True, slots=True)
class Pass:
    """The model that is run, and the members (numbers, heads, depths) that it serves; no depths: its own head alone."""

    model: PreTrainedModel
    members: tuple[int, ...]
    heads: tuple[torch.nn.Linear, ...]
    depths: tuple[int, ...]


def passes(models: Sequence[PreTrainedModel], response_alone: Sequence[bool]) -> list[Pass]:
    """The passes that serve all models, each model once; one whose head is not linear has a pass without heads.

    Those that read the response alone share no pass with the others.
    """
    heads = [_head(model) for model in models]
    depth = [len(layer_list(model)) if len(models) > 1 else 0 for model in models]
    left, found = sorted(range(len(models)), key=lambda number: -depth[number]), []
    while left:
        deep = left[0]
        alike = [
            number
            for number in left[1:]
            if heads[deep]
            and heads[number]
            and response_alone[deep] == response_alone[number]
            and _begins(models[deep], models[number])
        ]
        served = sorted([deep, *alike], key=lambda number: depth[number])
        kept = tuple(head for head in (heads[number] for number in served) if head is not None)
        found.append(Pass(models[deep], tuple(served), kept, tuple(depth[n] for n in served) if alike else ()))
        left = [number for number in left if number not in served]
    return found


def _head(model: PreTrainedModel) -> torch.nn.Linear | None:
    try:
        return linear_head(model)
    except ModelError:
        return None


def _begins(deep: PreTrainedModel, low: PreTrainedModel) -> bool:
    """Whether `low` is the lowest layers of `deep` with another head."""
    if type(deep) is not type(low) or read_out(deep) is None or len(layer_list(low)) >= len(layer_list(deep)):
        return False
    mine, theirs = deep.state_dict(), low.state_dict()
    body = [name for name in theirs if name.partition(".")[0] not in HEADS]
    return all(name in mine and torch.equal(mine[name], theirs[name]) for name in body)


@torch.inference_mode()
def pass_logits(run: Pass, encoder: TextEncoder, rows: Sequence[Encoded], batch_tokens: int) -> Floats:
    """Logits [members of the pass, N, logits of a head] of rows, in order."""
    result = np.zeros((len(run.members), len(rows), run.heads[0].out_features))
    device = next(run.model.parameters()).device
    heads = [(_numbers(head.weight).T, 0.0 if head.bias is None else _numbers(head.bias)) for head in run.heads]
    caught = HeadInput(run.model, run.depths)
    try:
        for batch, takers in shared_batches(rows, causal=not encoder.pair, batch_tokens=batch_tokens):
            inputs = encoder.collate([rows[index] for index in batch])
            run.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            read = caught.take([(place, len(rows[index]) - 1) for place, index in takers])
            for number, (weight, bias) in enumerate(heads):
                result[number, [index for _, index in takers]] = read[number] @ weight + bias
    finally:
        caught.close()
    return result


def _numbers(parameter: torch.Tensor) -> Floats:
    return parameter.detach().float().cpu().numpy().astype(np.float64)
