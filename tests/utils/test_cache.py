"""Artifacts are complete or absent and are reused when everything they were built from is the same."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rluf.errors import ResourceError
from rluf.utils.cache import (
    ORIGIN_FILE,
    build_or_reuse,
    build_or_reuse_all,
    compute_artifact_key,
    hash_files,
    hash_source_code,
)


def write_artifact(folder: Path) -> None:
    folder.mkdir()
    (folder / "data.txt").write_text("built")


def test_an_artifact_is_built_once(tmp_path: Path) -> None:
    first = build_or_reuse(tmp_path, "data", {"seed": 1}, write_artifact)
    second = build_or_reuse(tmp_path, "data", {"seed": 1}, write_artifact)
    other_seed = build_or_reuse(tmp_path, "data", {"seed": 2}, write_artifact)
    assert (first.reused, second.reused, other_seed.reused) == (False, True, False)
    assert first.folder == second.folder != other_seed.folder
    assert (second.folder / "data.txt").read_text() == "built"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_artifact(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_or_reuse(tmp_path, "data", {}, fail)
    assert list((tmp_path / "artifacts").iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["file", "dangling link", "link to a file", "empty folder", "folder without its origin"]
)
def test_anything_in_place_of_an_artifact_is_one_error_before_the_build(kind: str, tmp_path: Path) -> None:
    folder = build_or_reuse(tmp_path, "data", {}, write_artifact).folder
    (folder / ORIGIN_FILE).unlink()
    if kind != "folder without its origin":
        (folder / "data.txt").unlink()
    if kind not in ("empty folder", "folder without its origin"):
        folder.rmdir()
        (tmp_path / "other").touch()
        link_target = {"dangling link": "missing", "link to a file": tmp_path / "other"}.get(kind)
        folder.touch() if link_target is None else folder.symlink_to(link_target)
    with pytest.raises(ResourceError, match=rf"{folder} is not a complete artifact.*delete it"):
        build_or_reuse(tmp_path, "data", {}, lambda _: pytest.fail("was built"))


def test_a_link_to_an_artifact_is_reused(tmp_path: Path) -> None:
    folder = build_or_reuse(tmp_path, "data", {}, write_artifact).folder
    folder.symlink_to(folder.rename(tmp_path / "elsewhere"))
    assert build_or_reuse(tmp_path, "data", {}, write_artifact).reused


def test_only_missing_artifacts_are_built_in_one_call(tmp_path: Path) -> None:
    build_or_reuse(tmp_path, "a", {"x": 1}, write_artifact)
    built_names: list[list[str]] = []

    def build(folders: Mapping[str, Path]) -> None:
        built_names.append(sorted(folders))
        for folder in folders.values():
            write_artifact(folder)

    artifacts = build_or_reuse_all(tmp_path, {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}}, build)
    assert built_names == [["b", "c"]]
    assert {name: artifact.reused for name, artifact in artifacts.items()} == {"a": True, "b": False, "c": False}


def test_keys_depend_on_content_not_on_order() -> None:
    assert compute_artifact_key({"a": 1, "b": 2}) == compute_artifact_key({"b": 2, "a": 1})
    assert compute_artifact_key({"a": 1}) != compute_artifact_key({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        compute_artifact_key({"a": float("nan")})


def test_file_hashes_depend_on_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    first = hash_files([tmp_path])
    (tmp_path / "a").write_text("y")
    second = hash_files([tmp_path])
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, hash_files([tmp_path])}) == 3


def test_code_hashes_cover_modules_and_packages() -> None:
    assert hash_source_code("utils.cache") != hash_source_code("utils.paths")
    assert hash_source_code("prepare") == hash_source_code("prepare")


def test_code_hashes_refuse_a_name_without_source() -> None:
    with pytest.raises(ValueError, match=r"rluf\.feedback has no source files"):
        hash_source_code("prepare", "feedback")


def build_and_read(cache: str, barrier: Any, results: Any) -> None:
    def build(folder: Path) -> None:
        folder.mkdir()
        results.put("built")
        time.sleep(0.2)
        for index in range(30):
            (folder / f"{index}.txt").write_text("x")

    for round_index in range(3):
        barrier.wait()
        artifact = build_or_reuse(Path(cache), "demo", {"round": round_index}, build)
        for _ in range(20):
            assert sum(file.stat().st_size > 0 for file in artifact.folder.iterdir()) == 31


def test_processes_that_start_together_build_an_artifact_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=build_and_read, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert results.qsize() == 3
