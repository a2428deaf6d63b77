"""Which weight of love, at which KL, on which seeds: the main job over a grid by Ray Tune; front and recommended point.

python -m rluf.sweep --config configs/love-0.3.yaml --weights 0 0.1 0.3 --kl 0.02 0.1 --seeds 1 2 3

Each run is python -m rluf.train with objectives.love.weight, algorithm.kl_coef and seed set, the rest from the config
and from key=value; what love gets more or less than in the config, helpfulness gets less or more, so that a weight is a
share of the reward. Finished runs with the very settings asked for are not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rluf.config.cli import guard
from rluf.config.load import load_settings
from rluf.errors import ActorError, SettingsError

if TYPE_CHECKING:
    from rluf.config.settings import Settings

logger = logging.getLogger("rluf.sweep")
PLACE = ("name", "run", "cluster", "serve", "tracking")
"""Settings that say where a run is made and what it is told to, not what it finds."""


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rluf.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="settings of the main job; without it: the quickstart")
    add("--weights", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="weights of love (default 0 0.1 0.3)")
    add("--kl", type=float, nargs="+", default=[0.02], help="KL coefficients (default 0.02)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default 1 2 3)")
    add("--concurrent", type=int, default=1, help="runs at a time, if the cluster has room (default 1)")
    add("overrides", nargs="*", metavar="key=value", help="change single settings of all runs")
    return parser


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, read. key=value words may stand anywhere, also after --seeds, which would take them."""
    changes = [word for word in arguments if "=" in word and not word.startswith("-")]
    given = options().parse_intermixed_args([word for word in arguments if word not in changes])
    given.overrides += changes
    return given


def sweep(given: argparse.Namespace) -> dict[str, Any]:
    """Run the grid, write <run.root>/<name>-sweep/sweep.json and return it. Raises RlufError; failed runs are named."""
    import ray
    from ray import tune

    from cluster.connect import connected
    from rluf.sweep.analysis import report, sweep_text
    from rluf.tracking.console import setup_logging
    from rluf.tracking.run_files import jsonable, write_json
    from rluf.utils.paths import runs_root

    setup_logging()
    settings = load_settings(given.config, given.overrides).settings
    if given.concurrent < 1 or min(given.weights) < 0 or min(given.kl) < 0:
        raise SettingsError("--concurrent must be 1 or more, --weights and --kl 0 or more")
    folder = runs_root(settings) / f"{settings.name}-sweep"
    folder.mkdir(parents=True, exist_ok=True)
    grid = [(w, kl, seed) for w in given.weights for kl in given.kl for seed in given.seeds]
    changes = {point: _overrides(given, settings, folder, point) for point in grid}
    commands = {_name(point): _command(given, changes[point]) for point in grid}
    wanted = {point: load_settings(given.config, changes[point]).settings for point in grid}
    waiting = [_name(point) for point in grid if not finished(folder / _name(point), wanted[point])]
    logger.info("%d runs, %d of them are there already; results in %s", len(grid), len(grid) - len(waiting), folder)
    if waiting:
        with connected(settings):
            address, here = ray.get_runtime_context().gcs_address, Path.cwd()

            def trial(config: dict[str, Any]) -> dict[str, float]:
                return _run(commands[config["run"]], here, address, folder / f"{config['run']}.log")

            tune.Tuner(
                tune.with_resources(trial, {"CPU": 0, "memory": 1_000_000}),
                param_space={"run": tune.grid_search(waiting)},
                tune_config=tune.TuneConfig(max_concurrent_trials=given.concurrent),
                run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=1),
            ).fit()
    found = {point: finished(folder / _name(point), wanted[point]) for point in grid}
    result = report(found)
    result["failed"] = {_name(point): str(folder / f"{_name(point)}.log") for point, one in found.items() if not one}
    write_json(folder / "sweep.json", jsonable(result))
    sys.stdout.write(sweep_text(result))
    return result


def _name(point: tuple[float, float, int]) -> str:
    return f"love{point[0]:g}-kl{point[1]:g}-seed{point[2]}"


def _overrides(
    given: argparse.Namespace, settings: Settings, folder: Path, point: tuple[float, float, int]
) -> list[str]:
    rest = max(0.0, settings.objectives.love.weight + settings.objectives.helpfulness.weight - point[0])
    return [
        *given.overrides, f"objectives.love.weight={point[0]:g}", f"objectives.helpfulness.weight={rest:g}",
        f"algorithm.kl_coef={point[1]:g}", f"seed={point[2]}", f"name={_name(point)}", f"run.root={folder}",
    ]  # fmt: skip


def _command(given: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    config = ["--config", str(given.config.resolve())] if given.config else []
    return [sys.executable, "-m", "rluf.train", *config, *overrides]


def finished(folder: Path, wanted: Settings) -> dict[str, Any] | None:
    """summary.json of the newest finished run in `folder` that had the settings `wanted`, None where there is none."""
    from rluf.tracking.run_files import read_json

    for file in sorted(folder.glob("*/summary.json"), reverse=True):
        if not file.parent.is_symlink() and same(read_json(file.parent / "config.json"), wanted):
            return read_json(file)
    return None


def same(told: Mapping[str, Any], wanted: Settings) -> bool:
    """Whether a run's config.json says what `wanted` does, but for its place; keys it lacks are taken as defaults."""
    from pydantic import ValidationError

    from rluf.config.settings import Settings

    try:
        sides = (Settings.model_validate(told), wanted)
    except ValidationError:
        return False  # of a version with other settings
    first, second = (one.model_dump(exclude=set(PLACE)) for one in sides)
    return bool(told) and first == second and sides[0].run.deterministic == wanted.run.deterministic


def _run(command: Sequence[str], here: Path, address: str, log: Path) -> dict[str, float]:
    """One run in the folder `here` on the sweep's own Ray cluster, ended with the trial; {"failed": 0 or 1}."""
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=here, env={**os.environ, "RAY_ADDRESS": address}, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            return {"failed": float(process.wait() != 0)}
        finally:
            if process.poll() is None:
                process.terminate()


def check_all_ended(result: Mapping[str, Any]) -> None:
    """Raise ActorError that names the runs of the sweep that failed and their logs."""
    failed = result["failed"]
    if failed:
        logs = ", ".join(f"{name} (see {log})" for name, log in failed.items())
        raise ActorError(
            f"{len(failed)} runs of the sweep failed: {logs}; mend what the logs say and run the sweep again, finished "
            "runs are kept"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. The last line of stdout is JSON, also where runs failed; errors are one clear message on stderr."""
    given = parsed(sys.argv[1:] if arguments is None else arguments)

    def work() -> None:
        from rluf.tracking.run_files import jsonable

        result = sweep(given)
        sys.stdout.write(json.dumps(jsonable(result), allow_nan=False) + "\n")
        check_all_ended(result)

    return guard(work)


if __name__ == "__main__":
    raise SystemExit(main())
