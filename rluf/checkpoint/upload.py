"""Upload checkpoints to storage that outlives the machine, in the background of the run; download them to resume.

The files of a run are below <run.checkpoint_upload_url>/<name>/<time>, as in its run folder: config.json, the base
policy's responses, and checkpoints/step-<n>, whose complete.json is uploaded last, so that an interrupted upload never
passes for a complete one. Failures of the storage are logged and retried, and never stop a run: its checkpoints are on
the local disk.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.checkpoint.format import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    find_checkpoint_problem,
    parse_step,
)
from rluf.errors import ModelError, ResourceError
from rluf.types import ANSWERS_FILE
from rluf.utils.files import atomic_folder

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 4
"""Upload attempts per checkpoint; the pause before attempt n is RETRY_PAUSE_S * 4^(n - 2)."""
RETRY_PAUSE_S = 1.0


@dataclass(slots=True)
class _UploadTask:
    """One checkpoint being uploaded; `start_time` is monotonic."""

    checkpoint_folder: Path
    start_time: float
    current_file: str = ""
    uploaded_files: set[str] = field(default_factory=set)
    problem: str | None = None
    is_done: bool = False
    is_abandoned: bool = False


class CheckpointUploader:
    """Upload the checkpoints of one run, one at a time; when uploads fall behind, only the newest is next."""

    def __init__(self, url: str, run_folder: Path, timeout_s: float, retry_pause_s: float = RETRY_PAUSE_S) -> None:
        """Upload from `run_folder` to `url`, at most `timeout_s` per checkpoint. Opens nothing yet."""
        self.url, self.run_folder = url.rstrip("/"), run_folder
        self._timeout_s, self._retry_pause_s = timeout_s, retry_pause_s
        self._lock = threading.Lock()
        self._current_task: _UploadTask | None = None
        self._next_checkpoint: Path | None = None
        self.uploaded_steps: list[int] = []
        # Checkpoints that this run has or had: remote copies of any other are not this run's to delete.
        self._known_checkpoints = self._list_local_checkpoints()

    @classmethod
    def from_settings(cls, settings: Settings, run_folder: Path) -> CheckpointUploader | None:
        """The uploader of `run.checkpoint_upload_url`; None without it."""
        if settings.run.checkpoint_upload_url is None:
            return None
        url = f"{settings.run.checkpoint_upload_url.rstrip('/')}/{settings.name}/{run_folder.name}"
        return cls(url, run_folder, settings.timeouts.call_s)

    def check_storage(self) -> None:
        """Upload the run's settings, which shows whether the storage is writable. Raises ResourceError if not."""
        try:
            storage, run_path = open_storage(self.url)
            storage.makedirs(run_path, exist_ok=True)
            storage.pipe_file(f"{run_path}/config.json", (self.run_folder / "config.json").read_bytes())
        except (OSError, ValueError, RuntimeError) as error:
            raise ResourceError(
                f"run.checkpoint_upload_url: cannot write to {self.url}: {type(error).__name__}: {error}; check the "
                "address and the credentials in the environment, or unset run.checkpoint_upload_url"
            ) from error
        logger.info("checkpoint upload: enabled url=%s", self.url)

    def add_checkpoint(self, checkpoint_folder: Path) -> None:
        """Upload a checkpoint after the current one; an upload that hangs past its timeout is abandoned."""
        with self._lock:
            self._known_checkpoints.add(checkpoint_folder.name)
            task = self._current_task
            if task is not None and not task.is_done and time.monotonic() - task.start_time > self._timeout_s:
                # A thread blocked in the storage's driver cannot be stopped: it is left behind and ignored.
                task.is_abandoned = True
                logger.warning("%s", self._format_timeout(task))
                task = None
            if task is not None and not task.is_done:
                if self._next_checkpoint is not None:
                    logger.info("checkpoint %s: not uploaded, a newer one replaced it", self._next_checkpoint.name)
                self._next_checkpoint = checkpoint_folder
                return
            self._start_task(checkpoint_folder)

    def _list_local_checkpoints(self) -> set[str]:
        return {folder.name for folder in (self.run_folder / CHECKPOINTS_FOLDER).glob("step-*")}

    def wait_until_idle(self) -> bool:
        """Wait until nothing is being uploaded, at most one timeout; returns whether all uploads succeeded."""
        deadline = time.monotonic() + self._timeout_s
        while (task := self._current_task) is not None and not task.is_done:
            if time.monotonic() > deadline:
                logger.warning("%s", self._format_timeout(task))
                return False
            time.sleep(0.02)
        return self._current_task is None or self._current_task.problem is None

    def _format_timeout(self, task: _UploadTask) -> str:
        return (
            f"checkpoint {task.checkpoint_folder.name}: upload to {self.url} abandoned after "
            f"{time.monotonic() - task.start_time:.0f} s (at {task.current_file or 'its start'}), more than "
            f"timeouts.call_s={self._timeout_s:g}; the checkpoint on disk is complete: {task.checkpoint_folder}"
        )

    def _start_task(self, checkpoint_folder: Path) -> None:
        self._current_task = task = _UploadTask(checkpoint_folder, time.monotonic())
        # A daemon thread, so that a hanging storage cannot prevent the process from exiting.
        thread_name = f"rluf-upload-{checkpoint_folder.name}"
        threading.Thread(target=self._run_task, args=(task,), name=thread_name, daemon=True).start()

    def _run_task(self, task: _UploadTask) -> None:
        # Replaced below; it remains when an unexpected error ends the thread, and the waiters are still released.
        problem: str | None = "an unexpected error; its traceback is in the output"
        try:
            problem = self._upload_with_retries(task)
        finally:
            task.problem = problem
            if problem is not None and not task.is_abandoned:
                logger.warning(
                    "checkpoint %s: upload to %s failed: %s; training continues, the local checkpoint is complete: %s",
                    task.checkpoint_folder.name, self.url, problem, task.checkpoint_folder,
                )  # fmt: skip
            with self._lock:
                task.is_done = True
                next_checkpoint, is_current = self._next_checkpoint, self._current_task is task
                # An abandoned task that ends after all must not start the next one a second time.
                if is_current and next_checkpoint is not None:
                    self._next_checkpoint = None
                    self._start_task(next_checkpoint)

    def _upload_with_retries(self, task: _UploadTask) -> str | None:
        """Upload; returns the problem of the last attempt, None when it succeeded or is no longer needed."""
        problem = None
        for attempt in range(MAX_ATTEMPTS):
            try:
                if self._upload_once(task):
                    seconds = time.monotonic() - task.start_time
                    name = task.checkpoint_folder.name
                    logger.info("checkpoint %s: uploaded to %s seconds=%.1f", name, self.url, seconds)
                    self.uploaded_steps.append(int(parse_step(task.checkpoint_folder) or 0))
                return None
            except (OSError, ValueError, RuntimeError) as error:
                if not (task.checkpoint_folder / MANIFEST_FILE).exists():
                    name = task.checkpoint_folder.name
                    logger.info("checkpoint %s: not uploaded, it was deleted meanwhile", name)
                    return None
                attempts = f"attempt {attempt + 1} of {MAX_ATTEMPTS}"
                problem = f"{type(error).__name__}: {error} (at {task.current_file}, {attempts})"
            if task.is_abandoned or attempt + 1 == MAX_ATTEMPTS:
                break
            name = task.checkpoint_folder.name
            logger.warning("checkpoint %s: upload to %s failed, retrying: %s", name, self.url, problem)
            time.sleep(self._retry_pause_s * 4**attempt)
        return problem

    def _upload_once(self, task: _UploadTask) -> bool:
        """Upload what is missing, the manifest last, then delete remote copies of checkpoints this run has deleted.

        Returns whether the upload is complete; False if it was abandoned.
        """
        storage, run_path = open_storage(self.url)
        remote_folder = f"{run_path}/{CHECKPOINTS_FOLDER}/{task.checkpoint_folder.name}"
        manifest = json.loads((task.checkpoint_folder / MANIFEST_FILE).read_text("utf-8"))
        file_names = [*manifest["files"], MANIFEST_FILE]
        local_by_remote = {f"{run_path}/{ANSWERS_FILE}": self.run_folder / ANSWERS_FILE}
        local_by_remote |= {f"{remote_folder}/{name}": task.checkpoint_folder / name for name in file_names}
        if not task.uploaded_files and storage.exists(f"{remote_folder}/{MANIFEST_FILE}"):
            # A copy of the same step from before the run rolled back: it is incomplete while its files are replaced.
            storage.rm(f"{remote_folder}/{MANIFEST_FILE}")
        for remote_file, local_file in local_by_remote.items():
            if task.is_abandoned:
                return False
            task.current_file = local_file.name
            if remote_file not in task.uploaded_files:
                storage.makedirs(remote_file.rpartition("/")[0], exist_ok=True)
                storage.put_file(str(local_file), remote_file)
                task.uploaded_files.add(remote_file)
        # Copies that this run never had stay: a machine that resumes a run starts with its newest checkpoint alone.
        with self._lock:
            deleted_names = self._known_checkpoints - self._list_local_checkpoints()
        for name in _list_complete_checkpoints(storage, run_path):
            if name in deleted_names:
                # The manifest first, so that an interrupted deletion leaves no copy that passes for complete.
                storage.rm(f"{run_path}/{CHECKPOINTS_FOLDER}/{name}/{MANIFEST_FILE}")
                storage.rm(f"{run_path}/{CHECKPOINTS_FOLDER}/{name}", recursive=True)
        return True


def open_storage(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it; pyarrow's own for s3, gs and abfs without an fsspec driver.

    Raises ResourceError when there is neither.
    """
    import fsspec

    try:
        storage, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        storage, path = _open_arrow_storage(url, error)
    # fsspec caches instances and their listings, which another process may have changed.
    storage.invalidate_cache()
    return storage, str(path).rstrip("/")


def _open_arrow_storage(url: str, fsspec_error: Exception) -> tuple[Any, str]:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    try:
        file_system, path = FileSystem.from_uri(url)
    except (OSError, ArrowException) as error:
        raise ResourceError(
            f"no storage driver for {url}: {fsspec_error}; use s3://, gs://, abfs:// or file://, or install the driver"
        ) from error
    return ArrowFSWrapper(file_system), path


@contextmanager
def _translate_read_errors(url: str) -> Iterator[None]:
    """Raise ResourceError for storage that cannot be read."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"cannot read {url}: {type(error).__name__}: {error}; check the address and the credentials in the "
            "environment, or name a run folder on disk in run.resume"
        ) from error


def _list_names(storage: Any, folder: str) -> list[str]:
    try:
        return [str(path).rstrip("/").rpartition("/")[2] for path in storage.ls(folder, detail=False)]
    except FileNotFoundError:
        return []


def _list_complete_checkpoints(storage: Any, run_path: str) -> list[str]:
    """Names of the uploaded checkpoints of a run that have a manifest, the newest first."""
    name_by_step = {
        step: name
        for name in _list_names(storage, f"{run_path}/{CHECKPOINTS_FOLDER}")
        if (step := parse_step(Path(name))) is not None
    }
    names = [name_by_step[step] for step in sorted(name_by_step, reverse=True)]
    return [name for name in names if storage.exists(f"{run_path}/{CHECKPOINTS_FOLDER}/{name}/{MANIFEST_FILE}")]


def find_newest_upload(url: str, run_name: str) -> tuple[str, int] | None:
    """URL of the newest run named `run_name` with an uploaded checkpoint under `url`, and its newest step."""
    runs_url = f"{url.rstrip('/')}/{run_name}"
    with _translate_read_errors(url):
        storage, runs_path = open_storage(runs_url)
        # Run folders are named by their start time.
        for run in sorted(_list_names(storage, runs_path), reverse=True):
            checkpoint_names = _list_complete_checkpoints(storage, f"{runs_path}/{run}")
            if checkpoint_names:
                return f"{runs_url}/{run}", int(checkpoint_names[0].removeprefix("step-"))
    return None


def download_newest_checkpoint(url: str, run_folder: Path) -> None:
    """Download the newest complete checkpoint of the run at `url`, and its base responses, into `run_folder`.

    Raises ModelError when there is none, ResourceError when the storage cannot be read.
    """
    with _translate_read_errors(url):
        storage, run_path = open_storage(url)
        for name in _list_complete_checkpoints(storage, run_path):
            target_folder = run_folder / CHECKPOINTS_FOLDER / name
            if target_folder.is_dir() and find_checkpoint_problem(target_folder) is None:
                return
            with atomic_folder(target_folder) as temporary_folder:
                for remote_file in storage.find(f"{run_path}/{CHECKPOINTS_FOLDER}/{name}"):
                    local_file = temporary_folder / str(remote_file).split(f"/{CHECKPOINTS_FOLDER}/{name}/", 1)[1]
                    local_file.parent.mkdir(parents=True, exist_ok=True)
                    storage.get_file(remote_file, str(local_file))
            problem = find_checkpoint_problem(target_folder)
            if problem is None:
                if not (run_folder / ANSWERS_FILE).exists():
                    storage.get_file(f"{run_path}/{ANSWERS_FILE}", str(run_folder / ANSWERS_FILE))
                logger.info("checkpoint %s: downloaded from %s to %s", name, url, target_folder)
                return
            logger.warning("checkpoint %s/%s/%s: skipped, %s", url, CHECKPOINTS_FOLDER, name, problem)
    raise ModelError(f"run.resume={url}: expected a complete checkpoint, got none; name another run")
