"""Runs of a sweep: one training job per point of the grid, by Ray Tune; finished runs of equal settings are reused."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.load import load_settings
from rluf.errors import ActorError, SettingsError

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.sweep")
LOCATION_SECTIONS = ("name", "run", "cluster", "serve", "tracking")
"""Settings of location and reporting, which do not affect the result of a run."""


def run_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Run the grid; writes <run.root>/<name>-sweep/sweep.json and returns its content, with failed runs. RlufError."""
    import ray
    from ray import tune

    from cluster.connect import ray_connection
    from rluf.sweep.analysis import build_sweep_report, format_sweep_report
    from rluf.tracking.console import setup_logging
    from rluf.utils.files import to_jsonable, write_json
    from rluf.utils.paths import resolve_runs_root

    setup_logging()
    settings = load_settings(args.config, args.overrides).settings
    if args.concurrent < 1 or min(args.weights) < 0 or min(args.kl) < 0:
        raise SettingsError("--concurrent must be 1 or more, --weights and --kl 0 or more")
    sweep_folder = resolve_runs_root(settings) / f"{settings.name}-sweep"
    sweep_folder.mkdir(parents=True, exist_ok=True)
    grid = [(weight, kl_coef, seed) for weight in args.weights for kl_coef in args.kl for seed in args.seeds]
    overrides_by_point = {grid_point: _run_overrides(args, settings, sweep_folder, grid_point) for grid_point in grid}
    command_by_run = {_run_name(point): _train_command(args, overrides_by_point[point]) for point in grid}
    # Loading the settings of every point here refuses an invalid one before the first run starts.
    expected_settings = {point: load_settings(args.config, overrides_by_point[point]).settings for point in grid}

    def find_summary(grid_point: tuple[float, float, int]) -> dict[str, Any] | None:
        return find_finished_run(sweep_folder / _run_name(grid_point), expected_settings[grid_point])

    pending_runs = [_run_name(grid_point) for grid_point in grid if not find_summary(grid_point)]
    logger.info(
        "%s: starting runs=%d finished_before=%d", sweep_folder, len(pending_runs), len(grid) - len(pending_runs)
    )
    if pending_runs:
        with ray_connection():
            ray_address, working_folder = ray.get_runtime_context().gcs_address, Path.cwd()

            def run_trial(config: dict[str, Any]) -> dict[str, float]:
                run_name = config["run"]
                return _run_training(
                    command_by_run[run_name], working_folder, ray_address, sweep_folder / f"{run_name}.log"
                )

            # A trial reserves no CPU: it only waits for the run, whose actors reserve the resources themselves.
            tune.Tuner(
                tune.with_resources(run_trial, {"CPU": 0, "memory": 1_000_000}),
                param_space={"run": tune.grid_search(pending_runs)},
                tune_config=tune.TuneConfig(max_concurrent_trials=args.concurrent),
                run_config=tune.RunConfig(name="tune", storage_path=str(sweep_folder), verbose=1),
            ).fit()
    summaries = {grid_point: find_summary(grid_point) for grid_point in grid}
    report = build_sweep_report(summaries)
    report["failed"] = {
        _run_name(grid_point): str(sweep_folder / f"{_run_name(grid_point)}.log")
        for grid_point, summary in summaries.items()
        if not summary
    }
    write_json(sweep_folder / "sweep.json", to_jsonable(report))
    sys.stdout.write(format_sweep_report(report))
    return report


def _run_name(grid_point: tuple[float, float, int]) -> str:
    return f"love{grid_point[0]:g}-kl{grid_point[1]:g}-seed{grid_point[2]}"


def _run_overrides(
    args: argparse.Namespace, settings: Settings, sweep_folder: Path, grid_point: tuple[float, float, int]
) -> list[str]:
    love_weight, kl_coef, seed = grid_point
    helpfulness_weight = max(
        0.0, settings.objectives.love.weight + settings.objectives.helpfulness.weight - love_weight
    )
    return [
        *args.overrides, f"objectives.love.weight={love_weight:g}",
        f"objectives.helpfulness.weight={helpfulness_weight:g}", f"algorithm.kl_coef={kl_coef:g}", f"seed={seed}",
        f"name={_run_name(grid_point)}", f"run.root={sweep_folder}",
    ]  # fmt: skip


def _train_command(args: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    config_arguments = ["--config", str(args.config.resolve())] if args.config else []
    return [sys.executable, "-m", "rluf.train", *config_arguments, *overrides]


def find_finished_run(point_folder: Path, expected_settings: Settings) -> dict[str, Any] | None:
    """summary.json of the newest finished run in `point_folder` with the expected settings; None if there is none."""
    from rluf.utils.files import read_json

    for summary_path in sorted(point_folder.glob("*/summary.json"), reverse=True):
        run_folder = summary_path.parent
        # `latest` is a link to one of the other folders.
        if not run_folder.is_symlink() and has_same_settings(read_json(run_folder / "config.json"), expected_settings):
            return read_json(summary_path)
    return None


def has_same_settings(run_config: Mapping[str, Any], expected_settings: Settings) -> bool:
    """Whether a run used the expected settings, LOCATION_SECTIONS aside; keys missing from its config are defaults."""
    from pydantic import ValidationError

    from rluf.config.settings import Settings

    try:
        run_settings = Settings.model_validate(run_config)
    except ValidationError:
        return False  # written by a version with other settings
    run_values, expected_values = (
        settings.model_dump(exclude=set(LOCATION_SECTIONS)) for settings in (run_settings, expected_settings)
    )
    # run.deterministic is the one setting of the excluded sections that changes the result.
    return (
        bool(run_config)
        and run_values == expected_values
        and run_settings.run.deterministic == expected_settings.run.deterministic
    )


def _run_training(command: Sequence[str], working_folder: Path, ray_address: str, log_path: Path) -> dict[str, float]:
    """Run one training job on the Ray cluster of the sweep, terminated with the trial; {"failed": 0 or 1}."""
    with log_path.open("w", encoding="utf-8") as log_stream:
        training_process = subprocess.Popen(
            command,
            cwd=working_folder,
            env={**os.environ, "RAY_ADDRESS": ray_address},
            stdout=log_stream,
            stderr=subprocess.STDOUT,
        )
        try:
            return {"failed": float(training_process.wait() != 0)}
        finally:
            if training_process.poll() is None:
                training_process.terminate()


def raise_for_failed_runs(report: Mapping[str, Any]) -> None:
    """Raise ActorError that names the failed runs of the sweep and their logs."""
    failed_runs = report["failed"]
    if failed_runs:
        failure_texts = ", ".join(f"{name} (see {log_path})" for name, log_path in failed_runs.items())
        raise ActorError(
            f"{len(failed_runs)} runs of the sweep failed: {failure_texts}; fix the errors in the logs and run the "
            "sweep again, finished runs are reused"
        )
