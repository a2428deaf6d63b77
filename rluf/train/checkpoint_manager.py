"""Checkpoints of a run folder: save, find, roll back; the base policy's responses; graceful stop on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.checkpoint.format import (
    CHECKPOINTS_FOLDER,
    RunCheckpoint,
    RunState,
    delete_checkpoints_after,
    diff_settings,
    find_newest_complete,
    hash_prompts,
    prune_checkpoints,
    write_run_state,
)
from rluf.checkpoint.upload import CheckpointUploader, download_newest_checkpoint, find_newest_upload
from rluf.config.renamed import describe_old_keys
from rluf.config.run import RESUME_WITH_PATTERN
from rluf.config.settings import Settings
from rluf.errors import DataError, ModelError, RewardHackingError, SettingsError
from rluf.tracking.run_files import read_answers, write_answers
from rluf.types import ANSWERS_FILE, BASE_ARM, PolicyAnswer, Prompt
from rluf.utils.files import atomic_folder, read_json, to_jsonable

if TYPE_CHECKING:
    from rluf.train.controller import TrainController

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Writes, finds and prunes the checkpoints of one run folder."""

    def __init__(self, settings: Settings, run_folder: Path, prompts: Sequence[Prompt]) -> None:
        """`prompts` are the training prompts, in order: a checkpoint fits these only."""
        self.settings, self.run_folder = settings, run_folder
        self.uploader = CheckpointUploader.from_settings(settings, run_folder)
        self._checkpoints_folder = run_folder / CHECKPOINTS_FOLDER
        self._prompts_digest = hash_prompts(prompts)
        self._last_saved_step = 0

    @contextlib.contextmanager
    def wait_for_upload(self) -> Iterator[None]:
        """On leaving, also by an exception, wait with a deadline for a checkpoint upload that is under way."""
        try:
            yield
        finally:
            if self.uploader is not None:
                self.uploader.wait_until_idle()

    def load_newest(self, max_step: float = float("inf")) -> tuple[RunCheckpoint, RunState] | None:
        """The newest complete checkpoint of a step up to `max_step`, with its state; None without one.

        Raises SettingsError when settings that affect training, or the training prompts, have changed since.
        """
        checkpoint = find_newest_complete(self._checkpoints_folder, max_step)
        if checkpoint is None:
            return None
        state = checkpoint.read_state()
        self._last_saved_step = checkpoint.step
        replaced_keys = describe_old_keys(state.settings)
        if replaced_keys:
            raise SettingsError(
                f"run.resume={self.settings.run.resume}: an earlier release wrote checkpoint {checkpoint.folder}, "
                f"whose settings have old names ({', '.join(sorted(replaced_keys)[:3])} ...); resume it with that "
                "release, or start a new run without run.resume"
            )
        changes = diff_settings(state.settings, self.settings.model_dump(mode="json"))
        accepted = {key for key in changes if _is_accepted(key, self.settings.run.resume_with)}
        refused = [change for key, change in changes.items() if key not in accepted]
        if state.prompts_digest != self._prompts_digest:
            # The state holds positions in the shuffled prompts and ids in flight: with other prompts both are invalid.
            refused.append("the training prompts (another log or another split)")
        if refused:
            named = [key for key in changes if key not in accepted and RESUME_WITH_PATTERN.fullmatch(key)]
            remedy = f", name them in run.resume_with=[{','.join(named)}]" if named else ""
            raise SettingsError(
                f"run.resume={self.settings.run.resume} does not fit checkpoint {checkpoint.folder}: changed since: "
                f"{', '.join(refused)}; undo these changes{remedy}, or start a new run without run.resume"
            )
        if accepted:
            logger.warning(
                "checkpoint of step %d: resuming with %s",
                checkpoint.step,
                ", ".join(change for key, change in changes.items() if key in accepted),
            )
        return checkpoint, self._apply_kl_changes(state, accepted)

    def _apply_kl_changes(self, state: RunState, changed_keys: Collection[str]) -> RunState:
        """Replace the saved KL coefficient, which a target may have adapted, if the run is resumed with another one."""
        algorithm = self.settings.algorithm
        target_removed = "algorithm.kl_target" in changed_keys and algorithm.kl_target is None
        if not target_removed and "algorithm.kl_coef" not in changed_keys:
            return state
        controller_state = state.controller_state
        updater_state = {**controller_state.policy_updater, "kl_coef": algorithm.kl_coef}
        return replace(state, controller_state=replace(controller_state, policy_updater=updater_state))

    def roll_back_to(self, step: int, reason: str) -> tuple[RunCheckpoint, RunState]:
        """The newest complete checkpoint of a step up to `step`; newer ones, which led to `reason`, are deleted.

        Raises RewardHackingError when there is none.
        """
        resume_from = self.load_newest(step)
        if resume_from is None:
            raise RewardHackingError(
                f"{reason}; no checkpoint of step {step} or before to roll back to: set "
                "learner.checkpoint_every_steps, or lower objectives.love.weight"
            )
        delete_checkpoints_after(self._checkpoints_folder, resume_from[0].step)
        return resume_from

    async def save_checkpoint(
        self,
        controller: TrainController,
        step: int,
        metric_rows: Sequence[Mapping[str, Any]],
        monitor_state: Mapping[str, Any] | None = None,
    ) -> Path | None:
        """Write the checkpoint of `step` atomically, then delete superfluous ones; None if it exists already.

        `metric_rows` are the metrics of all steps so far, `monitor_state` that of the reward hacking monitor. Raises
        ModelError when the files cannot be written.
        """
        if step == self._last_saved_step:
            return None
        target = self._checkpoints_folder / f"step-{step}"
        with atomic_folder(target) as temporary_folder:
            lr_schedules = await controller.save_checkpoint(temporary_folder)
            state = RunState(
                step=step,
                world_size=self.settings.learner.workers,
                settings=self.settings.model_dump(mode="json"),
                prompts_digest=self._prompts_digest,
                # The snapshot, not state(): while the learners wrote their part, groups of the next step went on.
                controller_state=controller.snapshot,
                lr_schedules=lr_schedules,
                step_metrics=[to_jsonable(row) for row in metric_rows],
                monitor_state=monitor_state,
            )
            await asyncio.to_thread(write_run_state, temporary_folder, state)
        self._last_saved_step = step
        logger.info("checkpoint of step %d: saved to %s", step, target)
        # Steps of an offline algorithm have no reward.
        reward_by_step = {int(row["step"]): float(row["reward"]) for row in metric_rows if "reward" in row}
        prune_checkpoints(self._checkpoints_folder, reward_by_step, self.settings.learner.keep_checkpoints)
        if self.uploader is not None:
            self.uploader.add_checkpoint(target)
        return target

    def save_base_answers(self, answers: Sequence[PolicyAnswer]) -> None:
        """Save the base policy's responses, which the comparison at the end of the run needs."""
        write_answers(self.run_folder, answers)

    def load_base_answers(self) -> list[PolicyAnswer]:
        """The responses saved by `save_base_answers`. Raises DataError when the file is missing."""
        # A run that finished before has added those of aligned and control, which are made again.
        answers = [answer for answer in read_answers(self.run_folder) if answer.arm.startswith(BASE_ARM)]
        if not answers:
            raise DataError(
                f"{self.run_folder / ANSWERS_FILE} is missing: the base policy's responses, saved before the first "
                "step; restore the file, or start a new run without run.resume"
            )
        return answers


def _is_accepted(changed_key: str, resume_with: Sequence[str]) -> bool:
    """Whether run.resume_with names a setting, or the mapping that it is an entry of."""
    return any(changed_key == key or changed_key.startswith(f"{key}.") for key in resume_with)


def find_resume_folder(settings: Settings, runs_folder: Path) -> Path | None:
    """The run folder that run.resume names; None to start a new run.

    `runs_folder` holds this configuration's run folders. `latest` is the newest one with a checkpoint, here or at
    run.checkpoint_upload_url; without one a new run starts, with a log line. A checkpoint of a URL is downloaded into a
    run folder here. Raises ModelError when a named folder has no checkpoint.
    """
    resume = settings.run.resume
    if resume is None:
        return None
    if "://" in resume:
        folder = runs_folder / resume.rstrip("/").rpartition("/")[2]
        download_newest_checkpoint(resume, folder)
        return folder
    return find_local_resume_folder(settings) or _find_latest_run(settings, runs_folder)


def find_local_resume_folder(settings: Settings) -> Path | None:
    """The folder that run.resume names; None without one, for `latest` or a URL. ModelError without checkpoint."""
    resume = settings.run.resume
    if resume is None or resume == "latest" or "://" in resume:
        return None
    folder = Path(resume).expanduser().resolve()
    if find_newest_complete(folder / CHECKPOINTS_FOLDER) is None:
        raise ModelError(
            f"run.resume={resume}: no complete checkpoint in {folder / CHECKPOINTS_FOLDER}; name another run folder"
        )
    return folder


RESULT_SECTIONS = tuple(
    name for name in Settings.model_fields if name not in ("run", "cluster", "timeouts", "tracking")
)
"""Settings that affect the result of a run."""


def is_finished(settings: Settings, run_folder: Path) -> bool:
    """Whether a run has all its steps, its policy and its comparison by the same settings: nothing to resume."""
    try:
        summary, config = (read_json(run_folder / name) for name in ("summary.json", "config.json"))
    except DataError:
        return False
    if not summary or not config:
        return False
    present_config = settings.model_dump(mode="json")
    # The config is written when an attempt starts: a summary from before it is that of another attempt.
    is_newest = (run_folder / "summary.json").stat().st_mtime_ns >= (run_folder / "config.json").stat().st_mtime_ns
    return (
        is_newest
        and summary.get("versions", {}).get("weights") == settings.algorithm.steps
        and (run_folder / "policy" / "config.json").is_file()
        and all(config.get(name) == present_config[name] for name in RESULT_SECTIONS)
    )


def _find_latest_run(settings: Settings, runs_folder: Path) -> Path | None:
    """The newest run with a complete checkpoint among local run folders and uploads; an upload is downloaded."""
    local_run = _find_latest_local_run(runs_folder)
    upload_url = settings.run.checkpoint_upload_url
    upload = find_newest_upload(upload_url, settings.name) if upload_url else None
    if upload is not None:
        run_url, step = upload
        run_name = run_url.rpartition("/")[2]
        # Run folders are named by their start time, so (name, step) orders by run first, then by progress.
        if local_run is None or local_run < (run_name, step):
            download_newest_checkpoint(run_url, runs_folder / run_name)
            return (runs_folder / run_name).resolve()
    if local_run is not None:
        return (runs_folder / local_run[0]).resolve()
    logger.info("run.resume=latest: no run under %s has a complete checkpoint; starting a new run", runs_folder)
    return None


def _find_latest_local_run(runs_folder: Path) -> tuple[str, int] | None:
    """Name and checkpoint step of the newest local run with a complete checkpoint."""
    # Symbolic links are left out: "latest" points to one of the other folders.
    run_folders = [path for path in runs_folder.glob("*") if path.is_dir() and not path.is_symlink()]
    for run_folder in sorted(run_folders, key=lambda path: path.name, reverse=True):
        checkpoints_folder = run_folder / CHECKPOINTS_FOLDER
        checkpoint = find_newest_complete(checkpoints_folder) if checkpoints_folder.is_dir() else None
        if checkpoint is not None:
            return run_folder.name, checkpoint.step
    return None


@contextlib.contextmanager
def sigterm_event() -> Iterator[asyncio.Event]:
    """An event that SIGTERM sets inside the block instead of ending the program; `ray job stop` sends SIGTERM."""
    stop_event, event_loop = asyncio.Event(), asyncio.get_running_loop()
    previous_handler = signal.getsignal(signal.SIGTERM)
    try:
        event_loop.add_signal_handler(signal.SIGTERM, stop_event.set)
    except (ValueError, RuntimeError):  # outside the main thread, where no signal handler can be installed
        yield stop_event
        return
    try:
        yield stop_event
    finally:
        # remove_signal_handler installs the default action, not the handler of before.
        event_loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, previous_handler)
