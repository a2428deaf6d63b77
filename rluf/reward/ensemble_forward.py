"""Forward passes of ensembles: one pass through the deepest model serves all members that are truncations of it.

Decoders also read each conversation only once for all of its messages that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from rluf.errors import ModelError
from rluf.reward.backbone import get_layer_list
from rluf.reward.linear_probe import HEAD_MODULE_NAMES, HeadInputCapture, final_norm_or_pooler, get_linear_head
from rluf.reward.text import EncodedItem, TextEncoder, iter_shared_batches
from rluf.utils.stats import Floats


@dataclass(frozen=True, slots=True)
class SharedForward:
    """One forward pass: the model to run and the members it serves, with their heads and depths in layers.

    `depths` is empty when the model serves only itself; `heads` is empty when its head is not linear.
    """

    model: PreTrainedModel
    member_indices: tuple[int, ...]
    heads: tuple[torch.nn.Linear, ...]
    depths: tuple[int, ...]


def plan_forward_passes(models: Sequence[PreTrainedModel], response_only: Sequence[bool]) -> list[SharedForward]:
    """Plan the passes that serve all models, each model in one pass.

    A model whose head is not linear gets a pass without heads. Members that read only the response do not share a pass
    with members that read the conversation.
    """
    heads = [_find_linear_head(model) for model in models]
    layer_counts = [len(get_layer_list(model)) if len(models) > 1 else 0 for model in models]
    # Deepest first: a pass through the deepest model passes through every truncation of it.
    remaining = sorted(range(len(models)), key=lambda index: -layer_counts[index])
    forward_passes = []
    while remaining:
        deepest = remaining[0]
        truncations = [
            index
            for index in remaining[1:]
            if heads[deepest]
            and heads[index]
            and response_only[deepest] == response_only[index]
            and _is_truncation_of(models[deepest], models[index])
        ]
        # Shallowest first, the order in which HeadInputCapture returns the depths; the model that runs comes last.
        served = sorted([deepest, *truncations], key=lambda index: layer_counts[index])
        served_heads = tuple(head for head in (heads[index] for index in served) if head is not None)
        depths = tuple(layer_counts[index] for index in served) if truncations else ()
        forward_passes.append(SharedForward(models[deepest], tuple(served), served_heads, depths))
        remaining = [index for index in remaining if index not in served]
    return forward_passes


def _find_linear_head(model: PreTrainedModel) -> torch.nn.Linear | None:
    try:
        return get_linear_head(model)
    except ModelError:
        return None


def _is_truncation_of(deep_model: PreTrainedModel, shallow_model: PreTrainedModel) -> bool:
    """Whether `shallow_model` consists of the lowest layers of `deep_model` with another head."""
    if type(deep_model) is not type(shallow_model) or final_norm_or_pooler(deep_model) is None:
        return False
    if len(get_layer_list(shallow_model)) >= len(get_layer_list(deep_model)):
        return False
    # Compare the weights themselves: members may come from different folders, or have been trained apart.
    deep_weights, shallow_weights = deep_model.state_dict(), shallow_model.state_dict()
    backbone_names = [name for name in shallow_weights if name.partition(".")[0] not in HEAD_MODULE_NAMES]
    return all(
        name in deep_weights and torch.equal(deep_weights[name], shallow_weights[name]) for name in backbone_names
    )


@torch.inference_mode()
def compute_shared_logits(
    forward_pass: SharedForward, encoder: TextEncoder, rows: Sequence[EncodedItem], batch_tokens: int
) -> Floats:
    """Logits [members of the pass, N, logits per head] of rows, in order."""
    logits = np.zeros((len(forward_pass.member_indices), len(rows), forward_pass.heads[0].out_features))
    device = next(forward_pass.model.parameters()).device
    # The heads are applied here, in float64: the model's own head reads only the deepest layer.
    heads = [
        (_to_float64(head.weight).T, 0.0 if head.bias is None else _to_float64(head.bias))
        for head in forward_pass.heads
    ]
    capture = HeadInputCapture(forward_pass.model, forward_pass.depths)
    try:
        for batch, readers in iter_shared_batches(
            rows, is_causal=not encoder.uses_text_pairs, batch_tokens=batch_tokens
        ):
            inputs = encoder.collate([rows[index] for index in batch])
            forward_pass.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            # A row that is a prefix of another is read at its own last token of the longer row.
            features = capture.take_features(
                [(batch_index, len(rows[row_index]) - 1) for batch_index, row_index in readers]
            )
            row_indices = [row_index for _, row_index in readers]
            for head_index, (weight, bias) in enumerate(heads):
                logits[head_index, row_indices] = features[head_index] @ weight + bias
    finally:
        capture.close()
    return logits


def _to_float64(parameter: torch.Tensor) -> Floats:
    return parameter.detach().float().cpu().numpy().astype(np.float64)
