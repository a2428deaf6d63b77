"""Policy folders are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rluf.algorithms.policy_io import load_policy
from rluf.errors import ModelError, ResourceError
from rluf.utils.files import atomic_folder, write_error


def test_folder_appears_only_when_whole_and_replaces_the_old(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    for text in ("one", "two"):
        with atomic_folder(target) as part:
            (part / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "one"
        assert (target / "a").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with atomic_folder(target) as part:
        (part / "a").write_text("one")
    with pytest.raises(KeyError), atomic_folder(target) as part:
        (part / "a").write_text("two")
        raise KeyError
    assert (target / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "policy") as part:
        (part / "a").write_text("one")
        (part / "a").chmod(0o600)
    folder = (tmp_path / "policy").stat().st_mode
    assert (tmp_path / "policy" / "a").stat().st_mode & 0o777 == folder & 0o666


def test_unwritable_place_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="free some disk"), atomic_folder(tmp_path / "file" / "policy"):
        pass


def test_missing_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        load_policy(tmp_path, dtype=torch.float32)


def test_a_full_disk_is_told_as_such_and_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with atomic_folder(target) as part:
        (part / "a").write_text("one")
    told = r"No space left on device.*earlier checkpoints are kept"
    with pytest.raises(ResourceError, match=told), atomic_folder(target) as part:
        (part / "a").symlink_to("/dev/full")
        (part / "a").write_text("two")
    assert (target / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_safetensors_hands_the_number_on_in_its_message(tmp_path: Path) -> None:
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert isinstance(write_error("the policy", tmp_path, SafetensorError(told)), ResourceError)
    assert isinstance(write_error("the policy", tmp_path, SafetensorError("invalid header")), ModelError)
