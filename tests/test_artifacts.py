"""What a kept reward model is known by: everything that would train another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rluf.artifacts import reward_parts
from rluf.config.load import load_settings
from rluf.utils.cache import Stage, stage_key

DATA = Stage("data", Path("data"), "0123456789ab", reused=True)


def key(*overrides: str, group: tuple[str, ...] = ("love",)) -> str:
    return stage_key(reward_parts(load_settings(None, overrides).settings, DATA, group))


def test_a_model_trained_in_another_type_is_another_model() -> None:
    assert key("reward.dtype=float32") != key("reward.dtype=bfloat16")
    assert key() in (key("reward.dtype=float32"), key("reward.dtype=bfloat16"))


def test_a_backbone_folder_counts_with_its_weights_and_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    override = f"reward.love.backbone={tmp_path}"
    before = key(override)
    assert key(override) == before
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    trained_on = key(override)
    assert trained_on != before
    (tmp_path / "config.json").write_text('{"layers": 2}', "utf-8")
    assert key(override) not in (before, trained_on)
    assert key(override, group=("safety",)) == key(group=("safety",))


def test_the_folder_of_a_members_backbone_counts_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    override = f"reward.love={{layers: [6, '{tmp_path}:2'], probe: true}}"
    before = key(override)
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    assert key(override) != before


def test_an_embedded_name_is_no_folder_though_one_of_that_name_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reward_parts(load_settings(None).settings, DATA, ("love",))["folders"] == {}
