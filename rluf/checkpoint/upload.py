"""Copies of checkpoints on storage that outlives the machine, made while the run goes on.

A run's copies lie under <run.upload>/<name>/<time>, as in its run folder: config.json, the base policy's answers, and
checkpoints/step-<n>, whose complete.json is copied last, so that a copy cut short is never taken for a whole one.
Storage that fails is told and tried again, and never stops a run: its checkpoints are on disk all the same.
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

from rluf.checkpoint.format import ANSWERS, FOLDER, MANIFEST, flaw, step_of
from rluf.errors import ModelError, ResourceError
from rluf.utils.files import atomic_folder

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""How often a checkpoint is tried; the pause before attempt n is PAUSE_S * 4^(n - 2)."""
PAUSE_S = 1.0


@dataclass(slots=True)
class _Copy:
    """One checkpoint on its way: since when (monotonic), its file of the moment, the files that are there."""

    folder: Path
    since: float
    file: str = ""
    there: set[str] = field(default_factory=set)
    problem: str | None = None
    done: bool = False
    given_up: bool = False


class Uploader:
    """Copies the checkpoints of one run folder, one after the other, the newest first when it falls behind."""

    def __init__(self, url: str, folder: Path, deadline_s: float, pause_s: float = PAUSE_S) -> None:
        """Copy from run folder `folder` to `url`; each checkpoint may take `deadline_s`. `begin` opens the storage."""
        self.url, self.folder, self._deadline, self._pause = url.rstrip("/"), folder, deadline_s, pause_s
        self._lock = threading.Lock()
        self._now: _Copy | None = None
        self._next: Path | None = None
        self.uploaded: list[int] = []
        self._known = self._here()

    @classmethod
    def of(cls, settings: Settings, folder: Path) -> Uploader | None:
        """The uploader that `run.upload` asks for; None without it."""
        if settings.run.upload is None:
            return None
        url = f"{settings.run.upload.rstrip('/')}/{settings.name}/{folder.name}"
        return cls(url, folder, settings.learner.deadline_s)

    def begin(self) -> None:
        """Copy the run's settings, which shows whether the storage takes files. Raises ResourceError when not."""
        try:
            storage, root = open_storage(self.url)
            storage.makedirs(root, exist_ok=True)
            storage.pipe_file(f"{root}/config.json", (self.folder / "config.json").read_bytes())
        except (OSError, ValueError, RuntimeError) as error:
            raise ResourceError(
                f"run.upload: cannot write to {self.url}: {type(error).__name__}: {error}; check the address and the "
                "credentials in the environment, or take run.upload out"
            ) from error
        logger.info("checkpoints are copied to %s", self.url)

    def add(self, checkpoint: Path) -> None:
        """Copy `checkpoint` when the one before it is through; one that hangs past its deadline is given up."""
        with self._lock:
            self._known.add(checkpoint.name)
            now = self._now
            if now is not None and not now.done and time.monotonic() - now.since > self._deadline:
                now.given_up = True
                logger.warning("%s", self._late(now))
                now = None
            if now is not None and not now.done:
                if self._next is not None:
                    logger.info("%s is not copied: a newer checkpoint overtook it", self._next.name)
                self._next = checkpoint
                return
            self._start(checkpoint)

    def _here(self) -> set[str]:
        return {path.name for path in (self.folder / FOLDER).glob("step-*")}

    def drain(self) -> bool:
        """Wait until nothing is under way, at most the deadline of a checkpoint; whether all got there."""
        deadline = time.monotonic() + self._deadline
        while (now := self._now) is not None and not now.done:
            if time.monotonic() > deadline:
                logger.warning("%s", self._late(now))
                return False
            time.sleep(0.02)
        return self._now is None or self._now.problem is None

    def _late(self, now: _Copy) -> str:
        return (
            f"waited {time.monotonic() - now.since:.0f} s for {self.url} to take {now.folder.name} (at "
            f"{now.file or 'its start'}), more than learner.deadline_s={self._deadline:g}; it is given up, the copy on "
            f"disk is whole: {now.folder}"
        )

    def _start(self, checkpoint: Path) -> None:
        self._now = copy = _Copy(checkpoint, time.monotonic())
        threading.Thread(target=self._run, args=(copy,), name=f"rluf-upload-{checkpoint.name}", daemon=True).start()

    def _run(self, copy: _Copy) -> None:
        problem: str | None = "an unexpected error; its traceback is in the output"
        try:
            problem = self._attempts(copy)
        finally:
            copy.problem = problem
            if problem is not None and not copy.given_up:
                logger.warning(
                    "%s was not copied to %s: %s; the run goes on, the checkpoint on disk is whole: %s",
                    copy.folder.name, self.url, problem, copy.folder,
                )  # fmt: skip
            with self._lock:
                copy.done = True
                following, current = self._next, self._now is copy
                if current and following is not None:
                    self._next = None
                    self._start(following)

    def _attempts(self, copy: _Copy) -> str | None:
        """Try to copy; returns what is wrong after the last attempt, None when the copy is whole (or overtaken)."""
        problem = None
        for number in range(ATTEMPTS):
            try:
                if self._copied(copy):
                    seconds = time.monotonic() - copy.since
                    logger.info("%s is copied to %s after %.1f s", copy.folder.name, self.url, seconds)
                    self.uploaded.append(int(step_of(copy.folder) or 0))
                return None
            except (OSError, ValueError, RuntimeError) as error:
                if not (copy.folder / MANIFEST).exists():
                    logger.info("%s is not copied: it was deleted meanwhile, newer ones are kept", copy.folder.name)
                    return None
                problem = f"{type(error).__name__}: {error} (at {copy.file}, attempt {number + 1} of {ATTEMPTS})"
            if copy.given_up or number + 1 == ATTEMPTS:
                break
            logger.warning("%s: copying to %s failed, trying again: %s", copy.folder.name, self.url, problem)
            time.sleep(self._pause * 4**number)
        return problem

    def _copied(self, copy: _Copy) -> bool:
        """Copy what is not there yet, the manifest last, then delete copies whose checkpoints this run has deleted.

        Others stay: a machine that goes on with a run begins with its newest checkpoint alone.
        """
        storage, root = open_storage(self.url)
        target = f"{root}/{FOLDER}/{copy.folder.name}"
        sizes: dict[str, int] = json.loads((copy.folder / MANIFEST).read_text("utf-8"))["files"]
        files = {f"{root}/{ANSWERS}": self.folder / ANSWERS}
        files |= {f"{target}/{name}": copy.folder / name for name in (*sizes, MANIFEST)}
        if not copy.there and storage.exists(f"{target}/{MANIFEST}"):
            storage.rm(f"{target}/{MANIFEST}")  # of the same step before the run went back: not whole any more
        for there, here in files.items():
            if copy.given_up:
                return False
            copy.file = here.name
            if there not in copy.there:
                storage.makedirs(there.rpartition("/")[0], exist_ok=True)
                storage.put_file(str(here), there)
                copy.there.add(there)
        with self._lock:
            gone = self._known - self._here()
        for name in _steps(storage, root):
            if name in gone:
                storage.rm(f"{root}/{FOLDER}/{name}/{MANIFEST}")
                storage.rm(f"{root}/{FOLDER}/{name}", recursive=True)
        return True


def open_storage(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it; pyarrow's own for s3, gs and abfs without an fsspec driver.

    Raises ResourceError when neither knows it.
    """
    import fsspec

    try:
        storage, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        storage, root = _arrow(url, error)
    storage.invalidate_cache()
    return storage, str(root).rstrip("/")


def _arrow(url: str, reason: Exception) -> tuple[Any, str]:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    try:
        system, root = FileSystem.from_uri(url)
    except (OSError, ArrowException) as error:
        raise ResourceError(
            f"no driver for {url}: {reason}; use s3://, gs://, abfs:// or file://, or install the driver beside rluf"
        ) from error
    return ArrowFSWrapper(system), root


@contextmanager
def _told(url: str) -> Iterator[None]:
    """What storage that cannot be read says, as one error of ours."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"cannot read {url}: {type(error).__name__}: {error}; check the address and the credentials in the "
            "environment, or name a run folder on disk in run.resume"
        ) from error


def _names(storage: Any, folder: str) -> list[str]:
    try:
        return [str(one).rstrip("/").rpartition("/")[2] for one in storage.ls(folder, detail=False)]
    except FileNotFoundError:
        return []


def _steps(storage: Any, root: str) -> list[str]:
    """Names of checkpoints with a manifest under a run's copies, the newest first."""
    found = {step: name for name in _names(storage, f"{root}/{FOLDER}") if (step := step_of(Path(name))) is not None}
    ordered = [found[step] for step in sorted(found, reverse=True)]
    return [name for name in ordered if storage.exists(f"{root}/{FOLDER}/{name}/{MANIFEST}")]


def newest_upload(url: str, name: str) -> tuple[str, int] | None:
    """URL of the newest run of configuration `name` that has a copied checkpoint under `url`, and its newest step."""
    with _told(url):
        storage, root = open_storage(f"{url.rstrip('/')}/{name}")
        for run in sorted(_names(storage, root), reverse=True):
            steps = _steps(storage, f"{root}/{run}")
            if steps:
                return f"{url.rstrip('/')}/{name}/{run}", int(steps[0].removeprefix("step-"))
    return None


def download(url: str, folder: Path) -> None:
    """Fetch the newest whole checkpoint of the run copied to `url`, and its answers, into run folder `folder`.

    Raises ModelError when there is none, ResourceError when the storage cannot be read.
    """
    with _told(url):
        storage, root = open_storage(url)
        for name in _steps(storage, root):
            target = folder / FOLDER / name
            if target.is_dir() and flaw(target) is None:
                return
            with atomic_folder(target) as part:
                for there in storage.find(f"{root}/{FOLDER}/{name}"):
                    here = part / str(there).split(f"/{FOLDER}/{name}/", 1)[1]
                    here.parent.mkdir(parents=True, exist_ok=True)
                    storage.get_file(there, str(here))
            problem = flaw(target)
            if problem is None:
                if not (folder / ANSWERS).exists():
                    storage.get_file(f"{root}/{ANSWERS}", str(folder / ANSWERS))
                logger.info("checkpoint %s of %s is here: %s", name, url, target)
                return
            logger.warning("the copy %s/%s/%s is left out: %s", url, FOLDER, name, problem)
    raise ModelError(f"run.resume={url}: no whole checkpoint there; name another run")
