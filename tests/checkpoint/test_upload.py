"""Copies of checkpoints on other storage: whole or not there, tried again, never silent, found by a resumption."""

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

from rluf.checkpoint.format import ANSWERS, FOLDER, MANIFEST, RunState, forget_after, newest_whole, prune, write_state
from rluf.checkpoint.upload import Uploader, download, newest_upload
from rluf.config.load import load_settings
from rluf.errors import ModelError, ResourceError
from rluf.train.checkpoint_manager import resumed_folder


class Shaky(MemoryFileSystem):  # type: ignore[misc]
    """Storage whose next `failures` writes fail, and whose writes wait for `gate`."""

    protocol = "shaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = 0
    gate = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("shaky://", "memory://")))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        """As every file system's, but not always."""
        Shaky.gate.wait(20)
        if Shaky.failures > 0:
            Shaky.failures -= 1
            raise OSError("503 slow down")
        super().put_file(lpath, rpath, **options)


class Arrow(ArrowFSWrapper):  # type: ignore[misc]
    """What s3:// becomes where no fsspec driver is installed: pyarrow's file system, here of this disk."""

    protocol = "arrow"

    def __init__(self, **options: Any) -> None:
        super().__init__(LocalFileSystem(), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("arrow://")


fsspec.register_implementation("shaky", Shaky, clobber=True)
fsspec.register_implementation("arrow", Arrow, clobber=True)


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    for kind in (MemoryFileSystem, Shaky):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Shaky.failures = 0
    Shaky.gate.set()
    yield
    Shaky.gate.set()


def checkpoint(run: Path, step: int, content: bytes = b"weights") -> Path:
    folder = run / FOLDER / f"step-{step}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "learner-0-of-1.safetensors").write_bytes(content)
    write_state(folder, RunState(step, 1, {}, "digest", {}, [], [{"step": step, "reward": 0.0}]))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny" / "20260101-000000"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / ANSWERS).write_text('{"group": 1}\n')
    return folder


def url_of(scheme: str, tmp_path: Path) -> str:
    return f"{scheme}://store" if scheme == "memory" else f"{scheme}://{tmp_path}/store"


@pytest.mark.parametrize("scheme", ["memory", "file", "arrow"])
def test_a_checkpoint_is_found_and_whole_on_another_machine(scheme: str, run: Path, tmp_path: Path) -> None:
    base = url_of(scheme, tmp_path)
    settings = load_settings(None, [f"run.upload={base}", "run.resume=latest", "name=tiny"]).settings
    uploads = Uploader.of(settings, run)
    assert uploads is not None and uploads.url == f"{base}/tiny/{run.name}"
    uploads.begin()
    for step in (3, 6):
        uploads.add(checkpoint(run, step, bytes([step])))
        assert uploads.drain()
    assert uploads.uploaded == [3, 6]
    assert newest_upload(base, "tiny") == (uploads.url, 6)
    elsewhere = tmp_path / "elsewhere"
    found = resumed_folder(settings, elsewhere)
    assert found is not None and found.name == run.name
    whole = newest_whole(found / FOLDER)
    assert whole is not None and whole.step == 6
    assert (whole.folder / "learner-0-of-1.safetensors").read_bytes() == bytes([6])
    assert (found / ANSWERS).read_text() == '{"group": 1}\n'
    named = load_settings(None, [f"run.resume={uploads.url}"]).settings
    assert resumed_folder(named, tmp_path / "third") == tmp_path / "third" / run.name


def test_what_is_newer_here_is_not_fetched_and_what_is_deleted_here_goes_there_too(run: Path, tmp_path: Path) -> None:
    settings = load_settings(None, ["run.upload=memory://store", "run.resume=latest", "name=tiny"]).settings
    uploads = Uploader("memory://store/tiny/" + run.name, run, 5.0)
    for step in (3, 6):
        uploads.add(checkpoint(run, step))
        uploads.drain()
    prune(run / FOLDER, {}, keep=1)
    uploads.add(checkpoint(run, 9))
    assert uploads.drain()
    storage = fsspec.filesystem("memory")
    names = {path.rpartition("/")[2] for path in storage.ls(f"/store/tiny/{run.name}/{FOLDER}", detail=False)}
    assert names == {"step-6", "step-9"}
    checkpoint(run, 12)
    assert resumed_folder(settings, run.parent) == run.resolve()
    assert newest_whole(run / FOLDER).step == 12  # type: ignore[union-attr]


def test_copies_that_this_machine_never_had_stay(run: Path, tmp_path: Path) -> None:
    first = Uploader("memory://store/tiny/r", run, 5.0)
    for step in (3, 6):
        first.add(checkpoint(run, step))
        first.drain()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    download(first.url, elsewhere)
    second = Uploader(first.url, elsewhere, 5.0)
    for step in (9, 12):
        second.add(checkpoint(elsewhere, step))
        assert second.drain()
    forget_after(elsewhere / FOLDER, 9)
    shutil.rmtree(elsewhere / FOLDER / "step-6")
    second.add(checkpoint(elsewhere, 15))
    assert second.drain()
    there = fsspec.filesystem("memory").ls(f"/store/tiny/r/{FOLDER}", detail=False)
    assert {path.rpartition("/")[2] for path in there} == {"step-3", "step-9", "step-15"}


def test_a_copy_cut_short_is_never_taken_for_a_whole_one(run: Path, tmp_path: Path) -> None:
    uploads = Uploader("memory://store/tiny/r", run, 5.0)
    for step in (3, 6):
        uploads.add(checkpoint(run, step))
        uploads.drain()
    storage = fsspec.filesystem("memory")
    storage.rm(f"/store/tiny/r/{FOLDER}/step-6/{MANIFEST}")
    assert newest_upload("memory://store", "tiny") == ("memory://store/tiny/r", 3)
    storage.pipe_file(f"/store/tiny/r/{FOLDER}/step-6/{MANIFEST}", b'{"format": 1, "files": {"gone": 3}}')
    download("memory://store/tiny/r", tmp_path / "back")
    assert newest_whole(tmp_path / "back" / FOLDER).step == 3  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="no whole checkpoint there"):
        download("memory://store/other", tmp_path / "back")


def test_the_same_step_after_going_back_replaces_its_copy(run: Path, tmp_path: Path) -> None:
    uploads = Uploader("memory://store/tiny/r", run, 5.0)
    uploads.add(checkpoint(run, 3, b"before"))
    uploads.drain()
    shutil.rmtree(run / FOLDER / "step-3")
    uploads.add(checkpoint(run, 3, b"beyond"))
    uploads.drain()
    download(uploads.url, tmp_path / "back")
    assert (tmp_path / "back" / FOLDER / "step-3" / "learner-0-of-1.safetensors").read_bytes() == b"beyond"


def test_storage_that_fails_is_tried_again_and_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    uploads = Uploader("shaky://store", run, 5.0, pause_s=0.01)
    Shaky.failures = 2
    uploads.add(checkpoint(run, 3))
    assert uploads.drain() and uploads.uploaded == [3]
    assert caplog.text.count("trying again: OSError: 503 slow down") == 2
    Shaky.failures = 99
    uploads.add(checkpoint(run, 6))
    assert not uploads.drain()
    assert "step-6 was not copied to shaky://store: OSError: 503 slow down" in caplog.text
    assert "attempt 4 of 4" in caplog.text
    Shaky.failures = 0
    uploads.add(checkpoint(run, 9))
    assert uploads.drain() and uploads.uploaded == [3, 9]


def test_storage_that_hangs_is_given_up_past_the_deadline_and_the_newest_goes_next(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = Uploader("shaky://store", run, 0.3, pause_s=0.01)
    Shaky.gate.clear()
    uploads.add(checkpoint(run, 3))
    begun = time.monotonic()
    assert not uploads.drain()
    assert time.monotonic() - begun < 3.0
    assert "waited 0 s for shaky://store to take step-3 (at base_answers.jsonl)" in caplog.text
    uploads.add(checkpoint(run, 6))  # in place of step 3, which is given up
    uploads.add(checkpoint(run, 9))
    uploads.add(checkpoint(run, 12))
    Shaky.gate.set()
    deadline = time.monotonic() + 10
    while uploads.uploaded != [6, 12] and time.monotonic() < deadline:
        uploads.drain()
    assert uploads.uploaded == [6, 12]


def test_a_checkpoint_deleted_on_the_way_is_no_failure(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    uploads = Uploader("shaky://store", run, 5.0)
    Shaky.gate.clear()
    folder = checkpoint(run, 3)
    uploads.add(folder)
    shutil.rmtree(folder)
    Shaky.gate.set()
    assert uploads.drain() and uploads.uploaded == []
    assert "WARNING" not in caplog.text


def test_storage_that_cannot_be_written_or_read_is_told_before_anything_starts(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"run\.upload: cannot write to file:///.*take run\.upload out"):
        Uploader(f"file://{tmp_path}/file/below", run, 5.0).begin()
    with pytest.raises(ResourceError, match="no driver for nowhere://"):
        Uploader("nowhere://store", run, 5.0).begin()
    with pytest.raises(ResourceError, match=r"cannot read file:///.*run\.resume"):
        download(f"file://{tmp_path}/file/below", tmp_path / "back")


@pytest.mark.slow
def test_storage_out_of_reach_is_told_with_pyarrows_own_driver(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "canary-of-uploads",
                        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_EC2_METADATA_DISABLED": "true",
                        "AWS_MAX_ATTEMPTS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=r"cannot write to s3://nowhere/runs.*credentials") as caught:
        Uploader("s3://nowhere/runs", run, 5.0).begin()
    assert "canary" not in str(caught.value)
