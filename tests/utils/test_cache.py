"""Stages are whole or absent, found again by what they were made from, and never half-built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from rluf.utils.cache import code_digest, file_digest, run_stage, run_stages, stage_key


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "data.txt").write_text("made")


def test_a_stage_is_built_once(tmp_path: Path) -> None:
    first = run_stage(tmp_path, "data", {"seed": 1}, write)
    again = run_stage(tmp_path, "data", {"seed": 1}, write)
    other = run_stage(tmp_path, "data", {"seed": 2}, write)
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert first.folder == again.folder != other.folder
    assert (again.folder / "data.txt").read_text() == "made"


def test_reuse_can_be_refused(tmp_path: Path) -> None:
    first = run_stage(tmp_path, "data", {}, write)
    (first.folder / "data.txt").write_text("old")
    again = run_stage(tmp_path, "data", {}, write, reuse=False)
    assert not again.reused
    assert (again.folder / "data.txt").read_text() == "made"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, "data", {}, fail)
    assert list((tmp_path / "stages").iterdir()) == []


def test_only_missing_stages_are_built_together(tmp_path: Path) -> None:
    run_stage(tmp_path, "a", {"x": 1}, write)
    asked: list[list[str]] = []

    def build(folders: Mapping[str, Path]) -> None:
        asked.append(sorted(folders))
        for folder in folders.values():
            write(folder)

    stages = run_stages(tmp_path, {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}}, build)
    assert asked == [["b", "c"]]
    assert {name: stage.reused for name, stage in stages.items()} == {"a": True, "b": False, "c": False}


def test_keys_tell_apart_what_differs() -> None:
    assert stage_key({"a": 1, "b": 2}) == stage_key({"b": 2, "a": 1})
    assert stage_key({"a": 1}) != stage_key({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        stage_key({"a": float("nan")})


def test_file_digest_sees_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    first = file_digest([tmp_path])
    (tmp_path / "a").write_text("y")
    second = file_digest([tmp_path])
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, file_digest([tmp_path])}) == 3


def test_code_digest_covers_modules_and_packages() -> None:
    assert code_digest("utils.cache") != code_digest("utils.paths")
    assert code_digest("prepare") == code_digest("prepare")


def test_code_digest_refuses_a_name_without_source() -> None:
    with pytest.raises(ValueError, match=r"rluf\.feedback has no source files"):
        code_digest("prepare", "feedback")
