"""Train a policy from user feedback: reward models, policy optimization, comparison with the base policy, report.

Reads the log, trains missing reward models, trains the policy, compares it with its base on test prompts, and writes a
report. Without --config it runs the quickstart.

    ray job submit --working-dir . -- python -m rluf.train --config configs/human.yaml
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rluf.config.cli import CommandOptions, parse_command_line, run_command
from rluf.errors import SettingsError

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.train")


def train(settings: Settings, profile_steps: int = 0) -> Path:
    """Run the whole job and return the run folder; `profile_steps` steps are profiled.

    Raises RlufError with a message for the user.
    """
    # Imported here: `--help` and `--dry-run` must not wait for torch and ray.
    from cluster.autoscaling import ensure_capacity
    from cluster.connect import ray_connection
    from cluster.node_check import check_nodes
    from cluster.plan import check_host_disk, format_plan, plan_resources
    from rluf.artifacts import list_reward_model_folders, prepare_data_artifact, train_reward_artifacts
    from rluf.checkpoint.upload import CheckpointUploader
    from rluf.evaluate.compare import compare_policies, write_cards, write_results
    from rluf.models.hub import resolve_policy
    from rluf.report.model_card import write_model_card
    from rluf.tracking.console import setup_logging
    from rluf.tracking.timeline import PhaseTimer
    from rluf.tracking.wandb import WandbTracker
    from rluf.train.checkpoint_manager import find_resume_folder, is_finished
    from rluf.train.loop import run_training
    from rluf.train.startup_check import check_policy
    from rluf.utils.event_loop import collect_garbage_rarely, run_coroutine
    from rluf.utils.files import write_json
    from rluf.utils.paths import create_run_folder, lock_run_folder, resolve_cache_folder, resolve_runs_root

    setup_logging()
    phase_timer, cache_folder, runs_root = PhaseTimer(), resolve_cache_folder(settings), resolve_runs_root(settings)
    check_run(settings, may_download=True)
    check_host_disk(settings, runs_root, cache_folder)
    model_path = phase_timer.time_call("model", resolve_policy, settings)
    resume_folder = find_resume_folder(settings, runs_root / settings.name)
    if resume_folder is not None and is_finished(settings, resume_folder):
        logger.info("run: already finished, nothing to resume; report: %s", resume_folder / "report.html")
        return resume_folder
    phase_timer.time_call("check", check_policy, settings, model_path)

    with ExitStack() as stack:
        phase_timer.time_call("ray", stack.enter_context, ray_connection())
        resource_plan = plan_resources(settings)
        logger.info("actors:\n%s", format_plan(resource_plan, use_rich=False))
        stack.enter_context(ensure_capacity(resource_plan, settings.timeouts.autoscale_s))
        check_nodes(settings, model_path, runs_root, cache_folder)

        run_folder = resume_folder or create_run_folder(settings)
        stack.enter_context(lock_run_folder(run_folder))
        setup_logging(run_folder / "run.log")
        stack.enter_context(phase_timer.add_up_attempts(run_folder / "phases.json"))
        logger.info("run folder: %s", run_folder)
        write_json(run_folder / "config.json", settings.model_dump(mode="json"))
        uploader = CheckpointUploader.from_settings(settings, run_folder)
        if uploader is not None:
            # Before hours of training: a wrong URL or missing credentials would be noticed at the first checkpoint.
            uploader.check_storage()

        data_artifact = phase_timer.time_call("prepare", prepare_data_artifact, settings)
        reward_artifacts = phase_timer.time_call("reward", train_reward_artifacts, settings, data_artifact)
        write_cards(run_folder, data_artifact, reward_artifacts)

        tracker = stack.enter_context(WandbTracker(settings, run_folder))
        tracker.log_artifacts(data_artifact, reward_artifacts)
        tracker.log_reward_training()
        reward_folders = list_reward_model_folders(reward_artifacts)
        data_folder = data_artifact.folder
        with collect_garbage_rarely():
            result = run_coroutine(
                run_training(settings, run_folder, model_path, data_folder, reward_folders, tracker, profile_steps)
            )
        phase_timer.add_seconds(result.phase_seconds)

        summary = phase_timer.time_call("compare", compare_policies, settings, result, data_artifact, reward_artifacts)
        write_results(settings, run_folder, summary, result, phase_timer, tracker)
        write_model_card(run_folder)
    return run_folder


def check_run(settings: Settings, *, may_download: bool = False) -> None:
    """Refuse what a run would refuse later: inputs, models, plug-ins and the run to resume. Raises RlufError."""
    from rluf.artifacts import check_training_rows
    from rluf.evaluate.inputs import check_comparison_inputs

    check_comparison_inputs(settings, may_download=may_download)
    check_training_rows(settings)
    if settings.run.resume is not None:
        from rluf.train.checkpoint_manager import find_local_resume_folder

        find_local_resume_folder(settings)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="check that the policy can be trained, then exit")
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint (run.resume=latest)")
    parser.add_argument(
        "--profile", metavar="steps=N", type=_parse_profile_steps, default=0, help="profile N steps, from step 2 on"
    )


def _parse_profile_steps(text: str) -> int:
    steps = text.removeprefix("steps=")
    if not steps.isdecimal():
        raise SettingsError(f"--profile expects steps=N, such as steps=3, got {text!r}")
    return int(steps)


def _list_overrides(options: argparse.Namespace) -> list[str]:
    if options.resume and (words := [word for word in options.overrides if "=" not in word]):
        raise SettingsError(f"--resume takes no folder; write run.resume={words[0]} to resume another run")
    return ["run.resume=latest"] if options.resume else []


COMMAND_OPTIONS = CommandOptions(_add_options, _list_overrides, check_run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors caused by the user are one message on stderr."""
    loaded = parse_command_line("train", __doc__ or "", arguments, COMMAND_OPTIONS)
    if loaded.options.check:
        from rluf.train.startup_check import check_training

        return run_command(lambda: check_training(loaded.settings))
    return run_command(lambda: train(loaded.settings, loaded.options.profile))


if __name__ == "__main__":
    raise SystemExit(main())
