"""Run folders: named, never overwritten, with a link to the newest; clear errors when a folder is not writable."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from rluf.config.run import RunSettings
from rluf.config.settings import Settings
from rluf.errors import DataError, ResourceError
from rluf.utils.paths import (
    check_cache_writable,
    create_run_folder,
    find_sample_log,
    lock_run_folder,
    resolve_cache_folder,
    resolve_runs_root,
)


def settings(root: Path | None = None) -> Settings:
    return Settings(run=RunSettings(root=None if root is None else str(root)))


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    first, second = create_run_folder(settings(tmp_path)), create_run_folder(settings(tmp_path))
    assert first != second
    assert (tmp_path / "quickstart" / "latest").resolve() == second.resolve()


def test_a_copied_folder_named_latest_stops_no_run(tmp_path: Path) -> None:
    copy = tmp_path / "quickstart" / "latest"
    copy.mkdir(parents=True)
    (copy / "summary.json").write_text("{}")
    folder = create_run_folder(settings(tmp_path))
    assert sorted(path.name for path in copy.parent.iterdir()) == sorted([folder.name, "latest"])
    assert (copy / "summary.json").is_file()


@pytest.mark.parametrize("name", ["", "artifacts", "locks", "models"])
def test_a_cache_that_cannot_be_written_is_one_message(name: str, tmp_path: Path) -> None:
    blocked = tmp_path / "cache" / name
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("as unusable as a folder of another user, and also for root")
    with pytest.raises(ResourceError, match=r"is not a writable folder; set run\.root and run\.cache"):
        check_cache_writable(tmp_path / "cache")


def test_unwritable_root_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot write a run folder .* set run.root or RLUF_RUNS"):
        create_run_folder(settings(tmp_path / "file"))


def test_a_packaged_job_writes_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working_dir = tmp_path / "runtime_resources" / "working_dir_files"
    working_dir.mkdir(parents=True)
    monkeypatch.delenv("RLUF_RUNS", raising=False)
    monkeypatch.chdir(working_dir)
    assert resolve_runs_root(settings()) == Path.home() / "rluf" / "runs"
    monkeypatch.chdir(tmp_path)
    assert resolve_runs_root(settings()) == tmp_path / "runs"
    monkeypatch.setenv("RLUF_RUNS", "/elsewhere")
    assert resolve_runs_root(settings()) == Path("/elsewhere")


def test_cache_follows_setting_then_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLUF_CACHE", str(tmp_path))
    assert resolve_cache_folder(settings()) == tmp_path
    assert resolve_cache_folder(Settings(run=RunSettings(cache="/c"))) == Path("/c")


def test_only_shipped_samples_have_files() -> None:
    assert find_sample_log("feedback").is_file()
    with pytest.raises(DataError, match="not shipped"):
        find_sample_log("hearts")


def create_folders(root: str, folders: Any) -> None:
    for _ in range(20):
        folders.put(str(create_run_folder(settings(Path(root)))))


def test_processes_that_start_in_one_second_get_different_folders(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folders = context.SimpleQueue()
    processes = [context.Process(target=create_folders, args=(str(tmp_path), folders)) for _ in range(4)]
    for process in processes:
        process.start()
    names = [folders.get() for _ in range(80)]
    for process in processes:
        process.join(20)
    assert len(set(names)) == 80


def test_one_process_writes_a_run_at_a_time(tmp_path: Path) -> None:
    with (
        lock_run_folder(tmp_path),
        pytest.raises(ResourceError, match="another process is training in"),
        lock_run_folder(tmp_path),
    ):
        pass
    with lock_run_folder(tmp_path):
        pass
