"""What a run keeps on disk to go on after a stop: checkpoints, the base policy's answers, the metrics so far."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rluf.checkpoint.format import (  # fmt: skip
    ANSWERS,
    FOLDER,
    Checkpoint,
    RunState,
    changed,
    forget_after,
    group_from_json,
    group_to_json,
    newest_whole,
    prompts_digest,
    prune,
    write_state,
)
from rluf.checkpoint.upload import Uploader, download, newest_upload
from rluf.config.settings import Settings
from rluf.errors import AlarmError, DataError, ModelError, SettingsError
from rluf.tracking.run_files import jsonable, read_jsonl, write_jsonl
from rluf.train.fault_tolerance import LastingPipeline
from rluf.types import Group, Prompt
from rluf.utils.files import atomic_folder

logger = logging.getLogger(__name__)


class Keeper:
    """Writes and finds the checkpoints of one run folder."""

    def __init__(self, settings: Settings, folder: Path, prompts: Sequence[Prompt]) -> None:
        """`prompts` are the training prompts, in order."""
        self.settings, self.folder = settings, folder
        self.uploads = Uploader.of(settings, folder)
        self._prompts = prompts_digest(prompts)
        self._saved = 0

    @contextlib.contextmanager
    def copied(self) -> Iterator[None]:
        """On leaving, however that is, wait with a deadline for the copy of a checkpoint that is under way."""
        try:
            yield
        finally:
            if self.uploads is not None:
                self.uploads.drain()

    def newest(self, at_most: float = float("inf")) -> tuple[Checkpoint, RunState] | None:
        """The newest whole checkpoint of a step up to `at_most`, and its state; None when there is none.

        Raises SettingsError when settings that matter to what is learnt, or the training prompts, are others now.
        """
        found = newest_whole(self.folder / FOLDER, at_most)
        if found is None:
            return None
        state = found.state()
        self._saved = found.step
        problems = changed(state.settings, self.settings.model_dump(mode="json"))
        if state.prompts != self._prompts:
            problems.append("the training prompts (the log or the split is another one)")
        if problems:
            raise SettingsError(
                f"run.resume={self.settings.run.resume} does not fit checkpoint {found.folder}: changed since: "
                f"{', '.join(problems)}; take these back, or start a new run without run.resume"
            )
        return found, state

    def go_back(self, step: int, why: str) -> tuple[Checkpoint, RunState]:
        """The newest whole checkpoint of a step up to `step`; younger ones are deleted, they led to `why`.

        Raises AlarmError when there is none.
        """
        found = self.newest(step)
        if found is None:
            raise AlarmError(
                f"{why}; there is no checkpoint of step {step} or before to go back to: set learner.save_every, or "
                "lower objectives.love.weight"
            )
        forget_after(self.folder / FOLDER, found[0].step)
        return found

    async def save(
        self,
        pipeline: LastingPipeline,
        step: int,
        rows: Sequence[Mapping[str, Any]],
        watch: Mapping[str, Any] | None = None,
    ) -> Path | None:
        """Write checkpoint `step` whole or not at all, then delete superfluous ones; None if it is there already.

        `rows` are the metrics of all steps so far, `watch` is the state of the alarms. Raises ModelError when the disk
        refuses.
        """
        if step == self._saved:
            return None
        target = self.folder / FOLDER / f"step-{step}"
        with atomic_folder(target) as part:
            schedules = await pipeline.save_checkpoint(part)
            state = RunState(
                step=step,
                world=self.settings.learner.ranks,
                settings=self.settings.model_dump(mode="json"),
                prompts=self._prompts,
                pipeline=pipeline.snapshot,
                schedules=schedules,
                rows=[jsonable(row) for row in rows],
                watch=watch,
            )
            await asyncio.to_thread(write_state, part, state)
        self._saved = step
        logger.info("checkpoint of step %d: %s", step, target)
        rewards = {int(row["step"]): float(row["reward"]) for row in rows}
        prune(self.folder / FOLDER, rewards, self.settings.learner.keep_checkpoints)
        if self.uploads is not None:
            self.uploads.add(target)
        return target

    def keep_answers(self, answers: Sequence[tuple[Group, Mapping[str, tuple[float, ...]]]]) -> None:
        """Keep the base policy's answers, which the comparison at the end needs."""
        write_jsonl(self.folder / ANSWERS, ({"group": group_to_json(g), "values": dict(v)} for g, v in answers))

    def answers(self) -> list[tuple[Group, dict[str, tuple[float, ...]]]]:
        """The base policy's answers kept by `keep_answers`. Raises DataError when they are not there."""
        rows = read_jsonl(self.folder / ANSWERS)
        if not rows:
            raise DataError(
                f"{self.folder / ANSWERS} is missing, the base policy's answers that a run keeps before its first "
                "step; restore it, or start a new run without run.resume"
            )
        return [(group_from_json(row["group"]), {k: tuple(v) for k, v in row["values"].items()}) for row in rows]


def resumed_folder(settings: Settings, runs: Path) -> Path | None:
    """The run folder that run.resume means, None to begin a new one.

    `runs` holds this configuration's run folders. For latest it is the newest one with a checkpoint, and a new run is
    begun, with a message, when there is none. Where run.upload has a newer one, or a URL is named, its newest
    checkpoint is fetched into a run folder here. Raises ModelError when a named folder has none.
    """
    wanted = settings.run.resume
    if wanted is None:
        return None
    if "://" in wanted:
        folder = runs / wanted.rstrip("/").rpartition("/")[2]
        download(wanted, folder)
        return folder
    if wanted != "latest":
        folder = Path(wanted).expanduser().resolve()
        if newest_whole(folder / FOLDER) is None:
            raise ModelError(f"run.resume={wanted}: no whole checkpoint in {folder / FOLDER}; name another run folder")
        return folder
    here: tuple[str, int] | None = None
    folders = sorted((p for p in runs.glob("*") if p.is_dir() and not p.is_symlink()), key=lambda p: p.name)
    for folder in reversed(folders):
        found = newest_whole(folder / FOLDER) if (folder / FOLDER).is_dir() else None
        if found is not None:
            here = folder.name, found.step
            break
    away = newest_upload(settings.run.upload, settings.name) if settings.run.upload else None
    if away is not None:
        name = away[0].rpartition("/")[2]
        if here is None or here < (name, away[1]):
            download(away[0], runs / name)
            return (runs / name).resolve()
    if here is not None:
        return (runs / here[0]).resolve()
    logger.info("run.resume=latest: no run under %s has a whole checkpoint; beginning a new one", runs)
    return None


@contextlib.contextmanager
def listening() -> Iterator[asyncio.Event]:
    """An event that SIGTERM sets inside the block, instead of ending the program; `ray job stop` sends it."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGTERM)
    try:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    except (ValueError, RuntimeError):  # not the main thread: nobody sends signals here
        yield stop
        return
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
