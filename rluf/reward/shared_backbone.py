"""Several heads on one shared backbone: love, continued, thumbs, helpfulness, safety, scored by one forward pass.

Each head has a folder of its own, as a model alone would: config of one logit, calibration, card, and two weight files,
`head.safetensors` and `backbone.safetensors`, the latter one file on disk under several names. Plain transformers and
vLLM read such a folder; rluf sees by the backbone's hash in calibration.json which folders belong together.
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

from rluf.errors import DataError
from rluf.reward.linear_probe import linear_head

BACKBONE, HEAD, INDEX = "backbone.safetensors", "head.safetensors", "model.safetensors.index.json"
SOURCES: Mapping[str, str] = {"continued": "love", "thumbs": "love"}
"""Heads that learn from the data of another objective, with labels of their own."""
UP, DOWN = ("love", "thumbs_up", "like"), ("thumbs_down", "dislike")


def data_of(head: str) -> str:
    """The objective whose prepared data the head learns from."""
    return SOURCES.get(head, head)


def labelled(head: str, records: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """The head's own rows of these records: `continued` where the log tells, `thumbs` where somebody said up or down.

    Other heads take the records as they are. Raises DataError when none is left.
    """
    if head not in SOURCES:
        return list(records)
    found: list[Mapping[str, Any]] = [
        {**row, "label": label} for row in records if (label := label_of(head, row)) is not None
    ]
    if not found:
        what = "says whether users wrote on" if head == "continued" else "has a thumb up or down"
        raise DataError(f"no row of {where} {what}: the head {head} has nothing to learn; take it out of reward.heads")
    return found


def label_of(head: str, record: Mapping[str, Any]) -> int | None:
    """The head's own label of a record; None where it has none, as pairs do."""
    if head == "continued":
        told = record.get("continued")
    elif head == "thumbs":
        told = record["reaction"] in UP if record.get("reaction") in (*UP, *DOWN) else None
    else:
        told = record.get("label")
    return None if told is None else int(told)


def head_name(model: nn.Module) -> str:
    """Name of the model's linear head among its modules."""
    head = linear_head(model)
    return next(name for name, module in model.named_modules() if module is head)


def save_heads(model: PreTrainedModel, tokenizer: Any, folders: Sequence[Path]) -> str:
    """Write the model's logits as folders of one logit each, in order; returns the hash of their backbone."""
    name = head_name(model)
    state = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    heads = {key: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
    body = {key: tensor for key, tensor in state.items() if key not in heads}
    model.config.num_labels, model.config.architectures = 1, [type(model).__name__]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        if number == 0:
            save_file(body, folder / BACKBONE, metadata={"format": "pt"})
        else:
            _link(folders[0] / BACKBONE, folder / BACKBONE)
        mine = {key: tensor[number : number + 1].clone() for key, tensor in heads.items()}
        save_file(mine, folder / HEAD, metadata={"format": "pt"})
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*body.values(), *mine.values()))
        places = {**dict.fromkeys(body, BACKBONE), **dict.fromkeys(mine, HEAD)}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        model.config.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    with (folders[0] / BACKBONE).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _link(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@torch.no_grad()
def join_heads(model: PreTrainedModel, folders: Sequence[Path]) -> None:
    """Give a loaded model of one logit the heads of all `folders`, its own backbone's: a logit each, in order."""
    name, head = head_name(model), linear_head(model)
    parts = [load_file(folder / HEAD) for folder in folders]
    wide = nn.Linear(head.in_features, len(parts), bias=head.bias is not None).to(head.weight)
    wide.weight.copy_(torch.cat([part[f"{name}.weight"] for part in parts]))
    if head.bias is not None:
        wide.bias.copy_(torch.cat([part[f"{name}.bias"] for part in parts]))
    setattr(model, name, wide)
    model.config.num_labels = len(parts)
