"""Several heads on one shared backbone: love, continued, dislike, helpfulness, safety, scored by one forward pass.

Each head has a folder of its own, like a separate model: config with one logit, calibration, card, and two weight
files, `head.safetensors` and `backbone.safetensors`; the latter is one file on disk with several hard links. Plain
transformers and vLLM can load such a folder; rluf finds folders that belong together by the backbone hash in
calibration.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from rluf.config.reward import REACTION_HEADS
from rluf.errors import DataError
from rluf.reward.backbone import get_linear_head

BACKBONE_FILE, HEAD_FILE, INDEX_FILE = "backbone.safetensors", "head.safetensors", "model.safetensors.index.json"
HEAD_DATA_SOURCES: Mapping[str, str] = dict.fromkeys(REACTION_HEADS, "love")
"""Heads that are trained on the data of another objective, with labels of their own."""
HEAD_REQUIREMENTS: Mapping[str, str] = {
    "continued": "whether the user continued", "thumbs": "a thumb up or down", "dislike": "a thumb down",
}  # fmt: skip
"""What a row of the log needs for a label of the head, for error messages."""
THUMBS_UP_REACTIONS, THUMBS_DOWN_REACTIONS = ("love", "thumbs_up", "like"), ("thumbs_down", "dislike")


def get_data_objective(head: str) -> str:
    """The objective whose prepared data the head is trained on."""
    return HEAD_DATA_SOURCES.get(head, head)


def select_labeled_rows(head: str, records: Sequence[Mapping[str, Any]], source_name: str) -> list[Mapping[str, Any]]:
    """Records with a label of the head: `continued` if the log has the field, `thumbs` for a thumb up or down.

    `dislike` is a thumb down against everything else, like love; it needs one thumb down among the records. Other heads
    take all records unchanged. Raises DataError when no record is left.
    """
    if head not in HEAD_DATA_SOURCES:
        return list(records)
    labeled_rows: list[Mapping[str, Any]] = [
        {**row, "label": label} for row in records if (label := get_head_label(head, row)) is not None
    ]
    if not labeled_rows or (head == "dislike" and not any(row["label"] for row in labeled_rows)):
        requirement = HEAD_REQUIREMENTS[head]
        raise DataError(
            f"no row of {source_name} has {requirement}, so the head {head} has no training rows; remove it from "
            "reward.shared_backbone_heads"
        )
    return labeled_rows


def get_head_label(head: str, record: Mapping[str, Any]) -> int | None:
    """The head's own label of a record; None if it has none, as for pairs."""
    if head == "continued":
        label = record.get("continued")
    elif head == "thumbs":
        reaction = record.get("reaction")
        is_rated = reaction in (*THUMBS_UP_REACTIONS, *THUMBS_DOWN_REACTIONS)
        label = reaction in THUMBS_UP_REACTIONS if is_rated else None
    elif head == "dislike":
        label = record.get("reaction") in THUMBS_DOWN_REACTIONS
    else:
        label = record.get("label")
    return None if label is None else int(label)


def find_head_name(model: nn.Module) -> str:
    """Name of the linear head among the model's modules."""
    head = get_linear_head(model)
    return next(name for name, module in model.named_modules() if module is head)


def save_head_folders(model: PreTrainedModel, tokenizer: Any, folders: Sequence[Path]) -> str:
    """Write each logit of the model as a folder with one logit, in order; returns the hash of the shared backbone."""
    head_name = find_head_name(model)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    head_weights = {name: tensor for name, tensor in weights.items() if name.startswith(f"{head_name}.")}
    backbone_weights = {name: tensor for name, tensor in weights.items() if name not in head_weights}
    # Each folder's config describes a one-logit model: plain transformers must be able to load it.
    model.config.num_labels, model.config.architectures = 1, [type(model).__name__]
    for head_index, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        if head_index == 0:
            save_file(backbone_weights, folder / BACKBONE_FILE, metadata={"format": "pt"})
        else:
            _link_or_copy(folders[0] / BACKBONE_FILE, folder / BACKBONE_FILE)
        # Cloned: safetensors refuses a slice that shares memory with the whole head.
        own_weights = {name: tensor[head_index : head_index + 1].clone() for name, tensor in head_weights.items()}
        save_file(own_weights, folder / HEAD_FILE, metadata={"format": "pt"})
        tensors = (*backbone_weights.values(), *own_weights.values())
        total_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        weight_map = {**dict.fromkeys(backbone_weights, BACKBONE_FILE), **dict.fromkeys(own_weights, HEAD_FILE)}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        model.config.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    with (folders[0] / BACKBONE_FILE).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system does not support links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@torch.no_grad()
def load_heads(model: PreTrainedModel, folders: Sequence[Path]) -> None:
    """Replace the head of a loaded one-logit model by the heads of all `folders` of its backbone, one logit each."""
    head_name, head = find_head_name(model), get_linear_head(model)
    head_weights = [load_file(folder / HEAD_FILE) for folder in folders]
    joint_head = nn.Linear(head.in_features, len(head_weights), bias=head.bias is not None).to(head.weight)
    joint_head.weight.copy_(torch.cat([weights[f"{head_name}.weight"] for weights in head_weights]))
    if head.bias is not None:
        joint_head.bias.copy_(torch.cat([weights[f"{head_name}.bias"] for weights in head_weights]))
    setattr(model, head_name, joint_head)
    model.config.num_labels = len(head_weights)
