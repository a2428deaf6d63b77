"""Writes are complete or absent, locks exclude other processes, JSON has no NaN."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rluf.errors import ModelError, ResourceError
from rluf.utils.files import (
    atomic_folder,
    atomic_write,
    build_write_error,
    file_lock,
    read_json,
    replace_folder,
    to_jsonable,
    try_lock,
    write_json,
)


def test_a_lock_that_cannot_be_opened_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()  # as unusable as a file of another user, and also for root
    for acquire in (lambda path: file_lock(path).__enter__(), try_lock):
        with pytest.raises(ResourceError, match=r"cannot open the lock .*/lock: .*set run\.cache"):
            acquire(tmp_path / "lock")


def test_an_atomic_write_replaces_the_file_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as temporary_path:
        temporary_path.write_text("first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary_path:
        temporary_path.write_text("second")
        raise KeyboardInterrupt
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "first"


def test_an_atomic_folder_replaces_the_folder_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    for content in ("first", "second"):
        with atomic_folder(path) as temporary_folder:
            (temporary_folder / "weights").write_text(content)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary_folder:
        (temporary_folder / "weights").write_text("third")
        raise KeyboardInterrupt
    assert [folder.name for folder in tmp_path.iterdir()] == ["policy"]
    assert (path / "weights").read_text() == "second"


def test_replacing_a_folder_leaves_no_file_of_the_old_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["old", "old/new"]


def test_write_errors_tell_a_full_disk_from_other_failures(tmp_path: Path) -> None:
    full_disk = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(build_write_error("the policy", tmp_path, full_disk), ResourceError)
    assert isinstance(build_write_error("the policy", tmp_path, RuntimeError("I/O error (os error 28)")), ResourceError)
    assert isinstance(build_write_error("the policy", tmp_path, OSError(errno.EIO, "I/O error")), ModelError)


def test_a_lock_excludes_other_processes(tmp_path: Path) -> None:
    lock_path = tmp_path / "lock"
    program = (
        "import sys, pathlib; from rluf.utils.files import try_lock; "
        f"sys.exit(int(try_lock(pathlib.Path({str(lock_path)!r})) is None))"
    )
    with file_lock(lock_path):
        assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 1
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
    lock_file = try_lock(lock_path)
    assert lock_file is not None
    assert try_lock(lock_path) is None
    lock_file.close()


def test_json_files_have_no_nan_and_no_numpy_types(tmp_path: Path) -> None:
    content = {"mean": np.float64(0.5), "rows": np.arange(2), "missing": float("nan"), "ok": True, "path": Path("a")}
    write_json(tmp_path / "a.json", content)
    expected = {"mean": 0.5, "rows": [0, 1], "missing": None, "ok": True, "path": "a"}
    assert read_json(tmp_path / "a.json") == to_jsonable(content) == expected
    assert read_json(tmp_path / "missing.json") == {}
