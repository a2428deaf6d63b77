"""Policy folders are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rluf.algorithms.policy_model import load_policy
from rluf.errors import ModelError, ResourceError
from rluf.utils.files import atomic_folder, build_write_error


def test_folder_appears_only_when_complete_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    for text in ("one", "two"):
        with atomic_folder(target) as staging_folder:
            (staging_folder / "a").write_text(text)
            assert not target.exists() or (target / "a").read_text() == "one"
        assert (target / "a").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_failure_leaves_only_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with atomic_folder(target) as staging_folder:
        (staging_folder / "a").write_text("one")
    with pytest.raises(KeyError), atomic_folder(target) as staging_folder:
        (staging_folder / "a").write_text("two")
        raise KeyError
    assert (target / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "policy") as staging_folder:
        (staging_folder / "a").write_text("one")
        (staging_folder / "a").chmod(0o600)
    folder = (tmp_path / "policy").stat().st_mode
    assert (tmp_path / "policy" / "a").stat().st_mode & 0o777 == folder & 0o666


def test_unwritable_path_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="free some disk"), atomic_folder(tmp_path / "file" / "policy"):
        pass


def test_missing_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        load_policy(tmp_path, dtype=torch.float32)


def test_a_full_disk_is_a_resource_error_and_the_old_folder_remains(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    with atomic_folder(target) as staging_folder:
        (staging_folder / "a").write_text("one")
    pattern = r"No space left on device.*earlier checkpoints remain"
    with pytest.raises(ResourceError, match=pattern), atomic_folder(target) as staging_folder:
        (staging_folder / "a").symlink_to("/dev/full")
        (staging_folder / "a").write_text("two")
    assert (target / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_the_error_number_in_a_safetensors_message_is_recognized(tmp_path: Path) -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert isinstance(build_write_error("the policy", tmp_path, SafetensorError(message)), ResourceError)
    assert isinstance(build_write_error("the policy", tmp_path, SafetensorError("invalid header")), ModelError)
