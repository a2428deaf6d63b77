"""A wrong or partial set of weights is named as such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rluf.backends.weight_transfer.manifest import Checklist, checkpoint_shapes
from rluf.errors import SyncError

WEIGHTS = {
    "model.embed_tokens.weight": torch.zeros(8, 4),
    "model.norm.weight": torch.zeros(4),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
}


def _folder(path: Path) -> Path:
    save_file(WEIGHTS, path / "model.safetensors")
    return path


def test_rotary_frequencies_are_no_weights(tmp_path: Path) -> None:
    assert checkpoint_shapes(_folder(tmp_path)) == {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    _folder(tmp_path)
    save_file({"tok_embeddings.weight": torch.zeros(8, 4)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": dict.fromkeys(WEIGHTS, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "tok_embeddings.weight" not in checkpoint_shapes(tmp_path)


def test_a_tied_head_must_be_sent_by_name(tmp_path: Path) -> None:
    checklist = Checklist(_folder(tmp_path), tied=True)
    checklist.start()
    checklist.admit([("model.embed_tokens.weight", [8, 4]), ("model.norm.weight", [4])])
    with pytest.raises(SyncError, match=r"1 of 3 tensors were not sent: lm_head\.weight"):
        checklist.finish()
    checklist.admit([("lm_head.weight", (8, 4))])
    checklist.finish()


def test_unknown_misshapen_and_repeated_tensors_are_refused(tmp_path: Path) -> None:
    checklist = Checklist(_folder(tmp_path), tied=False)
    checklist.start()
    with pytest.raises(SyncError, match="does not hold"):
        checklist.admit([("lm_head.weight", (8, 4))])
    with pytest.raises(SyncError, match=r"as \(4, 8\)"):
        checklist.admit([("model.embed_tokens.weight", (4, 8))])
    checklist.admit([("model.norm.weight", (4,))])
    with pytest.raises(SyncError, match="twice"):
        checklist.admit([("model.norm.weight", (4,))])
    checklist.start()
    checklist.admit([("model.norm.weight", (4,))])
