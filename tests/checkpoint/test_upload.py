"""Checkpoint uploader: complete or absent, retried, reported, and used to resume."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import LocalFileSystem

from rluf.checkpoint.format import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    ControllerState,
    RunState,
    delete_checkpoints_after,
    find_newest_complete,
    prune_checkpoints,
    write_run_state,
)
from rluf.checkpoint.upload import CheckpointUploader, download_newest_checkpoint, find_newest_upload
from rluf.config.load import load_settings
from rluf.errors import ModelError, ResourceError
from rluf.train.checkpoint_manager import find_resume_folder
from rluf.types import ANSWERS_FILE

CONTROLLER_STATE = ControllerState({}, {}, {}, {})


class UnreliableStorage(MemoryFileSystem):  # type: ignore[misc]
    """Storage whose next `failures` writes fail, and whose writes wait for `gate`."""

    protocol = "unreliable"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = 0
    gate = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("unreliable://", "memory://")))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        """Fail while failures are left."""
        UnreliableStorage.gate.wait(20)
        if UnreliableStorage.failures > 0:
            UnreliableStorage.failures -= 1
            raise OSError("503 slow down")
        super().put_file(lpath, rpath, **options)


class ArrowStorage(ArrowFSWrapper):  # type: ignore[misc]
    """The stand-in for s3:// without an fsspec driver: pyarrow's file system, here of the local disk."""

    protocol = "arrow"

    def __init__(self, **options: Any) -> None:
        super().__init__(LocalFileSystem(), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("arrow://")


fsspec.register_implementation("unreliable", UnreliableStorage, clobber=True)
fsspec.register_implementation("arrow", ArrowStorage, clobber=True)


@pytest.fixture(autouse=True)
def _empty_storage() -> Iterator[None]:
    for storage_class in (MemoryFileSystem, UnreliableStorage):
        storage_class.store.clear()
        storage_class.pseudo_dirs[:] = [""]
    UnreliableStorage.failures = 0
    UnreliableStorage.gate.set()
    yield
    UnreliableStorage.gate.set()


def write_checkpoint(run_folder: Path, step: int, content: bytes = b"weights") -> Path:
    folder = run_folder / CHECKPOINTS_FOLDER / f"step-{step}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "learner-0-of-1.safetensors").write_bytes(content)
    write_run_state(folder, RunState(step, 1, {}, "digest", CONTROLLER_STATE, [], [{"step": step, "reward": 0.0}]))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny" / "20260101-000000"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / ANSWERS_FILE).write_text('{"group": 1}\n')
    return folder


def make_url(scheme: str, tmp_path: Path) -> str:
    return f"{scheme}://store" if scheme == "memory" else f"{scheme}://{tmp_path}/store"


@pytest.mark.parametrize("scheme", ["memory", "file", "arrow"])
def test_an_uploaded_checkpoint_is_complete_on_another_machine(scheme: str, run_folder: Path, tmp_path: Path) -> None:
    base = make_url(scheme, tmp_path)
    settings = load_settings(None, [f"run.checkpoint_upload_url={base}", "run.resume=latest", "name=tiny"]).settings
    uploader = CheckpointUploader.from_settings(settings, run_folder)
    assert uploader is not None and uploader.url == f"{base}/tiny/{run_folder.name}"
    uploader.check_storage()
    for step in (3, 6):
        uploader.add_checkpoint(write_checkpoint(run_folder, step, bytes([step])))
        assert uploader.wait_until_idle()
    assert uploader.uploaded_steps == [3, 6]
    assert find_newest_upload(base, "tiny") == (uploader.url, 6)
    elsewhere = tmp_path / "elsewhere"
    resume_folder = find_resume_folder(settings, elsewhere)
    assert resume_folder is not None and resume_folder.name == run_folder.name
    newest = find_newest_complete(resume_folder / CHECKPOINTS_FOLDER)
    assert newest is not None and newest.step == 6
    assert (newest.folder / "learner-0-of-1.safetensors").read_bytes() == bytes([6])
    assert (resume_folder / ANSWERS_FILE).read_text() == '{"group": 1}\n'
    url_settings = load_settings(None, [f"run.resume={uploader.url}"]).settings
    assert find_resume_folder(url_settings, tmp_path / "third") == tmp_path / "third" / run_folder.name


def test_newer_local_checkpoints_are_used_and_deleted_ones_are_deleted_remotely(
    run_folder: Path, tmp_path: Path
) -> None:
    settings = load_settings(
        None, ["run.checkpoint_upload_url=memory://store", "run.resume=latest", "name=tiny"]
    ).settings
    uploader = CheckpointUploader("memory://store/tiny/" + run_folder.name, run_folder, 5.0)
    for step in (3, 6):
        uploader.add_checkpoint(write_checkpoint(run_folder, step))
        uploader.wait_until_idle()
    prune_checkpoints(run_folder / CHECKPOINTS_FOLDER, {}, keep_count=1)
    uploader.add_checkpoint(write_checkpoint(run_folder, 9))
    assert uploader.wait_until_idle()
    storage = fsspec.filesystem("memory")
    names = {
        path.rpartition("/")[2]
        for path in storage.ls(f"/store/tiny/{run_folder.name}/{CHECKPOINTS_FOLDER}", detail=False)
    }
    assert names == {"step-6", "step-9"}
    write_checkpoint(run_folder, 12)
    assert find_resume_folder(settings, run_folder.parent) == run_folder.resolve()
    assert find_newest_complete(run_folder / CHECKPOINTS_FOLDER).step == 12  # type: ignore[union-attr]


def test_remote_checkpoints_that_this_machine_never_had_stay(run_folder: Path, tmp_path: Path) -> None:
    first = CheckpointUploader("memory://store/tiny/r", run_folder, 5.0)
    for step in (3, 6):
        first.add_checkpoint(write_checkpoint(run_folder, step))
        first.wait_until_idle()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    download_newest_checkpoint(first.url, elsewhere)
    second = CheckpointUploader(first.url, elsewhere, 5.0)
    for step in (9, 12):
        second.add_checkpoint(write_checkpoint(elsewhere, step))
        assert second.wait_until_idle()
    delete_checkpoints_after(elsewhere / CHECKPOINTS_FOLDER, 9)
    shutil.rmtree(elsewhere / CHECKPOINTS_FOLDER / "step-6")
    second.add_checkpoint(write_checkpoint(elsewhere, 15))
    assert second.wait_until_idle()
    remote_paths = fsspec.filesystem("memory").ls(f"/store/tiny/r/{CHECKPOINTS_FOLDER}", detail=False)
    assert {path.rpartition("/")[2] for path in remote_paths} == {"step-3", "step-9", "step-15"}


def test_an_interrupted_upload_never_passes_for_complete(run_folder: Path, tmp_path: Path) -> None:
    uploader = CheckpointUploader("memory://store/tiny/r", run_folder, 5.0)
    for step in (3, 6):
        uploader.add_checkpoint(write_checkpoint(run_folder, step))
        uploader.wait_until_idle()
    storage = fsspec.filesystem("memory")
    storage.rm(f"/store/tiny/r/{CHECKPOINTS_FOLDER}/step-6/{MANIFEST_FILE}")
    assert find_newest_upload("memory://store", "tiny") == ("memory://store/tiny/r", 3)
    storage.pipe_file(
        f"/store/tiny/r/{CHECKPOINTS_FOLDER}/step-6/{MANIFEST_FILE}", b'{"format": 2, "files": {"missing": 3}}'
    )
    download_newest_checkpoint("memory://store/tiny/r", tmp_path / "back")
    assert find_newest_complete(tmp_path / "back" / CHECKPOINTS_FOLDER).step == 3  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="expected a complete checkpoint, got none"):
        download_newest_checkpoint("memory://store/other", tmp_path / "back")


def test_the_same_step_after_a_rollback_replaces_its_upload(run_folder: Path, tmp_path: Path) -> None:
    uploader = CheckpointUploader("memory://store/tiny/r", run_folder, 5.0)
    uploader.add_checkpoint(write_checkpoint(run_folder, 3, b"before"))
    uploader.wait_until_idle()
    shutil.rmtree(run_folder / CHECKPOINTS_FOLDER / "step-3")
    uploader.add_checkpoint(write_checkpoint(run_folder, 3, b"beyond"))
    uploader.wait_until_idle()
    download_newest_checkpoint(uploader.url, tmp_path / "back")
    assert (tmp_path / "back" / CHECKPOINTS_FOLDER / "step-3" / "learner-0-of-1.safetensors").read_bytes() == b"beyond"


def test_failed_uploads_are_retried_and_logged(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    uploader = CheckpointUploader("unreliable://store", run_folder, 5.0, retry_pause_s=0.01)
    UnreliableStorage.failures = 2
    uploader.add_checkpoint(write_checkpoint(run_folder, 3))
    assert uploader.wait_until_idle() and uploader.uploaded_steps == [3]
    assert caplog.text.count("retrying: OSError: 503 slow down") == 2
    UnreliableStorage.failures = 99
    uploader.add_checkpoint(write_checkpoint(run_folder, 6))
    assert not uploader.wait_until_idle()
    assert "step-6: upload to unreliable://store failed: OSError: 503 slow down" in caplog.text
    assert "attempt 4 of 4" in caplog.text
    UnreliableStorage.failures = 0
    uploader.add_checkpoint(write_checkpoint(run_folder, 9))
    assert uploader.wait_until_idle() and uploader.uploaded_steps == [3, 9]


def test_a_hanging_upload_is_abandoned_and_the_newest_is_next(
    run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploader = CheckpointUploader("unreliable://store", run_folder, 0.3, retry_pause_s=0.01)
    UnreliableStorage.gate.clear()
    uploader.add_checkpoint(write_checkpoint(run_folder, 3))
    start_time = time.monotonic()
    assert not uploader.wait_until_idle()
    assert time.monotonic() - start_time < 3.0
    assert "step-3: upload to unreliable://store abandoned after 0 s (at answers.jsonl)" in caplog.text
    uploader.add_checkpoint(write_checkpoint(run_folder, 6))  # starts at once, since step 3 is abandoned
    uploader.add_checkpoint(write_checkpoint(run_folder, 9))
    uploader.add_checkpoint(write_checkpoint(run_folder, 12))
    UnreliableStorage.gate.set()
    deadline = time.monotonic() + 10
    while uploader.uploaded_steps != [6, 12] and time.monotonic() < deadline:
        uploader.wait_until_idle()
    assert uploader.uploaded_steps == [6, 12]


def test_a_checkpoint_deleted_during_its_upload_is_not_a_failure(
    run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploader = CheckpointUploader("unreliable://store", run_folder, 5.0)
    UnreliableStorage.gate.clear()
    folder = write_checkpoint(run_folder, 3)
    uploader.add_checkpoint(folder)
    shutil.rmtree(folder)
    UnreliableStorage.gate.set()
    assert uploader.wait_until_idle() and uploader.uploaded_steps == []
    assert "WARNING" not in caplog.text


def test_unwritable_or_unreadable_storage_is_an_error(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"run\.checkpoint_upload_url: cannot write to file:///.*unset run"):
        CheckpointUploader(f"file://{tmp_path}/file/below", run_folder, 5.0).check_storage()
    with pytest.raises(ResourceError, match="no storage driver for nowhere://"):
        CheckpointUploader("nowhere://store", run_folder, 5.0).check_storage()
    with pytest.raises(ResourceError, match=r"cannot read file:///.*run\.resume"):
        download_newest_checkpoint(f"file://{tmp_path}/file/below", tmp_path / "back")


@pytest.mark.slow
def test_unreachable_storage_with_pyarrows_own_driver_is_an_error(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "canary-of-uploads",
                        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_EC2_METADATA_DISABLED": "true",
                        "AWS_MAX_ATTEMPTS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=r"cannot write to s3://nowhere/runs.*credentials") as caught:
        CheckpointUploader("s3://nowhere/runs", run_folder, 5.0).check_storage()
    assert "canary" not in str(caught.value)
