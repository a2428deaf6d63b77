"""The cache key of a reward model covers everything that would train another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rluf.artifacts import reward_cache_inputs
from rluf.config.load import load_settings
from rluf.utils.cache import Artifact, compute_artifact_key

DATA = Artifact("data", Path("data"), "0123456789ab", reused=True)


def reward_key(*overrides: str, heads: tuple[str, ...] = ("love",)) -> str:
    return compute_artifact_key(reward_cache_inputs(load_settings(None, overrides).settings, DATA, heads))


def test_the_dtype_of_training_is_part_of_the_key() -> None:
    assert reward_key("model.dtype=float32") != reward_key("model.dtype=bfloat16")
    assert reward_key() in (reward_key("model.dtype=float32"), reward_key("model.dtype=bfloat16"))


def test_a_backbone_folder_counts_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    override = f"reward.love.backbone={tmp_path}"
    before = reward_key(override)
    assert reward_key(override) == before
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    with_new_weights = reward_key(override)
    assert with_new_weights != before
    (tmp_path / "config.json").write_text('{"layers": 2}', "utf-8")
    assert reward_key(override) not in (before, with_new_weights)
    assert reward_key(override, heads=("safety",)) == reward_key(heads=("safety",))


def test_the_folder_of_a_members_backbone_counts_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    override = f"reward.love.ensemble.members=[{{layers: 6}}, {{backbone: '{tmp_path}', layers: 2}}]"
    before = reward_key(override)
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    assert reward_key(override) != before


def test_an_embedded_name_wins_over_a_local_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reward_cache_inputs(load_settings(None).settings, DATA, ("love",))["folders"] == {}
