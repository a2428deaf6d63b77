"""Runs of a sweep: one training job per point of the grid, by Ray Tune; finished runs of equal settings are reused."""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rluf.config.cli import format_yaml_value
from rluf.config.load import load_settings, parse_yaml
from rluf.config.settings import Settings
from rluf.errors import ActorError, SettingsError
from rluf.sweep.grid import GridPoint
from rluf.utils.hashing import hash_parts
from rluf.utils.paths import resolve_runs_root

logger = logging.getLogger("rluf.sweep")
LOCATION_SECTIONS = ("name", "run", "cluster", "serve", "tracking")
"""Settings of location and reporting, which do not affect the result of a run."""
LOCATION_OVERRIDES = ("name", "run.root", "tracking.group")
"""What the sweep sets last in every run, in order."""


class SweepPlan(NamedTuple):
    """Folder of a sweep; overrides and settings of each of its runs."""

    folder: Path
    overrides: dict[GridPoint, list[str]]
    settings: dict[GridPoint, Settings]


def plan_sweep(args: argparse.Namespace) -> SweepPlan:
    """Load the settings of every run; SettingsError refuses an invalid one before the first run starts."""
    if args.concurrent < 1 or min(value or 0 for value in (*args.weights, *args.kl)) < 0:
        raise SettingsError("--concurrent must be 1 or more, --weights and --kl 0 or more")
    set_keys = {"seed": "--seeds", **({} if args.kl == [None] else {"algorithm.kl_coef": "--kl"})}
    for override in args.overrides:
        key = override.partition("=")[0].strip()
        if key in set_keys:
            raise SettingsError(
                f"{override}: every run of a sweep gets this setting from {set_keys[key]}; set it there"
            )
    try:
        settings = load_settings(args.config, args.overrides).settings
        folder = resolve_runs_root(settings) / f"{settings.name}-sweep"
        overrides = {point: build_run_overrides(args, settings, folder, point) for point in list_grid_points(args)}
        return SweepPlan(
            folder, overrides, {point: load_settings(args.config, texts).settings for point, texts in overrides.items()}
        )
    except SettingsError as error:
        raise SettingsError(f"{error}{_suggest_grid(args)}") from None


def _suggest_grid(args: argparse.Namespace) -> str:
    """Hint for values that are not written as --grid takes them; empty where they are."""
    lists = [text for text in args.overrides if re.fullmatch(r"[\w.]+=[^\[{]*,.*", text)]
    if lists:
        return f"; several values of a setting are --grid {lists[0]}"
    values = [text for text in args.overrides if "=" not in text]
    if args.grid and values:
        key = args.grid[-1].partition("=")[0]
        return f"; the values of a --grid are separated by commas: --grid {key}={','.join(values)}"
    lists = [text for text in args.grid if re.fullmatch(r"[\w.]+=\[[^\[\]]*\]", text)]
    return f"; --grid tries each value of a list without its brackets: {re.sub(r'[][]', '', lists[0])}" if lists else ""


def check_sweep(args: argparse.Namespace) -> str:
    """List the runs of a sweep with what each of them changes. Raises the RlufError that a run would raise."""
    from rluf.evaluate.inputs import check_comparison_inputs

    plan, lines = plan_sweep(args), []
    for point, settings in plan.settings.items():
        if point.seed == args.seeds[0]:  # all seeds need the same inputs
            check_comparison_inputs(settings)
        status = "finished" if find_finished_run(plan.folder / format_run_name(point), settings) else "to run"
        changes = " ".join(plan.overrides[point][len(args.overrides) : -len(LOCATION_OVERRIDES)])
        lines.append(f"{format_run_name(point)} ({status}): {changes}")
    return "\n".join([f"{plan.folder}: {len(lines)} runs", *lines, ""])


def run_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Run the grid; writes <run.root>/<name>-sweep/sweep.json and returns its content, with failed runs. RlufError."""
    import ray
    from ray import tune

    from cluster.connect import ray_connection
    from rluf.sweep.analysis import build_sweep_report, format_sweep_report
    from rluf.tracking.console import setup_logging
    from rluf.utils.files import to_jsonable, write_json

    setup_logging()
    sweep_folder, overrides_by_point, expected_settings = plan_sweep(args)
    sweep_folder.mkdir(parents=True, exist_ok=True)
    grid = list(expected_settings)
    command_by_run = {format_run_name(point): _train_command(args, overrides_by_point[point]) for point in grid}

    def find_summary(grid_point: GridPoint) -> dict[str, Any] | None:
        return find_finished_run(sweep_folder / format_run_name(grid_point), expected_settings[grid_point])

    pending_runs = [format_run_name(grid_point) for grid_point in grid if not find_summary(grid_point)]
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
        format_run_name(grid_point): str(sweep_folder / f"{format_run_name(grid_point)}.log")
        for grid_point, summary in summaries.items()
        if not summary
    }
    write_json(sweep_folder / "sweep.json", to_jsonable(report))
    sys.stdout.write(format_sweep_report(report))
    return report


def list_grid_points(args: argparse.Namespace) -> list[GridPoint]:
    """All points of the command line's grid, the seeds of a setting together."""
    return [
        GridPoint(weight, kl_coef, seed, grid_overrides)
        for weight, kl_coef, grid_overrides, seed in product(
            args.weights, args.kl, product(*parse_grid(args.grid)), args.seeds
        )
    ]


def parse_grid(arguments: Sequence[str]) -> list[list[str]]:
    """The overrides key=value of each `key=a,b,c`, in order. Raises SettingsError for one that cannot be swept."""
    values_by_key: dict[str, list[str]] = {}
    for argument in arguments:
        key, _, values_text = argument.partition("=")
        # As a YAML list, so that a value may be a list or a mapping itself.
        values = parse_yaml(f"[{values_text}]", f"--grid {argument}")
        if not key or not isinstance(values, list) or not values:
            raise SettingsError(f"--grid {argument}: expected key=a,b,c, such as learner.learning_rate=1e-6,1e-5")
        if key == "seed" or key.partition(".")[0] in ("name", "run"):
            raise SettingsError(f"--grid {key}: the sweep sets this key itself; use --seeds for seeds")
        if key in values_by_key:
            raise SettingsError(f"--grid {key} is given twice; list all its values in one")
        values_by_key[key] = [f"{key}={format_yaml_value(value)}" for value in values]
    return [list(dict.fromkeys(overrides)) for overrides in values_by_key.values()]


def format_run_name(grid_point: GridPoint) -> str:
    """Name of the run of a point, which is also its folder: love0.1-kl0.05-seed1-learner.learning_rate-1e-06."""
    parts = [
        *([] if grid_point.love_weight is None else [f"love{grid_point.love_weight:g}"]),
        *([] if grid_point.kl_coef is None else [f"kl{grid_point.kl_coef:g}"]),
        f"seed{grid_point.seed}",
    ]
    for override in grid_point.grid_overrides:
        safe_text = re.sub(r"[^A-Za-z0-9_.-]+", "-", override)
        # Different values such as [1] and {1} may become the same text.
        is_unique = re.fullmatch(r"[A-Za-z0-9_.]+=[A-Za-z0-9_.-]+", override)
        parts.append(safe_text if is_unique else f"{safe_text[:60]}-{hash_parts(override)[:6]}")
    return "-".join(parts)


def build_run_overrides(
    args: argparse.Namespace, settings: Settings, sweep_folder: Path, grid_point: GridPoint
) -> list[str]:
    """Overrides of the run of a point, on top of those of the command line."""
    overrides = [*args.overrides, *grid_point.grid_overrides]
    swept_keys = {override.partition("=")[0] for override in grid_point.grid_overrides}
    if grid_point.love_weight is not None:
        weights = settings.objectives
        # Helpfulness absorbs the difference: the sum stays constant, so a weight stays a share of the reward.
        helpfulness_weight = max(0.0, weights.love.weight + weights.helpfulness.weight - grid_point.love_weight)
        point_overrides = {
            "objectives.love.weight": grid_point.love_weight, "objectives.helpfulness.weight": helpfulness_weight
        }  # fmt: skip
    else:
        point_overrides = {}
    if grid_point.kl_coef is not None:
        point_overrides["algorithm.kl_coef"] = grid_point.kl_coef
    if conflicts := swept_keys & set(point_overrides):
        raise SettingsError(f"--grid {min(conflicts)} conflicts with --weights or --kl, which set it; give one of them")
    return [
        *overrides, *(f"{key}={value:g}" for key, value in point_overrides.items()), f"seed={grid_point.seed}",
        *map("{}={}".format, LOCATION_OVERRIDES, (format_run_name(grid_point), sweep_folder, sweep_folder.name)),
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
            # Ray ends a stopped trial by an exception here; without this the job would continue as an orphan.
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
